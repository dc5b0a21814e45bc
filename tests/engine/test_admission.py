"""Bounded admission: which requests are refused, and that every place in the queue is given back."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from llmengine.batch import Batch
from llmengine.config import SchedulerConfig
from llmengine.engine import engine
from llmengine.engine.admission import Admission, AdmissionTicket, Applicant
from llmengine.engine.handle import RequestHandle
from llmengine.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    RequestFailedError,
)
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import (
    WAIT_S,
    GatedTokenizer,
    ShiftedTime,
    StepGate,
    assert_idle,
    bounded,
    in_loop,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)


def small_queue(**limits: Any) -> SchedulerConfig:
    """Return limits that let one request run and few wait."""
    return SchedulerConfig(max_batch_size=1, max_tokens_per_step=64, max_tokens_per_mixed_step=64, **limits)


def test_tickets_count_and_come_back_once() -> None:
    admission = Admission(small_queue(max_queued_requests=2, max_queued_tokens=10).resolve())
    first, second = admission.acquire_nowait(), admission.acquire_nowait()
    with pytest.raises(QueueFullError, match="max_queued_requests=2"):
        admission.acquire_nowait()
    first.add_tokens(8)
    with pytest.raises(QueueFullError, match="max_queued_tokens=10"):
        second.add_tokens(3)
    second.release()
    second.release()
    assert (admission.num_requests, admission.num_tokens) == (1, 8)
    first.release()
    assert (admission.num_requests, admission.num_tokens) == (0, 0)


def test_one_long_prompt_fits_an_empty_queue() -> None:
    admission = Admission(small_queue(max_queued_tokens=10).resolve())
    ticket = admission.acquire_nowait()
    ticket.add_tokens(1000)
    assert admission.num_tokens == 1000
    ticket.release()
    assert admission.num_tokens == 0


def test_too_many_requests_are_refused_and_room_is_made_by_starting() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=small_queue(max_queued_requests=2)) as llm:
        running = llm.generate_async([1], tokens(3))
        gate.wait()
        waiting = [llm.generate_async([2], tokens(3)), llm.generate_async("a", tokens(3))]
        assert llm.stats().num_queued == 2
        for prompt in ([3], "b"):
            with pytest.raises(QueueFullError) as caught:
                llm.generate_async(prompt, tokens(3))
            assert caught.value.status == 429
        gate.open()
        for handle in (running, *waiting):
            assert handle.result(WAIT_S).finish_reason == "length"
        assert llm.generate_async([3], tokens(3)).result(WAIT_S).token_ids == oracle([3], 3)
        assert_idle(llm)


async def test_too_many_tokens_are_refused_at_once_or_from_the_handle() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=small_queue(max_queued_tokens=10)) as llm:
        async with timeout():
            running = llm.generate_async([1], tokens(3))
            gate.wait()
            waiting = llm.generate_async([2] * 8, tokens(3))
            with pytest.raises(QueueFullError, match="max_queued_tokens=10"):
                llm.generate_async([3] * 3, tokens(3))
            text = llm.generate_async("abc", tokens(3), streaming=True)
            with pytest.raises(QueueFullError, match="max_queued_tokens=10"):
                await anext(text)
            assert [output async for output in text] == []
            assert llm.stats().num_queued == 1
            gate.open()
            await asyncio.gather(running, waiting)
        assert_idle(llm)


def test_generate_submits_more_prompts_than_the_queue_holds() -> None:
    scheduler = small_queue(max_queued_requests=2, max_queued_tokens=7)
    with make_llm(scheduler=scheduler) as llm:
        prompts = [[index % 250] * (1 + index % 5) for index in range(60)]
        outputs = bounded(lambda: llm.generate(prompts, tokens(2)))
        assert [output.token_ids for output in outputs] == [oracle(prompt, 2) for prompt in prompts]
        assert_idle(llm)


class FailingTokenizer(ByteTokenizer):
    """Cannot encode "bad"."""

    def encode(self, text: str) -> list[int]:
        if text == "bad":
            raise KeyError(text)
        return super().encode(text)


@pytest.mark.parametrize("prompt", ["bad", "", "x" * 400, [], [1] * 400, [999], ["a"]])
def test_place_comes_back_when_the_prompt_is_at_fault(prompt: str | Sequence[int]) -> None:
    fault = RequestFailedError if prompt == "bad" else InvalidRequestError
    with make_llm(tokenizer=FailingTokenizer(), scheduler=small_queue(max_queued_requests=1)) as llm:
        with pytest.raises(fault):
            llm.generate_async(prompt, tokens(2)).result(WAIT_S)
        assert llm.stats().num_queued == 0
        with pytest.raises(fault):
            bounded(lambda: llm.generate([prompt], tokens(2)))
        assert llm.stats().num_queued == 0
        assert_idle(llm)


def test_fault_of_the_tokenizer_is_the_same_error_for_generate() -> None:
    with make_llm(tokenizer=FailingTokenizer()) as llm:
        with pytest.raises(RequestFailedError, match="failed to encode the prompt") as caught:
            bounded(lambda: llm.generate("bad", tokens(2)))
        assert isinstance(caught.value.__cause__, KeyError)


def test_prompt_that_leaves_no_room_is_refused() -> None:
    with make_llm(max_model_len=16) as llm:
        for prompt in ([1] * 16, [1] * 100):
            with pytest.raises(PromptTooLongError, match=f"{len(prompt)} tokens; .*limit is 16"):
                llm.generate_async(prompt, tokens(2))
        assert bounded(lambda: llm.generate([1] * 15, tokens(2)))[0].num_tokens == 1
    with make_llm(num_blocks=4, block_size=4, max_model_len=100) as llm, pytest.raises(PromptTooLongError, match="12"):
        llm.generate_async([1] * 12, tokens(2))


def test_place_comes_back_when_aborted_while_tokenizing() -> None:
    tokenizer = GatedTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=small_queue(max_queued_requests=1)) as llm:
        handle = llm.generate_async("abc", tokens(3))
        tokenizer.wait_begun()
        handle.abort()
        tokenizer.gate.set()
        assert handle.result(WAIT_S).finish_reason == "abort"
        assert_idle(llm)


def test_place_comes_back_when_the_deadline_passes_in_the_queue() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=small_queue(max_queued_requests=1)) as llm:
        running = llm.generate_async([1], tokens(3))
        gate.wait()
        late = llm.generate_async([2], tokens(3), deadline_s=1e-9)
        gate.open()
        output = late.result(WAIT_S)
        assert (output.finish_reason, output.token_ids) == ("timeout", [])
        assert output.timeline.first_scheduled is None
        assert running.result(WAIT_S).num_tokens == 3
        assert_idle(llm)


def test_place_comes_back_when_the_engine_dies() -> None:
    gate = StepGate()

    def on_step(batch: Batch) -> None:
        gate(batch)
        raise KeyError("device")

    llm = make_llm(on_step=on_step, scheduler=small_queue(max_queued_requests=4))
    running = llm.generate_async([1], tokens(3))
    gate.wait()
    waiting = [llm.generate_async([2], tokens(3)) for _ in range(3)]
    gate.open()
    for handle in (running, *waiting):
        with pytest.raises(EngineDeadError):
            handle.result(WAIT_S)
    bounded(llm.close)
    assert llm.stats().num_queued == 0


def test_place_comes_back_when_the_engine_closes() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    handles = [llm.generate_async([1], tokens(200))]
    gate.wait()
    handles += [llm.generate_async([2], tokens(200)) for _ in range(3)]
    closing = start(llm.close)
    gate.open()
    closing.result(WAIT_S)
    for handle in handles:
        assert handle.result(WAIT_S).finish_reason == "abort"
    assert llm.stats().num_queued == 0


def test_refused_request_gives_its_place_back() -> None:
    """The backend's last act submits a request: the engine takes the command and never runs it."""
    handles: list[RequestHandle] = []

    def fail(batch: Batch) -> None:
        handles.append(llm.generate_async([2], tokens(3)))
        raise KeyError("device")

    llm = make_llm(on_step=fail)
    with pytest.raises(EngineDeadError):
        llm.generate_async([1], tokens(3)).result(WAIT_S)
    with pytest.raises(EngineDeadError):
        handles[0].result(WAIT_S)
    assert llm.stats().num_queued == 0
    bounded(llm.close)


