"""OutputStream: how tokens get from the engine thread to a consumer in any thread or event loop.

There is no queue. The engine appends to the request's `OutputLog` and publishes its length. A reader remembers how far
it has read and takes everything after that at once. So a slow consumer gets merged deltas, a consumer that never reads
costs nothing beyond the output itself, and any number of consumers may read one stream.

If the caller wants a slow consumer's request to pause or end (`SlowConsumer`), the reader notes in the stream how far
it has read, and the engine compares after each step. A reader that finds its request paused asks for it to go on.

Waking is batched: `publish()` collects the waiters of all streams of a step, and `wake()` makes one
`call_soon_threadsafe` of them for each event loop. That call itself resumes the consumers' tasks: a future for each
token, and a turn of the event loop for each future, would cost more than everything else that the host does for it.

A waiter belongs to its event loop, and a stream refers to it weakly. So tasks that wait here live as long as their
loop, and are collected with a loop that is dropped, as if they waited for futures of that loop. The requests that tasks
of a closed loop wait for are aborted between two steps (`abort_orphans`).

Reading and publishing take no lock. The engine writes what is new before it looks for waiters, and a consumer becomes a
waiter before it looks for what is new. The GIL makes both threads see these accesses in one order, so no wake-up is
lost.
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
from typing import Any, Protocol

from llmengine.engine.blocking import wait_in_pieces
from llmengine.engine.reader import FamilyReader, OutputReader
from llmengine.engine.stats import RequestState, RequestStats
from llmengine.errors import EngineClosedError, LLMEngineError
from llmengine.outputs import OutputLog, RequestTimeline
from llmengine.request_options import SlowConsumer


def check_process(pid: int) -> None:
    """Raise `EngineClosedError` in a process other than `pid`: a forked one, where the engine has no thread."""
    if os.getpid() != pid:
        raise EngineClosedError(
            f"the LLM belongs to process {pid}, and this is process {os.getpid()}, which was forked from it; "
            "make the LLM in the process that uses it, or start processes with multiprocessing's 'spawn'"
        )


class LoopWaiter:
    """A place where one task at a time waits until its stream has something new. Belongs to one event loop.

    This is an awaitable that a task accepts in place of an `asyncio.Future` (`asyncio.isfuture()` is true of it). It
    may be awaited again and again, and may return although nothing is new.

    Attributes:
        abort: ends the request of the stream that it is called with.
        seen: tokens that the task has read, set by the task before it waits.
        posted: a call that will handle this waiter is on its way to the event loop.
        resume: lets the waiting task go on; None while no task waits.
        context: the context in which `resume` is called.
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

    # The part of `asyncio.Future` that a task uses.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the task that waits here."""
        return self.loop

    def add_done_callback(self, callback: Callable[[LoopWaiter], object], *, context: Context) -> None:
        """Remember how to resume the task."""
        self.resume = callback
        self.context = context

    def result(self) -> None:
        """Nothing: the task looks into the stream."""

    def cancel(self, msg: Any = None) -> bool:
        """Resume the task; False tells it to raise its own `CancelledError`, with its message."""
        resume, self.resume = self.resume, None
        if resume is not None:
            self.loop.call_soon(resume, self, context=self.context)
        return False


class ThreadWaiter:
    """A place where a thread waits until its stream, or one of several, has something new or has ended."""

    __slots__ = ("__weakref__", "event", "loop", "posted")

    def __init__(self) -> None:
        self.event = threading.Event()
        self.loop: None = None
        self.posted = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until there is something new; False if `timeout_s` seconds pass first.

        Everything published before the return can be read then. The next call returns if anything came after it.
        """
        if not wait_in_pieces(self.event.wait, timeout_s):
            return False
        self.event.clear()
        self.posted = False
        return True


Waiter = LoopWaiter | ThreadWaiter

_loops: dict[weakref.ref[asyncio.AbstractEventLoop], None] = {}
"""The event loops that have had waiters. Iterate over a copy, since other threads add to it."""

_KEPT = "_llmengine_waiters"
"""Attribute of an event loop that holds its attached waiters."""


def _waiters_of(loop: asyncio.AbstractEventLoop) -> set[LoopWaiter]:
    """The set that keeps the loop's attached waiters alive; it belongs to the loop."""
    kept: set[LoopWaiter] | None = getattr(loop, _KEPT, None)
    if kept is None:
        kept = set()
        setattr(loop, _KEPT, kept)
        _loops[weakref.ref(loop)] = None
    return kept


