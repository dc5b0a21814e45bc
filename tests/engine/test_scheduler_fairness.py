"""How long requests wait: ageing, tenants, victims, the pace of prompts, and what a long queue costs the scheduler."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from llmengine.engine import fair_queue, scheduler
from llmengine.engine.request import Request, RequestStatus
from tests.engine.helpers import Steps, tokens


def prompt_of(num_tokens: int, first: int = 0) -> list[int]:
    """Return token ids that differ for each `first`."""
    return [(first * 31 + index) % 256 for index in range(num_tokens)]


def one_at_a_time(**settings: Any) -> Steps:
    """Return a scheduler that runs one request at a time."""
    return Steps(max_batch_size=1, max_tokens_per_step=64, max_tokens_per_mixed_step=64, **settings)


def served(requests: list[Request]) -> Counter[str | None]:
    """Return the tokens of each tenant that were computed."""
    counted: Counter[str | None] = Counter()
    for request in requests:
        if request.stream.log.first_scheduled is not None:
            counted[request.tenant] += len(request.token_ids) - 1
    return counted


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 5), (-3, 4)])
def test_waiting_for_those_with_priority_is_bounded(low: int, high: int) -> None:
    """Each second one request is served and a more urgent one comes: overtaking ends at the bound."""
    steps = one_at_a_time(priority_ageing_s=3.0)
    bound_s = (high - low) * 3.0
    steps.submit([9], 1, priority=high)
    patient = steps.submit([1], 1, priority=low)
    while patient.status is RequestStatus.WAITING:
        steps.step()
        steps.now += 1.0
        steps.submit([2], 1, priority=high)
    started = patient.stream.log.first_scheduled
    assert started is not None
    overtaking = [r for r in steps.requests if r.priority == high and r.stream.log.first_scheduled is not None]
    assert all(request.stream.log.queued < bound_s for request in overtaking)
    assert len(overtaking) == bound_s, "until then they do come first"
    assert started == bound_s


def test_tenants_that_wait_get_tokens_by_weight() -> None:
    """Long prompts or long outputs, many requests or few: only tokens count."""
    steps = Steps(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32, num_blocks=65,
                  caching=False, tenant_weights={"big": 3.0})  # fmt: skip
    for index in range(150):
        steps.submit(prompt_of(20, index), 4, tenant="big")
        steps.submit(prompt_of(2, index), 12, tenant="small")
        steps.submit(prompt_of(6, index), 6)
    for _ in range(350):
        steps.step()
    assert all(any(r.tenant == name for r in steps.scheduler.requests()) for name in ("big", "small", None))
    counted = served(steps.requests)
    # What runs and what was chosen before may differ by a few requests.
    assert counted["small"] == pytest.approx(counted[None], abs=80)
    assert counted["big"] / 3 == pytest.approx(counted["small"], abs=80)
    assert counted["small"] > 700


def test_a_crowd_does_not_delay_another_tenant() -> None:
    steps = one_at_a_time()
    for index in range(50):
        steps.submit(prompt_of(3, index), 2, tenant="crowd", priority=9)
    for _ in range(20):
        steps.step()
    alone = steps.submit([1, 2], 2, tenant="alone")
    started = sum(r.stream.log.first_scheduled is not None for r in steps.requests)
    while alone.status is RequestStatus.WAITING:
        steps.step()
    assert sum(r.stream.log.first_scheduled is not None for r in steps.requests) <= started + 2


def test_using_an_idle_engine_is_not_held_against_a_tenant() -> None:
    """ "eager" had the engine for itself; once "late" comes, both get the same, and neither catches up."""
    steps = Steps(max_batch_size=2, num_blocks=65, max_tokens_per_step=32, max_tokens_per_mixed_step=32)
    for index in range(2):
        steps.submit(prompt_of(4, index), 50, tenant="eager")
    for _ in range(45):
        steps.step()
    before = served(steps.requests)["eager"]
    for index in range(30):
        steps.submit(prompt_of(3, index), 6, tenant="late")
        steps.submit(prompt_of(3, index), 6, tenant="eager")
    for _ in range(60):
        steps.step()
    counted = served(steps.requests)
    assert counted["late"] == pytest.approx(counted["eager"] - before, abs=25)


def test_coming_late_to_a_crowd_is_no_claim_to_what_ran_before() -> None:
    """ "eager" waits as well, but nothing has been admitted since its two long-running requests began."""
    steps = Steps(max_batch_size=2, num_blocks=65, max_tokens_per_step=32, max_tokens_per_mixed_step=32)
    for index in range(2):
        steps.submit(prompt_of(4, index), 50, tenant="eager")
    steps.step()
    eager = [steps.submit(prompt_of(3, index), 6, tenant="eager") for index in range(30)]
    for _ in range(45):
        steps.step()
    late = [steps.submit(prompt_of(3, index), 6, tenant="late") for index in range(30)]
    for _ in range(60):
        steps.step()
    counted = served([*eager, *late])
    assert counted["late"] == pytest.approx(counted["eager"], abs=25)


def test_a_long_prompt_does_not_hold_up_another_tenants_short_one() -> None:
    steps = Steps(max_batch_size=4, max_tokens_per_step=8, max_tokens_per_mixed_step=8)
    steps.submit(prompt_of(60), 2, tenant="long")
    steps.step()
    short = steps.submit(prompt_of(5, 1), 2, tenant="short")
    assert [[row.num_tokens for row in steps.step().rows] for _ in range(2)] == [[8], [5, 3]]
    assert len(short.stream.log.token_ids) == 1
    steps.drain()
    steps.check_tokens()


def test_urgent_prompt_overtakes_a_prompt_in_progress() -> None:
    steps = Steps(max_batch_size=4, max_tokens_per_step=8, max_tokens_per_mixed_step=8)
    steps.submit(prompt_of(60), 2)
    steps.step()
    urgent = steps.submit(prompt_of(5, 1), 2, priority=1)
    steps.step()
    assert len(urgent.stream.log.token_ids) == 1
    steps.drain()
    steps.check_tokens()


def test_cache_hits_and_computing_again_are_not_charged() -> None:
    steps = Steps(num_blocks=7, max_model_len=24, max_batch_size=2, caching=False)
    keeper, victim = steps.submit(prompt_of(8), 12, tenant="a"), steps.submit(prompt_of(8, 1), 8, tenant="a")
    while not (victim.num_preemptions and victim.status is RequestStatus.RUNNING):
        steps.step()
    charged = keeper.share.service
    assert charged <= len(keeper.token_ids) + len(victim.token_ids)
    steps.drain()
    warm = Steps()
    warm.submit(prompt_of(17), 2, tenant="a")
    warm.submit([1], 30, tenant="b")  # otherwise the tenants' service would be forgotten
    while warm.requests[0].status is not RequestStatus.FINISHED:
        warm.step()
    share = warm.scheduler.requests().__next__().share
    again = warm.submit(prompt_of(17), 2, tenant="a")
    before = again.share.service
    warm.step()
    assert again.share.service - before == 1
    assert share.name == "b"


def test_victim_is_the_cheapest_of_the_least_important() -> None:
    """Of two requests of equal priority the short one is preempted, although the long one came later."""
    steps = Steps(num_blocks=11, max_model_len=36, max_batch_size=3, caching=False)
    short, long = steps.submit(prompt_of(5), 20), steps.submit(prompt_of(20, 1), 15)
    while not steps.counters.num_preemptions:
        steps.step()
    assert (short.num_preemptions, long.num_preemptions) == (1, 0)
    steps.drain()
    steps.check_tokens()
    assert long.num_preemptions == 0


def test_each_preemption_makes_the_next_one_dearer() -> None:
    steps = Steps(num_blocks=11, max_model_len=36, max_batch_size=3, caching=False)
    short, long = steps.submit(prompt_of(5), 20), steps.submit(prompt_of(20, 1), 15)
    steps.step()
    short.num_preemptions = 2
    while not steps.counters.num_preemptions:
        steps.step()
    assert (short.num_preemptions, long.num_preemptions) == (2, 1)
    steps.drain()
    steps.check_tokens()


@pytest.mark.parametrize(("num_blocks", "fits"), [(10, True), (9, False)])
def test_what_was_preempted_comes_back_to_more_room(num_blocks: int, fits: bool) -> None:
    """It needs one block more in reserve for each running request than a new request does."""
    steps = Steps(num_blocks=num_blocks, max_model_len=28)
    steps.submit(prompt_of(8), 8)
    steps.step()
    second = steps.submit(prompt_of(13, 1), 2)
    second.num_preemptions = 1
    steps.step()
    assert second.status is (RequestStatus.RUNNING if fits else RequestStatus.WAITING)
    steps.drain()
    steps.check_tokens()


def test_cheap_does_not_count_across_levels_of_effective_priority() -> None:
    """The short request came earlier by more than a level's worth of waiting."""
    steps = Steps(num_blocks=11, max_model_len=36, max_batch_size=3, caching=False, priority_ageing_s=5.0)
    short = steps.submit(prompt_of(5), 20)
    steps.now = 6.0
    long = steps.submit(prompt_of(20, 1), 15)
    while not steps.counters.num_preemptions:
        steps.step()
    assert (short.num_preemptions, long.num_preemptions) == (0, 1)
    steps.drain()
    steps.check_tokens()


