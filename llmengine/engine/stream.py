"""OutputStream: how tokens get from the engine thread to a consumer in any thread or event loop.

There is no queue. The engine appends to the request's `OutputLog` and publishes how long it is; a consumer remembers
how far it has read and takes everything between at once. So a slow consumer gets merged deltas, a consumer that never
reads costs nothing beyond the output itself, and any number of consumers may read one stream.

Waking is batched: `publish()` returns the waiters that now have something to read, and `wake()` makes one
`call_soon_threadsafe` per event loop out of all of a step's waiters.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from llmengine.errors import LLMEngineError
from llmengine.outputs import GenerationOutput, LogCursor, OutputLog


class Waiter:
    """One consumer that waits for a stream: a future of its loop, or a `threading.Event` without a loop."""

    __slots__ = ("event", "final_only", "future", "loop", "stream")

    def __init__(self, stream: OutputStream, *, final_only: bool, loop: asyncio.AbstractEventLoop | None) -> None:
        self.stream = stream
        self.final_only = final_only
        self.loop = loop
        self.future: asyncio.Future[None] | None = None if loop is None else loop.create_future()
        self.event: threading.Event | None = threading.Event() if loop is None else None


class OutputStream:
    """One request's output on its way to its consumers.

    `log` is appended to by the engine thread alone. Everything else may be called from any thread.
    """

    __slots__ = ("_cursor", "_failure", "_finished", "_lock", "_waiters", "abort_requested", "consumer", "log")

    def __init__(self, log: OutputLog) -> None:
        self.log = log
        self.abort_requested = False
        """Set before the engine hears of it, so that a request that is not submitted yet never starts."""
        self.consumer: weakref.ref[Any] | None = None
        """Weak reference to the consumer's handle; its callback aborts the request when the handle is collected."""
        self._lock = threading.Lock()
        self._cursor = LogCursor()
        self._finished = False
        self._failure: LLMEngineError | None = None
        self._waiters: list[Waiter] = []

    def publish(self) -> list[Waiter]:
        """Let consumers see what the log holds now; return the waiters to be woken. Engine thread only."""
        log = self.log
        with self._lock:
            self._cursor = LogCursor(len(log.token_ids), len(log.pieces))
            self._finished = log.finish_reason is not None
            return self._take_waiters(final=self._finished)

    def fail(self, failure: LLMEngineError) -> list[Waiter]:
        """End the stream with an error that each read raises from now on; return the waiters to be woken."""
        with self._lock:
            if not self._finished:
                self._failure = failure
            return self._take_waiters(final=True)

    @property
    def ended(self) -> bool:
        """True once the last output is published or the stream failed."""
        return self._finished or self._failure is not None

    def poll(self, seen: LogCursor) -> tuple[GenerationOutput, LogCursor] | None:
        """Return what was published after `seen` as one output, or None; raises the failure of a failed stream.

        A finished stream answers even where nothing is new: its final output carries the finish reason.
        """
        with self._lock:
            end, finished, failure = self._cursor, self._finished, self._failure
        if failure is not None and end == seen:
            raise failure
        if end == seen and not finished:
            return None
        return GenerationOutput(self.log, seen, end, finished=finished), end

    def final(self) -> GenerationOutput:
        """Return the whole output of an ended stream; raises the failure of a failed one."""
        with self._lock:
            end, finished, failure = self._cursor, self._finished, self._failure
        if failure is not None:
            raise failure
        assert finished
        return GenerationOutput(self.log, LogCursor(), end, finished=True)

    async def wait(self, seen: LogCursor, *, final_only: bool) -> None:
        """Return when there is something after `seen` (or, with `final_only`, when the stream has ended).

        Cancellation leaves the stream as it was.
        """
        waiter = self._add_waiter(seen, final_only=final_only, loop=asyncio.get_running_loop())
        if waiter is None:
            return
        assert waiter.future is not None
        try:
            await waiter.future
        finally:
            self._remove_waiter(waiter)

    def wait_blocking(self, seen: LogCursor, *, final_only: bool, timeout_s: float | None) -> bool:
        """Like `wait()` for a plain thread; False when `timeout_s` seconds passed first."""
        waiter = self._add_waiter(seen, final_only=final_only, loop=None)
        if waiter is None:
            return True
        assert waiter.event is not None
        try:
            return waiter.event.wait(timeout_s)
        finally:
            self._remove_waiter(waiter)

    def _add_waiter(
        self, seen: LogCursor, *, final_only: bool, loop: asyncio.AbstractEventLoop | None
    ) -> Waiter | None:
        with self._lock:
            if self._finished or self._failure is not None or (not final_only and self._cursor != seen):
                return None
            waiter = Waiter(self, final_only=final_only, loop=loop)
            self._waiters.append(waiter)
            return waiter

    def _remove_waiter(self, waiter: Waiter) -> None:
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _take_waiters(self, *, final: bool) -> list[Waiter]:
        if not self._waiters:
            return []
        taken = [waiter for waiter in self._waiters if final or not waiter.final_only]
        if taken:
            self._waiters = [waiter for waiter in self._waiters if waiter not in taken]
        return taken


def wake(waiters: Iterable[Waiter]) -> list[OutputStream]:
    """Wake each consumer, one call per event loop; return the streams whose consumer's loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        if waiter.loop is None:
            assert waiter.event is not None
            waiter.event.set()
        else:
            by_loop.setdefault(waiter.loop, []).append(waiter)
    orphans: list[OutputStream] = []
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, group)
        except RuntimeError:
            orphans.extend(waiter.stream for waiter in group)
    return orphans


def _resolve(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        assert waiter.future is not None
        if not waiter.future.done():
            waiter.future.set_result(None)
