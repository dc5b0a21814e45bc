"""How an engine ends, and how requests end that do not simply finish."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy
import pytest

from llmengine.batch import BackendInfo, Batch, StepResult
from llmengine.config import SchedulerConfig
from llmengine.engine import engine, owner
from llmengine.engine.handle import RequestHandle
from llmengine.engine.request import Request
from llmengine.engine.stream import OutputStream
from llmengine.errors import (
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    LLMEngineError,
    PromptTooLongError,
    RequestFailedError,
)
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput, OutputLog
from llmengine.sampling_params import SamplingParams
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import (
    WAIT_S,
    GatedTokenizer,
    Panic,
    RecordingBackend,
    ShiftedTime,
    StepGate,
    assert_concatenates,
    assert_idle,
    bounded,
    heeding_ctrl_c,
    interrupt_main_in,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)


def engine_threads() -> set[threading.Thread]:
    """Return the threads of all engines that run."""
    return {thread for thread in threading.enumerate() if thread.name == "llmengine"}


@pytest.fixture
def backends() -> list[RecordingBackend]:
    """The backends that factories from `keep` have made."""
    return []


@pytest.fixture
def keep(backends: list[RecordingBackend]) -> Callable[..., RecordingBackend]:
    """Return a factory that remembers the backends it makes."""

    def make(**options: Any) -> RecordingBackend:
        backends.append(RecordingBackend(**options))
        return backends[-1]

    return make


def assert_closed_once(backends: Sequence[RecordingBackend]) -> None:
    """Assert that one backend was made and closed once, both on the same thread, which is not a caller's."""
    (backend,) = backends
    assert backend.closed_by == [backend.made_by]
    assert backend.made_by != threading.get_ident()


def test_close_is_idempotent(backends: list[RecordingBackend], keep: Callable[..., Any]) -> None:
    llm = make_llm(backend=keep)
    bounded(lambda: llm.generate([1], tokens(2)))
    for _ in range(3):
        bounded(llm.close)
    assert_closed_once(backends)
    assert llm.health().state == "closed"
    assert not llm.health().ok


def test_close_from_several_threads_during_a_step(backends: list[RecordingBackend], keep: Callable[..., Any]) -> None:
    """Every call returns after the engine has ended, not only the first."""
    gate = StepGate()
    llm = make_llm(backend=keep, on_step=gate)
    handle = llm.generate_async([1], tokens(50))
    gate.wait()
    num_closed_at_return = []

    def close() -> None:
        llm.close()
        num_closed_at_return.append(len(backends[0].closed_by))

    barrier = threading.Barrier(4, timeout=WAIT_S)

    def close_together() -> None:
        barrier.wait()
        close()

    closing = [start(close_together) for _ in range(3)]
    barrier.wait()
    assert not concurrent.futures.wait(closing, 0.05, concurrent.futures.FIRST_COMPLETED).done
    gate.open()
    for future in closing:
        future.result(WAIT_S)
    assert num_closed_at_return == [1, 1, 1]
    assert handle.result(WAIT_S).finish_reason == "abort"
    assert_closed_once(backends)


async def test_aclose_twice_and_then_close(backends: list[RecordingBackend], keep: Callable[..., Any]) -> None:
    llm = make_llm(backend=keep)
    async with timeout():
        await asyncio.gather(llm.aclose(), llm.aclose(drain=5))
        await llm.aclose()
    llm.close()
    assert_closed_once(backends)


async def test_context_managers_close() -> None:
    with make_llm() as llm:
        pass
    assert llm.health().state == "closed"
    async with timeout(), make_llm() as llm:
        assert (await llm.generate_async([1], tokens(1))).num_tokens == 1
    assert llm.health().state == "closed"


async def test_cancelled_aclose_still_stops_the_engine() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    async with timeout():
        handle = llm.generate_async([1], tokens(50))
        gate.wait()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await llm.aclose()
        gate.open()
        assert (await handle).finish_reason == "abort"
        await llm.aclose()
    assert llm.health().state == "closed"


async def test_drain_finishes_what_fits() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    async with timeout():
        handles = [llm.generate_async([index], tokens(20), streaming=True) for index in range(3)]
        gate.wait()
        closing = asyncio.ensure_future(llm.aclose(drain=WAIT_S))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError):
            llm.generate_async([9], tokens(1))
        gate.open()
        await closing
        for index, handle in enumerate(handles):
            assert (await handle).token_ids == oracle([index], 20)


