"""`ReplicaLink`, with a transport that says what the test wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

import pytest

from llmengine.cluster.link import ReplicaLink
from llmengine.cluster.step_watch import StepWatch
from llmengine.cluster.wire import Command, ReplicaInfo, Update
from llmengine.errors import ReplicaDeadError
from tests.engine.helpers import make_llm, timeout

TIMEOUT_S = 0.2


class Spoken:
    """A transport whose replica says what is put into `said`, and ends at None."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[Update | None] = asyncio.Queue()
        self.is_killed = False

    async def start(self) -> ReplicaInfo:
        raise AssertionError("it is there already")

    async def send(self, commands: Sequence[Command]) -> None:
        raise AssertionError("there are no commands")

    async def updates(self) -> AsyncIterator[Update]:
        while (update := await self.said.get()) is not None:
            for _ in range(3):  # a connection takes some turns of the loop
                await asyncio.sleep(0)
            yield update

    async def stop(self, drain_s: float) -> None:
        self.said.put_nowait(None)

    def kill(self) -> None:
        self.is_killed = True


def make_link(transport: Spoken) -> ReplicaLink:
    return ReplicaLink(0, transport, TIMEOUT_S, StepWatch(None), lambda request, error: False, lambda call: None)


def heartbeat() -> Update:
    with make_llm() as llm:
        return Update([], llm.stats(), llm.health())


async def test_a_silent_replica_is_dead() -> None:
    transport = Spoken()
    transport.said.put_nowait(heartbeat())
    async with timeout():
        with pytest.raises(ReplicaDeadError, match=r"replica 0 is dead: it has said nothing for 0\.2 s"):
            await make_link(transport).run()
    assert transport.is_killed


async def test_what_a_replica_said_while_the_loop_stood_still_counts() -> None:
    transport, update = Spoken(), heartbeat()
    link = make_link(transport)
    async with timeout(), asyncio.TaskGroup() as group:
        running = group.create_task(link.run())
        transport.said.put_nowait(update)
        while link.stats is None:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.001)
        time.sleep(3 * TIMEOUT_S)  # noqa: ASYNC251  # as if the process were stopped
        transport.said.put_nowait(update)
        await link.stop(0.0)
        await running
    assert transport.said.empty()
