"""How many steps the engine keeps in flight."""

from __future__ import annotations

from llmengine.batch import StepResult

_LEAST = 2
_IDLE_SHARE = 0.05
"""A device that waits for longer than this share of a step's time has run dry."""

_CALM_STEPS = 512
"""Steps without running dry after which one step less is kept in flight."""


class RunAhead:
    """Two steps, so that the device has one to run while the host looks at the other; more while that is not enough.

    A thread that computes in Python holds the interpreter for milliseconds at a time, and the device runs out of steps
    meanwhile. Each step in flight beyond the second bridges one step's time more; it also lets a new request wait for
    one step more, so it is given up again when it is not needed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._least = min(_LEAST, limit)
        self.depth = self._least
        self._num_calm = 0

    def observe(self, result: StepResult) -> None:
        """Take note of whether the device had to wait for a step."""
        if result.idle_s > _IDLE_SHARE * result.forward_s:
            self.depth = min(self.depth + 1, self._limit)
            self._num_calm = 0
            return
        self._num_calm += 1
        if self._num_calm >= _CALM_STEPS:
            self.depth = max(self.depth - 1, self._least)
            self._num_calm = 0