async def test_drain_gives_up_when_its_time_is_over() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    async with timeout():
        handle = llm.generate_async([1], tokens(200))
        gate.wait()
        closing = asyncio.ensure_future(llm.aclose(drain=1e-6))
        await asyncio.sleep(0)
        gate.open()
        await closing
        assert (await handle).finish_reason == "abort"


async def test_drain_of_an_idle_engine_does_not_wait() -> None:
    llm = make_llm()
    async with timeout():
        await llm.aclose(drain=10 * WAIT_S)
    assert llm.health().state == "closed"


@pytest.mark.parametrize("drain", [None, True, False, "1", -1, -0.5, math.nan, -math.inf, [1], {}, 1j, object(), b"5"])
async def test_a_faulty_drain_closes_nothing(drain: Any) -> None:
    async with timeout():
        with make_llm() as llm:
            with pytest.raises(InvalidRequestError, match=r"drain must be a number of seconds of at least 0, not "):
                await llm.aclose(drain=drain)
            assert llm.health().state == "ready"
            assert (await llm.generate_async([1], tokens(3))).token_ids == oracle([1], 3)


@pytest.mark.parametrize("drain", [math.inf, 5, Fraction(9, 2), numpy.float32(4.5), numpy.int64(5), 10**30])
async def test_any_number_of_seconds_is_a_drain(drain: Any) -> None:
    async with timeout():
        llm = make_llm()
        handle = llm.generate_async([1], tokens(3))
        await llm.aclose(drain=drain)
        assert (await handle).token_ids == oracle([1], 3)
        await llm.aclose(drain=drain)  # once more, when the engine is closed


@pytest.mark.parametrize("prompt", [[1], "a"])
def test_closed_engine_takes_nothing(prompt: Any) -> None:
    llm = make_llm()
    llm.close()
    with pytest.raises(EngineClosedError) as caught:
        llm.generate_async(prompt, tokens(1))
    assert caught.value.status == 503
    with pytest.raises(EngineClosedError):
        bounded(lambda: llm.generate(prompt, tokens(1)))
    assert llm.stats().num_queued == 0


def test_prompt_that_is_tokenized_while_the_engine_closes_fails() -> None:
    tokenizer = GatedTokenizer()
    llm = make_llm(tokenizer=tokenizer)
    handles = [llm.generate_async("abc", tokens(3)) for _ in range(10)]
    tokenizer.wait_begun()
    bounded(llm.close)
    tokenizer.gate.set()
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(WAIT_S)
    assert llm.stats().num_queued == 0


async def read_all(handle: RequestHandle, outputs: list[GenerationOutput]) -> None:
    """Append what the handle gives until it ends or raises."""
    async for output in handle:
        outputs.append(output)  # noqa: PERF401


class Fault(Exception):
    """A fault of a device."""


class FailingInLaunch(RecordingBackend):
    """Fails in its third step."""

    def launch(self, batch: Batch) -> None:
        if batch.step == 3:
            raise Fault("launch")
        super().launch(batch)


class FailingInCollect(RecordingBackend):
    """Fails in its third step."""

    def collect(self) -> StepResult:
        result = super().collect()
        if result.step == 3:
            raise Fault("collect")
        return result


@pytest.mark.parametrize("kind", [FailingInLaunch, FailingInCollect])
@pytest.mark.parametrize("in_flight", [1, 2])
async def test_fault_of_the_backend_fails_every_stream(kind: type[RecordingBackend], in_flight: int) -> None:
    made = []

    def make(**options: Any) -> RecordingBackend:
        made.append(kind(**options))
        return made[-1]

    gate = StepGate()
    scheduler = SchedulerConfig(max_batch_size=2)
    llm = make_llm(backend=make, max_steps_in_flight=in_flight, scheduler=scheduler, on_step=gate)
    async with timeout():
        handles = [llm.generate_async([0], tokens(50), streaming=True)]
        gate.wait()
        handles += [llm.generate_async([index], tokens(50), streaming=True) for index in range(1, 5)]
        text = llm.generate_async("text", tokens(50))
        gate.open()
        for handle in (*handles, text):
            outputs: list[GenerationOutput] = []
            with pytest.raises(EngineDeadError) as caught:
                await read_all(handle, outputs)
            assert isinstance(caught.value.__cause__, Fault)
            assert all(not output.finished for output in outputs)
            assert [output async for output in handle] == []
            with pytest.raises(EngineDeadError):
                await handle
        with pytest.raises(EngineDeadError) as caught:
            llm.generate_async([1], tokens(1))
        assert isinstance(caught.value.__cause__, Fault)
        with pytest.raises(EngineDeadError):
            await asyncio.to_thread(llm.generate, ["a"], tokens(1))
        health = llm.health()
        assert (health.state, health.ok) == ("dead", False)
        assert health.failure is not None
        assert "Fault" in health.failure
        await llm.aclose()
    bounded(llm.close)
    assert llm.health().state == "dead"
    assert llm.stats().num_queued == 0
    assert_closed_once(made)


