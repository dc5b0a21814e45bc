"""Deadlines: the moments by which requests must have finished."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

_MAX_STALE = 64
"""Entries of ended requests are dropped when there are this many of them, and four for each living request."""


class Deadlines:
    """A heap of (moment on the monotonic clock, request id). A request may have several entries, and may have ended."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, moment: float, request_id: int) -> None:
        """Have `passed()` yield the request from `moment` on."""
        heapq.heappush(self._heap, (moment, request_id))

    @property
    def next(self) -> float | None:
        """The earliest moment; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> Iterator[int]:
        """Yield and forget the requests whose moments have come, earliest first."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[1]

    def trim(self, num_alive: int, is_alive: Callable[[int], bool]) -> None:
        """Forget requests that have ended once most entries are theirs."""
        if len(self._heap) > 4 * num_alive + _MAX_STALE:
            self._heap = [entry for entry in self._heap if is_alive(entry[1])]
            heapq.heapify(self._heap)
