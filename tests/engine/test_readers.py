"""Ways to read a handle: `with` blocks, tasks, threads, and several readers of one request."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from llmengine import (
    LLM,
    EngineClosedError,
    GenerationOutput,
    InvalidRequestError,
    PromptTooLongError,
    RequestHandle,
    SamplingParams,
    SchedulerConfig,
)
from tests.engine.helpers import (
    WAIT_S,
    Panic,
    StepGate,
    assert_idle,
    bounded,
    close_loop_under,
    counting_model,
    in_loop,
    make_llm,
    oracle,
    start,
    timeout,
    tokens,
)

PROMPT = [5, 6, 7]
LONG = tokens(400)


async def collect(handle: RequestHandle) -> list[GenerationOutput]:
    return [output async for output in handle]


def deltas(outputs: list[GenerationOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids_delta]


@pytest.fixture
def llm() -> Any:
    with make_llm() as made:
        yield made


@pytest.fixture
def gate() -> StepGate:
    return StepGate()


@pytest.fixture
def held(gate: StepGate) -> Any:
    """An LLM whose engine makes five steps and stands in the sixth until the gate is opened."""
    for _ in range(5):
        gate.let_go()
    with make_llm(on_step=gate) as made:
        try:
            yield made
        finally:
            gate.open()


# Blocks


async def test_async_with_aborts_at_its_end(held: LLM, gate: StepGate) -> None:
    async with timeout():
        async with held.generate_async(PROMPT, LONG, True) as handle:
            async for output in handle:
                if output.num_tokens >= 3:
                    break
        gate.open()
        assert [output async for output in handle] == []
        assert (await handle).finish_reason == "abort"
        await asyncio.to_thread(assert_idle, held)


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, Panic])
async def test_async_with_aborts_when_its_body_raises(held: LLM, gate: StepGate, error: type[BaseException]) -> None:
    async with timeout():
        with pytest.raises(error):
            async with held.generate_async(PROMPT, LONG) as handle:
                raise error
        gate.open()
        assert (await handle).finish_reason == "abort"


async def test_async_with_leaves_a_finished_request_as_it_is(llm: LLM) -> None:
    async with timeout(), llm.generate_async(PROMPT, tokens(3), True) as handle:
        outputs = await collect(handle)
    assert outputs[-1].finish_reason == "length"
    assert (await handle).finish_reason == "length"


def test_with_aborts_at_its_end(held: LLM, gate: StepGate) -> None:
    with held.generate_async(PROMPT, LONG, True) as handle:
        outputs = handle.stream()
        assert next(outputs).num_tokens > 0
    gate.open()
    assert handle.result(WAIT_S).finish_reason == "abort"
    with held.generate_async(PROMPT, tokens(3)) as handle:
        assert handle.result(WAIT_S).token_ids == oracle(PROMPT, 3)
    assert handle.result(WAIT_S).finish_reason == "length"


# Tasks


async def _as_completed(handles: list[RequestHandle]) -> list[GenerationOutput]:
    return [await one for one in asyncio.as_completed(handles)]


async def _wait(handles: list[RequestHandle]) -> list[GenerationOutput]:
    done, pending = await asyncio.wait([handle.task() for handle in handles])
    assert not pending
    return [task.result() for task in done]


async def _group(handles: list[RequestHandle]) -> list[GenerationOutput]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(handle.wait()) for handle in handles]
    return [task.result() for task in tasks]


async def _anyio(handles: list[RequestHandle]) -> list[GenerationOutput]:
    outputs: list[GenerationOutput] = []

    async def read(handle: RequestHandle) -> None:
        outputs.append(await handle)

    async with anyio.create_task_group() as group:
        for handle in handles:
            group.start_soon(read, handle)
            group.start_soon(handle.wait)
    return outputs


async def _each(wrap: Callable[[RequestHandle], Awaitable[GenerationOutput]], handles: Any) -> list[GenerationOutput]:
    return [await wrap(handle) for handle in handles]


WAYS: dict[str, Callable[[list[RequestHandle]], Awaitable[list[GenerationOutput]]]] = {
    "gather": lambda handles: asyncio.gather(*handles),
    "as_completed": _as_completed,
    "wait": _wait,
    "TaskGroup": _group,
    "anyio": _anyio,
    "wait_for": lambda handles: _each(lambda handle: asyncio.wait_for(handle, WAIT_S), handles),
    "shield": lambda handles: _each(asyncio.shield, handles),
    "ensure_future": lambda handles: _each(asyncio.ensure_future, handles),
    "task": lambda handles: _each(lambda handle: handle.task(), handles),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("params", [tokens(3), tokens(3, n=2, temperature=1.0)], ids=["one", "family"])
async def test_ways_to_wait_for_handles(llm: LLM, way: str, params: SamplingParams) -> None:
    async with timeout():
        handles = [llm.generate_async([number], params, bool(number % 2)) for number in range(4)]
        outputs = await WAYS[way](handles)
        assert {output.request_id for output in outputs} == {handle.request_id for handle in handles}
        assert all(output.finished and len(output.outputs) == params.n for output in outputs)
        await asyncio.to_thread(assert_idle, llm)


def test_a_handle_can_be_all_that_a_loop_runs(llm: LLM) -> None:
    assert asyncio.run(llm.generate_async(PROMPT, tokens(3)).wait()).token_ids == oracle(PROMPT, 3)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        assert loop.run_until_complete(llm.generate_async(PROMPT, tokens(3))).token_ids == oracle(PROMPT, 3)
    assert anyio.run(llm.generate_async(PROMPT, tokens(3)).wait).token_ids == oracle(PROMPT, 3)


@pytest.mark.parametrize("begun", [False, True])
async def test_cancelled_task_aborts_also_before_it_has_begun(held: LLM, gate: StepGate, begun: bool) -> None:
    async with timeout():
        handle = held.generate_async(PROMPT, LONG)
        task = handle.task()
        if begun:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        assert (await handle).finish_reason == "abort"


async def test_failing_sibling_aborts_what_a_group_waits_for(held: LLM, gate: StepGate) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError

    async with timeout():
        handle = held.generate_async(PROMPT, LONG)
        with pytest.raises(ExceptionGroup):  # noqa: PT012
            async with asyncio.TaskGroup() as group:
                group.create_task(handle.wait())
                group.create_task(fail())
        gate.open()
        assert (await handle).finish_reason == "abort"


async def test_first_of_several_wins(held: LLM, gate: StepGate) -> None:
    async with timeout():
        quick, slow = held.generate_async([1], tokens(1)), held.generate_async([2], LONG)
        tasks = {handle.task(): handle for handle in (quick, slow)}
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert [tasks[task] for task in done] == [quick]
        for task in pending:
            task.cancel()
        await asyncio.wait(pending)
        gate.open()
        assert (await slow).finish_reason == "abort"


async def test_rejected_prompt_is_raised_by_each_way(llm: LLM) -> None:
    async with timeout():
        for read in (lambda handle: handle.task(), lambda handle: handle.wait(), asyncio.ensure_future):
            with pytest.raises(PromptTooLongError):
                await read(llm.generate_async("a" * 10_000))
        with pytest.raises(PromptTooLongError):
            await asyncio.to_thread(lambda: list(llm.stream("a" * 10_000)))


# Synchronous streaming


def test_stream_in_a_thread(llm: LLM) -> None:
    outputs = list(llm.stream("abc", tokens(20)))
    assert outputs[-1].finished
    assert outputs[-1].token_ids == deltas(outputs) == oracle(list(b"abc"), 20)
    assert "".join(output.text_delta for output in outputs) == outputs[-1].text


def test_stream_comes_token_by_token() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, next_token=counting_model) as llm:
        stream = llm.stream("a", tokens(3))
        gate.wait()
        texts = []
        for _ in range(3):
            gate.let_go()
            texts.append(bounded(lambda: next(stream)).text_delta)
        gate.open()
        assert texts == ["b", "c", "d"]
        assert bounded(lambda: next(stream, None)) is None


def test_stream_of_several_outputs(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_new_tokens=10, seed=1)
    outputs = list(llm.stream(PROMPT, params))
    whole = llm.generate(PROMPT, params)[0].outputs
    for index, output in enumerate(whole):
        own = [one for one in outputs if one.index == index]
        assert deltas(own) == output.token_ids
        assert [one.finished for one in own].count(True) == 1
    with pytest.raises(InvalidRequestError, match="best_of"):
        llm.stream(PROMPT, params.replace(best_of=4))


@pytest.mark.parametrize("leave", ["break", "close", "raise", "drop unstarted", "del"])
def test_leaving_a_stream_aborts_its_request(held: LLM, gate: StepGate, leave: str) -> None:
    if leave == "break":
        for _ in held.stream(PROMPT, LONG):
            break
    elif leave == "raise":

        def use() -> None:
            for _ in held.stream(PROMPT, LONG):
                raise Panic

        with pytest.raises(Panic):
            use()
    elif leave == "drop unstarted":
        held.stream(PROMPT, LONG)
    else:
        stream = held.stream(PROMPT, LONG)
        next(stream)
        if leave == "close":
            stream.close()
            assert next(stream, None) is None
        else:
            del stream
    gate.open()
    assert_idle(held)
    assert held.requests() == []
    assert held.stats().counters.num_generated_tokens < 10


def test_stream_of_a_handle_goes_on_where_it_was_read(llm: LLM) -> None:
    handle = llm.generate_async(PROMPT, tokens(30), True)
    first = in_loop(lambda: anext(handle))
    assert deltas([first, *handle.stream()]) == oracle(PROMPT, 30)
    final_only = list(llm.generate_async(PROMPT, tokens(30)).stream())
    assert [output.token_ids for output in final_only] == [oracle(PROMPT, 30)]


def test_stream_raises_what_ends_the_engine() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    stream = llm.stream(PROMPT, LONG)
    gate.wait()
    closing = start(llm.close)
    gate.open()
    assert bounded(lambda: list(stream))[-1].finish_reason in ("abort", "length")
    closing.result(WAIT_S)
    with pytest.raises(EngineClosedError):
        llm.stream(PROMPT, LONG)


async def test_stream_works_in_a_running_loop_and_blocks_it(llm: LLM) -> None:
    assert deltas(list(llm.stream(PROMPT, tokens(10)))) == oracle(PROMPT, 10)


def test_stream_waits_for_room() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_batch_size=1, max_queued_requests=1)) as llm:
        handles = [llm.generate_async([number], tokens(2), wait_for_admission=True) for number in range(3)]
        stream = llm.stream(PROMPT, tokens(2), tenant="other")
        gate.open()
        assert bounded(lambda: deltas(list(stream))) == oracle(PROMPT, 2)
        assert all(handle.result(WAIT_S).finished for handle in handles)


def test_many_threads_stream(llm: LLM) -> None:
    futures = [start(lambda n=n: deltas(list(llm.stream([n], tokens(30))))) for n in range(12)]  # type: ignore[misc]
    assert [future.result(WAIT_S) for future in futures] == [oracle([n], 30) for n in range(12)]


# Several readers


async def test_each_reader_sees_everything(llm: LLM) -> None:
    async with timeout():
        source = llm.generate_async("abc", tokens(50), True)
        first = await anext(source)
        readers = [source.subscribe() for _ in range(3)]
        outputs = await asyncio.gather(*map(collect, readers))
        late = await collect(source.subscribe())
        rest = await collect(source)
        expected = oracle(list(b"abc"), 50)
        for one in (*outputs, late, [first, *rest]):
            assert deltas(one) == expected
            assert "".join(output.text_delta for output in one) == one[-1].text
            assert one[-1].finish_reason == "length"
        assert len({id(reader) for reader in readers}) == 3
        assert {reader.request_id for reader in readers} == {source.request_id}


def test_readers_in_loops_and_threads_of_their_own(llm: LLM) -> None:
    readers = llm.generate_async(PROMPT, tokens(200), True).tee(6)
    ways: list[Callable[[RequestHandle], list[int]]] = [
        lambda reader: deltas(in_loop(lambda: collect(reader))),
        lambda reader: deltas(list(reader.stream())),
        lambda reader: reader.result(WAIT_S).token_ids,
    ]
    futures = [start(lambda r=reader, w=ways[n % 3]: w(r)) for n, reader in enumerate(readers)]  # type: ignore[misc]
    assert all(future.result(WAIT_S) == oracle(PROMPT, 200) for future in futures)


async def test_family_has_readers(llm: LLM) -> None:
    async with timeout():
        params = SamplingParams(n=2, temperature=1.0, max_new_tokens=20, seed=3)
        first, second = llm.generate_async(PROMPT, params, True).tee(2)
        outputs = await asyncio.gather(collect(first), collect(second))
        for index in range(2):
            one, other = ([o for o in outputs[n] if o.index == index] for n in range(2))
            assert deltas(one) == deltas(other)
            assert len(deltas(one)) == 20
        final = await first.subscribe(streaming=False)
        assert len(final.outputs) == 2
        best = llm.generate_async(PROMPT, params.replace(best_of=3))
        with pytest.raises(InvalidRequestError, match="best_of"):
            best.subscribe(streaming=True)
        assert len((await best.subscribe()).outputs) == 2


def test_tee_of_no_reader_is_refused(llm: LLM) -> None:
    handle = llm.generate_async(PROMPT, tokens(2))
    for wrong in (0, -1, True, "2"):
        with pytest.raises(InvalidRequestError, match="num_readers must be an integer of at least 1, not "):
            handle.tee(wrong)  # type: ignore[arg-type]
    assert handle.result(WAIT_S).finish_reason == "length"


async def _cancel(reader: RequestHandle) -> None:
    task = asyncio.create_task(collect(reader))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def _cancel_final(reader: RequestHandle) -> None:
    task = reader.task()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def _expire(reader: RequestHandle) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collect(reader), 0)


async def _break(reader: RequestHandle) -> None:
    async with reader:
        await anext(reader)


async def _close_loop(reader: RequestHandle) -> None:
    await asyncio.to_thread(close_loop_under, reader)


WAYS_TO_LEAVE: dict[str, Callable[[RequestHandle], Awaitable[None]]] = {
    "aclose": lambda reader: reader.aclose(),
    "cancel": _cancel,
    "cancel the final output": _cancel_final,
    "expire": _expire,
    "async with": _break,
    "thread": lambda reader: asyncio.to_thread(lambda: [next(reader.stream()), None][1]),
    "drop": lambda reader: asyncio.sleep(0),
    "close the loop": _close_loop,
}


@pytest.mark.parametrize("way", WAYS_TO_LEAVE)
async def test_last_reader_to_leave_aborts(way: str) -> None:
    gate = StepGate()
    gate.let_go()
    with make_llm(on_step=gate) as llm:
        async with timeout():
            readers = llm.generate_async(PROMPT, LONG, True).tee(3)
            stays = readers.pop()
            await anext(stays)
            while readers:
                await WAYS_TO_LEAVE[way](readers.pop())
                gate.let_go()
                output = await anext(stays)
                assert not output.finished
                assert llm.requests()[0].state == "running"
            gate.let_go()
            await WAYS_TO_LEAVE[way](stays)
            del stays
            gate.open()
            gc.collect()
            await asyncio.to_thread(assert_idle, llm)
            assert llm.requests() == []


async def test_abort_ends_it_for_all_readers(held: LLM, gate: StepGate) -> None:
    async with timeout():
        source = held.generate_async(PROMPT, LONG, True)
        readers = source.tee(2)
        await anext(readers[0])
        source.abort()
        gate.open()
        for reader in readers:
            outputs = await collect(reader)
            assert outputs[-1].finish_reason == "abort"


async def test_source_counts_as_a_reader_until_it_is_gone(held: LLM, gate: StepGate) -> None:
    async with timeout():
        source = held.generate_async(PROMPT, LONG, True)
        reader = source.subscribe()
        await reader.aclose()
        assert [stats.request_id for stats in held.requests()] == [source.request_id]
        reader = source.subscribe()
        del source
        assert not (await anext(reader)).finished
        await reader.aclose()
        gate.open()
        assert (await reader).finish_reason == "abort"


@pytest.mark.parametrize("policy", ["pause", "abort"])
async def test_reader_that_has_read_most_counts_for_a_slow_consumer(policy: Any) -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_unread_tokens=2)) as llm:
        async with timeout():
            fast, slow = llm.generate_async(PROMPT, tokens(40), True, slow_consumer=policy).tee(2)
            await asyncio.to_thread(gate.wait)
            seen = []
            while len(seen) < 39:
                gate.let_go()
                seen += (await anext(fast)).token_ids_delta
                if len(seen) == 10:
                    assert (await anext(slow)).num_tokens == 10  # and reads no more
            gate.open()
            seen += deltas(await collect(fast))
            assert seen == oracle(PROMPT, 40)
            assert deltas(await collect(slow)) == oracle(PROMPT, 40)[10:]


async def test_request_is_paused_while_no_reader_reads() -> None:
    with make_llm(scheduler=SchedulerConfig(max_unread_tokens=4)) as llm:
        async with timeout():
            first, second = llm.generate_async(PROMPT, tokens(60), True, slow_consumer="pause").tee(2)
            await llm.generate_async([9], tokens(60))
            assert llm.stats().num_paused == 1
            assert deltas(await collect(second)) == oracle(PROMPT, 60)
            assert (await first).finish_reason == "length"


def test_readers_come_and_go_from_many_threads(llm: LLM) -> None:
    source = llm.generate_async(PROMPT, tokens(200), True)

    def come_and_go(number: int) -> bool:
        for turn in range(20):
            with source.subscribe() as reader:
                if (turn + number) % 3:
                    next(reader.stream())
        return deltas(list(source.subscribe().stream())) == oracle(PROMPT, 200)

    threads = [start(lambda n=n: come_and_go(n)) for n in range(4)]  # type: ignore[misc]
    assert all(thread.result(WAIT_S) for thread in threads)
    assert source.result(WAIT_S).finish_reason == "length"
    assert threading.active_count() < 50
