"""OutputStream: how tokens get from the engine thread to a consumer in any thread or event loop.

There is no queue. The engine appends to the request's `OutputLog` and publishes how long it is; a consumer remembers
how far it has read and takes everything between at once. So a slow consumer gets merged deltas, a consumer that never
reads costs nothing beyond the output itself, and any number of consumers may read one stream.

Where the caller wants less than that for a slow consumer (`SlowConsumer`), the consumer notes in the stream how far it
has read, the engine compares after each token, and the consumer that finds its request paused asks for it to go on.

Waking is batched: `publish()` collects the waiters of all of a step's streams, and `wake()` makes one
`call_soon_threadsafe` per event loop out of them. That call resumes the consumers' tasks itself: a future for each
token, and a turn of the event loop for each future, would cost more than everything else that the host does for it.

A waiter belongs to its event loop, and a stream knows it weakly: tasks that wait here live as long as their loop, and
go with a loop that is dropped, as if they waited for futures of its own. What tasks of a closed loop wait for is
aborted between two steps (`abort_orphans`).

Reading and publishing take no lock. The engine writes what is new before it looks for waiters, a consumer becomes a
waiter before it looks for what is new, and the GIL lets both see these accesses in one order, so no wake-up is lost.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from contextvars import Context
from operator import length_hint
from typing import Any

from llmengine.engine.reader import FamilyReader, OutputReader
from llmengine.engine.stats import RequestState, RequestStats
from llmengine.errors import EngineClosedError, LLMEngineError
from llmengine.outputs import OutputLog, RequestTimeline
from llmengine.request_options import SlowConsumer


def check_process(pid: int) -> None:
    """Raise `EngineClosedError` in another process than `pid`, a forked one, where the engine has no thread."""
    if os.getpid() != pid:
        raise EngineClosedError(
            f"the LLM belongs to process {pid}, and this is process {os.getpid()}, forked from it: "
            "make the LLM in the process that uses it, or start processes with multiprocessing's 'spawn'"
        )


class LoopWaiter:
    """A place for one task at a time to wait in, until its stream has something new. Belongs to one event loop.

    An awaitable that a task accepts in place of an `asyncio.Future` (`asyncio.isfuture()` is true of it), and which may
    be awaited again and again. It may return although nothing is new.

    Attributes:
        abort: ends the request of the stream that it is called with.
        seen: how many tokens the task has read, set by the task before it waits.
        posted: a call that will look after this waiter is on its way to the event loop.
        resume: lets the task go on that waits here; None while none does.
        context: to call `resume` in.
    """

    __slots__ = (
        "__weakref__",
        "_asyncio_future_blocking",
        "abort",
        "attached",
        "context",
        "loop",
        "posted",
        "resume",
        "seen",
        "stream",
    )

    def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop, abort: Callable[[Any, bool], None]) -> None:
        self.stream = stream
        self.loop = loop
        self.abort = abort
        self.attached = True
        self.posted = False
        self.seen = 0
        self._asyncio_future_blocking = False
        self.resume: Callable[[LoopWaiter], object] | None = None
        self.context: Context

    def __await__(self) -> Generator[LoopWaiter, None, None]:
        self._asyncio_future_blocking = True
        yield self

    # What a task asks of the future that it waits for.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop of the task that may wait here."""
        return self.loop

    def add_done_callback(self, callback: Callable[[LoopWaiter], object], *, context: Context) -> None:
        """Remember how to let the task go on."""
        self.resume = callback
        self.context = context

    def result(self) -> None:
        """Return nothing: the task looks into the stream."""

    def cancel(self, msg: Any = None) -> bool:
        """Let the task go on; False tells it to raise its `CancelledError` (with its message) by itself then."""
        resume, self.resume = self.resume, None
        if resume is not None:
            self.loop.call_soon(resume, self, context=self.context)
        return False


