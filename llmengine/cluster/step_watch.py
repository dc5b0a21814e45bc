"""StepWatch: notices an engine that has requests but ends no step, such as one whose device hangs."""

from __future__ import annotations

from llmengine.engine.stats import EngineStats
from llmengine.errors import EngineDeadError

# What a replica says comes this far apart, in seconds, when nothing stands still.
_USUAL_LOOK_S = 1.0


class StepWatch:
    """Watches one engine. One thread.

    Time between two looks counts as half of the limit at most, or as a second if that is more: this process, too, may
    stand still, as in a frozen container, and then hears only in the next looks what the engine has done meanwhile.

    Args:
        limit_s: how long a step may take; None: for ever.
    """

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self._num_steps = -1
        self._looked_at = 0.0
        self._stood_s = 0.0

    def check(self, stats: EngineStats, now: float) -> None:
        """Look at what the engine says of itself at a moment of a monotonic clock, in seconds.

        Raises `EngineDeadError` if requests have been running for longer than the limit since a step was seen to end.
        """
        before, self._looked_at = self._looked_at, now
        if stats.num_running == 0 or stats.counters.num_steps != self._num_steps:
            self._num_steps, self._stood_s = stats.counters.num_steps, 0.0
        elif self._limit_s is not None:
            self._stood_s += min(now - before, max(self._limit_s / 2, _USUAL_LOOK_S))
            if self._stood_s > self._limit_s:
                waited = f"requests are running, but no step has ended for {self._stood_s:.3g} s"
                raise EngineDeadError(f"{waited} (step_timeout_s={self._limit_s:g})")
