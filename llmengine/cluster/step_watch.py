"""StepWatch: notices an engine that has requests but ends no step, such as one whose device hangs."""

from __future__ import annotations

from llmengine.engine.stats import EngineStats
from llmengine.errors import EngineDeadError


class StepWatch:
    """Watches one engine. One thread.

    Args:
        limit_s: how long a step may take; None: for ever.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._num_steps = -1
        self._since = 0.0

    def check(self, stats: EngineStats, now: float) -> None:
        """Look at what the engine says of itself at a moment of a monotonic clock, in seconds.

        Raises `EngineDeadError` if requests have been running for longer than the limit since a step was seen to end.
        """
        if stats.num_running == 0 or stats.counters.num_steps != self._num_steps:
            self._num_steps, self._since = stats.counters.num_steps, now
        elif self._limit_s is not None and now - self._since > self._limit_s:
            waited = f"requests are running, but no step has ended for {now - self._since:.3g} s"
            raise EngineDeadError(f"{waited} (step_timeout_s={self._limit_s:g})")
