"""How many steps the engine keeps in flight, and when it launches the next one."""

from __future__ import annotations

import math
from collections import deque

from llmengine.batch import Batch, StepResult

_LEAST = 2
_IDLE_SHARE = 0.05
"""A device that waits for longer than this share of a step's time has run dry."""

_CALM_STEPS = 512
"""Steps without running dry after which one step less is kept in flight."""

_EARLY_STEPS = 64
"""Steps that are launched early after one came too late."""

_TRUSTED_SHARE = 0.8
"""Share of the time that a step like it took, which a step in flight is trusted to take as well."""

_LEAD_S = 1e-3
"""A step is scheduled and launched at least so much earlier than it must be."""

_LEAST_WAIT_S = 2e-3
"""Waiting for less is not worth a wake-up."""


class RunAhead:
    """Two steps, so that the device has one to run while the host looks at the other; more while that is not enough.

    The second is launched late: a request that arrives while the first runs is then part of it, and waits for one step
    less. How long the first will run is told from steps like it. Where that was too late, launches are early for a
    while.

    A thread that computes in Python holds the interpreter for milliseconds at a time, and the device runs out of steps
    meanwhile. Each step in flight beyond the second bridges one step's time more; it also lets a new request wait for
    one step more, so it is given up again when it is not needed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._least = min(_LEAST, limit)
        self.depth = self._least
        self._num_calm = 0
        self._num_early = 0
        self._in_flight: deque[tuple[_Kind, bool]] = deque()
        self._began = 0.0
        self._seconds: dict[_Kind, tuple[float, float]] = {}

    def spare_s(self, now: float) -> float:
        """Return for how many seconds from `now` on (monotonic clock) the next launch may wait for requests."""
        if self._num_early > 0 or len(self._in_flight) != 1 or self._limit < _LEAST:
            return 0.0
        kind, _ = self._in_flight[0]
        expected_s = min(self._seconds.get(kind, (0.0, 0.0)))
        spare_s = self._began + _TRUSTED_SHARE * expected_s - _LEAD_S - now
        return spare_s if spare_s >= _LEAST_WAIT_S else 0.0

    def launched(self, batch: Batch, now: float, *, is_late: bool) -> None:
        """Take note of a step that was launched, and whether after a wait of `spare_s`."""
        if not self._in_flight:
            self._began = now
        self._in_flight.append((_kind(batch), is_late))

    def observe(self, result: StepResult, now: float) -> None:
        """Take note of the end of the oldest step: how long it took, and whether the device had waited for it."""
        kind, was_late = self._in_flight.popleft()
        _, latest_s = self._seconds.get(kind, (0.0, 0.0))
        self._seconds[kind] = (latest_s, result.forward_s)
        self._began = now
        self._num_early = max(0, self._num_early - 1)
        self._num_calm += 1
        if result.idle_s > _IDLE_SHARE * result.forward_s:
            if was_late:
                self._num_early = _EARLY_STEPS
            else:
                self.depth = min(self.depth + 1, self._limit)
            self._num_calm = 0
        elif self._num_calm >= _CALM_STEPS:
            self.depth = max(self.depth - 1, self._least)
            self._num_calm = 0


_Kind = tuple[bool, int]
"""Steps of one kind take about as long: whether there are prompts in it, and how many tokens, on a scale of logs."""


def _kind(batch: Batch) -> _Kind:
    num_tokens = batch.num_tokens
    return num_tokens > len(batch.rows), int(4 * math.log2(num_tokens))
