"""How many steps are kept in flight, and how late the next is launched."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine import LLM
from llmengine.batch import Batch, BatchRow, StepResult
from llmengine.engine import engine
from llmengine.engine.handle import RequestHandle
from llmengine.engine.run_ahead import RunAhead
from llmengine.testing import FakeBackend
from tests.engine.helpers import VOCAB_SIZE, oracle, tokens

SECONDS = {128: 0.018, 1024: 0.074, 4096: 0.264}
"""Seconds that a device computes for, by the number of a prompt's tokens."""


def prompt(num_tokens: int) -> Batch:
    return Batch(1, [BatchRow(0, 0, num_tokens, range(num_tokens), (), sample=1)])


DECODE = Batch(1, [BatchRow(slot, 5, 1, (), (), sample=1) for slot in range(8)])
PROMPT = prompt(512)
BUSY = StepResult(1, {}, forward_s=0.010, idle_s=0.0001)
IDLE = StepResult(1, {}, forward_s=0.010, idle_s=0.002)


def run(run_ahead: RunAhead, result: StepResult, batch: Batch = DECODE) -> int:
    """Launch a step and observe its end; return the depth."""
    run_ahead.launched(batch, 0.0, launch_s=0.0, is_late=False)
    run_ahead.observe(result, 0.0, looked_at=0.0)
    return run_ahead.depth


def run_second(run_ahead: RunAhead, result: StepResult) -> bool:
    """Launch a step beside one of a known kind, as late as possible; observe both ends; return whether it waited."""
    run_ahead.launched(DECODE, 7.0, launch_s=0.0, is_late=False)
    is_late = run_ahead.spare_s(7.0) > 0
    run_ahead.launched(DECODE, 7.0, launch_s=0.0, is_late=is_late)
    run_ahead.observe(BUSY, 7.01, looked_at=0.0)
    run_ahead.observe(result, 7.02, looked_at=0.0)
    return is_late


@pytest.mark.parametrize(("limit", "least"), [(1, 1), (2, 2), (8, 2)])
def test_starts_with_two_steps_where_the_backend_takes_them(limit: int, least: int) -> None:
    run_ahead = RunAhead(limit)
    assert {run(run_ahead, BUSY) for _ in range(2000)} == {least}
    assert run_second(run_ahead, BUSY) == (limit > 1)


def test_a_backend_that_wants_early_launches_is_not_kept_waiting() -> None:
    run_ahead = RunAhead(2, may_wait=False)
    assert {run(run_ahead, BUSY) for _ in range(100)} == {2}
    assert not run_second(run_ahead, BUSY)


def test_grows_while_the_device_runs_dry_up_to_the_backends_limit() -> None:
    run_ahead = RunAhead(4)
    assert [run(run_ahead, result) for result in (IDLE, BUSY, IDLE, IDLE, IDLE)] == [3, 3, 4, 4, 4]


def test_gives_steps_up_again_one_after_the_other() -> None:
    run_ahead = RunAhead(4)
    for _ in range(2):
        run(run_ahead, IDLE)
    depths = [run(run_ahead, BUSY) for _ in range(2000)]
    assert sorted(set(depths)) == [2, 3, 4]
    assert depths == sorted(depths, reverse=True)


def test_a_step_that_came_too_late_lets_the_next_ones_come_early_and_adds_none() -> None:
    run_ahead = RunAhead(4)
    for _ in range(2):
        run(run_ahead, BUSY)
    assert run_second(run_ahead, IDLE)
    assert run_ahead.depth == 2
    assert [run_second(run_ahead, BUSY) for _ in range(40)] == [False] * 32 + [True] * 8


def test_the_next_launch_waits_for_most_of_the_time_that_steps_of_the_kind_took() -> None:
    run_ahead = RunAhead(2)
    for seconds in (0.1, 0.2, 0.05, 0.04):
        run_ahead.launched(PROMPT, 0.0, launch_s=0.0, is_late=False)
        run_ahead.launched(DECODE, 0.0, launch_s=0.0, is_late=False)
        assert run_ahead.spare_s(0.0) == 0.0  # both in flight
        run_ahead.observe(StepResult(1, {}, forward_s=seconds), 1.0, looked_at=0.0)
        run_ahead.observe(StepResult(2, {}, forward_s=0.010), 1.0, looked_at=0.0)
    assert run_ahead.spare_s(1.0) == 0.0  # none in flight
    run_ahead.launched(PROMPT, 2.0, launch_s=0.0, is_late=False)
    assert run_ahead.spare_s(2.0) == pytest.approx(0.8 * 0.04 - 0.001)
    assert run_ahead.spare_s(2.025) == pytest.approx(0.8 * 0.04 - 0.001 - 0.025)
    assert run_ahead.spare_s(2.0295) == 0.0  # too little to be worth it
    run_ahead.launched(DECODE, 2.03, launch_s=0.0, is_late=False)
    run_ahead.observe(StepResult(3, {}, forward_s=0.04), 2.045, looked_at=0.0)  # the decodes begin now
    assert run_ahead.spare_s(2.046) == pytest.approx(0.8 * 0.010 - 0.001 - 0.001)


