"""However a consumer leaves, its request ends, and its blocks come back within one step."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import anyio.lowlevel
import pytest

from llmengine.config import SchedulerConfig
from llmengine.engine.handle import RequestHandle
from llmengine.errors import EngineClosedError
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput
from tests.engine.helpers import (
    WAIT_S,
    EngineHarness,
    GatedTokenizer,
    StepGate,
    assert_concatenates,
    assert_idle,
    bounded,
    in_loop,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)

Leave = Callable[[LLM, StepGate], Awaitable[RequestHandle | None]]
"""Leaves a request; returns the handle where it is not the handle's collection that must end the request."""

LONG = tokens(200)


def stream(llm: LLM) -> RequestHandle:
    """Submit a request that would go on for long."""
    return llm.generate_async([3, 1], LONG, streaming=True)


async def cancel_and_check(task: asyncio.Future[GenerationOutput]) -> None:
    """Cancel a task and assert that it ends cancelled."""
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@contextlib.asynccontextmanager
async def stepping(gate: StepGate) -> AsyncIterator[None]:
    """Let the engine step, one step after another, while the body waits."""

    async def step() -> None:
        while True:
            gate.step()
            for _ in range(5):
                await asyncio.sleep(0)

    task = asyncio.ensure_future(step())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def leave_by_break(llm: LLM, gate: StepGate) -> None:
    async with stepping(gate):
        async for _ in stream(llm):
            break


