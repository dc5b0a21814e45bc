"""Deadlines: the moments at which requests end that are not finished by then."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

_MAX_STALE = 64
"""Entries of requests that have ended are dropped when there are so many, and four for each that has not."""


class Deadlines:
    """A heap of (moment on the monotonic clock, request id). A request may have several, and may have ended."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []

    def add(self, moment: float, request_id: int) -> None:
        """Have `passed` yield the request from `moment` on."""
        heapq.heappush(self._heap, (moment, request_id))

    @property
    def next(self) -> float | None:
        """The earliest moment."""
        return self._heap[0][0] if self._heap else None

    def passed(self, now: float) -> Iterator[int]:
        """Yield and forget the requests whose moment has come, in their order."""
        while self._heap and self._heap[0][0] <= now:
            yield heapq.heappop(self._heap)[1]

    def trim(self, num_alive: int, is_alive: Callable[[int], bool]) -> None:
        """Forget requests that have ended, once most entries are theirs."""
        if len(self._heap) > 4 * num_alive + _MAX_STALE:
            self._heap = [entry for entry in self._heap if is_alive(entry[1])]
            heapq.heapify(self._heap)
