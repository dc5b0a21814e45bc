"""RequestHandle: one request in progress, as `generate_async` returns it."""

from __future__ import annotations

import weakref
from asyncio import Task, get_running_loop, sleep
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, NoReturn, Self

from llmengine.checks import require_int
from llmengine.engine.stats import RequestStats
from llmengine.engine.stream import LoopWaiter, Stream, ThreadWaiter, attach, request_stats, wait_blocking
from llmengine.outputs import GenerationOutput


class RequestHandle(AsyncGenerator[GenerationOutput, None]):
    """One request in progress: an async generator of its outputs, and an awaitable of the final one.

    ``async for output in handle`` yields an output whenever tokens arrive (or just the final one, without `streaming`),
    and ``for output in handle.stream()`` does the same in a thread. ``await handle`` and ``handle.result()`` give the
    final output. The request runs whether or not anybody reads.

    With several outputs (`SamplingParams.n`), a streaming handle yields outputs of one at a time, each with its `index`
    and with deltas of its own, and for each one that is `finished`. The final output has all of them in `outputs`.

    The request is aborted, and its KV blocks are free again within one step, when `abort()` is called or its reader
    leaves. The reader leaves when

    - `aclose()` is called, or an ``async with handle:`` or ``with handle:`` block ends,
    - a task that awaits the handle is cancelled (a timeout is a cancellation),
    - the handle is garbage collected, as happens after a ``break`` out of an ``async for`` over an unnamed handle.

    With several readers (`subscribe`, `tee`), each of which is a handle of its own, the request is aborted when the
    last of them leaves.

    Reading raises `EngineDeadError` or `EngineClosedError` if the engine ended first, and the `RequestError` that
    rejected the prompt if the fault was found after `generate_async` had returned.

    Args:
        stream: the output of any producer, which appends to the stream's log and publishes it.
        abort: asks the producer to end the stream's request; called with the stream and `keep_prefix`. Never blocks.
        streaming: yield outputs whenever tokens arrive.
        owner: kept alive as long as the handle, such as the owner of the engine that produces the stream.
    """

    def __init__(
        self,
        stream: Stream,
        abort: Callable[[Stream, bool], None],
        *,
        streaming: bool,
        owner: object = None,
    ) -> None:
        self._owner = owner
        self._stream = stream
        self._abort = abort
        self._reader = stream.reader(streaming)
        self._waiter: LoopWaiter | None = None
        self._was_immediate = False
        """The previous read found its output at once, without a turn of the event loop."""
        self._leave = _join(self, stream, abort)

    @property
    def request_id(self) -> int | str:
        """The caller's `request_id`, else a number that increases and is unique within the `LLM`."""
        return self._stream.log.public_id

    @property
    def metadata(self) -> Any:
        """The caller's `metadata`."""
        return self._stream.log.metadata

    @property
    def done(self) -> bool:
        """True once the final output, or the failure, can be read without waiting."""
        return self._stream.ended

    @property
    def exhausted(self) -> bool:
        """True once this reader has taken the final output, has met the failure, or has left."""
        return self._reader.exhausted

    def stats(self) -> RequestStats:
        """How far the request is. The engine runs on meanwhile."""
        return request_stats(self._stream)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the handle of request {self.request_id!r} cannot be pickled or copied, because it is bound to an LLM in "
            "this process; its outputs can be pickled"
        )

    def abort(self, *, keep_prefix: bool = True) -> None:
        """End the request with finish reason "abort". Its output so far can still be read. Idempotent, any thread.

        The KV blocks that the request filled stay findable for later prompts with the same beginning, until they are
        needed for something else. With `keep_prefix=False` they are forgotten, except for those that other requests use
        and those that this one found when it began. The first call decides.
        """
        self._abort(self._stream, keep_prefix)

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """The final output; blocks this thread until it is there.

        Raises `TimeoutError` after `timeout` seconds; the request goes on. Also raises what reading raises.
        """
        if not wait_blocking(self._stream, timeout):
            raise TimeoutError(f"request {self.request_id!r} did not finish within {timeout} s")
        return self._reader.final()

    def stream(self) -> Generator[GenerationOutput, None, None]:
        """Yield what ``async for`` would yield, blocking this thread. Leaving the loop aborts the request.

        The reader leaves when the generator is closed or collected, as after a ``break`` out of a loop over an unnamed
        one.
        """
        stream, reader = self._stream, self._reader
        waiter: ThreadWaiter | None = None
        try:
            while not reader.exhausted:
                if not reader.streaming:
                    wait_blocking(stream, None)
                if (output := reader.take()) is not None:
                    yield output
                elif waiter is None:
                    waiter = ThreadWaiter()
                    stream.add_waiter(waiter, final_only=False)  # now look again: something may have been published
                else:
                    waiter.wait()
        finally:
            # No `detach`, which takes a lock, as a garbage collection must not. The stream refers to the waiter weakly.
            self._close()

    def poll(self) -> GenerationOutput | None:
        """What ``async for`` would yield next, if it is there, else None. Never waits; raises what reading raises.

        For callers that have a loop of their own, such as one that draws frames. `exhausted` says when to stop.
        """
        reader = self._reader
        try:
            return None if reader.exhausted else reader.take()
        except BaseException:
            self._close()
            raise

    def add_waiter(self, waiter: ThreadWaiter) -> None:
        """Have a thread's waiter woken for all that is published from now on; `poll` after this, then wait."""
        self._stream.add_waiter(waiter, final_only=False)

    def subscribe(self, *, streaming: bool | None = None) -> RequestHandle:
        """Another reader of the request, which sees everything from the first token on, however late it comes.

        Each reader has its own place in the output and may be read in a thread or event loop of its own. The request
        runs until it has finished or the last reader has left; this handle counts as one as long as it exists. For
        `slow_consumer`, the reader that has read most counts.

        Args:
            streaming: None: the same as this handle. With `best_of`, True raises `InvalidRequestError`.
        """
        if streaming is None:
            streaming = self._reader.streaming
        return RequestHandle(self._stream, self._abort, streaming=streaming, owner=self._owner)

    def tee(self, num_readers: int) -> list[RequestHandle]:
        """`num_readers` readers like those of `subscribe()`, to which this handle leaves the request.

        This handle is not a reader any more, but can still abort the request.
        """
        require_int("num_readers", num_readers, 1)
        readers = [self.subscribe() for _ in range(num_readers)]
        self._close()
        return readers

    def __await__(self) -> Generator[Any, None, GenerationOutput]:
        return self.wait().__await__()

    def task(self) -> Task[GenerationOutput]:
        """A task of the running event loop that waits for the final output, for `asyncio.wait` for instance.

        The request is aborted when the task is cancelled, even before the task has begun.
        """
        leave = self._leave
        task = get_running_loop().create_task(self.wait(), name=f"llmengine request {self.request_id!r}")
        task.add_done_callback(lambda task: leave() if task.cancelled() else None)
        return task

    async def wait(self) -> GenerationOutput:
        """The final output, as of ``await handle``, for callers that need a coroutine or a coroutine function:

        ``group.create_task(handle.wait())``, ``asyncio.run(handle.wait())``, anyio's ``group.start_soon(handle.wait)``.
        """
        waiter = attach(self._stream, self._leave, final_only=True)
        try:
            while not self._stream.ended:
                await waiter
        except BaseException:
            # The task was cancelled, or the loop closes the coroutine: nobody will read on.
            self._leave()
            raise
        return self._reader.final()

    async def __anext__(self) -> GenerationOutput:
        # One coroutine and few calls for each token: this is what streaming costs the consumer's event loop.
        has_waited = False
        reader = self._reader
        try:
            while not reader.exhausted:
                if self._was_immediate:
                    # A consumer that is slower than the engine always finds something new. Without this turn of the
                    # loop, no timeout and no other task would run until the request has ended.
                    self._was_immediate, has_waited = False, True
                    await sleep(0)
                    continue
                output = reader.take()
                if output is not None:
                    self._was_immediate = not has_waited
                    return output
                waiter = self._waiter
                if waiter is None or waiter.resume or not waiter.attached or waiter.loop is not get_running_loop():
                    self._waiter = attach(self._stream, self._leave, final_only=not reader.streaming)
                    continue  # something may have been published before the waiter was attached
                waiter.seen = reader.num_seen
                has_waited = True
                await waiter
        except BaseException:
            # The task was cancelled, the loop closes the coroutine, or the request failed: nobody will read on.
            self._close()
            raise
        raise StopAsyncIteration

    async def asend(self, value: None) -> GenerationOutput:
        """Same as `__anext__`; the value is ignored."""
        return await self.__anext__()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> GenerationOutput:
        """Leave the request and raise the exception, as a generator without a handler for it would."""
        await self.aclose()
        error = typ if isinstance(typ, BaseException) else (val if isinstance(val, BaseException) else typ())
        raise error.with_traceback(tb)

    async def aclose(self) -> None:
        """End the iteration and leave; the request is aborted unless it has other readers. Never waits."""
        self._close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._reader.exhausted = True
        self._leave()


def _join(handle: RequestHandle, stream: Stream, abort: Callable[[Stream, bool], None]) -> Callable[..., None]:
    """Make the handle one of its stream's readers; return the function by which it leaves.

    The last reader to leave aborts the request. Leaving takes no lock, since garbage collections do it.
    """
    place = object()

    def leave(*_: object) -> None:
        stream.readers.pop(place, None)
        if not stream.readers and not stream.ended:
            abort(stream, True)

    # Not weakref.finalize, which would keep the stream in a global table and run at interpreter exit as well.
    stream.readers[place] = weakref.ref(handle, leave)
    return leave