async def leave_by_aclose(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    async with stepping(gate):
        await anext(handle)
    await handle.aclose()
    assert [output async for output in handle] == []
    return handle


async def leave_by_aclose_before_reading(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    await handle.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(handle)
    return handle


async def leave_by_athrow(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    async with stepping(gate):
        await anext(handle)
    with pytest.raises(KeyError, match="mine"):
        await handle.athrow(KeyError("mine"))
    with pytest.raises(StopAsyncIteration):
        await anext(handle)
    return handle


async def leave_by_athrow_of_a_class(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    with pytest.raises(GeneratorExit):
        await handle.athrow(GeneratorExit)
    return handle


async def leave_by_cancelling_anext(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    task = asyncio.ensure_future(anext(handle))
    await asyncio.sleep(0)
    await cancel_and_check(task)
    assert [output async for output in handle] == []
    return handle


async def leave_by_cancelling_await(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = llm.generate_async([3, 1], LONG)
    task = asyncio.ensure_future(handle)
    await asyncio.sleep(0)
    await cancel_and_check(task)
    return handle


async def leave_by_cancelling_before_the_task_began(llm: LLM, gate: StepGate) -> None:
    task = asyncio.ensure_future(llm.generate_async([3, 1], LONG))
    await cancel_and_check(task)


async def leave_by_timeout(llm: LLM, gate: StepGate) -> None:
    with pytest.raises(TimeoutError):  # noqa: PT012
        async with asyncio.timeout(0):
            async for _ in stream(llm):
                pass


async def leave_by_wait_for(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(handle), 0.001)
    gate.open()
    assert (await handle).finish_reason == "abort"
    return handle


async def leave_by_anyio_scope(llm: LLM, gate: StepGate) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async for _ in stream(llm):
            pass
    assert scope.cancelled_caught


async def leave_by_anyio_task_group(llm: LLM, gate: StepGate) -> None:
    async def read() -> None:
        async for _ in stream(llm):
            pass

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()


async def leave_by_failing_sibling(llm: LLM, gate: StepGate) -> None:
    async def read() -> None:
        async for _ in stream(llm):
            pass

    async def fail() -> None:
        raise KeyError("sibling")

    with pytest.raises(ExceptionGroup):  # noqa: PT012
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(fail())


async def leave_by_dropping(llm: LLM, gate: StepGate) -> None:
    handle = stream(llm)
    del handle


async def leave_by_collecting_a_cycle(llm: LLM, gate: StepGate) -> None:
    cycle: list[object] = [stream(llm)]
    cycle.append(cycle)
    del cycle
    gc.collect()


async def leave_by_aclosing(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    async with stepping(gate), contextlib.aclosing(handle):
        async for _ in handle:
            break
    return handle


async def leave_by_raising_in_the_body(llm: LLM, gate: StepGate) -> None:
    with pytest.raises(KeyError):  # noqa: PT012
        async with stepping(gate):
            async for _ in stream(llm):
                raise KeyError


async def leave_by_closing_a_wrapper(llm: LLM, gate: StepGate) -> None:
    async def wrapper() -> AsyncIterator[str]:
        async for output in stream(llm):
            yield output.text_delta

    outer = wrapper()
    async with stepping(gate):
        await anext(outer)
    await outer.aclose()  # type: ignore[attr-defined]


async def leave_by_cancelling_a_wrapper(llm: LLM, gate: StepGate) -> None:
    async def wrapper() -> AsyncIterator[str]:
        handle = stream(llm)
        async with contextlib.aclosing(handle):
            async for output in handle:
                yield output.text_delta

    async def read() -> None:
        async for _ in wrapper():
            pass

    task = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_abort(llm: LLM, gate: StepGate) -> RequestHandle:
    handle = stream(llm)
    handle.abort()
    handle.abort()
    gate.open()
    outputs = [output async for output in handle]
    assert_concatenates(outputs)
    assert outputs[-1].finish_reason == "abort"
    return handle


WAYS = [function for name, function in sorted(globals().items()) if name.startswith("leave_by_")]
LEAVE = pytest.mark.parametrize("leave", WAYS, ids=lambda function: function.__name__.removeprefix("leave_by_"))


@LEAVE
@pytest.mark.parametrize("in_flight", [1, 2])
async def test_blocks_come_back_when_a_running_request_is_left(leave: Leave, in_flight: int) -> None:
    """The engine stands in a step meanwhile: leaving must not wait for it. A neighbour goes on undisturbed."""
    gate = StepGate()
    with make_llm(on_step=gate, max_steps_in_flight=in_flight) as llm:
        async with timeout():
            neighbour = llm.generate_async([9, 9], tokens(40))
            gate.wait()
            gate.step()
            kept = await leave(llm, gate)
            gate.open()
            assert (await neighbour).token_ids == oracle([9, 9], 40)
        assert_idle(llm)
        assert kept is None or (await kept).finish_reason == "abort"
        assert llm.stats().counters.num_generated_tokens < 200


@LEAVE
async def test_nothing_is_held_when_a_queued_request_is_left(leave: Leave) -> None:
    """The first request fills the pool, so the other waits until it is left."""
    gate = StepGate()
    with make_llm(on_step=gate, num_blocks=12, max_model_len=44) as llm:
        async with timeout():
            first = llm.generate_async([1] * 38, tokens(6))
            gate.wait()
            kept = await leave(llm, gate)
            gate.open()
            assert (await first).token_ids == oracle([1] * 38, 6)
        assert_idle(llm)
        assert kept is None or (await kept).finish_reason == "abort"


@pytest.mark.parametrize("way", ["drop", "abort", "aclose", "cancel", "collect"])
async def test_request_left_while_it_is_tokenized_never_starts(way: str) -> None:
    tokenizer = GatedTokenizer()
    with make_llm(tokenizer=tokenizer, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        async with timeout():
            handle: RequestHandle | None = llm.generate_async("abc", LONG, streaming=True)
            assert handle is not None
            tokenizer.wait_begun()
            assert llm.stats().num_queued == 1
            if way == "abort":
                handle.abort()
            elif way == "aclose":
                await handle.aclose()
            elif way == "cancel":
                task = asyncio.ensure_future(anext(handle))
                await asyncio.sleep(0)
                await cancel_and_check(task)
                del task
            elif way == "collect":
                cycle: list[object] = [handle]
                cycle.append(cycle)
                del cycle
            kept = handle if way == "abort" else None
            handle = None
            gc.collect()
            tokenizer.gate.set()
            if kept is not None:
                assert (await kept).finish_reason == "abort"
        # The only place in the queue is the abandoned request's, so this waits until the engine has ended that.
        assert bounded(lambda: llm.generate([2], tokens(1)))[0].token_ids == oracle([2], 1)
        assert_idle(llm)
        assert llm.stats().counters.num_generated_tokens == 2
        assert llm.stats().counters.num_finished_requests == 3


@pytest.mark.parametrize("finishes_first", [True, False])
async def test_cancel_at_the_moment_it_finishes(finishes_first: bool) -> None:
    """The wake-up of the last token and the cancellation meet in one turn of the loop: the cancellation wins."""
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            task = asyncio.ensure_future(llm.generate_async([1], tokens(1)))
            gate.wait()
            await asyncio.sleep(0)
            if not finishes_first:
                task.cancel()
            gate.let_go()
            blocker = llm.generate_async([2], tokens(1))
            gate.wait()  # the next step has begun, so the wake-up is in the loop's queue
            if finishes_first:
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            assert (await blocker).token_ids == oracle([2], 1)
        assert_idle(llm)


async def test_cancelled_waiter_does_not_hold_up_those_woken_with_it() -> None:
    """A wake-up is for all consumers of the loop; one of them may be cancelled before it runs."""
    gate = StepGate()
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    with make_llm(on_step=gate) as llm:
        async with timeout():
            blocker = llm.generate_async([9], tokens(4))
            gate.wait()
            handles = [llm.generate_async([index], tokens(1)) for index in range(4)]
            tasks = [asyncio.ensure_future(handle) for handle in handles]
            await asyncio.sleep(0)
            gate.step()
            gate.step()  # the four have finished in one step, and their wake-up is in the loop's queue
            tasks[0].cancel()
            tasks[2].cancel()
            gate.open()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await blocker
        for index in (1, 3):
            output = results[index]
            assert isinstance(output, GenerationOutput)
            assert output.token_ids == oracle([index], 1)
        assert all(isinstance(results[index], asyncio.CancelledError) for index in (0, 2))
        assert_idle(llm)
    assert faults == []


async def test_abort_after_the_end_changes_nothing() -> None:
    with make_llm() as llm:
        async with timeout():
            handle = llm.generate_async([1], tokens(3))
            final = await handle
            handle.abort()
            await handle.aclose()
            assert (await handle).finish_reason == final.finish_reason == "length"
        assert_idle(llm)


async def test_what_came_before_an_abort_can_be_read() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async([1, 2], LONG, streaming=True)
            gate.wait()
            for _ in range(4):
                gate.step()
            handle.abort()
            gate.open()
            outputs = [output async for output in handle]
        assert_concatenates(outputs)
        assert outputs[-1].finish_reason == "abort"
        assert outputs[-1].token_ids == oracle([1, 2], 5)


async def test_one_cancelled_waiter_leaves_the_others_an_aborted_output() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            handle = llm.generate_async([1, 2], LONG, streaming=True)

            async def iterate() -> list[GenerationOutput]:
                return [output async for output in handle]

            reader = asyncio.ensure_future(iterate())
            in_thread = start(lambda: handle.result(WAIT_S))
            waiter = asyncio.ensure_future(handle)
            gate.wait()
            await asyncio.sleep(0)
            await cancel_and_check(waiter)
            gate.open()
            outputs = await reader
            assert outputs[-1].finish_reason == "abort"
            assert (await asyncio.wrap_future(in_thread)).finish_reason == "abort"
        assert_concatenates(outputs)


def test_cancellation_is_never_swallowed_by_uncancel_counts() -> None:
    """A task that is cancelled inside the handle counts one cancellation, as in any other await."""

    async def main() -> None:
        gate = StepGate()
        with make_llm(on_step=gate) as llm:
            entered = asyncio.Event()

            async def read() -> int:
                entered.set()
                try:
                    await llm.generate_async([1], LONG)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    assert task is not None
                    return task.cancelling()
                return -1

            task = asyncio.ensure_future(read())
            await entered.wait()
            task.cancel()
            assert await task == 1
            gate.open()

    in_loop(main)


@pytest.mark.parametrize("seed", range(3))
async def test_random_clients(seed: int) -> None:
    """Clients read, stall, break, cancel, abort, drop and time out; tokens are the oracle's, nothing is left."""
    rng = random.Random(seed)
    num_finished = 0

    async def client(llm: LLM, index: int) -> None:
        nonlocal num_finished
        prompt = [7] * rng.randint(0, 20) + [index]
        num_tokens = rng.randint(1, 24)
        priority = rng.randint(0, 1)
        handle = llm.generate_async(prompt, tokens(num_tokens), streaming=rng.random() < 0.8, priority=priority)
        way = rng.choice(["read", "read", "stall", "break", "abort", "drop", "scope", "cancel"])
        if way == "drop":
            return
        if way == "cancel":
            task = asyncio.ensure_future(anext(handle))
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return
        outputs = []
        with anyio.move_on_after(rng.random() * 0.003 if way == "scope" else WAIT_S):
            async for output in handle:
                outputs.append(output)
                if way == "break":
                    return
                if way == "abort":
                    handle.abort()
                if way == "stall":
                    for _ in range(rng.randint(0, 30)):
                        await asyncio.sleep(0)
        if outputs and outputs[-1].finished:
            assert_concatenates(outputs)
            final = outputs[-1]
            assert final.token_ids == oracle(prompt, final.num_tokens)
            assert way in ("abort", "scope") or (final.finish_reason, final.num_tokens) == ("length", num_tokens)
            num_finished += 1

    with make_llm(num_blocks=25, max_model_len=60, max_steps_in_flight=1 + seed % 3) as llm:
        async with timeout():
            for wave in range(4):
                async with asyncio.TaskGroup() as group:
                    for index in range(20):
                        group.create_task(client(llm, wave * 20 + index))
        gc.collect()
        assert_idle(llm)
    assert num_finished > 20


@pytest.mark.parametrize("in_flight", [1, 2])
def test_engine_is_sound_between_any_two_steps(in_flight: int) -> None:
    """Threads submit, read, abort and drop while another one checks the invariants all the time."""
    harness = EngineHarness(num_blocks=20, max_model_len=48, max_steps_in_flight=in_flight)
    barrier = threading.Barrier(4, timeout=WAIT_S)

    def client(seed: int) -> None:
        rng = random.Random(seed)
        barrier.wait()
        for index in range(30):
            prompt = [seed] * rng.randint(1, 15)
            handle = harness.submit(prompt, tokens(rng.randint(1, 20)))
            if index % 3 == 0:
                handle.abort()
            if index % 5:
                output = handle.result(WAIT_S)
                assert output.token_ids == oracle(prompt, output.num_tokens)

    def check() -> None:
        barrier.wait()
        for _ in range(150):
            harness.engine.check_integrity()

    futures = [start(lambda seed=seed: client(seed)) for seed in range(3)] + [start(check)]  # type: ignore[misc]
    for future in futures:
        future.result(WAIT_S)
    harness.submit([1], tokens(1)).result(WAIT_S)
    harness.engine.check_integrity()
    stats = harness.engine.stats()
    assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)
    harness.close()
    with pytest.raises(EngineClosedError):
        harness.engine.check_integrity()
