"""The scheduler's decisions, step by step, without an engine."""

from __future__ import annotations

import random

import pytest

from llmengine.engine.request import RequestStatus
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import Steps, counting_model, oracle, tokens

IN_FLIGHT = pytest.mark.parametrize("in_flight", [1, 2, 3])


def prompt_of(num_tokens: int, first: int = 0) -> list[int]:
    """Return token ids that differ for each `first`."""
    return [(first * 31 + index) % 256 for index in range(num_tokens)]


@IN_FLIGHT
def test_one_request_is_the_oracles(in_flight: int) -> None:
    steps = Steps(max_steps_in_flight=in_flight)
    request = steps.submit([1, 2, 3], 20)
    steps.drain()
    assert request.stream.log.token_ids == oracle([1, 2, 3], 20)
    assert request.stream.log.finish_reason == "length"
    steps.check_tokens()


@IN_FLIGHT
@pytest.mark.parametrize("caching", [True, False])
def test_crowd_in_a_tiny_pool_is_the_oracles(in_flight: int, caching: bool) -> None:
    steps = Steps(
        num_blocks=12,
        max_model_len=40,
        max_steps_in_flight=in_flight,
        caching=caching,
        max_batch_size=6,
        max_tokens_per_step=8,
        max_tokens_per_mixed_step=6,
    )
    shared = prompt_of(9)
    for index in range(24):
        steps.submit((shared if index % 3 else prompt_of(5, index)) + [index], 1 + index % 17, priority=index % 2)
    steps.drain()
    steps.check_tokens()
    assert steps.counters.num_preemptions > 0
    assert all(request.stream.log.finish_reason == "length" for request in steps.requests)
    assert steps.kv_cache.num_used_blocks == 0


def test_prompt_is_computed_in_chunks_in_order() -> None:
    steps = Steps(max_batch_size=4, max_tokens_per_step=8, max_tokens_per_mixed_step=4)
    steps.submit(prompt_of(20), 4)
    rows = [steps.step().rows[0] for _ in range(3)]
    assert [(row.start, row.num_tokens, row.sample) for row in rows] == [(0, 8, 0), (8, 8, 0), (16, 4, 1)]


def test_mixed_step_has_the_lower_budget_and_decodes_come_first() -> None:
    steps = Steps(max_batch_size=4, max_tokens_per_step=16, max_tokens_per_mixed_step=5)
    first = steps.submit(prompt_of(4), 10)
    steps.step()
    long = steps.submit(prompt_of(30, 1), 2)
    batch = steps.step()
    assert [row.num_tokens for row in batch.rows] == [1, 4]
    assert batch.rows[0].slot == first.slot
    assert batch.rows[1].slot == long.slot
    steps.drain()
    steps.check_tokens()


def test_running_prompt_goes_on_before_a_new_one_is_admitted() -> None:
    steps = Steps(max_batch_size=4, max_tokens_per_step=8, max_tokens_per_mixed_step=8)
    first = steps.submit(prompt_of(12), 2)
    second = steps.submit(prompt_of(12, 1), 2)
    assert [row.num_tokens for row in steps.step().rows] == [8]
    batch = steps.step()
    assert [(row.slot, row.num_tokens) for row in batch.rows] == [(first.slot, 4), (second.slot, 4)]


def test_batch_is_never_larger_than_allowed() -> None:
    steps = Steps(max_batch_size=3, max_tokens_per_step=64, max_tokens_per_mixed_step=64)
    for index in range(8):
        steps.submit(prompt_of(3, index), 4)
    assert len(steps.step().rows) == 3
    steps.drain()
    steps.check_tokens()


def test_one_batch_counts_all_tokens() -> None:
    steps = Steps()
    steps.submit([1, 2, 3], 3)
    steps.submit([4, 5], 3)
    steps.drain()
    assert steps.counters.num_prompt_tokens == 5
    assert steps.counters.num_generated_tokens == 6
    assert steps.counters.num_computed_tokens == 5 + 2 * 2
    assert steps.counters.num_finished_requests == 2
    assert steps.counters.num_steps == 3
    assert steps.counters.num_rows == 6


def test_priority_then_arrival() -> None:
    steps = Steps(max_batch_size=1, max_tokens_per_step=64, max_tokens_per_mixed_step=64)
    order = []
    for index, priority in enumerate([0, 5, 0, 5, -1, 9]):
        steps.submit(prompt_of(3, index), 1, priority=priority)
    while steps.launch() is not None:
        order += [request.request_id for request in steps.collect()]
    assert order == [5, 1, 3, 0, 2, 4]


