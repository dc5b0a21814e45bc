"""The wire between a cluster and one replica, and the one that stays within the process."""

from __future__ import annotations

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
    """A replica in this process, for tests and simulations. `make_llm` blocks, on a thread."""

    def __init__(self, make_llm: Callable[[], LLM]) -> None:
        self._make_llm = make_llm
        self._replica: Replica

    async def start(self) -> ReplicaInfo:
        """See `Transport`."""
        self._replica = await anyio.to_thread.run_sync(lambda: Replica(self._make_llm()))
        return self._replica.info

    async def send(self, commands: Sequence[Command]) -> None:
        """See `Transport`."""
        self._replica.execute(commands)

    def updates(self) -> AsyncIterator[Update]:
        """See `Transport`."""
        return self._replica.updates()

    async def stop(self, drain_s: float) -> None:
        """See `Transport`."""
        await self._replica.aclose(drain_s)

    def kill(self) -> None:
        """See `Transport`."""