@pytest.mark.parametrize("ending", ["close", "death"])
def test_generate_that_waits_for_room_hears_of_the_end(ending: str) -> None:
    """The only place is held by a prompt that is being tokenized, and stays so."""
    tokenizer = GatedTokenizer()
    gate = StepGate()

    def on_step(batch: Batch) -> None:
        gate(batch)
        if ending == "death":
            raise KeyError("device")

    llm = make_llm(on_step=on_step, tokenizer=tokenizer, scheduler=small_queue(max_queued_requests=1))
    running = llm.generate_async([1], tokens(1 if ending == "death" else 200))
    gate.wait()
    held = llm.generate_async("abc", tokens(3))
    tokenizer.wait_begun()
    begun = threading.Event()

    def generate() -> None:
        begun.set()
        llm.generate([[5], [6]], tokens(3))

    waiting = start(generate)
    assert begun.wait(WAIT_S)
    assert not waiting.done()
    gate.open()
    if ending == "close":
        bounded(llm.close)
    with pytest.raises(EngineClosedError if ending == "close" else EngineDeadError):
        waiting.result(WAIT_S)
    tokenizer.gate.set()
    with pytest.raises((EngineClosedError, EngineDeadError)):
        held.result(WAIT_S)
    if ending == "death":
        with pytest.raises(EngineDeadError):
            running.result(WAIT_S)
    bounded(llm.close)
    assert llm.stats().num_queued == 0


