"""PromptPace: how many prompt tokens a step may take beside decodes without exceeding the decodes' latency target."""

from __future__ import annotations

from llmengine.config import SchedulerConfig

_MIN_SHARE = 1 / 16
"""Share of `max_tokens_per_mixed_step` that prompts may always take, whatever the latency."""

_MEMORY = 1 / 8
"""Weight of the latest step in the averages."""

_OUTLIER = 3.0
"""A step's time (with a graph capture or a garbage collection, say) counts as at most this many times the expected."""


class PromptPace:
    """Learns how long steps take, and sizes the prompts' part of steps that also decode.

    A step with x prompt tokens beside its decodes takes about base + slope * x seconds. `base` is a running average
    over steps without prompt tokens. A second running average is taken over steps with at least `floor` prompt tokens,
    and the slope is that of the line through both. The cost of decodes (their number, their contexts) moves both
    averages. The next step gets as many prompt tokens as the line allows, but at most twice the second average's
    number, and never fewer than the floor: prompts go on, if slowly, where decodes alone exceed the target.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.max_decode_latency_ms is not None
        self._target_s = config.max_decode_latency_ms / 1e3
        self.floor = max(1, round(_MIN_SHARE * config.max_tokens_per_mixed_step))
        self._base_s: float | None = None
        self._tokens = 0.0
        self._step_s: float | None = None

    def observe(self, num_prompt_tokens: int, step_s: float) -> None:
        """Take in a step that added `step_s` seconds to the latency of its decodes."""
        if num_prompt_tokens == 0:
            if self._base_s is None:
                self._base_s = step_s
            else:
                self._base_s += _MEMORY * (min(step_s, _OUTLIER * self._base_s) - self._base_s)
        elif num_prompt_tokens >= self.floor:  # fewer say nothing about the slope
            if self._step_s is None:
                self._tokens, self._step_s = num_prompt_tokens, step_s
            else:
                step_s = min(step_s, _OUTLIER * self._expected_s(num_prompt_tokens))
                self._tokens += _MEMORY * (num_prompt_tokens - self._tokens)
                self._step_s += _MEMORY * (step_s - self._step_s)

    def max_prompt_tokens(self) -> int:
        """Prompt tokens that the next step may have beside its decodes."""
        if self._step_s is None:
            return self.floor
        slope = self._slope()
        spare_s = self._target_s - self._step_s
        grown = 2 * self._tokens if slope <= 0 else min(2 * self._tokens, self._tokens + spare_s / slope)
        return max(self.floor, int(grown))

    def _slope(self) -> float:
        assert self._step_s is not None
        return (self._step_s - (self._base_s or 0.0)) / self._tokens

    def _expected_s(self, num_prompt_tokens: int) -> float:
        assert self._step_s is not None
        return max(self._step_s + self._slope() * (num_prompt_tokens - self._tokens), self._base_s or 0.0)