class ThreadWaiter:
    """A thread that waits for something new of its stream, or for the end of it, or of each of several."""

    __slots__ = ("__weakref__", "event", "loop", "posted")

    def __init__(self) -> None:
        self.event = threading.Event()
        self.loop: None = None
        self.posted = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until there is something new; False when `timeout_s` seconds passed first.

        What comes after the return is heard of by the next call, and what came before can be seen.
        """
        if not self.event.wait(timeout_s):
            return False
        self.event.clear()
        self.posted = False
        return True


Waiter = LoopWaiter | ThreadWaiter

_loops: dict[weakref.ref[asyncio.AbstractEventLoop], None] = {}
"""The event loops that have had waiters. Never iterated itself, since other threads add to it."""

_KEPT = "_llmengine_waiters"
"""Attribute of an event loop: its attached waiters."""


def _waiters_of(loop: asyncio.AbstractEventLoop) -> set[LoopWaiter]:
    """Return the set that keeps the loop's attached waiters alive; it belongs to the loop."""
    kept: set[LoopWaiter] | None = getattr(loop, _KEPT, None)
    if kept is None:
        kept = set()
        setattr(loop, _KEPT, kept)
        _loops[weakref.ref(loop)] = None
    return kept


def abort_orphans() -> None:
    """Abort what tasks of closed event loops wait for. Between two steps, on any engine's thread."""
    for reference in list(_loops):
        loop = reference()
        if loop is None:
            _loops.pop(reference, None)
            continue
        if not loop.is_closed():
            continue
        _loops.pop(reference, None)
        for waiter in list(_waiters_of(loop)):
            waiter.stream.detach(waiter)
            if waiter.resume is not None:
                waiter.abort(waiter.stream, True)


class OutputStream:
    """One request's output on its way to its consumers.

    `log` is appended to by the engine thread alone. Everything else may be called from any thread.

    Attributes:
        slow_consumer: what to do when `is_behind`.
        max_unread: how many tokens may be unread; a limit unless `slow_consumer` is "coalesce".
        num_published: how many tokens consumers may read.
        num_read: how many they have read; who waits for the end counts as having read all.
        resume: of a paused request, to be called by who has read something; None while it is not paused.
        ended: the last output is published, or the stream failed; read before `num_published`, which is final then.
        failure: what each read of a failed stream raises once it finds nothing new.
        waiters: weak references to those to wake for each token; replaced, never changed.
        abort_requested: set before the engine hears of it, so that a request that is not submitted yet never starts.
        readers: those that the request runs for, each with a weak reference to its handle, whose callback removes it
            when that is collected. The last to leave aborts the request.
    """

    __slots__ = (
        "__weakref__",
        "_final_waiters",
        "_lock",
        "_pid",
        "abort_requested",
        "ended",
        "failure",
        "log",
        "max_unread",
        "num_published",
        "num_read",
        "readers",
        "resume",
        "slow_consumer",
        "waiters",
    )

    def __init__(self, log: OutputLog, slow_consumer: SlowConsumer = "coalesce", max_unread: int = 0) -> None:
        self.log = log
        self.slow_consumer: SlowConsumer = slow_consumer
        self.max_unread = max_unread
        self.num_published = 0
        self.num_read = 0
        self.resume: Callable[[], None] | None = None
        self.ended = False
        self.failure: LLMEngineError | None = None
        self.waiters: tuple[weakref.ref[Waiter], ...] = ()
        self.abort_requested = False
        self.readers: dict[object, weakref.ref[Any]] = {}
        self._final_waiters: tuple[weakref.ref[Waiter], ...] = ()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def members(self) -> tuple[OutputStream, ...]:
        """The stream of each of the prompt's outputs: there is one."""
        return (self,)

    def reader(self, streaming: bool) -> OutputReader:
        """A new place at the beginning of the output."""
        return OutputReader(self, streaming)

    @property
    def is_behind(self) -> bool:
        """True when `max_unread` tokens are unread and nobody waits for the end."""
        return self.num_published - self.num_read >= self.max_unread and not self._final_waiters

    def mark_read(self, num_tokens: int) -> None:
        """Note that a consumer has read so many tokens; the one that has read most counts. A paused request goes on."""
        with self._lock:
            self.num_read = max(self.num_read, num_tokens)
        if (resume := self.resume) is not None:
            resume()

    def finish(self) -> list[Waiter]:
        """Publish the last output; return the waiters to be woken. Engine thread only."""
        self.num_published = len(self.log.token_ids)
        return self._end()

    def fail(self, failure: LLMEngineError) -> list[Waiter]:
        """End the stream with an error, unless it has ended; return the waiters to be woken."""
        if self.ended:
            return []
        failure.request_id = self.log.public_id
        self.failure = failure
        return self._end()

    def add_waiter(self, waiter: Waiter, *, final_only: bool) -> None:
        """Let a waiter hear of what is published from now on (or of the end)."""
        self._check_process()
        with self._lock:
            if self.ended:
                return  # which whoever waits sees before
            if isinstance(waiter, LoopWaiter):
                _waiters_of(waiter.loop).add(waiter)
            if not final_only:
                # Without those of readers that have left.
                self.waiters = (*(other for other in self.waiters if other() is not None), weakref.ref(waiter))
                return
            self._final_waiters = (*self._final_waiters, weakref.ref(waiter))
        self.mark_read(self.num_published)

    def detach(self, waiter: Waiter) -> None:
        """Wake this waiter no more; idempotent."""
        reference = weakref.ref(waiter)
        with self._lock:
            if isinstance(waiter, LoopWaiter):
                waiter.attached = False
                _waiters_of(waiter.loop).discard(waiter)
            self.waiters = tuple(other for other in self.waiters if other is not reference)
            if reference in self._final_waiters:
                self.num_read = self.num_published
                self._final_waiters = tuple(other for other in self._final_waiters if other is not reference)

    def _check_process(self) -> None:
        if not self.ended:
            check_process(self._pid)

    def _end(self) -> list[Waiter]:
        """Return all waiters that are not on their way, and let go of all."""
        self.ended = True
        self.resume = None
        waiters = [waiter for reference in (*self.waiters, *self._final_waiters) if (waiter := reference()) is not None]
        self.waiters = self._final_waiters = ()
        for waiter in waiters:
            if isinstance(waiter, LoopWaiter):
                _waiters_of(waiter.loop).discard(waiter)
        waiters = [waiter for waiter in waiters if not waiter.posted]
        for waiter in waiters:
            waiter.posted = True
        return waiters