def test_a_kind_that_was_met_less_than_twice_is_not_waited_for() -> None:
    run_ahead = RunAhead(2)
    run(run_ahead, BUSY)
    run_ahead.launched(DECODE, 3.0, launch_s=0.0, is_late=False)
    assert run_ahead.spare_s(3.0) == 0.0
    run_ahead.observe(BUSY, 3.0, looked_at=0.0)
    run_ahead.launched(PROMPT, 4.0, launch_s=0.0, is_late=False)
    assert run_ahead.spare_s(4.0) == 0.0


def test_a_step_that_ended_while_the_host_was_busy_is_not_waited_for() -> None:
    """Such as in a launch that loads kernels: by then, the device has run the step that was launched."""
    run_ahead = RunAhead(2)
    for _ in range(2):
        run(run_ahead, StepResult(1, {}, forward_s=0.2), PROMPT)
    run_ahead.launched(DECODE, 5.0, launch_s=0.0, is_late=False)
    run_ahead.launched(PROMPT, 5.4, launch_s=0.395, is_late=False)
    run_ahead.observe(StepResult(1, {}, forward_s=0.01), 5.4, looked_at=5.4)
    assert run_ahead.spare_s(5.4) == 0.0  # it ended at 5.21
    run_ahead.observe(StepResult(1, {}, forward_s=0.2), 5.4, looked_at=5.4)

    run_ahead.launched(DECODE, 6.0, launch_s=0.0, is_late=False)
    run_ahead.launched(PROMPT, 6.1, launch_s=0.0, is_late=False)
    run_ahead.observe(StepResult(1, {}, forward_s=0.06), 6.15, looked_at=6.15)
    assert run_ahead.spare_s(6.15) == pytest.approx(0.8 * 0.2 - 0.001 - 0.05)  # it began when it was launched


@given(st.lists(st.tuples(st.sampled_from(sorted(SECONDS)), st.sampled_from([0.0005, 0.02, 0.1, 0.4])), max_size=80))
def test_the_device_never_stands_still_for_a_wait(steps: list[tuple[int, float]]) -> None:
    """Whatever launches take, if steps of a kind take the same time whenever the device need not wait for the host."""
    run_ahead = RunAhead(2)
    now = device_free_at = 0.0
    in_flight: deque[tuple[float, float]] = deque()
    for num_tokens, launch_s in steps:
        if len(in_flight) == run_ahead.depth:
            begins, ends = in_flight.popleft()
            looked_at, now = now, max(now, ends) + 0.0003
            run_ahead.observe(StepResult(1, {}, forward_s=ends - begins), now, looked_at=looked_at)
        spare_s = run_ahead.spare_s(now)
        now += spare_s
        assert not spare_s or now < device_free_at
        begins, now = max(now, device_free_at), now + launch_s
        device_free_at = max(begins + SECONDS[num_tokens], now)
        run_ahead.launched(prompt(num_tokens), now, launch_s=launch_s, is_late=spare_s > 0)
        in_flight.append((begins, device_free_at))


def test_steps_for_which_the_device_waited_are_not_expected_again() -> None:
    """The first steps of a size run without a graph, and kernels are loaded in them."""
    run_ahead = RunAhead(2)
    for launch_s, seconds in ((0.3, 0.31), (0.2, 0.21), (0.001, 0.04), (0.001, 0.05)):
        run_ahead.launched(PROMPT, 0.0, launch_s=launch_s, is_late=False)
        assert run_ahead.spare_s(0.0) == 0.0
        run_ahead.observe(StepResult(1, {}, forward_s=seconds), 1.0, looked_at=0.0)
    run_ahead.launched(PROMPT, 1.0, launch_s=0.005, is_late=False)
    assert run_ahead.spare_s(1.0) == pytest.approx(0.8 * 0.04 - 0.001 - 0.005)  # it began with the launch


class SlowBackend(FakeBackend):
    """A backend that reports ten seconds for each step, and remembers the rows of each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_steps_in_flight=2, **options)
        self.num_rows: list[int] = []

    def launch(self, batch: Batch) -> None:
        self.num_rows.append(len(batch.rows))
        super().launch(batch)

    def collect(self) -> StepResult:
        return replace(super().collect(), forward_s=10.0, idle_s=0.0)


async def test_a_request_that_arrives_during_a_step_is_part_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SlowBackend(vocab_size=VOCAB_SIZE)
    waits: list[tuple[float, int]] = []
    arrived: list[RequestHandle] = []

    def wait(seconds: float) -> None:
        waits.append((seconds, len(backend.num_rows)))
        if len(waits) == 3:
            arrived.append(llm.generate_async([7, 8, 9], tokens(4)))

    monkeypatch.setattr(
        engine, "time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter, sleep=wait)
    )
    with LLM.from_backend(lambda: backend) as llm:
        output = await llm.generate_async([1, 2, 3], tokens(12))
        late = await arrived[0]
    assert output.token_ids == oracle([1, 2, 3], 12)
    assert late.token_ids == oracle([7, 8, 9], 4)
    assert all(6.0 < seconds <= 8.0 - 0.001 for seconds, _ in waits)
    _, num_launched = waits[2]
    assert backend.num_rows[num_launched - 1 : num_launched + 1] == [1, 2]