async def test_consumer_that_waits_hears_of_the_fault() -> None:
    gate = StepGate()

    def on_step(batch: Batch) -> None:
        gate(batch)
        if len(gate.batches) == 2:
            raise Fault

    llm = make_llm(on_step=on_step)
    async with timeout():
        handle = llm.generate_async([1], tokens(9), streaming=True)
        gate.wait()
        gate.step()
        outputs = [await anext(handle)]
        in_thread = start(lambda: handle.result(WAIT_S))
        waiting = asyncio.ensure_future(anext(handle))
        await asyncio.sleep(0)
        gate.open()
        with pytest.raises(EngineDeadError):
            await waiting
        with pytest.raises(EngineDeadError):
            await asyncio.wrap_future(in_thread)
    assert outputs[0].token_ids == oracle([1], 1)
    bounded(llm.close)


def test_log_handler_that_fails_keeps_no_consumer_from_hearing_of_the_fault() -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    def on_step(batch: Batch) -> None:
        raise Fault

    logger, handler = logging.getLogger("llmengine"), Failing()
    logger.addHandler(handler)
    try:
        llm = make_llm(on_step=on_step)
        with pytest.raises(EngineDeadError) as caught:
            llm.generate_async([1], tokens(9)).result(WAIT_S)
        assert isinstance(caught.value.__cause__, Fault)
        bounded(llm.close)
    finally:
        logger.removeHandler(handler)


async def test_what_came_before_the_fault_can_be_read() -> None:
    gate = StepGate()

    def on_step(batch: Batch) -> None:
        gate(batch)
        if len(gate.batches) == 4:
            raise Fault

    llm = make_llm(on_step=on_step)
    async with timeout():
        handle = llm.generate_async([1], tokens(9), streaming=True)
        gate.open()
        await llm.aclose(drain=WAIT_S)
        outputs: list[GenerationOutput] = []
        with pytest.raises(EngineDeadError):
            await read_all(handle, outputs)
    assert [output.token_ids for output in outputs] == [oracle([1], 3)]
    assert not outputs[0].finished


def test_fault_while_loading_is_raised_and_ends_the_thread() -> None:
    def fail() -> FakeBackend:
        raise Fault("no memory")

    before = engine_threads()
    with pytest.raises(Fault, match="no memory"):
        LLM.from_backend(fail)
    for thread in engine_threads() - before:
        bounded(thread.join)


def test_llm_whose_thread_cannot_be_started_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def fail_to_make() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                make_llm()
        gc.collect()

    monkeypatch.setattr(owner, "_EXIT_TIMEOUT_S", 10 * WAIT_S)  # what an engine may take to end
    bounded(fail_to_make)


def test_fault_in_reading_the_backends_facts_closes_it() -> None:
    made = []

    class NoInfo(RecordingBackend):
        @property
        def info(self) -> BackendInfo:
            raise Fault("info")

    def make() -> FakeBackend:
        made.append(NoInfo())
        return made[-1]

    with pytest.raises(Fault, match="info"):
        LLM.from_backend(make)
    assert_closed_once(made)


def test_failing_row_fails_its_request_alone() -> None:
    def model(token_ids: Sequence[int]) -> int | None:
        return None if token_ids[0] == 66 and len(token_ids) >= 4 else 97

    with make_llm(next_token=model) as llm:
        bad, good = bounded(lambda: llm.generate([[66, 1], [67, 1]], tokens(6)))
        assert bad.finish_reason == "error"
        assert isinstance(bad.error, RequestFailedError)
        assert "not finite" in str(bad.error)
        assert bad.text == "aa"
        assert "error=" in repr(bad)
        assert (good.finish_reason, good.error, good.text) == ("length", None, "aaaaaa")
        assert llm.health().ok
        assert_idle(llm)


