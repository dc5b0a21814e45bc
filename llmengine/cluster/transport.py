"""The wire between a cluster and one replica, and the one that stays within the process."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import anyio.to_thread

from llmengine.cluster.replica import Replica
from llmengine.cluster.wire import Command, ReplicaInfo, Update
from llmengine.llm import LLM


class Transport(Protocol):
    """One replica as the cluster's loop sees it. Any method may raise when the replica dies."""

    async def start(self) -> ReplicaInfo:
        """Load the replica's engine."""

    async def send(self, commands: Sequence[Command]) -> None:
        """Have commands run in their order. Called again only after it has returned."""

    def updates(self) -> AsyncIterator[Update]:
        """What the replica says, until it ends. Called once, after `start`."""

    async def stop(self, drain_s: float) -> None:
        """Close the engine, after `drain_s` seconds in which requests may finish."""

    def kill(self) -> None:
        """End the replica at once, if it is still there; never blocks and never raises."""


TransportFactory = Callable[[int], Transport]
"""Makes the transport of a new replica from its number."""


class LocalTransport:
    """A replica in this process, for tests and simulations. `make_llm` blocks, on a thread.

    A replica that is killed closes its engine when the step that it is in has ended.
    """

    def __init__(self, make_llm: Callable[[], LLM]) -> None:
        self._make_llm = make_llm
        self._lock = threading.Lock()
        self._replica: Replica | None = None
        self._is_killed = False

    async def start(self) -> ReplicaInfo:
        """See `Transport`."""
        replica = await anyio.to_thread.run_sync(self._load)
        return replica.info

    async def send(self, commands: Sequence[Command]) -> None:
        """See `Transport`."""
        self._started.execute(commands)

    def updates(self) -> AsyncIterator[Update]:
        """See `Transport`."""
        return self._started.updates()

    async def stop(self, drain_s: float) -> None:
        """See `Transport`."""
        await self._started.aclose(drain_s)

    def kill(self) -> None:
        """See `Transport`."""
        with self._lock:
            self._is_killed = True
            if self._replica is not None:
                self._replica.kill()

    @property
    def _started(self) -> Replica:
        assert self._replica is not None
        return self._replica

    def _load(self) -> Replica:
        replica = Replica(self._make_llm())
        with self._lock:
            self._replica = replica
            if self._is_killed:  # nobody waits for it any more
                replica.kill()
        return replica
