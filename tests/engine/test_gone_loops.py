"""Event loops that are closed, dropped or run inside themselves while they have requests, and tasks that fail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from llmengine.config import SchedulerConfig
from llmengine.llm import LLM
from tests.engine.helpers import (
    WAIT_S,
    GatedTokenizer,
    StepGate,
    assert_idle,
    bounded,
    make_llm,
    oracle,
    tokens,
)

LONG = tokens(200)
SEVERAL = tokens(200, n=2, temperature=1.0)
Read = Callable[[LLM, Any], Coroutine[Any, Any, None]]

LOOPS = pytest.mark.parametrize(
    "new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)


async def read_stream(llm: LLM, prompt: Any, **options: Any) -> None:
    async for _ in llm.generate_async(prompt, LONG, streaming=True, **options):
        pass


async def read_named_stream(llm: LLM, prompt: Any, **options: Any) -> None:
    handle = llm.generate_async(prompt, LONG, streaming=True, **options)
    async for _ in handle:
        pass


async def read_final(llm: LLM, prompt: Any, **options: Any) -> None:
    async for _ in llm.generate_async(prompt, LONG, **options):
        pass


async def read_awaited(llm: LLM, prompt: Any, **options: Any) -> None:
    await llm.generate_async(prompt, LONG, **options)


async def read_family(llm: LLM, prompt: Any, **options: Any) -> None:
    await llm.generate_async(prompt, SEVERAL, **options)


async def read_family_stream(llm: LLM, prompt: Any, **options: Any) -> None:
    async for _ in llm.generate_async(prompt, SEVERAL, streaming=True, **options):
        pass


async def read_within_a_time(llm: LLM, prompt: Any, **options: Any) -> None:
    await asyncio.wait_for(llm.generate_async(prompt, LONG, **options), 1000)


async def read_next_within_a_time(llm: LLM, prompt: Any, **options: Any) -> None:
    handle = llm.generate_async(prompt, LONG, streaming=True, **options)
    while True:
        await asyncio.wait_for(anext(handle), 1000)


async def read_shielded(llm: LLM, prompt: Any, **options: Any) -> None:
    await asyncio.shield(llm.generate_async(prompt, LONG, **options))


async def read_gathered(llm: LLM, prompt: Any, **options: Any) -> None:
    await asyncio.gather(*(llm.generate_async(prompt, LONG, **options) for _ in range(2)))


async def read_paused(llm: LLM, prompt: Any, **options: Any) -> None:
    await llm.generate_async(prompt, LONG, slow_consumer="pause", **options)


READERS = [function for name, function in sorted(globals().items()) if name.startswith("read_")]
READ = pytest.mark.parametrize("read", READERS, ids=lambda function: function.__name__.removeprefix("read_"))


class Loop:
    """An event loop with a task that waits for a request."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, None]) -> None:
        self.loop = new_loop()
        self.loop.set_exception_handler(lambda loop, context: None)  # expect: tasks are destroyed while pending
        self.task = self.loop.create_task(main)

    def run(self, num_turns: int = 5) -> None:
        """Run the loop until the task waits."""

        async def turn() -> None:
            for _ in range(num_turns):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turn())

    def destroy(self) -> None:
        """Close the task's coroutine, so that it is not destroyed while it waits."""
        self.task.get_coro().close()  # type: ignore[union-attr]


@LOOPS
@READ
def test_a_running_request_ends_with_its_loop(read: Read, new_loop: Any) -> None:
    """The loop and the task are kept, so nothing is collected; a neighbour goes on."""
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        neighbour = llm.generate_async([9], LONG)
        gate.wait()
        reading = Loop(new_loop, read(llm, [1, 2]))
        reading.run()
        gate.step()
        gate.step()
        assert llm.stats().num_running > 1
        reading.loop.close()
        gate.step()
        gate.step()
        assert llm.stats().num_running == 1
        gate.open()
        assert neighbour.result(WAIT_S).token_ids == oracle([9], 200)
        assert_idle(llm)
        reading.destroy()


@LOOPS
@READ
def test_a_queued_request_ends_with_its_loop(read: Read, new_loop: Any) -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_batch_size=2)) as llm:
        others = [llm.generate_async([index], LONG) for index in (7, 8)]
        gate.wait()
        reading = Loop(new_loop, read(llm, [1, 2]))
        reading.run()
        gate.step()
        assert llm.stats().num_waiting >= 1
        reading.loop.close()
        gate.step()
        gate.step()
        assert llm.stats().num_waiting == 0
        gate.open()
        for index, handle in zip((7, 8), others, strict=True):
            assert handle.result(WAIT_S).token_ids == oracle([index], 200)
        assert_idle(llm)
        reading.destroy()


