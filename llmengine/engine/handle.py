"""RequestHandle: what `generate_async` returns."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any

from llmengine.engine.stream import OutputStream
from llmengine.outputs import GenerationOutput, LogCursor


class RequestHandle(AsyncGenerator[GenerationOutput, None]):
    """One request in progress: an async generator of its outputs, and an awaitable of the final one.

    ``async for output in handle`` yields as tokens arrive (or once, without `streaming`); ``await handle`` and
    ``handle.result()`` give the final output. The request runs whether or not anybody reads.

    The request is aborted, and its KV blocks come back within one step, when

    - `abort()` or `aclose()` is called,
    - a task that awaits the handle is cancelled (a timeout is a cancellation),
    - the handle is garbage collected, which is what ``break`` out of an ``async for`` over an unnamed handle does.

    Reading raises `EngineDeadError` or `EngineClosedError` when the engine ended first, and the `RequestError` that
    rejected the prompt when that was found after `generate_async` returned.
    """

    def __init__(
        self, stream: OutputStream, abort: Callable[[OutputStream], None], *, streaming: bool, owner: object = None
    ) -> None:
        self._owner = owner
        """Kept alive as long as this handle: an `LLM` that only its handles refer to must not close under them."""
        self._stream = stream
        self._abort = abort
        self._streaming = streaming
        self._seen = LogCursor()
        self._exhausted = False
        # Not weakref.finalize, which would keep the stream in a global table and run at interpreter exit as well.
        stream.consumer = weakref.ref(self, lambda _: None if stream.ended else abort(stream))

    @property
    def request_id(self) -> int:
        """Unique within the `LLM`, increasing."""
        return self._stream.log.request_id

    @property
    def done(self) -> bool:
        """True once the final output, or the failure, can be read without waiting."""
        return self._stream.ended

    def abort(self) -> None:
        """End the request with finish reason "abort"; what it has put out can still be read. Any thread; idempotent."""
        self._abort(self._stream)

    def result(self, timeout: float | None = None) -> GenerationOutput:
        """Block this thread until the final output is there and return it.

        Raises `TimeoutError` after `timeout` seconds; the request goes on.
        """
        if not self._stream.wait_blocking(self._seen, final_only=True, timeout_s=timeout):
            raise TimeoutError(f"request {self.request_id} did not finish within {timeout} s")
        return self._stream.final()

    def __await__(self) -> Generator[Any, None, GenerationOutput]:
        return self._wait_final().__await__()

    async def _wait_final(self) -> GenerationOutput:
        await self._wait(final_only=True)
        return self._stream.final()

    async def __anext__(self) -> GenerationOutput:
        while not self._exhausted:
            try:
                await self._wait(final_only=not self._streaming)
            except BaseException:
                self._exhausted = True
                raise
            if (output := self._take()) is not None:
                return output
        raise StopAsyncIteration

    def _take(self) -> GenerationOutput | None:
        """Return what is new; None when another task that iterates this handle took it, or closed the handle."""
        if self._exhausted:
            return None
        self._exhausted = True  # if this raises
        polled = self._stream.poll(self._seen)
        if polled is None:
            self._exhausted = False
            return None
        output, self._seen = polled
        self._exhausted = output.finished
        return output

    async def _wait(self, *, final_only: bool) -> None:
        try:
            await self._stream.wait(self._seen, final_only=final_only)
        except BaseException:
            # Cancelled, or the loop closes the coroutine: nobody will read on.
            self.abort()
            raise

    async def asend(self, value: None) -> GenerationOutput:
        """Same as `__anext__`; the value is ignored."""
        return await self.__anext__()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> GenerationOutput:
        """Abort the request and raise the exception here, as a generator without a handler would."""
        await self.aclose()
        error = typ if isinstance(typ, BaseException) else (val if isinstance(val, BaseException) else typ())
        raise error.with_traceback(tb)

    async def aclose(self) -> None:
        """Abort the request and end the iteration. Never waits."""
        self._exhausted = True
        self.abort()
