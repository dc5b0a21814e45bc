"""ClusterCore: the loop on which a cluster keeps its replicas and routes its requests; a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from llmengine.cluster.config import ClusterConfig
from llmengine.cluster.link import ReplicaLink
from llmengine.cluster.remote_request import RemoteRequest
from llmengine.cluster.router import Router
from llmengine.cluster.step_watch import StepWatch
from llmengine.cluster.transport import TransportFactory
from llmengine.cluster.wire import Abort, ReplicaInfo
from llmengine.engine.commands import CommandQueue
from llmengine.engine.stats import EngineHealth, EngineState, EngineStats
from llmengine.engine.stream import Stream, publish, wake
from llmengine.errors import (
    EngineClosedError,
    EngineDeadError,
    EngineError,
    LLMEngineError,
    QueueFullError,
    ReplicaDeadError,
)
from llmengine.outputs import FinishReason

_logger = logging.getLogger("llmengine.cluster")

_MAX_FAILED_STARTS = 3
"""A replica that cannot be started so many times in a row is given up."""

_RESTART_DELAY_S = 1.0
_STOP_TIMEOUT_S = 20.0
"""How long closing an engine may take before its replica is killed."""


@dataclass(eq=False, slots=True)
class _Slot:
    """A place for one replica, and for another one when it dies.

    Attributes:
        task: keeps the replica.
        start: loads a replica, while there is none.
        link: to the replica, once it has joined.
        joined: is done when the first replica has joined, or raises why none could be started.
        is_leaving: nothing follows the replica, and it gets no more requests.
    """

    task: asyncio.Task[None] | None = None
    start: asyncio.Task[ReplicaLink] | None = None
    link: ReplicaLink | None = None
    joined: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    is_leaving: bool = False

    def end(self, error: BaseException | None) -> None:
        """Tell those who wait for the first replica, if they still do."""
        if self.joined.done():
            return
        if error is None:
            self.joined.set_result(None)
        else:
            self.joined.set_exception(error)
            self.joined.exception()  # nobody may be waiting for it


class ClusterCore:
    """Replicas and requests of one cluster. `start`, `submit`, `abort` and `stop` may be called from any thread.

    Args:
        make_transport: of a replica that is yet to be started.
    """

    def __init__(self, config: ClusterConfig, make_transport: TransportFactory) -> None:
        self._config = config
        self._make_transport = make_transport
        self._commands = CommandQueue(self._refusal)
        self._router = Router()
        self._links: dict[int, ReplicaLink] = {}
        self._homeless: dict[int, RemoteRequest] = {}
        """Requests that wait for a replica, since there is none, by key."""
        self._numbers = itertools.count()
        self._slots: list[_Slot] = []
        self._tasks: asyncio.TaskGroup
        self._failure: BaseException | None = None
        self._state: EngineState = "loading"
        self._ready: Future[ReplicaInfo] = Future()
        self._over: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="llmengine cluster", daemon=True)

    def start(self) -> Future[ReplicaInfo]:
        """Start the thread. The future has the first replica's facts when all are loaded, or raises why one is not."""
        self._thread.start()
        return self._ready

    def submit(self, request: RemoteRequest) -> None:
        """Have a request run. Never blocks. Raises `EngineClosedError` or `EngineDeadError`."""
        self.check_open()
        self._commands.send(partial(self._place, request), lambda error: wake(request.stream.fail(error)))

    def abort(self, stream: Stream, keep_prefix: bool = True) -> None:
        """End a stream's request with finish reason "abort". Idempotent, never blocks, safe inside a GC callback."""
        if not stream.abort_requested and not stream.ended:
            stream.abort_requested = True
            self._commands.send(partial(self._abort, stream.log.request_id, keep_prefix), lambda _: None)

    def scale(self, num_replicas: int, drain_s: float) -> Future[None]:
        """Have so many replicas, see `Cluster.scale`. Never blocks. Raises what `check_open` raises."""
        self.check_open()
        done: Future[None] = Future()
        self._commands.send(partial(self._begin_scale, num_replicas, drain_s, done), partial(_refuse, done))
        return done

    def stop(self, drain_s: float = 0.0) -> None:
        """Accept nothing more, and close all replicas after at most `drain_s` seconds. Never blocks."""
        if self._state in ("loading", "ready"):
            self._state = "draining"
        self._commands.send(partial(self._begin_stop, drain_s), lambda _: None)

    def join(self, timeout_s: float | None = None) -> None:
        """Block until the thread has ended."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    async def wait_over(self) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            await asyncio.wrap_future(self._over)

    def check_open(self) -> None:
        """Raise `EngineDeadError` (with its cause) or `EngineClosedError` unless requests are accepted."""
        self._commands.check_process()
        if self._state not in ("loading", "ready"):
            raise self._refusal()

    def stats(self) -> dict[int, EngineStats]:
        """What each replica last said of itself, by number."""
        return {link.number: link.stats for link in list(self._links.values()) if link.stats is not None}

    def replica_health(self) -> dict[int, EngineHealth]:
        """What each replica last said of its health, by number; one that leaves is "draining"."""
        return {
            link.number: replace(link.health, state="draining") if link.is_leaving and link.health.ok else link.health
            for link in list(self._links.values())
            if link.health is not None
        }

    def health(self) -> EngineHealth:
        """The state of the cluster: ready as long as a replica is."""
        links = list(self._links.values())
        info = links[0].info.backend.description if links else "none is ready"
        idle_s = min((link.health.idle_s for link in links if link.health is not None), default=0.0)
        state: EngineState = "loading" if self._state == "ready" and not links else self._state
        failure = None if self._failure is None else repr(self._failure)
        return EngineHealth(state, f"{len(links)} replicas of: {info}", failure, idle_s)

    def _refusal(self) -> EngineError:
        if self._state != "dead":
            return EngineClosedError("the cluster is closed")
        error = EngineDeadError(f"the cluster has no replica: {self._failure}")
        error.__cause__ = self._failure
        return error

    # Everything below runs on the thread.

    def _run(self) -> None:
        try:
            asyncio.run(self._main(), debug=False)
        except BaseException as error:
            self._failure = error
        finally:
            self._state = "closed" if self._state == "draining" else "dead"
            self._commands.close()
            running = [request for link in self._links.values() for request in link.requests.values()]
            for request in [*self._homeless.values(), *running]:
                wake(request.stream.fail(self._refusal()))
            if not self._ready.done():
                self._ready.set_exception(self._refusal())
            self._over.set_result(None)

    async def _main(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            runner = self._tasks.create_task(self._run_commands())
            async with asyncio.TaskGroup() as self._tasks:
                for _ in range(self._config.num_replicas):
                    self._add_slot()
            runner.cancel()

    async def _run_commands(self) -> None:
        while True:
            self._commands.run_all()
            await self._commands.wait(None)

    def _call(self, function: Callable[[], None]) -> None:
        """Run a function on this thread, from any other."""
        self._commands.send(function, lambda _: None)

    def _add_slot(self) -> _Slot:
        slot = _Slot()
        self._slots.append(slot)
        slot.task = self._tasks.create_task(self._keep_replica(slot))
        return slot

    async def _keep_replica(self, slot: _Slot) -> None:
        """Start a replica, and another one whenever it dies, until the slot leaves or nothing can be started."""
        error: BaseException | None = None
        try:
            num_failures = 0
            while self._state in ("loading", "ready") and not slot.is_leaving:
                error = await self._start_replica(slot)
                if error is not None:
                    num_failures += 1
                    if num_failures == _MAX_FAILED_STARTS:
                        _logger.error("a replica could not be started %d times; it is given up", num_failures)
                        return
                    await asyncio.sleep(_RESTART_DELAY_S if self._state == "ready" else 0.0)
                elif slot.link is not None:
                    num_failures = 0
                    if not await self._run_replica(slot.link) and not self._config.replace_replicas:
                        return
                    slot.link = None
        finally:
            self._slots.remove(slot)
            slot.end(error)
            if not self._slots and self._state in ("loading", "ready"):
                self._state = "dead"

    async def _run_replica(self, link: ReplicaLink) -> bool:
        """Serve until a replica has ended; False if it has died."""
        try:
            await link.run()
        except ReplicaDeadError as error:
            _logger.warning("%s", error)
            self._failure = _without_frames(error)
            self._leave(link, error)
            if self._state == "loading":
                self._fail_start(link.number, error)
            return False
        self._leave(link, EngineClosedError("the cluster is closed"))
        return True

    async def _start_replica(self, slot: _Slot) -> BaseException | None:
        """Have a replica join, unless it fails, which is returned, or is not wanted any more."""
        number = next(self._numbers)
        slot.start = asyncio.create_task(self._load(number))
        await asyncio.wait([slot.start])
        task, slot.start = slot.start, None
        if task.cancelled():
            return None
        if (error := task.exception()) is not None:
            self._fail_start(number, error)
            return error
        link = task.result()
        if self._state == "draining" or slot.is_leaving:
            link.kill()
            return None
        slot.link = self._links[number] = link
        slot.end(None)
        if self._state == "loading" and len(self._links) == self._config.num_replicas:
            self._state = "ready"
            self._ready.set_result(link.info)
        homeless, self._homeless = self._homeless, {}
        for request in homeless.values():
            self._place(request)
        return None

    async def _load(self, number: int) -> ReplicaLink:
        transport = self._make_transport(number)
        watch = StepWatch(self._config.step_timeout_s)
        link = ReplicaLink(number, transport, self._config.replica_timeout_s, watch, self._place_again, self._call)
        try:
            await link.start()
        except BaseException:
            link.kill()
            raise
        return link

    def _fail_start(self, number: int, error: BaseException) -> None:
        self._failure = _without_frames(error)
        if self._state == "ready":
            _logger.warning("replica %d could not be started: %r", number, error)
        elif not self._ready.done():
            self._ready.set_exception(error)
            self._state = "draining"
            self._begin_stop(0.0)

    def _leave(self, link: ReplicaLink, error: EngineError) -> None:
        """Forget a replica that has ended; its requests go to others or fail."""
        del self._links[link.number]
        self._router.forget(link.number)
        self._move_requests(link, error)

    def _move_requests(self, link: ReplicaLink, error: EngineError) -> None:
        """Run a replica's requests elsewhere if they may, and let the others fail."""
        for request in link.take_requests():
            may_rerun = self._config.rerun_requests and request.num_reruns < self._config.max_reruns
            if request.stream.abort_requested:
                _finish(request, "abort")
            elif may_rerun and isinstance(error, ReplicaDeadError):
                request.restart()
                self._place(request)
            else:
                failure = type(error)(str(error))
                failure.__cause__ = error.__cause__
                wake(request.stream.fail(failure))

    def _place(self, request: RemoteRequest) -> None:
        """Give a request to the best replica, or keep it until there is one or its deadline has passed."""
        if request.stream.abort_requested:
            _finish(request, "abort")
            return
        loads = {
            number: len(link.requests)
            for number, link in self._links.items()
            if not link.is_leaving and number not in request.refused_by
        }
        if not loads:
            self._homeless[request.key] = request
            if (remaining_s := request.remaining_s) is not None:
                asyncio.get_running_loop().call_later(remaining_s, self._expire, request)
            return
        request.replica = self._router.choose(loads, request.keys)
        self._router.note(request.replica, request.keys)
        link = self._links[request.replica]
        link.requests[request.key] = request
        link.send(request.command())

    def _expire(self, request: RemoteRequest) -> None:
        """The deadline of a request that waited for a replica has passed."""
        if self._homeless.pop(request.key, None) is not None:
            _finish(request, "timeout")

    def _place_again(self, request: RemoteRequest, error: LLMEngineError) -> bool:
        """Give a request whose replica has a full queue to another one; False if all have refused it."""
        assert request.replica is not None
        request.refused_by.add(request.replica)
        others = {number for number, link in self._links.items() if not link.is_leaving}
        if not isinstance(error, QueueFullError) or others <= request.refused_by:
            return False
        self._place(request)
        return True

    def _abort(self, key: int, keep_prefix: bool) -> None:
        for link in self._links.values():
            if key in link.requests:
                link.send(Abort(key, keep_prefix))
        if (request := self._homeless.pop(key, None)) is not None:
            _finish(request, "abort")

    def _begin_scale(self, num_replicas: int, drain_s: float, done: Future[None]) -> None:
        if self._state != "ready":
            _refuse(done, self._refusal())
            return
        if not done.set_running_or_notify_cancel():
            return
        staying = [slot for slot in self._slots if not slot.is_leaving]
        staying.sort(key=lambda slot: -1 if slot.link is None else len(slot.link.requests))
        num_leaving = max(len(staying) - num_replicas, 0)
        changes: list[asyncio.Future[None]] = [self._leave_slot(slot, drain_s) for slot in staying[:num_leaving]]
        changes += [self._add_slot().joined for _ in range(num_replicas - len(staying))]
        self._tasks.create_task(_settle(changes, done))

    def _leave_slot(self, slot: _Slot, drain_s: float) -> asyncio.Task[None]:
        """Have a slot and its replica leave; return what ends when they have."""
        assert slot.task is not None
        slot.is_leaving = True
        if slot.start is not None:
            slot.start.cancel()
        if slot.link is not None:
            slot.link.is_leaving = True
            self._tasks.create_task(self._retire(slot.link, drain_s))
        return slot.task

    async def _retire(self, link: ReplicaLink, drain_s: float) -> None:
        """Stop a replica when its requests have ended, or have had so many seconds to."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await link.wait_idle()
        text = f"replica {link.number} was removed from the cluster, and had {drain_s:g} s to finish its requests"
        self._move_requests(link, ReplicaDeadError(text))
        if link.number in self._links:
            await self._stop_replica(link, 0.0)

    def _begin_stop(self, drain_s: float) -> None:
        for slot in self._slots:
            if slot.start is not None:
                slot.start.cancel()
        for link in self._links.values():
            self._tasks.create_task(self._stop_replica(link, drain_s))

    async def _stop_replica(self, link: ReplicaLink, drain_s: float) -> None:
        try:
            async with asyncio.timeout(drain_s + _STOP_TIMEOUT_S):
                await link.stop(drain_s)
        except Exception as error:  # it is gone, or hangs; it is killed in any case
            _logger.warning("replica %d did not stop: %r", link.number, error)
            link.kill()


def _without_frames(error: BaseException) -> BaseException:
    """The error, which no longer refers to what its frames and those of its causes do, such as an engine."""
    chain: list[BaseException | None] = [error]
    seen = set()
    while chain:
        if (link := chain.pop()) is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            chain += [link.__cause__, link.__context__]
    return error


async def _settle(changes: list[asyncio.Future[None]], done: Future[None]) -> None:
    """Finish `done` when all changes have ended, with the first one's error if there is one."""
    results = await asyncio.gather(*changes, return_exceptions=True)
    error = next((result for result in results if result is not None), None)
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


def _refuse(done: Future[None], error: EngineError) -> None:
    """Fail what a caller may have stopped waiting for."""
    if done.set_running_or_notify_cancel():
        done.set_exception(error)


def _finish(request: RemoteRequest, reason: FinishReason) -> None:
    """End a request that no replica runs."""
    for member in request.running:
        member.log.finished = time.monotonic()
        member.log.finish_reason = reason
    wake(publish([member for member in request.stream.members if not member.ended]))