class Room:
    """An `Admission` with a limit, and the names of those let in, in order."""

    def __init__(self, max_queued_requests: int, **settings: Any) -> None:
        config = small_queue(max_queued_requests=max_queued_requests, **settings)
        self.admission = Admission(config.resolve())
        self.inside: list[tuple[str, AdmissionTicket]] = []

    def enter(self, name: str, **options: Any) -> Applicant:
        """Apply for a place under a name."""
        return self.admission.apply(lambda ticket: self.inside.append((name, ticket)), **options)

    def names(self) -> str:
        """Return the names of all that were let in so far."""
        return "".join(name for name, _ in self.inside)


def test_applicants_are_let_in_as_room_comes_up_first_come_first_served() -> None:
    room = Room(2)
    for name in "abcde":
        room.enter(name)
    assert room.names() == "ab"
    assert room.admission.num_applicants == 3
    with pytest.raises(QueueFullError, match="max_queued_requests=2"):
        room.admission.acquire_nowait()
    for index in range(3):
        room.inside[index][1].release()
    assert room.names() == "abcde"
    assert room.admission.num_applicants == 0


def test_nobody_overtakes_an_applicant_that_waits_for_tokens() -> None:
    room = Room(9, max_queued_tokens=10)
    room.enter("a")
    room.inside[0][1].add_tokens(10)
    room.enter("b")
    with pytest.raises(QueueFullError, match="max_queued_tokens=10"):
        room.admission.acquire_nowait()
    room.inside[0][1].release()
    assert room.names() == "ab"
    room.admission.acquire_nowait().release()


def test_tenants_are_let_in_by_turns_and_weight() -> None:
    room = Room(1, tenant_weights={"c": 2.0})
    room.enter("-")
    for tenant in "aaaaaabbccccc":
        room.enter(tenant, tenant=tenant)
    for index in range(10):
        room.inside[index][1].release()
    assert Counter(room.names()[1:9]) == {"a": 2, "b": 2, "c": 4}


def test_urgent_applicants_come_first_among_their_tenants() -> None:
    room = Room(1)
    room.enter("-")
    for name, priority in (("x", 0), ("y", 2), ("z", 1)):
        room.enter(name, priority=priority)
    for index in range(3):
        room.inside[index][1].release()
    assert room.names() == "-yzx"


def test_an_applicant_that_withdraws_is_passed_over() -> None:
    room = Room(1)
    first, second, third = (room.enter(name) for name in "abc")
    assert not room.admission.withdraw(first), "it has its ticket"
    assert room.admission.withdraw(second)
    assert not room.admission.withdraw(second)
    room.inside[0][1].release()
    assert room.names() == "ac"
    room.inside[1][1].release()
    assert not room.admission.withdraw(third)
    assert (room.admission.num_requests, room.admission.num_applicants) == (0, 0)