@pytest.mark.parametrize("fault", [KeyError, Panic])
async def test_tokenizer_that_fails_to_decode_fails_its_request_alone(fault: type[BaseException]) -> None:
    class Broken(ByteTokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            if 255 in token_ids:
                raise fault("255")
            return super().decode(token_ids)

    with make_llm(tokenizer=Broken(), next_token=lambda ids: 255 if ids[0] == 1 and len(ids) == 5 else 97) as llm:
        async with timeout():
            bad = llm.generate_async([1, 2], tokens(9), streaming=True)
            good = llm.generate_async([2, 2], tokens(9))
            outputs = [output async for output in bad]
            assert (await good).text == "a" * 9
        assert_concatenates(outputs)
        assert outputs[-1].finish_reason == "error"
        assert isinstance(outputs[-1].error, RequestFailedError)
        assert isinstance(outputs[-1].error.__cause__, fault)
        assert outputs[-1].text == "aaa"
        # Also where the prompt's own ids cannot be decoded, which is found at submission.
        with pytest.raises((LLMEngineError, Panic), match="255"):
            llm.generate_async([255], tokens(1)).result(WAIT_S)
        assert_idle(llm)


def test_deadline_ends_a_running_request_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, clock = StepGate(), ShiftedTime()
    monkeypatch.setattr(engine, "time", clock)
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async([1, 2], tokens(200), streaming=True, deadline_s=600.0)
        gate.wait()
        for _ in range(3):
            gate.step()
        clock.ahead_s = 601.0
        gate.open()
        output = handle.result(WAIT_S)
        assert output.finish_reason == "timeout"
        assert output.token_ids == oracle([1, 2], 4)
        assert_idle(llm)


def test_deadlines_pass_in_order_while_others_run() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_batch_size=1)) as llm:
        running = llm.generate_async([1], tokens(20))
        gate.wait()
        late = [llm.generate_async([2], tokens(5), deadline_s=seconds) for seconds in (1e-9, 1e-6, 1e-9)]
        in_time = llm.generate_async([3], tokens(5), deadline_s=1000.0)
        gate.open()
        for handle in late:
            assert handle.result(WAIT_S).finish_reason == "timeout"
            assert handle.result(WAIT_S).text == ""
        assert in_time.result(WAIT_S).token_ids == oracle([3], 5)
        assert running.result(WAIT_S).token_ids == oracle([1], 20)
        assert_idle(llm)


def test_unbounded_deadline_is_none() -> None:
    with make_llm() as llm:
        assert llm.generate_async([3], tokens(5), deadline_s=float("inf")).result(WAIT_S).num_tokens == 5
        assert_idle(llm)


def test_collected_llm_stops_its_thread() -> None:
    before = engine_threads()
    llm = make_llm()
    llm.generate_async([1], tokens(2)).result(WAIT_S)
    (thread,) = engine_threads() - before
    del llm
    gc.collect()
    bounded(thread.join)


def test_handle_keeps_its_llm_open_and_no_longer_than_itself() -> None:
    before = engine_threads()
    llm = make_llm()
    gone = weakref.ref(llm)
    handle = llm.generate_async([1], tokens(50))
    del llm
    gc.collect()
    (thread,) = engine_threads() - before
    assert handle.result(WAIT_S).token_ids == oracle([1], 50)
    del handle
    gc.collect()
    assert gone() is None
    bounded(thread.join)


def count(*kinds: type) -> int:
    """Return how many objects of these types are alive."""
    gc.collect()
    return sum(type(item) in kinds for item in gc.get_objects())


def is_deadline(item: object) -> bool:
    """Return whether this may be an entry of a queue by time."""
    return type(item) is tuple and bool(item) and type(item[0]) is float


