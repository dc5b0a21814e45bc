"""ReplicaLink: one replica as the cluster's loop sees it while it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from llmengine.cluster.remote_request import RemoteRequest
from llmengine.cluster.step_watch import StepWatch
from llmengine.cluster.transport import Transport
from llmengine.cluster.wire import Abort, Command, Failed, Hold, ReplicaInfo, Update
from llmengine.engine.stats import EngineHealth, EngineStats
from llmengine.engine.stream import OutputStream, Waiter, publish, wake
from llmengine.errors import EngineClosedError, EngineDeadError, LLMEngineError, ReplicaDeadError

# In the time that a replica may be silent.
_NUM_LOOKS = 20


class ReplicaLink:
    """Sends commands to a replica and publishes what its requests put out. One event loop.

    Attributes:
        number: of the replica; a replacement has another one.
        info: facts about its engine, once `start` has returned.
        requests: those that it runs, by key.
        stats, health: what it last said of itself.
        is_leaving: it gets no more requests.

    Args:
        timeout_s: a replica that says nothing for so long is dead. Time in which the event loop itself stood still does
            not count.
        step_watch: says of an engine that hangs that it is.
        give_back: called with a request that failed before it put out anything, and its error; True if the cluster
            runs it elsewhere.
        call: has a function called on the event loop, from any thread.
    """

    def __init__(
        self,
        number: int,
        transport: Transport,
        timeout_s: float,
        step_watch: StepWatch,
        give_back: Callable[[RemoteRequest, LLMEngineError], bool],
        call: Callable[[Callable[[], None]], None],
    ) -> None:
        self.number = number
        self.requests: dict[int, RemoteRequest] = {}
        self.stats: EngineStats | None = None
        self.health: EngineHealth | None = None
        self.info: ReplicaInfo
        self.is_leaving = False
        self._transport = transport
        self._timeout_s = timeout_s
        self._step_watch = step_watch
        self._give_back = give_back
        self._call = call
        self._commands: list[Command] = []
        self._has_commands = asyncio.Event()
        self._has_taken = asyncio.Event()
        self._num_silent_looks = 0
        self._is_stopping = False
        self._death: LLMEngineError | None = None

    async def start(self) -> ReplicaInfo:
        """Load the engine."""
        self.info = await self._transport.start()
        return self.info

    def send(self, command: Command) -> None:
        """Have a command run after those before it."""
        self._commands.append(command)
        self._has_commands.set()

    async def run(self) -> None:
        """Serve until the replica ends. Raises `ReplicaDeadError`, with the cause, unless it was stopped."""
        cause: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                others = [group.create_task(self._send()), group.create_task(self._listen_for_silence())]
                await self._receive()
                for other in others:
                    other.cancel()
        except BaseExceptionGroup as errors:
            cause = _first_leaf(errors)
            if not isinstance(cause, Exception):
                raise cause from None
        finally:
            self._transport.kill()
        if not self._is_stopping:
            cause = self._death or cause
            text = "it has ended" if cause is None else str(cause).partition("\n")[0]
            raise ReplicaDeadError(f"replica {self.number} is dead: {text}") from cause

    def take_requests(self) -> list[RemoteRequest]:
        """Give all requests away: whatever the replica still says of them is ignored."""
        requests = list(self.requests.values())
        self.requests.clear()
        self._has_taken.set()
        return requests

    async def wait_idle(self) -> None:
        """Wait until the replica has no requests."""
        while self.requests:
            self._has_taken.clear()
            await self._has_taken.wait()

    async def stop(self, drain_s: float) -> None:
        """Close the engine, after `drain_s` seconds in which requests may finish; `run` then returns."""
        self._is_stopping = True
        await self._transport.stop(drain_s)

    def kill(self) -> None:
        """End the replica at once."""
        self._transport.kill()

    async def _send(self) -> None:
        while True:
            await self._has_commands.wait()
            self._has_commands.clear()
            commands, self._commands = self._commands, []
            await self._transport.send(commands)

    async def _receive(self) -> None:
        async for update in self._transport.updates():
            self._num_silent_looks = 0
            self._take(update)
            self._step_watch.check(update.stats, time.monotonic())
            if self._death is not None:
                return

    async def _listen_for_silence(self) -> None:
        """Raise `EngineDeadError` when the replica has said nothing for too long, in looks of a twentieth of that."""
        while self._num_silent_looks <= _NUM_LOOKS:
            await asyncio.sleep(self._timeout_s / _NUM_LOOKS)
            self._num_silent_looks += 1
        raise EngineDeadError(f"it has said nothing for {self._timeout_s:g} s")

    def _take(self, update: Update) -> None:
        self.stats, self.health = update.stats, update.health
        changed: list[OutputStream] = []
        waiters: list[Waiter] = []
        for item in update.outputs:
            request = self.requests.get(item.key)
            if request is None:
                continue
            try:
                if isinstance(item, Failed):
                    self._take_failure(request, item.fault.restore(), waiters)
                elif (member := request.apply(item)) is not None:
                    changed.append(member)
            except ReplicaDeadError as error:  # run again, it gave other tokens
                self.send(Abort(request.key, True))
                self._take_failure(request, error, waiters)
        wake(publish(changed) + waiters)
        for member in changed:
            self._look_after(member)
        self._has_taken.set()

    def _look_after(self, member: OutputStream) -> None:
        """Forget a request that has ended, and hold back one whose consumer is behind."""
        key = member.log.request_id
        request = self.requests.get(key)
        if request is None:
            return
        if request.stream.ended:
            del self.requests[key]
        elif member.slow_consumer != "coalesce" and member.is_behind and member.resume is None:
            self.send(Hold(key, True))
            member.resume = partial(self._call, partial(self._resume, member))
            self._resume(member)  # the consumer may have read before it could see that it has to ask

    def _resume(self, member: OutputStream) -> None:
        if member.resume is not None and not member.is_behind:
            member.resume = None
            self.send(Hold(member.log.request_id, False))

    def _take_failure(self, request: RemoteRequest, error: LLMEngineError, waiters: list[Waiter]) -> None:
        if isinstance(error, EngineDeadError | EngineClosedError) and not isinstance(error, ReplicaDeadError):
            self._death = error  # all requests fail likewise, and the cluster decides what becomes of them
            return
        del self.requests[request.key]
        if request.has_output or not self._give_back(request, error):
            waiters += request.stream.fail(error)


def _first_leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a tree of groups."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