def test_blocks_that_others_keep_cost_nothing() -> None:
    """The longer request shares its long prefix with another, so it is the cheaper one to compute again."""
    steps = Steps(num_blocks=15, max_model_len=40, max_batch_size=4)
    prefix = prompt_of(24)
    holder = steps.submit([*prefix, 1], 12)
    steps.step()
    alone = steps.submit(prompt_of(12, 3), 20)
    sharer = steps.submit([*prefix, 2, 3], 12)
    while not steps.counters.num_preemptions:
        steps.step()
    assert sharer.stream.log.num_cached_tokens == 24
    assert alone.num_preemptions == 0
    assert holder.num_preemptions + sharer.num_preemptions == 1
    steps.drain()
    steps.check_tokens()


def test_victim_is_of_the_tenant_that_was_served_most_whatever_the_priorities() -> None:
    steps = Steps(num_blocks=9, max_model_len=24, max_batch_size=4)
    hog = [steps.submit(prompt_of(4, index), 12, tenant="hog", priority=9) for index in range(2)]
    modest = steps.submit(prompt_of(4, 7), 12, tenant="modest")
    while not steps.counters.num_preemptions:
        steps.step()
    assert modest.num_preemptions == 0
    assert sum(request.num_preemptions for request in hog) == 1
    steps.drain()
    steps.check_tokens()


