"""How many steps are kept in flight."""

from __future__ import annotations

import pytest

from llmengine.batch import StepResult
from llmengine.engine.run_ahead import RunAhead

BUSY = StepResult(1, {}, forward_s=0.010, idle_s=0.0001)
IDLE = StepResult(1, {}, forward_s=0.010, idle_s=0.002)


@pytest.mark.parametrize(("limit", "least"), [(1, 1), (2, 2), (8, 2)])
def test_starts_with_two_steps_where_the_backend_takes_them(limit: int, least: int) -> None:
    run_ahead = RunAhead(limit)
    for _ in range(2000):
        run_ahead.observe(BUSY)
        assert run_ahead.depth == least


def test_grows_while_the_device_runs_dry_up_to_the_backends_limit() -> None:
    run_ahead = RunAhead(4)
    depths = []
    for result in (IDLE, BUSY, IDLE, IDLE, IDLE):
        run_ahead.observe(result)
        depths.append(run_ahead.depth)
    assert depths == [3, 3, 4, 4, 4]


def test_gives_steps_up_again_one_after_the_other() -> None:
    run_ahead = RunAhead(4)
    for _ in range(2):
        run_ahead.observe(IDLE)
    depths = []
    for _ in range(2000):
        run_ahead.observe(BUSY)
        depths.append(run_ahead.depth)
    assert sorted(set(depths)) == [2, 3, 4]
    assert depths == sorted(depths, reverse=True)