@pytest.mark.parametrize(("num_blocks", "fits"), [(9, True), (8, False)])
def test_admission_leaves_each_running_request_a_block_to_grow_into(num_blocks: int, fits: bool) -> None:
    # When the second is looked at, the first holds 3 blocks of 4; it wants 4, and 1 stays in reserve: 8 and block 0.
    steps = Steps(num_blocks=num_blocks, max_model_len=28)
    steps.submit(prompt_of(8), 8)
    steps.step()
    second = steps.submit(prompt_of(13, 1), 2)
    steps.step()
    assert second.status is (RequestStatus.RUNNING if fits else RequestStatus.WAITING)
    assert steps.kv_cache.num_used_blocks == (7 if fits else 3)
    steps.drain()
    steps.check_tokens()
    assert steps.counters.num_preemptions == 0


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    steps = Steps(num_blocks=9, max_model_len=32, max_batch_size=8)
    steps.submit(prompt_of(16), 8)
    steps.step()
    steps.submit(prompt_of(20, 1), 2)
    small = steps.submit(prompt_of(2, 2), 2)
    steps.step()
    assert small.status is RequestStatus.WAITING
    steps.drain()
    steps.check_tokens()


def test_victim_has_the_lowest_priority_and_came_last() -> None:
    steps = Steps(num_blocks=9, max_model_len=24, max_batch_size=4)
    kept = steps.submit(prompt_of(4), 12, priority=1)
    low = steps.submit(prompt_of(4, 1), 12, priority=0)
    high = steps.submit(prompt_of(4, 2), 12, priority=2)
    while not steps.counters.num_preemptions:
        steps.step()
    assert low.num_preemptions == 1
    assert low.status is RequestStatus.WAITING
    assert kept.num_preemptions == high.num_preemptions == 0
    steps.drain()
    steps.check_tokens()
    assert kept.num_preemptions == high.num_preemptions == 0


def test_latest_of_equal_priority_gives_way_and_comes_back_before_later_arrivals() -> None:
    steps = Steps(num_blocks=7, max_model_len=24, max_batch_size=4)
    first, last = steps.submit(prompt_of(8), 12), steps.submit(prompt_of(8, 1), 8)
    steps.step()
    later = steps.submit(prompt_of(12, 2), 2)
    while not steps.counters.num_preemptions:
        steps.step()
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)
    ended: list[int] = []
    while steps.launch() is not None:
        ended += [r.request_id for r in steps.collect() if r.status is RequestStatus.FINISHED]
    assert ended == [first.request_id, last.request_id, later.request_id]
    steps.check_tokens()


def test_request_that_was_preempted_enough_is_spared() -> None:
    steps = Steps(num_blocks=9, max_model_len=32, max_batch_size=4, max_preemptions=1, caching=False)
    early, late = steps.submit(prompt_of(12), 16), steps.submit(prompt_of(12, 1), 16)
    while not late.num_preemptions:
        steps.step()
    # Another crowd on the same blocks: now the one that was never preempted has to give way.
    while late.status is RequestStatus.WAITING:
        steps.step()
    rival = steps.submit(prompt_of(8, 2), 20, priority=1)
    steps.drain()
    assert late.num_preemptions == 1
    assert early.stream.log.finish_reason == rival.stream.log.finish_reason == "length"
    steps.check_tokens()


def test_spared_request_outlasts_one_that_is_not() -> None:
    """Requests take blocks in the order in which they are spared; otherwise the wrong one would have to give way."""
    steps = Steps(num_blocks=9, max_model_len=32, max_batch_size=4, max_preemptions=1, caching=False)
    rival = steps.submit(prompt_of(16), 16, priority=2)
    spared = steps.submit(prompt_of(12, 1), 16)
    while not spared.num_preemptions:
        steps.step()
    steps.scheduler.finish(rival, "abort")
    steps.step()
    assert spared.status is RequestStatus.RUNNING
    other = steps.submit(prompt_of(12, 2), 16, priority=1)
    steps.drain()
    assert spared.num_preemptions == 1
    assert other.num_preemptions >= 1
    steps.check_tokens()