@pytest.mark.parametrize("seed", range(4))
def test_preemptions_stay_few_under_pressure(seed: int) -> None:
    """Hysteresis: in a pool for three of eight, requests give way once or twice, not for each block."""
    rng = random.Random(seed)
    steps = Steps(num_blocks=41, max_model_len=64, max_batch_size=8, max_tokens_per_step=64,
                  max_tokens_per_mixed_step=32, caching=bool(seed % 2), max_preemptions=100)  # fmt: skip
    for index in range(60):
        steps.submit(prompt_of(rng.randint(2, 16), index), rng.randint(20, 45), tenant=rng.choice([None, "a"]))
    steps.drain()
    steps.check_tokens()
    assert 0 < steps.counters.num_preemptions <= 60
    assert max(request.num_preemptions for request in steps.requests) <= 6


def test_abort_may_forget_what_only_this_request_computed() -> None:
    for keep_prefix, num_cached in ((True, 16), (False, 8)):
        steps = Steps()
        common, secret = prompt_of(8), prompt_of(9, 1)
        steps.submit([*common, 1], 1)
        steps.drain()
        request = steps.submit([*common, *secret], 20)
        steps.step()
        steps.scheduler.finish(request, "abort", keep_prefix=keep_prefix)
        steps.scheduler.check_integrity()
        again = steps.submit([*common, *secret], 1)
        steps.drain()
        assert again.stream.log.num_cached_tokens == num_cached
        steps.check_tokens()