@pytest.mark.parametrize("deadline_s", [None, 1e6])
@pytest.mark.parametrize("way", ["finish", "abort", "queued abort", "text"])
def test_nothing_stays_of_requests_that_ended(way: str, deadline_s: float | None) -> None:
    kinds = (Request, OutputStream, OutputLog, RequestHandle, GenerationOutput)
    scheduler = SchedulerConfig(max_batch_size=2, max_queued_requests=5000)
    gate = StepGate()
    with make_llm(scheduler=scheduler, on_step=gate) as llm:
        if way != "queued abort":
            gate.open()
        num_before = count(*kinds)
        blocker = llm.generate_async([1], tokens(2))
        for index in range(10):
            prompt = "ab" if way == "text" else [index, 1]
            handles = [llm.generate_async(prompt, tokens(2), deadline_s=deadline_s) for _ in range(50)]
            for handle in handles:
                if "abort" in way:
                    handle.abort()
                if way != "queued abort":
                    handle.result(WAIT_S)
            gate.batches.clear()
        gate.open()
        blocker.result(WAIT_S)
        del handle, handles, blocker
        assert_idle(llm)
        gate.batches.clear()
        assert count(*kinds) <= num_before + 4
        assert not [
            item for item in gc.get_objects() if type(item) is list and len(item) > 300 and is_deadline(item[0])
        ]


def test_gone_streams_are_freed_without_the_collector() -> None:
    with make_llm() as llm:
        handle = llm.generate_async([1], tokens(2))
        output = handle.result(WAIT_S)
        stream = weakref.ref(handle)
        gc.collect()
        gc.disable()
        try:
            del handle
            assert stream() is None
        finally:
            gc.enable()
        assert output.token_ids == oracle([1], 2)


async def test_draining_waits_for_prompts_that_are_being_tokenized() -> None:
    tokenizer = GatedTokenizer()
    llm = LLM.from_backend(FakeBackend, tokenizer=tokenizer)
    async with asyncio.timeout(WAIT_S):
        accepted = llm.generate_async("accepted", SamplingParams(max_new_tokens=3))
        closing = asyncio.create_task(llm.aclose(drain=WAIT_S))
        await asyncio.to_thread(tokenizer.wait_begun)
        while llm.health().state != "draining":
            await asyncio.to_thread(lambda: None)
        with pytest.raises(EngineClosedError):
            llm.generate_async([1])
        tokenizer.gate.set()
        assert (await accepted).finish_reason == "length"
        await closing


async def test_draining_does_not_wait_for_a_prompt_that_is_rejected() -> None:
    tokenizer = GatedTokenizer()
    llm = LLM.from_backend(lambda: FakeBackend(max_model_len=8), tokenizer=tokenizer)
    async with asyncio.timeout(WAIT_S):
        rejected = llm.generate_async("far too long a prompt")
        await asyncio.to_thread(tokenizer.wait_begun)
        closing = asyncio.create_task(llm.aclose(drain=10 * WAIT_S))
        await asyncio.to_thread(lambda: None)
        tokenizer.gate.set()
        with pytest.raises(PromptTooLongError):
            await rejected
        await closing


async def test_draining_does_not_wait_for_a_blocking_prompt_that_is_rejected() -> None:
    class Broken(GatedTokenizer):
        """A tokenizer that fails at bad words, which are encoded once the request has its place in the queue."""

        def encode(self, text: str) -> list[int]:
            if "bad" not in text:
                return list(text.encode())
            super().encode(text)
            raise KeyError(text)

    tokenizer = Broken()
    llm = LLM.from_backend(FakeBackend, tokenizer=tokenizer)
    async with asyncio.timeout(WAIT_S):
        rejected = asyncio.wrap_future(start(lambda: llm.generate("good", tokens(1, bad_words=["bad"]))))
        await asyncio.to_thread(tokenizer.wait_begun)
        closing = asyncio.create_task(llm.aclose(drain=10 * WAIT_S))
        await asyncio.to_thread(lambda: None)
        tokenizer.gate.set()
        with pytest.raises(RequestFailedError, match="failed to encode bad_words"):
            await rejected
        await closing


def test_interrupted_chat_is_aborted_although_its_traceback_is_kept() -> None:
    """A notebook keeps the last traceback in this way."""

    class Chatty(ByteTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return super().encode(text)

        def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_variables: Any) -> str:
            return str(messages[0]["content"])

    gate = StepGate()
    with heeding_ctrl_c(), make_llm(tokenizer=Chatty(), on_step=gate) as llm:
        interrupted = start(lambda: interrupt_main_in("wait_blocking"))
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.chat([{"role": "user", "content": "a"}], tokens(200))
        interrupted.result(WAIT_S)
        gate.open()
        assert_idle(llm)
        del caught