def abort_orphans() -> None:
    """Abort the requests that tasks of closed event loops wait for. Between two steps, on any engine's thread."""
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


class Observation(Protocol):
    """Wants to know when the streams of a request end."""

    def ended(self, stream: OutputStream) -> None:
        """The stream's output is final, and no consumer knows yet. Never raises."""


class OutputStream:
    """One request's output on its way to its consumers.

    Only the producer, which is the engine thread, appends to `log`, publishes and finishes. All other methods may be
    called from any thread.

    Attributes:
        slow_consumer: what happens to the request while it `is_behind`.
        max_unread: most unread tokens; a limit unless `slow_consumer` is "coalesce".
        num_published: tokens that consumers may read.
        num_read: tokens that they have read. A consumer that waits for the end counts as having read everything.
        resume: lets a paused request go on; a consumer calls it when it has read something. None if not paused.
        ended: the final output is published, or the stream failed. Read it before `num_published`, which is final then.
        failure: the error that reading a failed stream raises once nothing new is left.
        waiters: weak references to the waiters to wake for each token; replaced, never changed.
        abort_requested: set before the engine is told, so that a request that is not submitted yet never starts.
        observation: is told when the stream ends; None if nobody observes the engine.
        readers: the readers that the request runs for, each with a weak reference to its handle, whose callback removes
            the reader when the handle is collected. The last reader to leave aborts the request.
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
        "observation",
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
        self.observation: Observation | None = None
        self.readers: dict[object, weakref.ref[Any]] = {}
        self._final_waiters: tuple[weakref.ref[Waiter], ...] = ()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    @property
    def members(self) -> tuple[OutputStream, ...]:
        """The streams of the prompt's outputs: this one alone."""
        return (self,)

    def reader(self, streaming: bool) -> OutputReader:
        """A new place at the beginning of the output."""
        return OutputReader(self, streaming)

    @property
    def is_behind(self) -> bool:
        """True if `max_unread` tokens are unread and no consumer waits for the end."""
        return self.num_published - self.num_read >= self.max_unread and not self._final_waiters

    def mark_read(self, num_tokens: int) -> None:
        """Note that a consumer has read `num_tokens` tokens. A paused request is asked to go on."""
        with self._lock:
            self.num_read = max(self.num_read, num_tokens)
        if (resume := self.resume) is not None:
            resume()

    def finish(self) -> list[Waiter]:
        """Publish the final output; return the waiters to wake. Engine thread only."""
        self.num_published = len(self.log.token_ids)
        return self._end()

    def fail(self, failure: LLMEngineError) -> list[Waiter]:
        """End the stream with an error, unless it has ended; return the waiters to wake."""
        if self.ended:
            return []
        failure.request_id = self.log.public_id
        self.failure = failure
        return self._end()

    def add_waiter(self, waiter: Waiter, *, final_only: bool) -> None:
        """Have a waiter woken for everything published from now on, or with `final_only` just for the end."""
        self._check_process()
        with self._lock:
            if self.ended:
                return  # a consumer looks at `ended` before it waits
            if isinstance(waiter, LoopWaiter):
                _waiters_of(waiter.loop).add(waiter)
            if not final_only:
                # Waiters of readers that have left are dropped.
                self.waiters = (*(other for other in self.waiters if other() is not None), weakref.ref(waiter))
                return
            self._final_waiters = (*self._final_waiters, weakref.ref(waiter))
        self.mark_read(self.num_published)

    def detach(self, waiter: Waiter) -> None:
        """Never wake this waiter again. Idempotent."""
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
        """Forget all waiters; return those for which no call is on its way yet."""
        if self.observation is not None:
            self.observation.ended(self)  # first, so that an observer never knows less than a reader
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
    """The streams of all outputs of one prompt, seen as one, which has ended when all have. Any thread.

    Attributes:
        num_returned: how many outputs the final one has, the best of `members` (`best_of`).
    """

    def __init__(self, members: Sequence[OutputStream], num_returned: int | None = None) -> None:
        self.members = tuple(members)
        self.num_returned = len(members) if num_returned is None else num_returned
        self.log = members[0].log
        # Shared by the members, since the engine keeps only those that run.
        self.readers = members[0].readers
        for member in members:
            member.readers = self.readers

    def reader(self, streaming: bool) -> FamilyReader:
        """A new place at the beginning of each output; raises `InvalidRequestError` for streaming with `best_of`."""
        return FamilyReader(self, streaming)

    @property
    def num_published(self) -> int:
        """Tokens that may be read, summed over all members."""
        return sum(member.num_published for member in self.members)

    @property
    def ended(self) -> bool:
        """True once no member will put out anything more."""
        return all(member.ended for member in self.members)

    @property
    def failure(self) -> LLMEngineError | None:
        """The failure of the first member that failed; None if none did."""
        return next((member.failure for member in self.members if member.failure is not None), None)

    @property
    def abort_requested(self) -> bool:
        """The same as for a single stream; set for all members at once."""
        return self.members[0].abort_requested

    @abort_requested.setter
    def abort_requested(self, value: bool) -> None:
        for member in self.members:
            member.abort_requested = value

    def fail(self, failure: LLMEngineError) -> list[Waiter]:
        """End all members that have not ended; return the waiters to wake."""
        return [waiter for member in self.members for waiter in member.fail(failure)]

    def add_waiter(self, waiter: Waiter, *, final_only: bool) -> None:
        """Have a waiter woken for everything that any member publishes, or with `final_only` for each member's end."""
        for member in self.members:
            member.add_waiter(waiter, final_only=final_only)

    def detach(self, waiter: Waiter) -> None:
        """Never wake this waiter again. Idempotent."""
        for member in self.members:
            member.detach(waiter)