class FamilyStream:
    """The streams of all outputs of one prompt, seen as one: it has ended when all have. Any thread.

    Attributes:
        num_returned: how many outputs the final one has, the best of `members` (`best_of`).
    """

    def __init__(self, members: Sequence[OutputStream], num_returned: int | None = None) -> None:
        self.members = tuple(members)
        self.num_returned = len(members) if num_returned is None else num_returned
        self.log = members[0].log
        # Of each member, since the engine keeps those that run.
        self.readers = members[0].readers
        for member in members:
            member.readers = self.readers

    def reader(self, streaming: bool) -> FamilyReader:
        """A new place at the beginning of each output; raises `InvalidRequestError` for streaming with `best_of`."""
        return FamilyReader(self, streaming)

    @property
    def num_published(self) -> int:
        """Tokens that may be read, of all members."""
        return sum(member.num_published for member in self.members)

    @property
    def ended(self) -> bool:
        """True once nothing more will come from any member."""
        return all(member.ended for member in self.members)

    @property
    def failure(self) -> LLMEngineError | None:
        """What the first failed member's reads raise; None where all are sound."""
        return next((member.failure for member in self.members if member.failure is not None), None)

    @property
    def abort_requested(self) -> bool:
        """As of a single stream; set for all members at once."""
        return self.members[0].abort_requested

    @abort_requested.setter
    def abort_requested(self, value: bool) -> None:
        for member in self.members:
            member.abort_requested = value

    def fail(self, failure: LLMEngineError) -> list[Waiter]:
        """End all members that have not ended; return the waiters to be woken."""
        return [waiter for member in self.members for waiter in member.fail(failure)]

    def add_waiter(self, waiter: Waiter, *, final_only: bool) -> None:
        """Let a waiter hear of what any member publishes from now on (or of the end of each)."""
        for member in self.members:
            member.add_waiter(waiter, final_only=final_only)

    def detach(self, waiter: Waiter) -> None:
        """Wake this waiter no more; idempotent."""
        for member in self.members:
            member.detach(waiter)


