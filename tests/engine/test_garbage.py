"""Requests leave no outputs, contexts or streams behind that only a garbage collection would free.

A collection looks at all objects of the program, and objects that wait for one make it come sooner.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress

import pytest

from llmengine.engine.handle import RequestHandle
from llmengine.engine.stream import LoopWaiter, OutputStream
from llmengine.llm import LLM
from llmengine.outputs import OutputLog
from llmengine.sampling_params import SamplingParams
from tests.engine.helpers import WAIT_S, make_llm

NUM_REQUESTS = 20


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


@pytest.fixture
def left_behind() -> Iterator[Callable[[], int]]:
    """Number of objects of requests beyond those before the test, with garbage collections off."""

    def count() -> int:
        return sum(type(item) in (OutputLog, OutputStream, LoopWaiter) for item in gc.get_objects())

    gc.collect()
    gc.disable()
    before = count()
    yield lambda: count() - before
    gc.enable()


async def read(handle: RequestHandle) -> None:
    async for _ in handle:
        pass


async def wait(handle: RequestHandle) -> None:
    await handle


async def leave(handle: RequestHandle) -> None:
    async for _ in handle:
        break


async def close(handle: RequestHandle) -> None:
    async with aclosing(handle):
        async for _ in handle:
            break


async def give_up(handle: RequestHandle) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0):
            await read(handle)


async def read_after_the_end(handle: RequestHandle) -> None:
    await handle
    await handle
    await read(handle)


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("consume", [read, wait, leave, close, give_up, read_after_the_end])
def test_a_request_leaves_nothing_for_the_garbage_collector(
    llm: LLM, left_behind: Callable[[], int], consume: Callable[[RequestHandle], Awaitable[None]], num_outputs: int
) -> None:
    async def main() -> None:
        async def one(number: int) -> None:
            params = SamplingParams(max_new_tokens=8, n=num_outputs, temperature=1.0)
            await consume(llm.generate_async([5, 6, number], params, streaming=True))

        await asyncio.gather(*map(one, range(NUM_REQUESTS)))

    asyncio.run(main())
    assert_none(llm, left_behind)


def test_threads_leave_nothing_for_the_garbage_collector(llm: LLM, left_behind: Callable[[], int]) -> None:
    params = SamplingParams(max_new_tokens=8)
    for _ in range(NUM_REQUESTS):
        llm.generate([[5, 6], [7]], params)
        llm.generate_async([5], params).result()
    assert_none(llm, left_behind)


def assert_none(llm: LLM, left_behind: Callable[[], int]) -> None:
    """Wait until the engine has dropped the work that nobody wants any more."""
    deadline = time.monotonic() + WAIT_S
    while (left := left_behind()) > 0:
        assert time.monotonic() < deadline, f"{left} objects"
        llm.generate([[9]], SamplingParams(max_new_tokens=1))
