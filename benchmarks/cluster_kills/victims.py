"""Replicas that can be made to die: in this process, in processes of their own, as actors of Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from benchmarks.process_replicas import ProcessTransport
from llmengine import LLM
from llmengine.batch import Batch
from llmengine.cluster import ClusterConfig
from llmengine.cluster.transport import LocalTransport, Transport
from llmengine.cluster.wire import Command, ReplicaInfo, Update
from llmengine.testing import FakeBackend, mixing_model

VOCAB_SIZE = 258
NEXT_TOKEN = mixing_model(VOCAB_SIZE)

_STEP_S = 0.001


def make_llm(on_step: Callable[[Batch], None]) -> LLM:
    """An engine on a fake backend, whose steps take about a millisecond."""

    def step(batch: Batch) -> None:
        time.sleep(_STEP_S)
        on_step(batch)

    return LLM.from_backend(lambda: FakeBackend(vocab_size=VOCAB_SIZE, num_blocks=257, on_step=step))


class Victim(Transport, Protocol):
    """A replica that can be made to die in several ways, once it `has_begun`. Any thread."""

    @property
    def has_begun(self) -> bool:
        """True once there is something to kill."""

    def die(self) -> None:
        """As a killed actor dies."""

    def fail(self) -> None:
        """In its next step."""

    def fall_silent(self) -> None:
        """Live on, but say nothing."""


class LocalVictim(LocalTransport):
    """A replica in this process. Only the wire to it breaks by itself; `kill` must end the rest."""

    def __init__(self, engines: list[weakref.ref[LLM]]) -> None:
        super().__init__(self._make)
        self._engines = engines
        self._is_dead = False
        self._is_failing = False
        self._is_silent = False

    @property
    def has_begun(self) -> bool:
        """See `Victim`."""
        return True

    def die(self) -> None:
        """See `Victim`."""
        self._is_dead = True

    def fail(self) -> None:
        """See `Victim`."""
        self._is_failing = True

    def fall_silent(self) -> None:
        """See `Victim`."""
        self._is_silent = True

    async def start(self) -> ReplicaInfo:
        """See `Transport`."""
        info = await super().start()
        self._check()
        return info

    async def send(self, commands: Sequence[Command]) -> None:
        """See `Transport`."""
        self._check()
        await super().send(commands)

    async def updates(self) -> AsyncIterator[Update]:
        """See `Transport`."""
        async for update in super().updates():
            self._check()
            if self._is_silent:
                await asyncio.Event().wait()
            yield update

    def _check(self) -> None:
        if self._is_dead:
            raise ConnectionError("the actor was killed")

    def _make(self) -> LLM:
        llm = make_llm(self._on_step)
        self._engines.append(weakref.ref(llm))
        return llm

    def _on_step(self, batch: Batch) -> None:
        if self._is_failing:
            raise RuntimeError("rank 1 was killed by SIGKILL")


class ProcessVictim(ProcessTransport):
    """A replica that is a process."""

    @property
    def has_begun(self) -> bool:
        """See `Victim`."""
        return self.pid is not None

    def die(self) -> None:
        """See `Victim`."""
        self._signal(signal.SIGKILL)

    def fail(self) -> None:
        """See `Victim`."""
        self._signal(signal.SIGUSR1)

    def fall_silent(self) -> None:
        """See `Victim`."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class RayVictim:
    """A replica that is an actor of Ray.

    Args:
        place: where the actor writes which process it is, and reads what becomes of it; each has its own.
    """

    def __init__(self, place: Path) -> None:
        from llmengine.cluster.ray_transport import actor_transports

        load = partial(load_on_actor, place)
        transport = actor_transports(load, ClusterConfig(actor_options={"num_cpus": 1}))(0)
        self.start, self.send, self.updates = transport.start, transport.send, transport.updates
        self.stop, self.kill = transport.stop, transport.kill
        self._place = place

    @property
    def has_begun(self) -> bool:
        """See `Victim`."""
        return self._place.exists()

    def die(self) -> None:
        """See `Victim`."""
        self._signal(signal.SIGKILL)

    def fail(self) -> None:
        """See `Victim`."""
        _failure(self._place).touch()

    def fall_silent(self) -> None:
        """See `Victim`."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(int(self._place.read_text()), number)


async def load_on_actor(place: Path) -> LLM:
    """The engine of a `RayVictim`."""
    failure, written = _failure(place), place.with_suffix(".new")
    written.write_text(str(os.getpid()))
    written.rename(place)

    def on_step(batch: Batch) -> None:
        if failure.exists():
            raise RuntimeError("rank 1 was killed by SIGKILL")

    return await asyncio.to_thread(make_llm, on_step)


def _failure(place: Path) -> Path:
    """A file that makes the next step fail."""
    return place.with_suffix(".fail")