Stream = OutputStream | FamilyStream
"""What one call of `generate_async` reads from."""


def attach(stream: Stream, abort: Callable[[Any, bool], None], *, final_only: bool) -> LoopWaiter:
    """Return a new waiter of the running event loop. It hears of what is published from now on (or of the end).

    `abort` is called with the stream when the loop is closed under a task that waits here.
    """
    waiter = LoopWaiter(stream, asyncio.get_running_loop(), abort)
    stream.add_waiter(waiter, final_only=final_only)
    return waiter


def wait_blocking(stream: Stream, timeout_s: float | None) -> bool:
    """Block this thread until the stream has ended; False when `timeout_s` seconds passed first."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    waiter = ThreadWaiter()
    stream.add_waiter(waiter, final_only=True)
    try:
        while not stream.ended:
            if not waiter.wait(None if deadline is None else deadline - time.monotonic()):
                return stream.ended
        return True
    finally:
        stream.detach(waiter)


def request_stats(stream: Stream) -> RequestStats:
    """Return how far the request is that the stream is of. Any thread."""
    log, members = stream.log, stream.members
    ended = stream.ended
    finished = log.finished if ended else None
    if ended:
        state: RequestState = "finished"
    elif any(member.resume is not None for member in members):
        state = "paused"
    else:
        state = "queued" if log.first_scheduled is None else "running"
    return RequestStats(
        request_id=log.public_id,
        metadata=log.metadata,
        tenant=log.tenant,
        priority=log.priority,
        state=state,
        num_outputs=len(members),
        num_prompt_tokens=len(log.prompt_token_ids),
        num_cached_tokens=log.num_cached_tokens,
        num_tokens=sum(member.num_published for member in members),
        timeline=RequestTimeline(log.queued, log.first_scheduled, log.first_token, finished, log.num_preemptions),
    )


def publish(streams: Iterable[OutputStream]) -> list[Waiter]:
    """Let consumers see what the streams' logs hold now; return the waiters to be woken. Engine thread only.

    A waiter whose event loop has not come to looking after it since the last time is not among them.
    """
    waiters: list[Waiter] = []
    for stream in streams:
        log = stream.log
        if log.finish_reason is not None:
            waiters += stream.finish()
            continue
        stream.num_published = len(log.token_ids)
        for reference in stream.waiters:
            waiter = reference()
            if waiter is not None and not waiter.posted:
                waiter.posted = True
                waiters.append(waiter)
    return waiters


def wake(waiters: Iterable[Waiter]) -> None:
    """Wake each consumer, one call per event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[LoopWaiter]] = {}
    for waiter in waiters:
        if isinstance(waiter, ThreadWaiter):
            waiter.event.set()
        else:
            by_loop.setdefault(waiter.loop, []).append(waiter)
    for loop, group in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed, see `abort_orphans`
            loop.call_soon_threadsafe(_deliver, iter(group))


def _deliver(waiters: Iterator[LoopWaiter]) -> None:
    """Let the tasks go on that wait and have something to read, now and here. In their event loop only.

    A waiter where no task waits leaves its stream, which would otherwise wake the event loop for nothing.
    """
    waiter = stream = resume = rest = None
    if length_hint(waiters) > 1:
        # For those that are left where a task runs the loop in itself until another one has read (as nest_asyncio
        # lets it), or raises what its event loop does not catch (KeyboardInterrupt, SystemExit).
        rest = asyncio.get_running_loop().call_soon(_deliver, waiters)
    try:
        for waiter in waiters:
            waiter.posted = False
            stream, resume = waiter.stream, waiter.resume
            if resume is None:
                stream.detach(waiter)
            elif stream.num_published != waiter.seen or stream.ended:
                waiter.resume = None
                waiter.context.run(resume, waiter)
        if rest is not None:
            rest.cancel()
    finally:
        # From Python 3.12 on a task's failure refers to this frame, which would refer to the task.
        del waiter, stream, resume, rest
