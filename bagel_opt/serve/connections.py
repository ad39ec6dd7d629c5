"""Connections that are bounded in number, in time and in memory, which uvicorn leaves to a proxy before it."""

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bagel_opt.serve.patience import STALL, patience

HEAD_BYTES = 2**16  # of a request's line and headers
LINGER = 5.0  # seconds in which the rest of a body that nobody wants may come, so that its sender reads the answer
PIPELINED = 8  # requests that may wait on one connection
MOST = 1000


def most_connections() -> int:
    """Half of what the process may have open; the rest is for the model's files and for pictures on their way."""
    try:
        import resource
    except ImportError:  # not on Windows
        return MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft // 2))


class Parting:
    """A connection's transport for an answer. Closing it while the request's body is still coming would take the answer
    away from its sender (RFC 9112, 9.6): so it says that nothing more comes, and goes on reading for LINGER seconds."""

    def __init__(self, connection: "Connection"):
        self.connection, self.transport, self.cycle = connection, connection.transport, connection.cycle

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def close(self) -> None:
        if self.cycle.more_body and not self.transport.is_closing():
            self.transport.write_eof()
        else:
            self.transport.close()


class Connection(HttpToolsProtocol):
    """A request's head must come within STALL seconds and HEAD_BYTES; its body is the application's to time. An answer
    must be taken at a least rate. Where there are too many connections, those that sent nothing yet make room."""

    most = most_connections()

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.head_bytes = 0
        self.head_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.linger_timer: asyncio.TimerHandle | None = None
        self.since = time.monotonic()

    # ---- what comes

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that every byte that is not taken yet is seen
        self._await_head()
        if len(self.connections) > self.most:
            idle = [one for one in self.connections if one.cycle is None]
            min(idle or [self], key=lambda one: one.since).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.head_timer or self._between_requests():
            self._await_head()
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES + len(data):
                self.transport.abort()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._stop_head()
        if len(self.pipeline) >= PIPELINED:
            raise ValueError("too many requests at once")  # which the parser's caller answers with 400
        super().on_headers_complete()
        self.cycle.transport = Parting(self)

    def _between_requests(self) -> bool:
        return self.cycle is None or not self.cycle.more_body

    def _await_head(self) -> None:
        if self.head_timer is None:
            self.head_timer = self.loop.call_later(STALL, self._head_is_late)

    def _stop_head(self) -> None:
        if self.head_timer:
            self.head_timer.cancel()
        self.head_timer, self.head_bytes = None, 0

    def _head_is_late(self) -> None:
        self.head_timer = None
        if self.cycle and not self.cycle.response_complete:  # the request before it is being answered
            self._await_head()
        else:
            self.transport.abort()

    # ---- what goes

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self.linger_timer = self.loop.call_later(LINGER, self.transport.abort)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.linger_timer:  # all of it came after the answer: the connection is as good as before
            self.linger_timer.cancel()
            self.linger_timer, self.cycle.more_body = None, False
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        self.write_timer = self.loop.call_later(patience(size), self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_write()
        super().resume_writing()

    def _stop_write(self) -> None:
        if self.write_timer:
            self.write_timer.cancel()
        self.write_timer = None

    # ---- the end

    def shutdown(self) -> None:
        """A request that is not here in full has not been accepted."""
        if self.cycle and not self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head()
        self._stop_write()
        super().connection_lost(exc)
