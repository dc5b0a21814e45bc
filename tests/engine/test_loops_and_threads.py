"""One LLM serves any thread and any event loop, and blocks no loop."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from llmengine.llm import LLM
from tests.engine.helpers import (
    WAIT_S,
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

LOOPS = pytest.mark.parametrize(
    "new_loop", [asyncio.SelectorEventLoop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
NewLoop = Callable[[], asyncio.AbstractEventLoop]


@pytest.mark.parametrize("in_flight", [1, 2])
def test_loops_in_several_threads_share_one_llm(in_flight: int) -> None:
    barrier = threading.Barrier(6, timeout=WAIT_S)
    with make_llm(max_steps_in_flight=in_flight, num_blocks=60) as llm:

        async def client(prompt: list[int]) -> None:
            outputs = [output async for output in llm.generate_async(prompt, tokens(15), streaming=True)]
            assert_concatenates(outputs)
            assert outputs[-1].token_ids == oracle(prompt, 15)

        def run_loop(number: int, new_loop: NewLoop) -> None:
            async def main() -> None:
                await asyncio.gather(*(client([7, 7, 7, 7, number, index]) for index in range(8)))

            barrier.wait()
            in_loop(main, new_loop)

        def run_plain(number: int) -> None:
            barrier.wait()
            prompts = [[7, 7, 7, 7, number, index] for index in range(8)]
            outputs = llm.generate(prompts, tokens(15))
            assert [output.token_ids for output in outputs] == [oracle(prompt, 15) for prompt in prompts]

        loops: list[NewLoop] = [asyncio.SelectorEventLoop, uvloop.new_event_loop] * 2
        futures = [start(lambda n=n, f=f: run_loop(n, f)) for n, f in enumerate(loops)]  # type: ignore[misc]
        futures += [start(lambda n=n: run_plain(n)) for n in (10, 11)]  # type: ignore[misc]
        for future in futures:
            future.result(WAIT_S)
        assert_idle(llm)


@LOOPS
def test_synchronous_generate_inside_a_running_loop(new_loop: NewLoop) -> None:
    with make_llm() as llm:

        async def main() -> None:
            before = llm.generate_async("before", tokens(20), streaming=True)
            outputs = llm.generate(["a", "b"], tokens(5))
            assert [output.token_ids for output in outputs] == [oracle(b"a", 5), oracle(b"b", 5)]
            assert (await before).token_ids == oracle(b"before", 20)

        in_loop(main, new_loop)


@LOOPS
def test_loop_closed_under_a_pending_consumer_aborts_its_request(new_loop: NewLoop) -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async([1], tokens(200), streaming=True)
        loop = new_loop()
        loop.set_exception_handler(lambda loop, context: None)  # expect: tasks are destroyed while pending

        async def read() -> None:
            await handle

        async def begin() -> asyncio.Task[None]:
            task = loop.create_task(read())
            await asyncio.sleep(0)
            return task

        iterating = llm.generate_async([2], tokens(200), streaming=True)

        async def iterate() -> None:
            async for _ in iterating:
                pass

        async def begin_iterating() -> asyncio.Task[None]:
            task = loop.create_task(iterate())
            await asyncio.sleep(0)
            return task

        gate.wait()
        pending = [loop.run_until_complete(begin()), loop.run_until_complete(begin_iterating())]
        loop.close()
        gate.open()
        assert iterating.result(WAIT_S).finish_reason == "abort"
        assert handle.result(WAIT_S).finish_reason == "abort"
        assert_idle(llm)
        for task in pending:
            task.get_coro().close()


@LOOPS
def test_blocked_loop_holds_up_nobody_else(new_loop: NewLoop) -> None:
    others_done = threading.Event()
    blocked = threading.Event()
    with make_llm() as llm:

        async def stuck() -> None:
            handle = llm.generate_async([1], tokens(30), streaming=True)
            first = await anext(handle)
            blocked.set()
            assert others_done.wait(WAIT_S)
            outputs = [first] + ([] if first.finished else [output async for output in handle])
            assert_concatenates(outputs)
            assert outputs[-1].token_ids == oracle([1], 30)
            assert len(outputs) <= 2  # all text of the time when the loop stood still comes at once

        async def other() -> None:
            outputs = [output async for output in llm.generate_async([2], tokens(30), streaming=True)]
            assert outputs[-1].token_ids == oracle([2], 30)

        future = start(lambda: in_loop(stuck, new_loop))
        assert blocked.wait(WAIT_S)
        bounded(lambda: in_loop(other, new_loop))
        bounded(lambda: llm.generate([1], tokens(30)))
        others_done.set()
        future.result(WAIT_S)


def test_handle_goes_from_loop_to_loop() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        handle = llm.generate_async([1], tokens(12), streaming=True)
        outputs = []

        async def take_one() -> None:
            outputs.append(await anext(handle))

        gate.wait()
        for new_loop in (asyncio.SelectorEventLoop, uvloop.new_event_loop, asyncio.SelectorEventLoop):
            gate.step()
            in_loop(take_one, new_loop)
        gate.open()

        async def take_the_rest() -> None:
            outputs.extend([output async for output in handle])

        in_loop(take_the_rest)
        assert_concatenates(outputs)
        assert outputs[-1].token_ids == oracle([1], 12)


def test_made_in_one_thread_used_in_another_closed_in_a_third() -> None:
    llm = bounded(make_llm)
    assert bounded(lambda: llm.generate([1], tokens(3)))[0].token_ids == oracle([1], 3)
    bounded(llm.close)
    assert llm.health().state == "closed"


@LOOPS
def test_nothing_blocks_the_loop_while_the_engine_stands_in_a_step(new_loop: NewLoop) -> None:
    """Any call that waited for the engine would wait for ever, as only this loop opens the gate."""
    gate = StepGate()
    llm = make_llm(on_step=gate)

    async def main() -> None:
        first = llm.generate_async("first", tokens(50), streaming=True)
        gate.wait()
        handles = [llm.generate_async(prompt, tokens(50), streaming=True) for prompt in ("text", [1, 2])]
        handles[0].abort()
        await handles[1].aclose()
        with pytest.raises(KeyError):
            await llm.generate_async([3], tokens(5)).athrow(KeyError())
        llm.generate_async([4], tokens(5))  # dropped at once
        waiting = asyncio.ensure_future(anext(first))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert llm.stats().num_running == 1
        assert llm.health().ok
        closing = asyncio.ensure_future(llm.aclose())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not closing.done()
        assert llm.health().state == "draining"
        gate.open()
        await closing

    in_loop(main, new_loop)
    assert llm.health().state == "closed"


async def test_nothing_blocks_the_loop_while_a_prompt_is_tokenized() -> None:
    tokenizer = GatedTokenizer()
    with make_llm(tokenizer=tokenizer) as llm:
        async with timeout():
            handles = [llm.generate_async("x" * 1000, tokens(3), deadline_s=None) for _ in range(20)]
            tokenizer.wait_begun()
            ids = [llm.generate_async([index], tokens(20), streaming=True) for index in range(10)]
            for index, handle in enumerate(ids):
                assert [output async for output in handle][-1].token_ids == oracle([index], 20)
            tokenizer.gate.set()
            for handle in handles:
                with pytest.raises(ValueError, match="1000 tokens"):
                    await handle
        assert_idle(llm)


class ProcessorTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose clock is its thread's processor time: it does not go while other programs have the processor."""

    def time(self) -> float:
        return time.thread_time()