@LOOPS
@READ
def test_a_request_that_waits_for_room_ends_with_its_loop(read: Any, new_loop: Any) -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_batch_size=1, max_queued_requests=1)) as llm:
        running = llm.generate_async([7], tokens(40))
        gate.wait()
        queued = llm.generate_async([8], tokens(1))
        reading = Loop(new_loop, read(llm, [1, 2], wait_for_admission=True))
        reading.run()
        gate.step()
        reading.loop.close()
        gate.open()
        assert running.result(WAIT_S).token_ids == oracle([7], 40)
        assert queued.result(WAIT_S).token_ids == oracle([8], 1)
        assert_idle(llm)
        assert llm.stats().counters.num_generated_tokens == 42
        reading.destroy()


@LOOPS
@READ
def test_a_request_that_is_being_tokenized_ends_with_its_loop(read: Read, new_loop: Any) -> None:
    tokenizer = GatedTokenizer()
    with make_llm(tokenizer=tokenizer) as llm:
        reading = Loop(new_loop, read(llm, "abc"))
        reading.run()
        tokenizer.wait_begun()
        reading.loop.close()
        tokenizer.gate.set()
        assert_idle(llm)
        assert llm.stats().counters.num_generated_tokens < 100
        reading.destroy()


@LOOPS
def test_a_beam_search_ends_with_its_loop(new_loop: Any) -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:

        async def search() -> None:
            await llm.beam_search_async([1, 2], 2, max_new_tokens=50)

        reading = Loop(new_loop, search())

        async def stand_in_a_step() -> None:
            await asyncio.to_thread(gate.wait)

        reading.loop.run_until_complete(stand_in_a_step())
        reading.run()
        reading.loop.run_until_complete(reading.loop.shutdown_default_executor())
        reading.loop.close()
        gate.open()
        assert_idle(llm)
        assert llm.stats().counters.num_generated_tokens <= 3
        reading.destroy()


@READ
def test_a_request_ends_with_a_loop_that_is_dropped(read: Read) -> None:
    """The loop is not even closed: nothing refers to it, and the engine does not keep it."""
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        neighbour = llm.generate_async([9], LONG)
        gate.wait()
        reading = Loop(asyncio.SelectorEventLoop, read(llm, [1, 2]))
        reading.run()
        gate.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # expect: the loop is not closed
            del reading
            gc.collect()
        gate.step()
        gate.step()
        assert llm.stats().num_running == 1
        gate.open()
        assert neighbour.result(WAIT_S).token_ids == oracle([9], 200)
        assert_idle(llm)


@LOOPS
def test_a_loop_that_rests_keeps_its_requests(new_loop: Any) -> None:
    """The loop is stopped and run again later; only the loop refers to the task."""
    with make_llm() as llm:
        results: list[list[int]] = []

        async def read() -> None:
            results.append((await llm.generate_async([1], LONG)).token_ids)

        resting = Loop(new_loop, read())
        resting.run()
        del resting.task
        gc.collect()
        bounded(lambda: llm.generate([2], tokens(220)))  # the other one has finished meanwhile
        gc.collect()
        resting.run()
        assert results == [oracle([1], 200)]
        resting.loop.close()


def test_two_engines_hear_of_one_closed_loop() -> None:
    gates = [StepGate(), StepGate()]
    llms = [make_llm(on_step=gate) for gate in gates]

    async def read() -> None:
        await asyncio.gather(*(llm.generate_async([1], LONG) for llm in llms))

    reading = Loop(asyncio.SelectorEventLoop, read())
    reading.run()
    for gate in gates:
        gate.wait()
    reading.loop.close()
    for gate, llm in zip(gates, llms, strict=True):
        gate.open()
        assert_idle(llm)
        assert llm.stats().counters.num_generated_tokens < 100
        llm.close()
    reading.destroy()


