"""A stream of messages over a connection: what `ring.py` is for ranks that share memory, for those that do not.

A message is eight bytes of length and itself. The writer that closes shuts its half of the connection down, so what it
has sent is still read.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable

__all__ = ["SocketReader", "SocketWriter"]

_PIECE = 1 << 18
# A short message is sent together with its length.
_SHORT = 1 << 16
# A reader that waits for something else takes in this much, so that the writer does not wait for it meanwhile.
_MOST_AHEAD = 8 << 20
_NAP_MS = 1000.0
# Where more than the other end can end the wait.
_SHORT_NAP_MS = 50.0


class SocketWriter:
    """The writing end; one thread at a time. What is written to a connection that has broken is dropped.

    Args:
        while_full: called again and again while there is no room, with the seconds waited so far; raises to give up.
    """

    def __init__(self, connection: socket.socket, while_full: Callable[[float], None]) -> None:
        self._connection = connection
        self._while_full = while_full
        self._is_broken = False

    def write(self, message: bytes | memoryview) -> None:
        """Send a message; blocks while the other end does not read and the system keeps no more."""
        head = len(message).to_bytes(8, "little")
        if len(message) <= _SHORT:
            self._send(memoryview(head + message))
        else:
            self._send(memoryview(head))
            self._send(memoryview(message))

    def close(self) -> None:
        """Tell the reader that nothing follows."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _send(self, data: memoryview) -> None:
        full_since = 0.0
        while data and not self._is_broken:
            try:
                data = data[self._connection.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                now = time.monotonic()
                full_since = full_since or now
                self._while_full(now - full_since)
                _await(self._connection, select.POLLOUT, _SHORT_NAP_MS)
            except OSError:  # whoever watches the other end's process finds out
                self._is_broken = True


class SocketReader:
    """The reading end; one thread at a time.

    Args:
        while_waiting: called again and again while there is nothing to read, with the seconds waited so far; raises to
            give up.
    """

    def __init__(self, connection: socket.socket, while_waiting: Callable[[float], None] | None = None) -> None:
        self._connection = connection
        self._while_waiting = while_waiting
        self._received = bytearray()
        self._has_ended = False
        self.why_ended = "the connection was closed"

    @property
    def closed(self) -> bool:
        """Whether the writer has closed or is gone, though there may be messages to read. Takes in what is there."""
        while not self._has_ended and len(self._received) < _MOST_AHEAD and self._take_in():
            pass
        return self._has_ended

    def read(self) -> bytes | None:
        """The next message, waiting for it; None when the writer has closed."""
        if not self._await_bytes(8):
            return None
        size = int.from_bytes(self._received[:8], "little")
        if not self._await_bytes(8 + size):
            return None
        message = bytes(memoryview(self._received)[8 : 8 + size])
        del self._received[: 8 + size]
        return message

    def has_message(self, timeout_s: float | None) -> bool:
        """Whether `read` will return at once, after at most so long."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._has_ended:
            size = int.from_bytes(self._received[:8], "little")
            if len(self._received) >= 8 and len(self._received) >= 8 + size:
                return True
            if self._take_in():
                continue
            left_s = _NAP_MS / 1000 if until is None else until - time.monotonic()
            if left_s <= 0:
                return False
            _await(self._connection, select.POLLIN, 1000 * left_s)
        return True

    def read_into(self, target: memoryview) -> bool:
        """Fill `target` with the next message, which must be as long; False when the writer has closed."""
        if not self._await_bytes(8):
            return False
        size = int.from_bytes(self._received[:8], "little")
        assert size == len(target), (size, len(target))
        ready = min(size, len(self._received) - 8)
        target[:ready] = memoryview(self._received)[8 : 8 + ready]
        del self._received[: 8 + ready]
        target = target[ready:]
        while target:
            if (count := self._receive_into(target)) is None:
                return False
            target = target[count:]
        return True

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _await_bytes(self, size: int) -> bool:
        """Whether so many bytes are there; waits for them."""
        began = time.monotonic()
        while len(self._received) < size:
            if self._has_ended:
                return False
            if self._take_in():
                began = time.monotonic()
            else:
                self._nap(began)
        return True

    def _receive_into(self, target: memoryview) -> int | None:
        """Receive part of a message where it is wanted; None when the writer has closed."""
        began = time.monotonic()
        while not self._has_ended:
            try:
                count = self._connection.recv_into(target, flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._nap(began)
            except OSError as error:
                self._end(str(error))
            else:
                if count:
                    return count
                self._end()
        return None

    def _take_in(self) -> bool:
        """Receive what is there; False if there is nothing."""
        try:
            data = self._connection.recv(_PIECE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(str(error))
            return True
        self._received += data
        if not data:
            self._end()
        return True

    def _end(self, why: str | None = None) -> None:
        self._has_ended = True
        self.why_ended = why or self.why_ended

    def _nap(self, began: float) -> None:
        if self._while_waiting is not None:
            self._while_waiting(time.monotonic() - began)
        _await(self._connection, select.POLLIN, _NAP_MS if self._while_waiting is None else _SHORT_NAP_MS)


def _await(connection: socket.socket, event: int, timeout_ms: float) -> None:
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # closed by another thread
        poll.register(connection, event)
        poll.poll(timeout_ms)