@IN_FLIGHT
@pytest.mark.parametrize("seed", range(4))
def test_tiny_pools_make_progress_and_do_not_thrash(in_flight: int, seed: int) -> None:
    rng = random.Random(seed)
    steps = Steps(
        num_blocks=8, max_model_len=28, max_steps_in_flight=in_flight, max_batch_size=6, max_tokens_per_step=16,
        max_tokens_per_mixed_step=8, caching=bool(seed % 2),
    )  # fmt: skip
    num_requests = 20
    for index in range(num_requests):
        steps.submit(prompt_of(rng.randint(1, 14), index), rng.randint(1, 14), priority=rng.randint(0, 1))
    # Each by itself would need at most 14 decodes and 2 chunks.
    steps.drain(max_steps=num_requests * 20)
    steps.check_tokens()
    assert all(request.stream.log.finish_reason == "length" for request in steps.requests)
    assert steps.counters.num_preemptions <= 3 * num_requests


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    # Both slots are taken; the preemption frees one, and blocks enough for the request that waits for a slot.
    steps = Steps(num_blocks=9, max_model_len=32, max_batch_size=2)
    steps.submit(prompt_of(12), 12)
    victim = steps.submit(prompt_of(12, 1), 12)
    steps.step()
    urgent = steps.submit([1, 2], 4, priority=1)
    batch = steps.step()
    while not victim.num_preemptions:
        batch = steps.step()
    assert not batch.slot_inits
    assert urgent.status is RequestStatus.WAITING
    assert [init.slot for init in steps.step().slot_inits] == [urgent.slot]
    steps.drain()
    steps.check_tokens()


def test_output_ends_at_the_context_limit() -> None:
    steps = Steps(num_blocks=7, max_model_len=24)
    request = steps.submit(prompt_of(20), params=tokens(20).replace(max_new_tokens=None))
    steps.drain()
    assert len(request.token_ids) == 24
    assert request.stream.log.finish_reason == "length"
    steps.check_tokens()


@IN_FLIGHT
def test_no_token_is_computed_after_the_last(in_flight: int) -> None:
    steps = Steps(max_steps_in_flight=in_flight)
    steps.submit([1, 2, 3], 5)
    steps.drain()
    assert steps.counters.num_computed_tokens == 3 + 4


@IN_FLIGHT
def test_stop_token_ends_and_later_tokens_are_discarded(in_flight: int) -> None:
    steps = Steps(max_steps_in_flight=in_flight, next_token=counting_model)
    request = steps.submit([ord("a")], 20, stop_token_ids=[ord("d")])
    other = steps.submit([ord("m")], 9)
    steps.drain()
    log = request.stream.log
    assert log.token_ids == list(b"bcd")
    assert (log.finish_reason, log.matched_stop) == ("stop", ord("d"))
    assert other.stream.log.token_ids == list(b"nopqrstuv")
    steps.check_tokens()


def test_min_new_tokens_holds_off_stop_ids_and_strings() -> None:
    steps = Steps(next_token=counting_model)
    by_id = steps.submit([ord("a")], params=tokens(60, min_new_tokens=5), stop_token_ids=[ord("c")])
    params = tokens(60, min_new_tokens=5, stop=("cd",))
    by_text = steps.submit([ord("a")], params=params, tokenizer=ByteTokenizer())
    steps.drain()
    assert len(by_id.stream.log.token_ids) == 28
    assert by_id.stream.log.finish_reason == "stop"
    assert "".join(by_text.stream.log.pieces) == "bcdefghijklmnopqrstuvwxyzab"
    assert by_text.stream.log.matched_stop == "cd"


def test_stop_string_in_the_text_that_the_end_releases_is_a_stop() -> None:
    """An unfinished character becomes U+FFFD only at the end, where it completes the stop string."""
    steps = Steps(next_token=lambda _: 0xC3)
    params = tokens(1, stop=("\ufffd",))
    request = steps.submit([1], params=params, tokenizer=ByteTokenizer())
    steps.drain()
    log = request.stream.log
    assert "".join(log.pieces) == ""
    assert (log.finish_reason, log.matched_stop) == ("stop", "\ufffd")


def test_failed_row_ends_its_request_alone() -> None:
    steps = Steps(next_token=lambda ids: None if ids[0] == 7 and len(ids) == 5 else (ids[-1] + 1) % 256)
    bad, good = steps.submit([7, 1], 9), steps.submit([8, 1], 9)
    steps.drain()
    log = bad.stream.log
    assert log.finish_reason == "error"
    assert log.token_ids == [2, 3, 4]
    assert "not finite" in str(log.error)
    assert good.stream.log.token_ids == list(range(2, 11))
    steps.scheduler.check_integrity()


