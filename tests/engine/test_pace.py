"""PromptPace, on steps with made-up times."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from llmengine.config import SchedulerConfig
from llmengine.engine.pace import PromptPace

MIXED = 1024

StepTime = Callable[[int, int], float]
"""Maps the number of a step and of its prompt tokens to seconds."""


def pace_for(target_ms: float) -> PromptPace:
    return PromptPace(SchedulerConfig(max_decode_latency_ms=target_ms, max_tokens_per_mixed_step=MIXED).resolve(True))


def run(pace: PromptPace, step_time: StepTime, num_steps: int, *, decode_only_every: int = 4) -> list[float]:
    """Return the times of steps, some without prompt tokens and the others with as many as allowed."""
    times = []
    for step in range(num_steps):
        num_tokens = 0 if step % decode_only_every == 0 else min(pace.max_prompt_tokens(), MIXED)
        step_s = step_time(step, num_tokens)
        pace.observe(num_tokens, step_s)
        if num_tokens:
            times.append(step_s)
    return times


@pytest.mark.parametrize(("base_ms", "token_us"), [(2.0, 10.0), (5.0, 40.0), (0.5, 15.0), (15.0, 50.0)])
def test_steps_come_up_to_the_target_and_not_above(base_ms: float, token_us: float) -> None:
    pace = pace_for(20.0)
    times = run(pace, lambda _, tokens: base_ms / 1e3 + token_us / 1e6 * tokens, 100)
    settled = times[30:]
    reachable = min(20e-3, base_ms / 1e3 + token_us / 1e6 * MIXED)
    assert max(settled) <= 20.5e-3
    assert min(settled) >= 0.85 * reachable


def test_a_long_first_prompt_step_is_not_taken_for_the_rule() -> None:
    """A prompt without decodes beside it gets the large budget; from there the line leads down at once."""
    pace = pace_for(20.0)
    pace.observe(2048, 5e-3 + 2048 * 50e-6)
    pace.observe(0, 5e-3)
    assert 5e-3 + pace.max_prompt_tokens() * 50e-6 == pytest.approx(20e-3, rel=0.01)


def test_noise_and_stalls_do_not_throw_it_off() -> None:
    rng = random.Random(1)

    def step_time(step: int, num_tokens: int) -> float:
        stall = 0.5 if step % 60 == 59 else 0.0
        return (4e-3 + 30e-6 * num_tokens) * rng.uniform(0.85, 1.15) + stall

    times = sorted(run(pace_for(20.0), step_time, 2000)[30:])
    assert 16e-3 < times[len(times) // 2] < 20e-3
    assert times[int(0.9 * len(times))] < 24e-3


def test_follows_when_decodes_become_dearer_and_cheaper() -> None:
    pace = pace_for(20.0)
    for base_s in (4e-3, 12e-3, 4e-3):
        times = run(pace, lambda _, tokens, base_s=base_s: base_s + 30e-6 * tokens, 200, decode_only_every=1000)
        assert times[-1] == pytest.approx(20e-3, rel=0.05)


def test_prompts_go_on_where_decodes_alone_take_too_long() -> None:
    pace = pace_for(20.0)
    run(pace, lambda _, tokens: 50e-3 + 30e-6 * tokens, 100)
    assert pace.max_prompt_tokens() == pace.floor == MIXED // 16


def test_begins_small() -> None:
    pace = pace_for(20.0)
    assert pace.max_prompt_tokens() == pace.floor
    pace.observe(0, 1e-3)
    assert pace.max_prompt_tokens() == pace.floor
    pace.observe(pace.floor, 1e-3)
    assert pace.max_prompt_tokens() == 2 * pace.floor, "never more than twice what was tried"
