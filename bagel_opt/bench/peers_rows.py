"""One row of peers.py: the same requests from so many clients at once, and figures of the answers; and the answers themselves."""

import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from bagel_opt.bench.peers_requests import MIXTURE, Answer, Call, Dialect, Work, call_of, send
from bagel_opt.bench.peers_servers import Peak

# Clients of each row, cheap rows first: what is killed keeps those that were saved.
ROWS = {
    "texts": (1, 16),
    "questions": (1, 4, 8, 16),
    "small-pictures": (1, 4, 16),
    "edits": (1, 4),
    "mixture": (8,),
    "pictures": (1, 4, 16),
}
PER_CLIENT = 5  # requests at most
COMPARED = 8
Row = dict[str, float | int | str | None]


def measured(
    url: str, dialect: Dialect, row: str, clients: int, work: Work, seconds: float, timeout: float, before: int | None
) -> Row:
    """Each client sends one request after another, at least one, and no new one after `seconds`. before: bytes in use on
    the GPU without the server."""
    numbers, calls = count(1), threading.Lock()
    begun = time.perf_counter()

    def client(_: int) -> list[Answer]:
        found: list[Answer] = []
        while not found or (time.perf_counter() - begun < seconds and len(found) < PER_CLIENT):
            with calls:
                number = next(numbers)
            found.append(send(url, call_of(row, dialect, work, number), timeout))
        return found

    with Peak(before) as peak, ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    return {**figures(answers, time.perf_counter() - begun), "memory, bytes": peak.bytes}


def figures(answers: Sequence[Answer], seconds: float) -> Row:
    """Of answers that took `seconds` together. Percentiles are those of the answers that came."""
    good = [answer for answer in answers if answer.error is None]
    found: Row = {"requests": len(answers), "lost": len(answers) - len(good), "seconds": seconds}
    if lost := next((answer.error for answer in answers if answer.error), None):
        found["error"] = lost[:300]
    if not good:
        return found
    times = [answer.seconds for answer in good]
    cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    found |= {"p50, s": cuts[9], "p95, s": cuts[18], "per minute": 60 * len(good) / seconds}
    if told := [answer for answer in good if answer.tokens]:
        found |= {
            "tokens": statistics.median(len(answer.tokens) for answer in told),
            "tokens/s": sum(len(answer.tokens) for answer in told) / seconds,
            "first token p50, s": statistics.median(answer.first for answer in told if answer.first is not None),
        }
        if steps := [
            (a.seconds - a.first) / (len(a.tokens) - 1) for a in told if a.first is not None and len(a.tokens) > 1
        ]:
            found["token p50, ms"] = 1000 * statistics.median(steps)
    return found


def warmed(url: str, dialect: Dialect, row: str, clients: int, work: Work, timeout: float, known: set[str]) -> float:
    """Sends what the row's requests need compiled, captured and allocated. known: kinds that this server has drawn, which
    is filled. -> seconds"""
    begun = time.perf_counter()
    kinds = set(MIXTURE) if row == "mixture" else {row}
    for kind in sorted(kinds):
        draws = kind not in ("texts", "questions")
        if draws and not dialect.lighter and kind in known:
            continue  # a whole picture each, and the server draws one after another
        many = 1 if draws and not dialect.lighter else min(clients, 4) if row == "mixture" else clients
        at_once([call_of(kind, dialect, work, 1000 + i, light=True) for i in range(many)], url, timeout)
        known.add(kind)
    return time.perf_counter() - begun


def at_once(calls: Sequence[Call], url: str, timeout: float) -> list[Answer]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: send(url, call, timeout), calls))


def told(url: str, dialect: Dialect, work: Work, timeout: float, together: bool) -> list[list[int]]:
    """The tokens of greedy answers to texts, one after another or at once. Raises RuntimeError where one fails."""
    calls = [call_of("texts", dialect, work, i) for i in range(COMPARED)]
    answers = at_once(calls, url, timeout) if together else [send(url, call, timeout) for call in calls]
    if failed := next((answer.error for answer in answers if answer.error), None):
        raise RuntimeError(f"an answer to compare failed: {failed}")
    return [list(answer.tokens) for answer in answers]


def first_differences(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> list[int | None]:
    """For each answer the number of equal tokens before the first that differs, or None where all are equal. Where one
    just stops earlier, that is a difference."""
    found: list[int | None] = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        found.append(None if same == len(a) == len(b) else same)
    return found
