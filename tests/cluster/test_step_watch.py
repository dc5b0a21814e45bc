"""`StepWatch`, at moments that the test chooses."""

from __future__ import annotations

import dataclasses

import pytest

from llmengine.cluster.step_watch import StepWatch
from llmengine.engine.stats import EngineStats
from llmengine.errors import EngineDeadError
from tests.engine.helpers import make_llm


def stats(num_running: int, num_steps: int) -> EngineStats:
    """What an engine says of itself after so many steps."""
    with make_llm() as llm:
        said = llm.stats()
    counters = dataclasses.replace(said.counters, num_steps=num_steps)
    return dataclasses.replace(said, num_running=num_running, counters=counters)


def test_only_an_engine_with_requests_that_ends_no_step_hangs() -> None:
    watch = StepWatch(10.0)
    for moment, num_running, num_steps in (
        (0, 0, 5),
        (1000, 0, 5),  # idle
        (1001, 2, 5),  # a request comes
        (1009, 2, 5),
        (1010, 2, 6),
        (1019, 1, 6),
        (1021, 0, 6),  # aborted
        (1030, 1, 6),  # another one
    ):
        watch.check(stats(num_running, num_steps), moment)
    watch.check(stats(1, 6), 1034)
    watch.check(stats(1, 6), 1035)
    with pytest.raises(EngineDeadError, match=r"no step has ended for 10.5 s \(step_timeout_s=10\)"):
        watch.check(stats(1, 6), 1035.5)


def test_a_watch_that_stood_still_itself_waits_for_what_the_engine_says_next() -> None:
    watch = StepWatch(10.0)
    for moment, num_steps in ((0, 5), (1, 5), (1000, 5), (1000.1, 6), (2000, 6), (2001, 6)):
        watch.check(stats(1, num_steps), moment)
    with pytest.raises(EngineDeadError, match="no step has ended for 11 s"):
        watch.check(stats(1, 6), 3000)


def test_a_limit_below_the_time_between_two_looks_is_passed_at_the_next() -> None:
    watch = StepWatch(0.5)
    watch.check(stats(1, 5), 100)
    with pytest.raises(EngineDeadError, match="no step has ended for 1 s"):
        watch.check(stats(1, 5), 101)


def test_without_a_limit_a_step_may_take_for_ever() -> None:
    watch = StepWatch(None)
    for moment in (0.0, 1e9):
        watch.check(stats(1, 1), moment)
