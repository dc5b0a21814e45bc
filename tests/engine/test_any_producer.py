"""Handles of streams that no engine produces: what a router over several engines would hand out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest

from llmengine.engine.handle import RequestHandle
from llmengine.engine.stream import FamilyStream, OutputStream, Stream, publish, wake
from llmengine.errors import InvalidRequestError, RequestFailedError
from llmengine.outputs import FinishReason, OutputLog
from tests.engine.helpers import WAIT_S, timeout


class Producer:
    """Puts out tokens for one stream or several, and notes what is aborted."""

    def __init__(self, num_outputs: int = 1, num_returned: int | None = None) -> None:
        self.outputs = [OutputStream(OutputLog(index, time.monotonic(), index=index)) for index in range(num_outputs)]
        single = num_outputs == 1
        self.stream: Stream = self.outputs[0] if single else FamilyStream(self.outputs, num_returned)
        self.aborted: list[tuple[Stream, bool]] = []

    def handle(self, *, streaming: bool = True) -> RequestHandle:
        return RequestHandle(self.stream, self.abort, streaming=streaming)

    def abort(self, stream: Stream, keep_prefix: bool) -> None:
        self.aborted.append((stream, keep_prefix))

    def put(self, token_ids: Iterable[int], index: int = 0, reason: FinishReason | None = None) -> None:
        output = self.outputs[index]
        output.log.token_ids += token_ids
        output.log.finish_reason = reason
        wake(publish([output]))


async def test_a_task_reads_what_is_published() -> None:
    producer = Producer()
    handle = producer.handle()
    read = asyncio.create_task(anext(handle))
    await asyncio.sleep(0)
    producer.put([1, 2])
    async with timeout():
        assert (await read).token_ids_delta == [1, 2]
        producer.put([3], reason="stop")
        final = await handle
        assert (final.token_ids, final.finish_reason) == ([1, 2, 3], "stop")
        assert [output.token_ids_delta async for output in handle] == [[3]]


def test_a_reader_that_leaves_aborts_once_it_is_the_last() -> None:
    producer = Producer()
    first = producer.handle()
    second = first.subscribe(streaming=False)
    with first:
        pass
    assert producer.aborted == []
    with second:
        second.abort(keep_prefix=False)
    assert producer.aborted == [(producer.stream, False), (producer.stream, True)]


def test_several_outputs_are_read_through_the_same_handle() -> None:
    producer = Producer(2)
    handle = producer.handle()
    producer.put([1], 0)
    producer.put([7, 8], 1, "length")
    producer.put([2], 0, "stop")
    deltas = [(output.index, output.token_ids_delta, output.finished) for output in handle.stream()]
    assert deltas == [(0, [1, 2], True), (1, [7, 8], True)]
    final = handle.subscribe(streaming=False).result(WAIT_S)
    assert [output.token_ids for output in final.outputs] == [[1, 2], [7, 8]]


def test_the_best_outputs_are_not_streamed() -> None:
    producer = Producer(3, num_returned=1)
    with pytest.raises(InvalidRequestError, match="the best 1 of best_of=3 are known only when all are finished"):
        producer.handle()
    handle = producer.handle(streaming=False)
    with pytest.raises(InvalidRequestError, match="streaming=True"):
        handle.subscribe(streaming=True)
    assert handle.subscribe().done is False


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_a_failure_comes_after_what_was_published(num_outputs: int) -> None:
    producer = Producer(num_outputs)
    handle = producer.handle()
    producer.put([4])
    failure = RequestFailedError("the machine is gone")
    wake(producer.stream.fail(failure))
    outputs = handle.stream()
    assert next(outputs).token_ids_delta == [4]
    with pytest.raises(RequestFailedError, match="gone"):
        next(outputs)
    with pytest.raises(RequestFailedError, match="gone"):
        handle.result(WAIT_S)
