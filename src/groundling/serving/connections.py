"""Connections: how many there may be, how long they may say or read nothing, and what those hear that are turned away.

Invariant: an open connection is counted where the server keeps it and nowhere else, so none is counted that is gone,
and none stays that has gone silent; one that is turned away holds nothing of the server after its answer.
"""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from groundling.serving.api_errors import ApiError, wrong
from groundling.serving.hosts import client_of

HEADER_TIMEOUT_S = 10.0
UNREAD_TIMEOUT_S = 30.0
"""How long a client may leave what was sent to it unread. A pass writes a few hundred bytes, a page's file 64 KiB, an
answer with likelihoods some megabytes at once, of which it may read a part each time."""
MAX_CONNECTIONS = 512
"""Half of the 1,024 files that a process may have open by default on Linux (getrlimit(2))."""
MAX_PER_ADDRESS = 64
"""A visitor's page holds two or three, six while it loads: a class behind one router. Eight addresses fill a server."""

MAX_AHEAD_BYTES = 1 << 16
"""Of further requests, while one is answered; after these the rest waits in the system."""

N_SPARE = 16
"""Connections above the total that may still ask how the server is."""
SPARE_TIMEOUT_S = 1.0
"""For their headers."""
WATCHED = ("/health", "/metrics")

FULL = ApiError(503, "as many connections are open as may: try again soon", "server_error", "full")
TOO_MANY = ApiError(
    429,
    "your address has as many connections open as it may: close some, or ask for several texts by one",
    "rate_limit_error",
    "too_many_connections",
)


class Protocol(H11Protocol):
    """Turns away connections past the caps, and ends one that does not bring the headers of its first or a later
    request in time, or does not read."""

    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def __init__(self, *, max_connections: int, max_per_address: int, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._max_connections, self._max_per_address = max_connections, max_per_address

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called for whatever is not read
        n_open = len(self.connections)  # this one is among them
        if 0 < self._max_per_address < self._n_of_address():
            self._turn_away(TOO_MANY)
        elif n_open > self._max_connections + N_SPARE:
            self._turn_away(FULL)
        elif n_open > self._max_connections:
            self.app = self._when_full
            self._await_headers(min(SPARE_TIMEOUT_S, HEADER_TIMEOUT_S))
        else:
            self._await_headers(HEADER_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # which ends uvicorn's own wait, at the first byte
        if self.cycle is None or self.cycle.response_complete:
            self._await_headers(HEADER_TIMEOUT_S)
        else:
            self._stop_waiting()
            self._read_on()

    def _read_on(self) -> None:
        """Reads what follows a whole request while it is answered, for uvicorn would not: else nobody saw the end of a
        client that has sent a byte more, and then left."""
        n_ahead = len(self.conn.trailing_data[0])
        if self.flow.read_paused and not self.cycle.more_body and n_ahead <= MAX_AHEAD_BYTES:
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting_for_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """As every other answer that is not a success, where uvicorn says it in plain text."""
        if getattr(sys.exception(), "error_status_hint", 400) == 431:  # h11's word for headers without an end
            self._answer_and_close(wrong("the headers are too large: send less", status=431, code="too_large"))
        else:
            self._answer_and_close(wrong("this is no valid HTTP request"))

    def _n_of_address(self) -> int:
        peers = [getattr(connection, "client", None) or ("",) for connection in self.connections]
        own = client_of((self.client or ("",))[0])
        return sum(client_of(peer[0]) == own for peer in peers)

    def _turn_away(self, error: ApiError) -> None:
        self.connections.discard(self)  # at once: others may come before it is gone
        self._answer_and_close(error)

    async def _when_full(self, scope: Scope, receive: Receive, send: Send) -> None:
        """In the application's place, for one request."""
        scope["headers"].append((b"connection", b"close"))  # as if the client had wanted no more
        await (self.config.loaded_app if scope["path"] in WATCHED else FULL.response())(scope, receive, send)

    def _answer_and_close(self, error: ApiError) -> None:
        """Without the application. If an answer was begun, nothing more is said."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error.response()
            answer.headers["Connection"] = "close"
            if self.cycle and not self.cycle.response_complete:
                self.cycle.disconnected = True  # the application's answer would come too late
            asked_for_headers = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            body = b"" if asked_for_headers else bytes(answer.body)
            reason = HTTPStatus(error.status).phrase.encode()
            for event in (
                h11.Response(status_code=error.status, headers=answer.raw_headers, reason=reason),
                h11.Data(body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_headers(self, timeout_s: float) -> None:
        if self._headers_due is None:
            self._headers_due = self.loop.call_later(timeout_s, self.transport.close)

    def _await_reader(self) -> None:
        n_unread = self.transport.get_write_buffer_size()
        self._reading_due = self.loop.call_later(UNREAD_TIMEOUT_S, self._end_unless_read, n_unread)

    def _end_unless_read(self, n_unread: int) -> None:
        if self.transport.get_write_buffer_size() < n_unread:
            self._await_reader()
        else:
            self.transport.abort()  # not closed: that would wait for the reader

    def _stop_waiting_for_reader(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _stop_waiting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None
