"""Engine: the thread that owns scheduler and backend, and the thread-safe door to it.

The thread runs an event loop of its own (uvloop where installed), never the caller's. It steps while there is work
and sleeps in the loop otherwise. All other threads talk to it through one deque of commands, which it empties between
two steps, so scheduler state needs no locks.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from numbers import Real
from typing import Any, TypeVar, cast

import anyio

from llmengine.batch import Backend, BackendInfo, PreparingBackend, WatchedBackend
from llmengine.config import KvCacheConfig, SchedulerConfig
from llmengine.engine.admission import Admission
from llmengine.engine.blocking import result_of, wait_in_pieces
from llmengine.engine.commands import CommandQueue
from llmengine.engine.deadlines import Deadlines
from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.observers import Observers
from llmengine.engine.request import Request, RequestStatus
from llmengine.engine.run_ahead import RunAhead
from llmengine.engine.scheduler import Scheduler
from llmengine.engine.scoring import score_tokens
from llmengine.engine.slow_consumers import SlowConsumers
from llmengine.engine.snapshot import take_stats
from llmengine.engine.stats import EngineCounters, EngineHealth, EngineState, EngineStats
from llmengine.engine.stream import Stream, abort_orphans, publish, wake
from llmengine.engine.waiting_room import WaitingRoom
from llmengine.engine.watchdog import Watchdog
from llmengine.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    LLMEngineError,
    clear_frames,
)
from llmengine.outputs import FinishReason

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_LOGGED_IDS = 16

_QUIET_S = 0.1
"""An engine that has been idle for this long prepares its backend, so that later steps start faster."""


class Engine:
    """Serves requests with one backend until stopped. Every public method may be called from any thread.

    `backend_factory` runs on the engine thread, so that one thread makes, uses and closes the backend.

    When a call into the backend hangs, the watchdog's thread ends the engine in place of the engine thread. If the call
    ever returns, the engine thread closes the backend and touches nothing else.
    """

    def __init__(
        self, backend_factory: Callable[[], Backend], scheduler_config: SchedulerConfig, kv_cache_config: KvCacheConfig
    ) -> None:
        self.admission = Admission(scheduler_config)
        self.observers = Observers()
        self.state: EngineState = "loading"
        self.failure: BaseException | None = None
        self._backend_factory = backend_factory
        self.scheduler_config = scheduler_config
        self._kv_cache_config = kv_cache_config
        self._ready: Future[BackendInfo] = Future()
        self._commands = CommandQueue(self._end_error)
        self._ended = False
        self._end_lock = threading.Lock()
        self._over: Future[None] = Future()
        """Done when the thread is about to end, or hangs."""
        self._over.set_running_or_notify_cancel()  # a task that waits for it may be cancelled, but must not cancel it
        self._hangs = False
        self._watchdog: Watchdog | None = None
        self._stop_at: float | None = None
        self._requests: dict[int, Request] = {}
        self._deadlines = Deadlines()
        self._counters = EngineCounters()
        self.waiting_room = WaitingRoom(self.admission, self._commands, self._deadlines, self._counters, self._refusal)
        self._latest_step_s = 0.0
        self._step_ended_at = time.monotonic()
        self._description = ""
        self._scheduler: Scheduler
        self._slow_consumers: SlowConsumers
        self._run_ahead: RunAhead
        self._can_prepare = self._may_prepare = False
        """Whether the backend can use quiet moments, and whether there may be something for it to do in one."""
        self._backend: Backend
        self._thread = threading.Thread(target=self._run, name="llmengine", daemon=True)

    def start(self) -> BackendInfo:
        """Start the thread and block until the backend is ready. Raises what the factory raised."""
        self._thread.start()
        return result_of(self._ready)

    def submit(self, request: Request) -> None:
        """Hand over a request that holds an admission ticket, which a draining engine still honours.

        Raises `EngineClosedError` or `EngineDeadError`.
        """
        if self.state in ("closed", "dead"):
            raise self._end_error()
        self._commands.send(partial(self._add, request), partial(_refuse_request, request))

    def submit_prepared(self, request: Request) -> None:
        """Hand over a request from the waiting room, unless it has ended there meanwhile. Never raises."""
        reject = partial(self.waiting_room.reject, request.relatives[0].stream)
        self._commands.send(partial(self._add_prepared, request), reject)

    def abort(self, stream: Stream, keep_prefix: bool = True) -> None:
        """End the stream's request with finish reason "abort". Idempotent, never blocks, safe inside a GC callback."""
        if not stream.abort_requested and not stream.ended:
            stream.abort_requested = True
            # The first member of a family comes last, since the others share its blocks.
            request_ids = [member.log.request_id for member in reversed(stream.members)]
            self._commands.send(partial(self._abort, request_ids, keep_prefix), _ignore)

    def nudge(self) -> None:
        """Wake the engine, so that it looks again at whether it has anything to wait for. Never blocks."""
        self._commands.nudge()

    def call(self, function: Callable[[Backend], T]) -> T:
        """Run a function on the engine thread between two steps; blocks until it has returned.

        Raises what it raises, and what `check_open()` raises.
        """
        self.check_open()
        future: Future[T] = Future()
        self._commands.send(partial(self._call, function, future), future.set_exception)
        return result_of(future)

    def score(self, token_ids: Sequence[int], take: Callable[[Any], None]) -> None:
        """Compute the logits of all tokens between two steps, and hand them to `take` on the engine thread; blocks.

        Raises what `check_open()` and `score_tokens` raise.
        """
        self.call(lambda backend: score_tokens(self._scheduler, backend, token_ids, take))

    def stop(self, drain_s: float = 0.0) -> None:
        """Accept nothing more; let requests go on for at most `drain_s` seconds, then abort the rest. Never blocks.

        Raises `InvalidRequestError`, before anything is closed, if `drain_s` is not a number of seconds.
        """
        if isinstance(drain_s, bool) or not isinstance(drain_s, Real) or not drain_s >= 0:
            raise InvalidRequestError(f"drain must be a number of seconds of at least 0, not {drain_s!r:.200}")
        if self.state in ("loading", "ready"):
            self.state = "draining"
        self._commands.send(partial(self._set_stop_at, time.monotonic() + float(drain_s)), _ignore)

    @property
    def is_forked(self) -> bool:
        """True in a process that was forked from the engine's, where there is no engine thread."""
        return self._commands.is_forked

    def join(self, timeout_s: float | None = None) -> bool:
        """Block until the thread has ended and the backend is closed; False if `timeout_s` seconds pass first.

        Once the watchdog has given up a thread that hangs in the backend, this does not wait for it.
        """
        if self.is_forked or self._thread.ident is None:
            return True  # there is no thread; the system may have refused to start it
        if self._thread is not threading.current_thread():
            wait_in_pieces(lambda seconds: bool(wait([self._over], seconds).done), timeout_s)
            if self._over.done() and not self._hangs:
                self._thread.join(timeout_s)
        return not self._thread.is_alive()

    async def wait_over(self) -> None:
        """Wait, in an event loop, until `join()` would not block.

        No thread waits on the caller's behalf: if this were cancelled, such a thread would keep the interpreter from
        exiting until the engine has drained.
        """
        if not self.is_forked:
            await asyncio.wrap_future(self._over)

    def check_open(self) -> None:
        """Raise `EngineDeadError` (with its cause) or `EngineClosedError` unless new work is accepted."""
        self._commands.check_process()
        if (refusal := self._refusal()) is not None:
            raise refusal

    def check_integrity(self) -> None:
        """Assert the scheduler's invariants between two steps; blocks until that is done."""
        self.call(lambda _: self._scheduler.check_integrity())

    def stats(self) -> EngineStats:
        """Current counts. The engine runs on meanwhile: each count is right, but they are not all of one moment."""
        is_over = self.state in ("closed", "dead")
        return take_stats(self._scheduler, self.admission, self._counters, self._latest_step_s, is_over=is_over)

    def health(self) -> EngineHealth:
        """The state, and what killed a dead engine. Never raises."""
        state, failure = self.state, None if self.failure is None else repr(self.failure)
        try:
            self._commands.check_process()
        except EngineClosedError as error:
            state, failure = "dead", repr(error)
        return EngineHealth(state, self._description, failure, time.monotonic() - self._step_ended_at)

    def _refusal(self) -> EngineError | None:
        """The error that new work gets; None while the engine takes new work."""
        return None if self.state in ("loading", "ready") else self._end_error()

    def _end_error(self) -> EngineError:
        """A new error for a request or a call that the engine's end leaves undone."""
        if self.state != "dead":
            return EngineClosedError("the LLM is closed")
        error = EngineDeadError(f"the engine stopped because of a fault: {self.failure!r}")
        error.__cause__ = self.failure
        return error

    # Everything below runs on the engine thread.

    def _run(self) -> None:
        use_uvloop = importlib.util.find_spec("uvloop") is not None
        try:
            # Not in debug mode, whatever PYTHONASYNCIODEBUG says: a debugged loop complains about long steps.
            options = {"use_uvloop": use_uvloop, "debug": False}
            anyio.run(self._main, backend="asyncio", backend_options=options)
            self._end(None)
        except BaseException as failure:
            self._end(failure)
            if not self._ready.done():
                clear_frames(failure)
                self._ready.set_exception(failure)
        finally:
            if self._watchdog is not None:
                self._watchdog.stop()
            if not self._hangs:
                self._over.set_result(None)

    def _end(self, failure: BaseException | None) -> None:
        """Fail all requests that are left; later calls do nothing. Runs on the engine thread or the watchdog's."""
        with self._end_lock:
            if self._ended:
                return
            self.failure = failure
            self.state = "closed" if failure is None else "dead"
            self.admission.close()
            failed = {request.stream.log.public_id: None for request in self._requests.values()}
            for request in self._requests.values():
                _refuse_request(request, self._end_error())
            self._requests.clear()
            self._ended = True
            self.waiting_room.close()
        self._commands.close()
        self.observers.engine_ended(failure)
        if failure is not None and self._ready.done():
            # This comes last, since the program's log handlers may take long or raise.
            listed = ", ".join(map(repr, itertools.islice(failed, _MAX_LOGGED_IDS)))
            logger.error(
                "llmengine stopped because of a fault; every request fails, including %d that had begun: %s%s",
                len(failed),
                listed,
                ", ..." if len(failed) > _MAX_LOGGED_IDS else "",
                exc_info=failure,
            )

    def _give_up(self) -> None:
        """End without the engine thread, which hangs in the backend. Runs on the watchdog's thread."""
        assert self._watchdog is not None
        self._hangs = True
        try:
            self._end(TimeoutError(self._watchdog.message))
        finally:
            self._over.set_result(None)

    def _call_backend(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._watchdog is None:
            return function(*arguments)
        self._watchdog.begin()
        try:
            return function(*arguments)
        finally:
            self._watchdog.end()

    async def _main(self) -> None:
        self._backend = self._backend_factory()
        # The factory may hold the source of the weights, which nobody needs any more.
        del self._backend_factory
        try:
            info = self._backend.info
            kv_cache = KVCacheManager(
                info.num_blocks, info.block_size, enable_prefix_caching=self._kv_cache_config.enable_prefix_caching
            )
            self._scheduler = Scheduler(
                self.scheduler_config, kv_cache, self._counters, notify=self.nudge, max_samples=info.max_samples
            )
            self._slow_consumers = SlowConsumers(
                self._scheduler, self._commands, lambda request, error: self._finish(request, "abort", error=error)
            )
            self._description = info.description
            self._run_ahead = RunAhead(info.max_steps_in_flight, may_wait=not info.wants_early_launches)
            self._can_prepare = self._may_prepare = isinstance(self._backend, PreparingBackend)
            if isinstance(self._backend, WatchedBackend):
                self._backend.watch(partial(self._commands.send, self._backend.check, _ignore))
            self._step_ended_at = time.monotonic()
            if self.scheduler_config.step_timeout_s is not None:
                self._watchdog = Watchdog(self.scheduler_config.step_timeout_s, self._give_up)
            if self.state == "loading":
                self.state = "ready"
            self._ready.set_result(info)
            try:
                await self._step_until_stopped()
            finally:
                self._scheduler.close()
        except BaseException as failure:
            if self._ready.done():
                self._end(failure)  # before closing the backend, which may fail or hang as well
            raise
        finally:
            try:
                self._call_backend(self._backend.close)
            finally:
                del self._backend

    async def _step_until_stopped(self) -> None:
        scheduler = self._scheduler
        while True:
            abort_orphans()
            self._commands.run_all()
            self._expire_requests()
            # A ticket without a request belongs to a prompt that is being tokenized.
            if self._stop_at is not None and (
                time.monotonic() >= self._stop_at or not (self._requests or self.admission.num_requests)
            ):
                for request in list(self._requests.values()):
                    self._finish(request, "abort")
                return
            has_work = scheduler.has_work or scheduler.num_steps_in_flight > 0
            if not has_work or not self._step():
                await self._sleep()

    def _step(self) -> bool:
        """Launch as many steps as may be in flight, collect the oldest one, and publish its tokens.

        Returns False if all requests wait for their grammars.

        ::

            two in flight    host    schedule N+1, launch | update N, wake | (late) schedule N+2, launch | ...
                             device  ... step N           | step N+1                                     | ...
        """
        began = time.monotonic()
        scheduler, backend = self._scheduler, self._backend
        if ended := scheduler.take_grammars():
            self._publish(ended)
        while scheduler.num_steps_in_flight < self._run_ahead.depth:
            spare_s = self._run_ahead.spare_s(time.monotonic())
            if spare_s > 0:
                time.sleep(spare_s)
                self._commands.run_all()
            batch = scheduler.schedule()
            if batch is None:
                break
            launching_at = time.monotonic()
            self._call_backend(backend.launch, batch)
            now = time.monotonic()
            self._run_ahead.launched(batch, now, launch_s=now - launching_at, is_late=spare_s > 0)
        if not scheduler.num_steps_in_flight:
            is_waiting = scheduler.awaits_grammars
            assert is_waiting or not scheduler.has_work, "requests are waiting, but no step can be made of them"
            return not is_waiting
        looked_at = time.monotonic()
        result = self._call_backend(backend.collect)
        self._step_ended_at = time.monotonic()
        self._run_ahead.observe(result, self._step_ended_at, looked_at=looked_at)
        self._may_prepare = self._can_prepare
        step, changed = scheduler.oldest_step, scheduler.update(result)
        if self.observers.active:
            ended_at, forward_s = self._step_ended_at, result.forward_s
            self.observers.step_ended(step, changed, began=began, ended=ended_at, forward_s=forward_s)
        if self.observers.cache_followers or scheduler.kv_cache.journal is not None:
            self.observers.report_cache(scheduler.kv_cache)
        self._publish(changed)
        self._latest_step_s = time.monotonic() - began
        self._counters.step_s += self._latest_step_s
        self._counters.forward_s += result.forward_s
        return True

    def _publish(self, changed: list[Request]) -> None:
        """Publish what the requests have generated, and forget those that have ended."""
        limited: list[Request] = []
        for request in changed:
            if request.status is RequestStatus.FINISHED:
                del self._requests[request.request_id]
            elif request.stream.slow_consumer != "coalesce":
                limited.append(request)
        wake(publish([request.stream for request in changed]))
        for request in limited:
            if request.stream.is_behind:
                self._slow_consumers.hold_back(request)

    async def _sleep(self) -> None:
        """Wait for a command, the next deadline, or the end of draining; prepare the backend if the wait is long."""
        self.observers.sleeps(has_requests=bool(self._requests))
        self.observers.report_cache(self._scheduler.kv_cache)
        quiet_at = self._step_ended_at + _QUIET_S if self._may_prepare else None
        moments = (self._deadlines.next, self._stop_at, quiet_at)
        await self._commands.wait(min((moment for moment in moments if moment is not None), default=None))
        if not self._commands and quiet_at is not None and time.monotonic() >= quiet_at:
            self._may_prepare = self._call_backend(cast(PreparingBackend, self._backend).prepare)

    def _add(self, request: Request) -> None:
        self._requests.update({relative.request_id: relative for relative in request.relatives})
        self._scheduler.add(request)
        for relative in reversed(request.relatives):
            if relative.stream.abort_requested:
                self._finish(relative, "abort")
                continue
            for deadline in (relative.deadline, relative.first_token_deadline):
                if deadline is not None:
                    self._deadlines.add(deadline, relative.request_id)

    def _abort(self, request_ids: Iterable[int], keep_prefix: bool) -> None:
        for request_id in request_ids:
            if (request := self._requests.get(request_id)) is not None:
                self._finish(request, "abort", keep_prefix=keep_prefix)
            else:
                self.waiting_room.finish(request_id, "abort")

    def _add_prepared(self, request: Request) -> None:
        if self.waiting_room.leave(request.request_id):
            self._add(request)

    def _call(self, function: Callable[[Backend], T], future: Future[T]) -> None:
        try:
            future.set_result(function(self._backend))
        except BaseException as failure:
            future.set_exception(failure)

    def _set_stop_at(self, moment: float) -> None:
        self.waiting_room.refuse_applicants()
        self.admission.close()
        self._stop_at = moment if self._stop_at is None else min(self._stop_at, moment)

    def _expire_requests(self) -> None:
        now = time.monotonic()
        for request_id in self._deadlines.passed(now):
            request = self._requests.get(request_id)
            if request is None:
                self.waiting_room.finish(request_id, "timeout")
            elif not request.stream.log.token_ids or (request.deadline is not None and request.deadline <= now):
                self._finish(request, "timeout")
        waiting_room = self.waiting_room
        self._deadlines.trim(
            len(self._requests) + len(waiting_room),
            lambda request_id: request_id in self._requests or request_id in waiting_room,
        )

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        keep_prefix: bool = True,
        error: LLMEngineError | None = None,
    ) -> None:
        self._scheduler.finish(request, reason, keep_prefix=keep_prefix)
        log = request.stream.log
        log.error = log.error or error
        del self._requests[request.request_id]
        wake(request.stream.finish())


def _refuse_request(request: Request, failure: EngineError) -> None:
    """End a request that the scheduler will never finish."""
    if request.ticket is not None:
        request.ticket.release()
    for relative in request.relatives:
        wake(relative.stream.fail(failure))


def _ignore(_: EngineError) -> None:
    """An abort or a stop changes nothing about an engine that has ended."""
