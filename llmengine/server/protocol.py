"""uvicorn's HTTP protocol with limits that it does not have itself: on the time and size of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10
"""Most bytes of a request line and headers together."""

HEAD_TIMEOUT_S = 10.0
"""Seconds from a connection's beginning, or a request's first byte, within which the head must be complete."""

_REFUSALS = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose request head is late or too large; a disconnect reaches pipelined requests as well.

    Without it, a client could hold a connection for ever with one byte, and any amount of memory with headers.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._cycles: list[Any] = []
        self._num_head_bytes = 0
        self._is_reading_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell every request of the connection that its client left."""
        self._stop_head_timer()
        super().connection_lost(exc)
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self._cycles.clear()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, unless the head is too large."""
        if self._is_reading_head:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._is_reading_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse(431)

    def on_message_begin(self) -> None:
        """A request's first byte has arrived."""
        super().on_message_begin()
        self._is_reading_head = True
        if self._head_timer is None:
            self._start_head_timer()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._is_reading_head = False
        self._num_head_bytes = 0
        self._stop_head_timer()
        super().on_headers_complete()
        self._cycles = [cycle for cycle in self._cycles if not cycle.response_complete]
        self._cycles.append(self.cycle)

    def _start_head_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int) -> None:
        """Answer and close, unless an earlier request of the connection is being answered: then just close."""
        self._stop_head_timer()
        if self.transport.is_closing():
            return
        if not any(not cycle.response_complete for cycle in self._cycles):
            line = b"HTTP/1.1 %d %s\r\n" % (status, _REFUSALS[status])
            self.transport.write(line + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
