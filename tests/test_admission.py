"""Bounded admission: what is refused, and that every place in the queue is given back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from engine_helpers import (
    WAIT_S,
    GatedTokenizer,
    RecordingBackend,
    StepGate,
    assert_idle,
    bounded,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)

from llmengine.batch import Batch
from llmengine.config import SchedulerConfig
from llmengine.engine.admission import Admission
from llmengine.engine.handle import RequestHandle
from llmengine.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
)
from llmengine.tokenizer import ByteTokenizer


def small_queue(**limits: int) -> SchedulerConfig:
    """Return limits of one request that runs, and few that wait."""
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
    with make_llm(tokenizer=FailingTokenizer(), scheduler=small_queue(max_queued_requests=1)) as llm:
        with pytest.raises(InvalidRequestError):
            llm.generate_async(prompt, tokens(2)).result(WAIT_S)
        assert llm.stats().num_queued == 0
        with pytest.raises(InvalidRequestError):
            bounded(lambda: llm.generate([prompt], tokens(2)))
        assert llm.stats().num_queued == 0
        assert_idle(llm)


def test_fault_of_the_tokenizer_is_the_same_error_for_generate() -> None:
    with make_llm(tokenizer=FailingTokenizer()) as llm:
        with pytest.raises(InvalidRequestError, match="could not be tokenized") as caught:
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

    class Submitting(RecordingBackend):
        def close(self) -> None:
            super().close()
            if not handles and llm.health().state == "ready":
                handles.append(llm.generate_async([2], tokens(3)))

    def fail(batch: Batch) -> None:
        raise KeyError("device")

    llm = make_llm(backend=Submitting, on_step=fail)
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
