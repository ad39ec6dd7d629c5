"""The server's log: JSON lines, and no more of them than help."""

import json
import logging
import time

AT_MOST = (
    20  # warnings or errors from one place in the code, in WINDOW seconds; the requests' own lines are not bounded
)
WINDOW = 60.0


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and what the call gave as extra={"fields": {...}}."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z"
        line = {"time": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Bounded(logging.Filter):
    """Lets what one place in the code warns of through so many times; then it is counted, and the count told later."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[str, int], list] = {}  # place -> [when the window began, how many came in it]

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        window = self.seen.setdefault((record.pathname, record.lineno), [record.created, 0])
        if record.created - window[0] > WINDOW:
            if window[1] > AT_MOST:
                record.fields = getattr(record, "fields", {}) | {"left_out": window[1] - AT_MOST}
            window[:] = [record.created, 0]
        window[1] += 1
        return window[1] <= AT_MOST