def test_no_place_is_lost_between_threads() -> None:
    """Threads apply, wait, withdraw and release at random: all that stay are let in, and the room ends empty."""
    admission = Admission(small_queue(max_queued_requests=3).resolve())
    inside = threading.Semaphore(3)

    def visit(seed: int) -> int:
        rng = random.Random(seed)
        num_visits = 0
        for _ in range(200):
            if rng.random() < 0.3:
                tickets: list[AdmissionTicket] = []
                applicant = admission.apply(tickets.append, tenant=f"t{seed % 3}")
                if not admission.withdraw(applicant):
                    while not tickets:
                        pass
                    tickets[0].release()
                continue
            ticket = admission.acquire_blocking(f"t{seed % 3}", rng.randint(0, 2))
            assert inside.acquire(blocking=False), "more are inside than there is room for"
            num_visits += 1
            inside.release()
            ticket.release()
        return num_visits

    visitors = [start(partial(visit, seed)) for seed in range(8)]
    assert sum(visitor.result(WAIT_S) for visitor in visitors) > 1000
    assert (admission.num_requests, admission.num_applicants) == (0, 0)


def test_waiting_for_admission_serves_more_than_the_queue_holds() -> None:
    scheduler = small_queue(max_queued_requests=2, max_queued_tokens=7)
    with make_llm(scheduler=scheduler) as llm:
        prompts = [[index % 250] * (1 + index % 5) for index in range(40)]
        handles = [llm.generate_async(prompt, tokens(2), wait_for_admission=True) for prompt in prompts]
        texts = [llm.generate_async("ab", tokens(2), wait_for_admission=True) for _ in range(5)]
        for prompt, handle in zip(prompts, handles, strict=True):
            assert handle.result(WAIT_S).token_ids == oracle(prompt, 2)
        assert all(handle.result(WAIT_S).token_ids == oracle(list(b"ab"), 2) for handle in texts)
        assert_idle(llm)


def test_prompts_at_fault_are_refused_at_once_or_from_the_handle_when_waiting() -> None:
    with make_llm(max_model_len=16, scheduler=small_queue(max_queued_requests=1)) as llm:
        for prompt in ([], [1] * 16, [999]):
            with pytest.raises(InvalidRequestError):
                llm.generate_async(prompt, tokens(2), wait_for_admission=True)
        with pytest.raises(PromptTooLongError):
            llm.generate_async("x" * 40, tokens(2), wait_for_admission=True).result(WAIT_S)
        assert_idle(llm)


def outside(llm: LLM, **options: Any) -> RequestHandle:
    """Return a request that waits for admission."""
    return llm.generate_async([7], tokens(3), wait_for_admission=True, **options)


async def test_a_request_that_waits_for_admission_can_be_cancelled_in_every_way() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=small_queue(max_queued_requests=1)) as llm:
        async with timeout():
            running = llm.generate_async([1], tokens(2))
            gate.wait()
            queued = llm.generate_async([2], tokens(2))
            aborted, closed, last = outside(llm), outside(llm), outside(llm)
            dropped = outside(llm)
            awaiting = asyncio.ensure_future(_result(outside(llm)))
            reading = asyncio.ensure_future(anext(outside(llm, deadline_s=60)))
            await asyncio.sleep(0)
            awaiting.cancel()
            reading.cancel()
            aborted.abort()
            await closed.aclose()
            del dropped
            for task in (awaiting, reading):
                with pytest.raises(asyncio.CancelledError):
                    await task
            gate.open()
            for handle in (running, queued, last):
                assert (await handle).finish_reason == "length"
            output = await aborted
            assert (output.finish_reason, output.token_ids) == ("abort", [])
        assert_idle(llm)
        assert llm.stats().counters.num_prompt_tokens == 4, "and those that left were never begun"


async def _result(handle: RequestHandle) -> GenerationOutput:
    return await handle


@pytest.mark.parametrize("seed", range(3))
def test_waiting_in_several_loops_with_cancellation_at_any_moment_loses_nobody(seed: int) -> None:
    scheduler = SchedulerConfig(max_batch_size=2, max_tokens_per_step=64, max_tokens_per_mixed_step=64,
                                max_queued_requests=2)  # fmt: skip
    with make_llm(scheduler=scheduler) as llm:

        async def visit(rng: random.Random) -> str:
            prompt = "ab" if rng.random() < 0.3 else [rng.randrange(256)]
            tenant = rng.choice([None, "a", "b"])
            handle = llm.generate_async(prompt, tokens(3), tenant=tenant, wait_for_admission=True)
            task = asyncio.ensure_future(_result(handle))
            if rng.random() < 0.5:
                for _ in range(rng.randrange(200)):
                    await asyncio.sleep(0)
                task.cancel()
            try:
                return (await task).finish_reason or ""
            except asyncio.CancelledError:
                return "cancelled"

        async def crowd(seed: int) -> list[str]:
            rng = random.Random(seed)
            return list(await asyncio.gather(*(visit(random.Random(rng.random())) for _ in range(60))))

        endings = Counter[str]()
        for visits in [start(partial(in_loop, partial(crowd, 10 * seed + index))) for index in range(3)]:
            endings.update(visits.result(WAIT_S))
        assert set(endings) == {"length", "cancelled"}
        assert endings["length"] >= 80
        assert_idle(llm)