@IN_FLIGHT
@pytest.mark.parametrize("reason", ["abort", "timeout"])
def test_request_may_end_with_steps_in_flight(in_flight: int, reason: str) -> None:
    assert reason in ("abort", "timeout")
    steps = Steps(max_steps_in_flight=in_flight)
    request, other = steps.submit([1, 2, 3], 20), steps.submit([4, 5], 6)
    steps.step()
    for _ in range(in_flight):
        steps.launch()
    steps.scheduler.finish(request, "abort" if reason == "abort" else "timeout")
    steps.scheduler.check_integrity()
    successor = steps.submit([9, 9, 9, 9, 9], 6)
    steps.drain()
    steps.check_tokens()
    assert len(request.stream.log.token_ids) == 1
    assert len(other.stream.log.token_ids) == len(successor.stream.log.token_ids) == 6


def test_preempted_request_that_ends_while_waiting_leaves_the_queue() -> None:
    steps = Steps(num_blocks=7, max_model_len=24)
    first, last = steps.submit(prompt_of(8), 12), steps.submit(prompt_of(8, 1), 8)
    while not last.num_preemptions:
        steps.step()
    steps.scheduler.finish(last, "abort")
    assert steps.scheduler.num_waiting == 0
    steps.drain()
    assert first.stream.log.finish_reason == "length"
    steps.check_tokens()


def test_ended_requests_do_not_pile_up_in_the_queue() -> None:
    steps = Steps(max_batch_size=1, max_tokens_per_step=8, max_tokens_per_mixed_step=8)
    steps.submit([1], 4)
    steps.step()
    for index in range(500):
        steps.scheduler.finish(steps.submit(prompt_of(3, index), 4), "abort")
    assert list(steps.scheduler.requests()) == steps.requests[:1]
    steps.drain()
    steps.check_tokens()


@IN_FLIGHT
def test_prefix_is_shared_by_content_only(in_flight: int) -> None:
    steps = Steps(max_steps_in_flight=in_flight)
    prompt = prompt_of(17)
    cold = steps.submit(prompt, 4)
    steps.drain()
    warm, other_salt, other_head = steps.submit(prompt, 4), steps.submit(prompt, 4, salt="x"), steps.submit(
        [255, *prompt[1:]], 4
    )  # fmt: skip
    steps.drain()
    steps.check_tokens()
    cached = [request.stream.log.num_cached_tokens for request in (cold, warm, other_salt, other_head)]
    assert cached == [0, 16, 0, 0]
    assert steps.kv_cache.num_queried_tokens == 4 * 17
    assert steps.kv_cache.num_hit_tokens == 16


def test_output_is_findable_as_a_prefix() -> None:
    steps = Steps()
    first = steps.submit(prompt_of(6), 12)
    steps.drain()
    follow_up = steps.submit([*first.token_ids, 1, 2], 4)
    steps.drain()
    steps.check_tokens()
    assert follow_up.stream.log.num_cached_tokens == 16  # 17 tokens were computed: the last is never fed back


def test_preempted_request_reuses_what_it_computed() -> None:
    steps = Steps(num_blocks=8, max_model_len=28)
    first, last = steps.submit(prompt_of(8), 12), steps.submit(prompt_of(8, 1), 8)
    steps.drain()
    steps.check_tokens()
    assert last.num_preemptions == 1
    assert first.num_preemptions == 0
    plain = sum(len(r.prompt_token_ids) + len(r.stream.log.token_ids) - 1 for r in (first, last))
    assert steps.counters.num_computed_tokens < plain + len(last.token_ids)
    assert last.stream.log.num_cached_tokens == 0, "only what others had computed counts as a hit"


def test_slot_takes_over_with_all_known_tokens() -> None:
    steps = Steps(num_blocks=7, max_model_len=24, caching=False)
    steps.submit(prompt_of(8), 12)
    last = steps.submit(prompt_of(8, 1), 8)
    while not last.num_preemptions:
        steps.step()
    known = list(last.token_ids)
    batch = steps.step()
    while not batch.slot_inits:
        batch = steps.step()
    init = batch.slot_inits[0]
    assert list(init.token_ids) == known
    assert init.num_prompt_tokens == 8
    assert list(batch.rows[-1].token_ids) == known
    assert batch.rows[-1].start == 0
