"""A stream of messages from one writer to several readers through shared memory, without a copy for each reader.

::

    [head, closed | tail 1, asleep 1 | tail 2, asleep 2 | ... ][ data, used as a ring ............................. ]
      writer's      reader 1's         reader 2's

`head` and the tails count bytes since the start and never wrap. The writer owns the bytes [head, least tail +
capacity), a reader those in [its tail, head). A message is eight bytes of length, itself, and padding to eight. One
that is larger than the ring passes through it in parts.

While readers keep up, sending makes no system call, so the writer keeps the interpreter's lock. A reader that has
nothing to read says so in `asleep` and blocks on its socket. The writer then sends that socket one byte.

Rejected: a socket for each reader (as many copies as readers), `multiprocessing.shared_memory` (starts a process
that tracks segments, and leaves a name behind when killed), semaphores (not in the standard library without names).
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from llmengine.backends.ranks.memory import LINE_WORDS, SharedMemory

__all__ = ["Ring", "RingReader", "RingWriter", "ring_size"]

_HEAD, _CLOSED = 0, 1
_TAIL, _ASLEEP = 0, 1
_CAPACITY = 4 << 20
# How long a reader looks before it blocks: waking it up costs the writer many microseconds, in which other threads of
# its process may take the interpreter's lock. Steps that follow each other find readers awake where cores are free.
_SPIN_S = 50e-6
_LONG_SPIN_S = 5e-3
# A reader looks again after this time, whatever it was told.
_NAP_S = 1.0
# And after this time where more than the writer can end the wait.
_SHORT_NAP_S = 0.05


def ring_size(num_readers: int) -> int:
    """Bytes of the file for a ring with so many readers."""
    return SharedMemory.header_size(1 + num_readers) + _CAPACITY


class Ring(SharedMemory):
    """The memory that writer and readers share.

    Args:
        fd: descriptor of a file of `ring_size` zeros; stays the caller's.
        num_readers: readers, numbered from 0.
    """

    def __init__(self, fd: int, num_readers: int) -> None:
        super().__init__(fd, 1 + num_readers)
        self.capacity = len(self.data)
        self.num_readers = num_readers

    def copy_in(self, at: int, data: memoryview) -> None:
        """Write to the bytes [at, at + len(data)) of the stream, of which at most `capacity` fit."""
        start = at % self.capacity
        first = min(len(data), self.capacity - start)
        self.data[start : start + first] = data[:first]
        self.data[: len(data) - first] = data[first:]

    def copy_into(self, at: int, target: memoryview) -> None:
        """Fill `target` with the bytes of the stream from `at` on."""
        start = at % self.capacity
        first = min(len(target), self.capacity - start)
        target[:first] = self.data[start : start + first]
        target[first:] = self.data[: len(target) - first]

    def copy_out(self, at: int, size: int) -> bytes:
        """The bytes [at, at + size) of the stream."""
        start = at % self.capacity
        first = min(size, self.capacity - start)
        if first == size:
            return bytes(self.data[start : start + size])
        return bytes(self.data[start:]) + bytes(self.data[: size - first])


class RingWriter:
    """The writing end; one thread at a time.

    Args:
        ring: the shared memory.
        wakers: a socket for each reader, to wake it up with.
        while_full: called again and again while there is no room, with the slowest reader and the seconds waited so
            far; raises to give up.
    """

    def __init__(self, ring: Ring, wakers: Sequence[socket.socket], while_full: Callable[[int, float], None]) -> None:
        self._ring = ring
        self._wakers = wakers
        self._while_full = while_full
        self._head = 0

    def write(self, message: bytes | memoryview) -> None:
        """Send a message to every reader; blocks while one of them is behind by the whole ring."""
        size = len(message)
        framed = memoryview(b"".join((size.to_bytes(8, "little"), message, bytes(-size % 8))))
        while framed:
            room = self._room()
            self._ring.copy_in(self._head, framed[:room])
            self._head += min(room, len(framed))
            framed = framed[room:]
            self._ring.fence()
            self._ring.words[_HEAD] = self._head
            self._wake()

    def close(self) -> None:
        """Tell readers that nothing follows what they have not read yet."""
        self._ring.words[_CLOSED] = 1
        self._wake()

    def _room(self) -> int:
        words, num_readers = self._ring.words, self._ring.num_readers
        if not num_readers:
            return self._ring.capacity
        full_since = 0.0
        while True:
            tails = [words[(1 + reader) * LINE_WORDS + _TAIL] for reader in range(num_readers)]
            last = min(tails)
            if room := self._ring.capacity - (self._head - last):
                return room
            now = time.monotonic()
            full_since = full_since or now
            self._while_full(tails.index(last), now - full_since)

    def _wake(self) -> None:
        self._ring.fence()
        words = self._ring.words
        for reader, waker in enumerate(self._wakers):
            asleep = (1 + reader) * LINE_WORDS + _ASLEEP
            if words[asleep]:
                words[asleep] = 0
                try:
                    waker.send(b"\0", socket.MSG_DONTWAIT)
                except OSError:
                    continue  # its process has ended, which others find out; or has many bytes to wake it already


class RingReader:
    """The reading end of one reader.

    Args:
        ring: the shared memory.
        reader: its number.
        waker: where the writer wakes it up.
        while_waiting: called again and again while there is nothing to read, with the seconds waited so far; raises to
            give up.
        spin_s: how long to look before blocking; None: depends on how many cores there are.
    """

    def __init__(
        self,
        ring: Ring,
        reader: int,
        waker: socket.socket,
        while_waiting: Callable[[float], None] | None = None,
        spin_s: float | None = None,
    ) -> None:
        self._ring = ring
        self._words = ring.words[(1 + reader) * LINE_WORDS : (2 + reader) * LINE_WORDS]
        self._waker = waker
        self._poll = select.poll()
        self._poll.register(waker, select.POLLIN)
        self._tail = 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        by_cores_s = _LONG_SPIN_S if cores >= 2 * (ring.num_readers + 1) else _SPIN_S
        self._spin_s = by_cores_s if spin_s is None else spin_s
        self._while_waiting = while_waiting

    @property
    def closed(self) -> bool:
        """Whether the writer has closed, though there may be messages to read."""
        return bool(self._ring.words[_CLOSED])

    def read(self) -> bytes | None:
        """The next message, waiting for it; None when the writer has closed."""
        frame = self._take(8)
        if frame is None:
            return None
        size = int.from_bytes(frame, "little")
        message = self._take(size + -size % 8)
        return None if message is None else message[:size]

    def read_into(self, target: memoryview) -> bool:
        """Fill `target` with the next message, which must be as long; False when the writer has closed."""
        frame = self._take(8)
        if frame is None:
            return False
        size = int.from_bytes(frame, "little")
        assert size == len(target), (size, len(target))
        while target:
            if not (ready := min(self._ready(), len(target))):
                return False
            self._ring.copy_into(self._tail, target[:ready])
            self._advance(ready)
            target = target[ready:]
        return self._take(-size % 8) is not None

    def close(self) -> None:
        """Close the socket; the writer goes on."""
        self._waker.close()

    def _take(self, size: int) -> bytes | None:
        """The next bytes of the stream, or None where it ends before them."""
        parts = []
        while size:
            if not (ready := min(self._ready(), size)):
                return None
            parts.append(self._ring.copy_out(self._tail, ready))
            self._advance(ready)
            size -= ready
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _advance(self, size: int) -> None:
        self._ring.fence()
        self._tail += size
        self._words[_TAIL] = self._tail

    def _ready(self) -> int:
        """How many bytes are there, at least one unless the writer has closed; waits."""
        began = time.perf_counter()
        while True:
            # Whether it is closed must be known before the last look at what is there.
            closed = self._ring.words[_CLOSED]
            self._ring.fence()
            ready = int(self._ring.words[_HEAD]) - self._tail
            if ready or closed:
                self._ring.fence()
                return ready
            waited = time.perf_counter() - began
            if waited < self._spin_s:
                os.sched_yield()
                continue
            if self._while_waiting is not None:
                self._while_waiting(waited)
            self._sleep()

    def _sleep(self) -> None:
        self._words[_ASLEEP] = 1
        self._ring.fence()
        if self._ring.words[_HEAD] == self._tail and not self._ring.words[_CLOSED]:
            self._poll.poll(1000 * (_NAP_S if self._while_waiting is None else _SHORT_NAP_S))
            self._drain()
        self._words[_ASLEEP] = 0

    def _drain(self) -> None:
        try:
            self._waker.recv(4096, socket.MSG_DONTWAIT)
        except OSError:  # nothing is there, or this end was closed by another thread
            return