def test_cancelled_between_the_grant_and_the_first_step() -> None:
    """The request is aborted while it is being tokenized."""
    tokenizer = GatedTokenizer()
    gate = StepGate()
    with make_llm(on_step=gate, tokenizer=tokenizer, scheduler=small_queue(max_queued_requests=1)) as llm:
        running = llm.generate_async([1], tokens(2))
        gate.wait()
        queued = llm.generate_async([2], tokens(2))
        handle = llm.generate_async("abc", tokens(2), wait_for_admission=True)
        gate.open()
        tokenizer.wait_begun()
        handle.abort()
        tokenizer.gate.set()
        assert handle.result(WAIT_S).finish_reason == "abort"
        assert running.result(WAIT_S).num_tokens == queued.result(WAIT_S).num_tokens == 2
        assert_idle(llm)


def test_deadlines_pass_while_waiting_for_admission_and_the_engine_sleeps() -> None:
    """The only place is held by a prompt that is being tokenized, so no step looks at the time."""
    tokenizer = GatedTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=small_queue(max_queued_requests=1)) as llm:
        held = llm.generate_async("abc", tokens(2))
        tokenizer.wait_begun()
        for options in ({"deadline_s": 0.02}, {"first_token_deadline_s": 0.02}):
            assert outside(llm, **options).result(WAIT_S).finish_reason == "timeout"
        patient = outside(llm, deadline_s=60.0)
        tokenizer.gate.set()
        assert held.result(WAIT_S).num_tokens == 2
        assert patient.result(WAIT_S).num_tokens == 3
        assert_idle(llm)


@pytest.mark.parametrize("ending", ["close", "drain", "death"])
def test_requests_that_wait_for_admission_hear_of_the_end(ending: str) -> None:
    gate = StepGate()

    def on_step(batch: Batch) -> None:
        gate(batch)
        if ending == "death":
            raise KeyError("device")

    llm = make_llm(on_step=on_step, scheduler=small_queue(max_queued_requests=1))
    running = llm.generate_async([1], tokens(3))
    gate.wait()
    queued = llm.generate_async([2], tokens(3))
    waiting = [outside(llm) for _ in range(3)]
    closing = (
        start(lambda: asyncio.run(llm.aclose(WAIT_S if ending == "drain" else 0.0))) if ending != "death" else None
    )
    while closing is not None and llm.health().state == "ready":
        pass
    gate.open()
    for handle in waiting:
        with pytest.raises(EngineDeadError if ending == "death" else EngineClosedError):
            handle.result(WAIT_S)
    if ending == "drain":
        assert running.result(WAIT_S).num_tokens == queued.result(WAIT_S).num_tokens == 3
    if closing is not None:
        closing.result(WAIT_S)
    bounded(llm.close)
    assert llm.stats().num_queued == 0


def test_first_token_deadline_ends_what_has_no_token_and_spares_what_has() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=small_queue()) as llm:
        running = llm.generate_async([1], tokens(4), first_token_deadline_s=60.0, deadline_s=120.0)
        gate.wait()
        late = llm.generate_async([2], tokens(3), first_token_deadline_s=1e-9)
        gate.step()
        assert late.result(WAIT_S).finish_reason == "timeout"
        gate.open()
        assert running.result(WAIT_S).finish_reason == "length"
        assert_idle(llm)


def test_first_token_deadline_does_not_hide_the_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, clock = StepGate(), ShiftedTime()
    monkeypatch.setattr(engine, "time", clock)
    with make_llm(on_step=gate, scheduler=small_queue()) as llm:
        handle = llm.generate_async([1], tokens(250), first_token_deadline_s=300.0, deadline_s=400.0)
        gate.wait()
        gate.step()
        clock.ahead_s = 350.0
        gate.step()
        clock.ahead_s = 401.0
        gate.open()
        output = handle.result(WAIT_S)
        assert output.finish_reason == "timeout"
        assert output.token_ids == oracle([1], 3)
        assert_idle(llm)