def test_forgetting_spares_what_another_request_uses() -> None:
    steps = Steps()
    prompt = prompt_of(17)
    request = steps.submit(prompt, 20)
    steps.step()
    other = steps.submit(prompt, 6)
    steps.step()
    steps.scheduler.finish(request, "abort", keep_prefix=False)
    steps.drain()
    assert other.stream.log.num_cached_tokens == 16
    third = steps.submit(prompt, 1)
    steps.drain()
    assert third.stream.log.num_cached_tokens == 16
    steps.check_tokens()


def test_forgetting_reaches_what_a_preempted_request_left_behind() -> None:
    steps = Steps(num_blocks=7, max_model_len=24)
    first, last = steps.submit(prompt_of(8), 12), steps.submit(prompt_of(8, 1), 8)
    while not last.num_preemptions:
        steps.step()
    assert last.status is RequestStatus.WAITING
    steps.scheduler.finish(last, "abort", keep_prefix=False)
    steps.scheduler.check_integrity()
    steps.scheduler.finish(first, "abort")
    again = steps.submit([*prompt_of(8, 1), 5], 1)
    steps.drain()
    assert again.stream.log.num_cached_tokens == 0
    steps.check_tokens()


def test_prompts_take_what_the_latency_leaves_of_a_step() -> None:
    """A step takes 2 ms and 0.1 ms a token; beside decodes it may take 6 ms: 40 tokens, and 512 without."""
    steps = Steps(num_blocks=1025, max_model_len=1024, max_batch_size=8, max_tokens_per_step=512,
                  max_tokens_per_mixed_step=256, max_decode_latency_ms=6.0)  # fmt: skip

    def step() -> int:
        batch = steps.launch()
        assert batch is not None
        steps.now += 2e-3 + 1e-4 * batch.num_tokens
        steps.collect()
        return batch.num_tokens

    steps.submit(prompt_of(4), params=tokens(900))
    step()
    step()
    for index in range(3):
        steps.submit(prompt_of(900, index), params=tokens(2))
    mixed = [step() for _ in range(50)]
    assert max(mixed) <= 42
    assert min(mixed[10:]) >= 36
    steps.scheduler.finish(steps.requests[0], "abort")
    steps.submit(prompt_of(900, 9), 2)
    while not all(r.status is RequestStatus.FINISHED for r in steps.requests[1:4]):
        step()
    assert step() > 42, "nothing decodes: the whole budget"


def lines_run(function: Callable[[], object]) -> int:
    """Return the number of lines of the scheduler's modules that a call executes."""
    files = {scheduler.__file__, fair_queue.__file__}
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def crowded(num_waiting: int, num_tenants: int) -> Steps:
    """Return a scheduler that is full, with `num_waiting` more requests waiting."""
    steps = Steps(max_batch_size=4, num_blocks=129)
    for index in range(num_waiting + 4):
        tenant = f"tenant {index % num_tenants}" if num_tenants > 1 else None
        steps.submit([index % 250], 3, tenant=tenant, priority=index % 3)
    return steps


@pytest.mark.parametrize("num_tenants", [1, 7, 1_000_000])
def test_what_a_step_costs_does_not_depend_on_how_many_wait(num_tenants: int) -> None:
    """Counted in lines executed, with requests that end and are admitted in these steps."""
    costs = []
    for num_waiting in (100, 10_000):
        steps = crowded(num_waiting, num_tenants)
        for _ in range(8):
            steps.step()
        costs.append(lines_run(lambda steps=steps: [steps.step() for _ in range(30)]))
        assert steps.scheduler.num_waiting > num_waiting - 80
    assert costs[1] < 1.5 * costs[0]


@pytest.mark.parametrize("num_tenants", [1, 1_000_000])
def test_coming_and_leaving_costs_the_same_however_many_wait(num_tenants: int) -> None:
    costs = []
    for num_waiting in (1_000, 10_000):
        steps = crowded(num_waiting, num_tenants)

        def come_and_leave(steps: Steps = steps) -> None:
            for index in range(500):
                steps.scheduler.finish(steps.submit([index % 250], 3, tenant="late"), "abort")
            for request in steps.requests[:500]:
                steps.scheduler.finish(request, "timeout")

        costs.append(lines_run(come_and_leave))
    assert costs[1] < 1.5 * costs[0] + 2 * 10_000, "the queue may have been tidied up once"
