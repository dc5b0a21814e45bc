"""ClusterCore: the loop on which a cluster keeps its replicas and routes its requests; a thread of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

from llmengine.cluster.config import ClusterConfig
from llmengine.cluster.link import ReplicaLink
from llmengine.cluster.remote_request import RemoteRequest
from llmengine.cluster.router import Router
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

_logger = logging.getLogger("llmengine.cluster")

_MAX_FAILED_STARTS = 3
"""A replica that cannot be started so many times in a row is given up."""

_RESTART_DELAY_S = 1.0
_STOP_TIMEOUT_S = 20.0
"""How long closing an engine may take before its replica is killed."""


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
        self._homeless: list[RemoteRequest] = []
        """Requests that wait for a replica, since there is none."""
        self._numbers = itertools.count()
        self._starting: set[asyncio.Task[ReplicaInfo]] = set()
        self._stopping: set[asyncio.Task[None]] = set()
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
            for request in self._homeless:
                wake(request.stream.fail(self._refusal()))
            if not self._ready.done():
                self._ready.set_exception(self._refusal())
            self._over.set_result(None)

    async def _main(self) -> None:
        async with asyncio.TaskGroup() as group:
            runner = group.create_task(self._run_commands())
            slots = [group.create_task(self._keep_replica()) for _ in range(self._config.num_replicas)]
            await asyncio.wait(slots)
            await asyncio.gather(*self._stopping)
            runner.cancel()

    async def _run_commands(self) -> None:
        while True:
            self._commands.run_all()
            await self._commands.wait(None)

    def _call(self, function: Callable[[], None]) -> None:
        """Run a function on this thread, from any other."""
        self._commands.send(function, lambda _: None)

    async def _keep_replica(self) -> None:
        """Start a replica, and another one whenever it dies."""
        num_failures = 0
        while self._state in ("loading", "ready"):
            link = await self._start_replica()
            if link is None:
                num_failures += 1
                if num_failures == _MAX_FAILED_STARTS:
                    _logger.error("a replica could not be started %d times; it is given up", num_failures)
                    return
                await asyncio.sleep(_RESTART_DELAY_S if self._state == "ready" else 0.0)
                continue
            num_failures = 0
            try:
                await link.run()
            except ReplicaDeadError as error:
                _logger.warning("%s", error)
                self._failure = error
                self._leave(link, error)
                if not self._config.replace_replicas:
                    return
            else:
                self._leave(link, EngineClosedError("the cluster is closed"))

    async def _start_replica(self) -> ReplicaLink | None:
        """A replica that is ready and has joined; None if it failed or the cluster stops meanwhile."""
        number = next(self._numbers)
        transport, timeout_s = self._make_transport(number), self._config.replica_timeout_s
        link = ReplicaLink(number, transport, timeout_s, self._place_again, self._call)
        task = asyncio.create_task(link.start())
        self._starting.add(task)
        try:
            await asyncio.wait([task])
        finally:
            self._starting.discard(task)
        if task.cancelled() or task.exception() is not None or self._state == "draining":
            link.kill()
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail_start(number, error)
            return None
        self._links[number] = link
        if self._state == "loading" and len(self._links) == self._config.num_replicas:
            self._state = "ready"
            self._ready.set_result(link.info)
        homeless, self._homeless = self._homeless, []
        for request in homeless:
            self._place(request)
        return link

    def _fail_start(self, number: int, error: BaseException) -> None:
        self._failure = error
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
        for request in list(link.requests.values()):
            may_rerun = self._config.rerun_requests and request.num_reruns < self._config.max_reruns
            if request.stream.abort_requested:
                _finish_aborted(request)
            elif may_rerun and isinstance(error, ReplicaDeadError):
                request.restart()
                self._place(request)
            else:
                failure = type(error)(str(error))
                failure.__cause__ = error.__cause__
                wake(request.stream.fail(failure))

    def _place(self, request: RemoteRequest) -> None:
        """Give a request to the best replica, or keep it until there is one."""
        if request.stream.abort_requested:
            _finish_aborted(request)
            return
        loads = {number: len(link.requests) for number, link in self._links.items() if number not in request.refused_by}
        if not loads:
            self._homeless.append(request)
            return
        request.replica = self._router.choose(loads, request.keys)
        self._router.note(request.replica, request.keys)
        link = self._links[request.replica]
        link.requests[request.key] = request
        link.send(request.command())

    def _place_again(self, request: RemoteRequest, error: LLMEngineError) -> bool:
        """Give a request whose replica has a full queue to another one; False if all have refused it."""
        assert request.replica is not None
        request.refused_by.add(request.replica)
        if not isinstance(error, QueueFullError) or self._links.keys() <= request.refused_by:
            return False
        self._place(request)
        return True

    def _abort(self, key: int, keep_prefix: bool) -> None:
        for link in self._links.values():
            if key in link.requests:
                link.send(Abort(key, keep_prefix))
        for request in [request for request in self._homeless if request.key == key]:
            self._homeless.remove(request)
            _finish_aborted(request)

    def _begin_stop(self, drain_s: float) -> None:
        for task in self._starting:
            task.cancel()
        for link in self._links.values():
            self._stopping.add(asyncio.create_task(self._stop_replica(link, drain_s)))

    async def _stop_replica(self, link: ReplicaLink, drain_s: float) -> None:
        try:
            async with asyncio.timeout(drain_s + _STOP_TIMEOUT_S):
                await link.stop(drain_s)
        except Exception as error:  # it is gone, or hangs; it is killed in any case
            _logger.warning("replica %d did not stop: %r", link.number, error)
            link.kill()


def _finish_aborted(request: RemoteRequest) -> None:
    """End a request that no replica runs."""
    for member in request.running:
        member.log.finished = time.monotonic()
        member.log.finish_reason = "abort"
    wake(publish([member for member in request.stream.members if not member.ended]))