class NestingLoop(asyncio.SelectorEventLoop):
    """A loop that may run inside itself, as nest_asyncio allows."""

    def _run_once(self) -> None:
        with contextlib.suppress(IndexError):  # the inner run has already run everything that was ready
            super()._run_once()  # type: ignore[misc]

    def run_within(self, future: asyncio.Future[Any]) -> None:
        """Run until `future` is done, inside a task."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.tasks._leave_task(self, task)
        try:
            while not future.done():
                self._run_once()
        finally:
            asyncio.tasks._enter_task(self, task)


@pytest.mark.parametrize("num_siblings", [1, 2, 5])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_within_a_run_reads_a_sibling(num_siblings: int, streaming: bool) -> None:
    """One call wakes all readers; in it, the first one runs the loop until the others have read."""
    gate = StepGate()
    loop = NestingLoop()

    async def sibling(llm: LLM, index: int, is_last: bool) -> list[int]:
        token_ids: list[int] = []
        async for output in llm.generate_async([index], tokens(1), streaming=streaming):
            token_ids += output.token_ids_delta
            if not is_last:
                loop.run_within(tasks[index])
        return token_ids

    async def main(llm: LLM) -> None:
        blocker = llm.generate_async([100], tokens(3))
        await asyncio.to_thread(gate.wait)
        tasks.extend(loop.create_task(sibling(llm, index, index == num_siblings)) for index in range(num_siblings + 1))
        # Each task runs the loop for the next one, so `tasks` is shifted by one.
        tasks.append(tasks.pop(0))
        await asyncio.sleep(0)
        gate.open()
        for index, task in enumerate(tasks):
            assert await task == oracle([(index + 1) % (num_siblings + 1)], 1)
        await blocker

    tasks: list[asyncio.Task[list[int]]] = []
    expired = loop.call_later(WAIT_S, lambda: [task.cancel() for task in tasks])
    with make_llm(on_step=gate) as llm:
        loop.run_until_complete(main(llm))
        assert_idle(llm)
    expired.cancel()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit])
def test_what_a_loop_lets_through_does_not_hold_up_the_others(fault: type[BaseException]) -> None:
    """The loop is run again, and the readers that the same call woke read on."""
    gate = StepGate()
    loop = asyncio.SelectorEventLoop()

    async def fail(llm: LLM) -> None:
        await llm.generate_async([1], tokens(1))
        raise fault

    async def read(llm: LLM, index: int) -> list[int]:
        return (await llm.generate_async([index], tokens(1))).token_ids

    async def begin(llm: LLM) -> asyncio.Task[None]:
        failing = loop.create_task(fail(llm))
        tasks.extend(loop.create_task(read(llm, index)) for index in range(2, 5))
        await asyncio.sleep(0)
        return failing

    tasks: list[asyncio.Task[list[int]]] = []
    with make_llm(on_step=gate) as llm:
        blocker = llm.generate_async([100], tokens(3))
        gate.wait()
        failing = loop.run_until_complete(begin(llm))
        gate.open()
        with pytest.raises(fault):
            loop.run_until_complete(failing)
        results = loop.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks), WAIT_S))
        assert results == [oracle([index], 1) for index in range(2, 5)]
        assert blocker.result(WAIT_S).num_tokens == 3
        assert_idle(llm)
    loop.close()


async def fail_at_once(llm: LLM) -> None:
    handle = llm.generate_async([1], LONG, streaming=True)
    async for _ in handle:
        raise ValueError("mine")


async def fail_behind_another_wait(llm: LLM) -> None:
    handle = llm.generate_async([1], LONG, streaming=True)
    async for _ in handle:
        await asyncio.sleep(0)
        raise ValueError("mine")


async def fail_in_a_call(llm: LLM) -> None:
    def work(number: int) -> None:
        raise ValueError(number)

    handle = llm.generate_async([1], LONG, streaming=True)
    async for output in handle:
        work(output.num_tokens)


async def fail_behind_anext(llm: LLM) -> None:
    handle = llm.generate_async([1], LONG, streaming=True)
    await anext(handle)
    raise ValueError("mine")


async def fail_cancelled(llm: LLM) -> None:
    handle = llm.generate_async([1], LONG, streaming=True)
    async for _ in handle:
        raise asyncio.CancelledError


async def fail_in_a_generator(llm: LLM) -> None:
    async def texts() -> Any:
        handle = llm.generate_async([1], LONG, streaming=True)
        async for output in handle:
            yield output.text_delta

    async for _ in texts():
        raise ValueError("mine")


async def fail_beside_another_request(llm: LLM) -> None:
    idle = llm.generate_async([2], LONG)
    handle = llm.generate_async([1], LONG, streaming=True)
    async for _ in handle:
        raise ValueError(idle.request_id)


async def fail_in_a_handler(llm: LLM) -> None:
    handle = llm.generate_async([1], LONG, streaming=True)
    async for _ in handle:
        try:
            raise KeyError
        except KeyError as error:
            raise ValueError("mine") from error


FAILURES = [function for name, function in sorted(globals().items()) if name.startswith("fail_")]


@LOOPS
@pytest.mark.parametrize("fail", FAILURES, ids=lambda function: function.__name__.removeprefix("fail_"))
def test_a_failed_reader_of_a_named_handle_ends_its_request(fail: Any, new_loop: Any) -> None:
    """The request ends as soon as its task is forgotten, without the garbage collector."""
    permits = threading.Semaphore(0)
    let_go = threading.Event()

    def on_step(_: Any) -> None:
        assert let_go.is_set() or permits.acquire(timeout=WAIT_S)

    async def main(llm: LLM) -> None:
        task = asyncio.ensure_future(fail(llm))
        await asyncio.sleep(0)  # the task submits all of its requests; before that no step may be spent
        permits.release(4)
        await asyncio.wait({task}, timeout=WAIT_S)
        assert task.cancelled() or isinstance(task.exception(), ValueError)

    gc.collect()
    gc.disable()
    try:
        with make_llm(on_step=on_step) as llm:
            loop = new_loop()
            loop.run_until_complete(main(llm))
            loop.close()
            let_go.set()
            permits.release()
            assert_idle(llm)
            assert llm.stats().counters.num_generated_tokens < 20
    finally:
        gc.enable()