Stream = OutputStream | FamilyStream
"""The output that one call of `generate_async` reads."""


def attach(stream: Stream, abort: Callable[[Any, bool], None], *, final_only: bool) -> LoopWaiter:
    """A new waiter of the running event loop, woken for everything published from now on (or just for the end).

    `abort` is called with the stream if the loop is closed while a task waits here.
    """
    waiter = LoopWaiter(stream, asyncio.get_running_loop(), abort)
    stream.add_waiter(waiter, final_only=final_only)
    return waiter


def wait_blocking(stream: Stream, timeout_s: float | None) -> bool:
    """Block this thread until the stream has ended; False if `timeout_s` seconds pass first."""
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
    """How far the stream's request is. Any thread."""
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
    """Let consumers see what the streams' logs hold now; return the waiters to wake. Engine thread only.

    A waiter for which an earlier call is still on its way to the event loop is not among them.
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
    """Wake the consumers, with one call for each event loop."""
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
    """Resume, within this call, the tasks that wait and have something to read. In their event loop only.

    A waiter where no task waits is detached from its stream, which would otherwise wake the event loop for nothing.
    """
    waiter = stream = resume = rest = None
    if length_hint(waiters) > 1:
        # This second call handles the remaining waiters if a task runs the loop within itself until another task has
        # read (as nest_asyncio allows), or raises what its event loop does not catch (KeyboardInterrupt, SystemExit).
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
        # From Python 3.12 on, a task's failure refers to this frame, which would refer to the task.
        del waiter, stream, resume, rest