def test_callbacks_on_the_loop_are_short_while_many_stream(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's own detector. Its limit is far above the cost of a wake-up."""
    with make_llm(num_blocks=400) as llm:

        async def consume(index: int) -> int:
            return len([o async for o in llm.generate_async(f"prompt {index}", tokens(20), streaming=True)])

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.slow_callback_duration = 0.25
            loop.set_debug(True)
            try:
                await asyncio.gather(*(consume(index) for index in range(100)))
            finally:
                loop.set_debug(False)

        gc.disable()  # A collection on the loop's thread would look at all that the tests before have left.
        try:
            bounded(lambda: in_loop(main, ProcessorTimeLoop))
        finally:
            gc.enable()
    assert not [record for record in caplog.records if "took" in record.getMessage()]


async def test_creating_does_not_block_the_loop() -> None:
    """`LLM.create` loads in a thread: a missing model is reported through the loop."""
    with pytest.raises(Exception, match="no-such-model"):
        async with timeout():
            await LLM.create("/no-such-model")


SCRIPT = """
import asyncio, sys, threading
from llmengine import LLM, SamplingParams, StructuredOutput
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer

llm = LLM.from_backend(lambda: FakeBackend(num_blocks=2000, max_model_len=7000), tokenizer=ByteTokenizer())
params = SamplingParams(max_new_tokens=5)
"""

ENDINGS = {
    "closed": "print(len(llm.generate('a', params)[0].token_ids)); llm.close()",
    "not closed": "print(len(llm.generate('a', params)[0].token_ids))",
    "work in flight": """
print(5)
handles = [llm.generate_async('a', SamplingParams(max_new_tokens=6000), streaming=True) for _ in range(8)]
handles[0].request_id
""",
    "reader in a daemon thread": """
print(5)
handle = llm.generate_async('a', SamplingParams(max_new_tokens=6000), streaming=True)
threading.Thread(target=lambda: handle.result(), daemon=True).start()
""",
    "in the middle of a loop": """
async def main():
    async for output in llm.generate_async('a', SamplingParams(max_new_tokens=6000), streaming=True):
        print(5)
        return
asyncio.run(main())
""",
    "sys.exit inside a stream": """
async def main():
    async for output in llm.generate_async('a', SamplingParams(max_new_tokens=6000), streaming=True):
        print(5)
        sys.exit(0)
asyncio.run(main())
""",
    "structured output in flight": """
letters = SamplingParams(max_new_tokens=6000, structured=StructuredOutput(regex='[a-z]{5000}'))
handles = [llm.generate_async('a', letters, streaming=True) for _ in range(8)]
async def main():
    await anext(handles[0])
asyncio.run(main())
print(5)
""",
    "a drain that was given up": """
async def main():
    paused = SamplingParams(max_new_tokens=6000)  # for ever, since nobody reads
    handle = llm.generate_async('a', paused, streaming=True, slow_consumer='pause')
    try:
        async with asyncio.timeout(0.01):
            await llm.aclose(drain=3600)
    except TimeoutError:
        return handle
handle = asyncio.run(main())
print(5)
""",
    "never used": "print(5)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_interpreter_exits_cleanly(ending: str) -> None:
    """A script without a __main__ guard exits in time and cleanly, with an unclosed engine and with work in flight."""
    command = [sys.executable, "-W", "error", "-X", "faulthandler", "-c", SCRIPT + ENDINGS[ending]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\n", "")


def test_a_debugged_process_hears_nothing_of_the_engines_loop() -> None:
    """asyncio's debug mode complains of a callback that takes 0.1 s; the engine loads a model and steps in one."""
    script = """
import asyncio, time
from llmengine import LLM, SamplingParams
from llmengine.testing import FakeBackend

def load():
    time.sleep(0.15)
    return FakeBackend(on_step=lambda batch: time.sleep(0.15))

async def main():
    async with LLM.from_backend(load) as llm:
        params = SamplingParams(max_new_tokens=2, ignore_eos=True)
        print(len([output async for output in llm.generate_async([1], params, streaming=True)]))
asyncio.run(main())
"""
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout) == (0, "2\n")
    assert "Engine" not in done.stderr


def test_waiting_for_a_handle_from_a_future() -> None:
    """`asyncio.gather` and `ensure_future` take a handle as any awaitable."""
    with make_llm() as llm:

        async def main() -> Any:
            return await asyncio.gather(*(llm.generate_async([index], tokens(4)) for index in range(3)))

        outputs = in_loop(main)
    assert [output.token_ids for output in outputs] == [oracle([index], 4) for index in range(3)]
