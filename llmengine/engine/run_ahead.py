"""How many steps the engine keeps in flight, and when it launches the next one."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from llmengine.batch import Batch, StepResult

_MIN_DEPTH = 2
_IDLE_SHARE = 0.05
"""A device that waits for longer than this share of a step's time has run dry."""

_CALM_STEPS = 512
"""After this many steps during which the device never ran dry, one step fewer is kept in flight."""

_EARLY_STEPS = 64
"""Steps that are launched early after one was launched too late."""

_TRUSTED_SHARE = 0.8
"""A step in flight is expected to take at least this share of the time of earlier steps of its kind."""

_BOUND_SHARE = 0.5
"""A step whose launch took this share of its time may have waited for it, as steps without a graph do."""

_LEAD_S = 1e-3
"""Steps are scheduled and launched at least this much earlier than necessary."""

_MIN_WAIT_S = 2e-3
"""A shorter wait is not worth a wake-up."""


class RunAhead:
    """Keeps two steps in flight, so that the device runs one while the host handles the other; more if needed.

    The second step is launched late. A request that arrives while the first runs can then be part of the second, and
    waits for one step less. The time that the first step will take is predicted from earlier steps of its kind, but not
    from those that may have waited for the host. After a launch that was too late, launches are early for a while.

    A thread that computes in Python holds the interpreter for milliseconds at a time, and the device may run out of
    steps meanwhile. Each step in flight beyond the second bridges the time of one more step. It also makes a new
    request wait for one more step, so it is given up again when it is not needed.

    Args:
        limit: most steps in flight.
        may_wait: the second step may be launched late.
    """

    def __init__(self, limit: int, *, may_wait: bool = True) -> None:
        self._limit = limit
        self._may_wait = may_wait
        self._min_depth = min(_MIN_DEPTH, limit)
        self.depth = self._min_depth
        self._num_calm = 0
        self._num_early = 0
        self._in_flight: deque[_Launched] = deque()
        self._began = 0.0
        self._seconds: dict[_Kind, tuple[float, float]] = {}

    def spare_s(self, now: float) -> float:
        """Seconds from `now` (monotonic clock) for which the next launch may wait for requests."""
        if not self._may_wait or self._num_early > 0 or len(self._in_flight) != 1 or self._limit < _MIN_DEPTH:
            return 0.0
        expected_s = min(self._seconds.get(self._in_flight[0].kind, (0.0, 0.0)))
        spare_s = self._began + _TRUSTED_SHARE * expected_s - _LEAD_S - now
        return spare_s if spare_s >= _MIN_WAIT_S else 0.0

    def launched(self, batch: Batch, now: float, *, launch_s: float, is_late: bool) -> None:
        """Note that a step was launched, which took `launch_s`. `is_late`: it had waited for `spare_s`."""
        began = now - launch_s
        if not self._in_flight:
            self._began = began
        self._in_flight.append(_Launched(_kind(batch), began, launch_s, is_late))

    def observe(self, result: StepResult, now: float, *, looked_at: float) -> None:
        """Note that the oldest step has ended: how long it took, and whether the device had to wait for it.

        Args:
            looked_at: when the engine began to wait for its end, which may have been before that.
        """
        step = self._in_flight.popleft()
        expected_end = self._began + result.forward_s
        ended = now if looked_at < expected_end else expected_end
        self._began = max(ended, self._in_flight[0].began) if self._in_flight else ended
        if step.launch_s < _BOUND_SHARE * result.forward_s:
            _, latest_s = self._seconds.get(step.kind, (0.0, 0.0))
            self._seconds[step.kind] = (latest_s, result.forward_s)
        self._num_early = max(0, self._num_early - 1)
        self._num_calm += 1
        if result.idle_s > _IDLE_SHARE * result.forward_s:
            if step.was_late:
                self._num_early = _EARLY_STEPS
            else:
                self.depth = min(self.depth + 1, self._limit)
            self._num_calm = 0
        elif self._num_calm >= _CALM_STEPS:
            self.depth = max(self.depth - 1, self._min_depth)
            self._num_calm = 0


_Kind = tuple[bool, int]
"""Steps of one kind take about equally long: (whether it has prompts, number of tokens on a logarithmic scale)."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight: when its launch began, how many seconds that took, and whether it had waited for `spare_s`."""

    kind: _Kind
    began: float
    launch_s: float
    was_late: bool


def _kind(batch: Batch) -> _Kind:
    num_tokens = batch.num_tokens
    return num_tokens > len(batch.rows), int(4 * math.log2(num_tokens))
