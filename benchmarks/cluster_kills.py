"""Parts of a cluster die under load, one after the other; every stream must end well, and nothing may be left.

    python -m benchmarks.cluster_kills --kills 300              replicas that are threads of this process
    python -m benchmarks.cluster_kills --kills 300 --processes  replicas that are processes, killed by signals

Clients run requests all the while. Each stream must bring the tokens that it brings without any cluster, or its
beginning and then one of llmengine's errors, within `--bound` seconds. After each kill the cluster must be whole again
before the next. What is killed, and when, follows from `--seed`; the replicas' backends are fakes.

    replica     a replica's connection breaks, as that of a killed actor does; with `--processes`: SIGKILL
    rank        a step of a replica's backend raises, as when one of its ranks has died
    node        half of the replicas at once
    silence     a replica says nothing any more; with `--processes`: SIGSTOP
    connection  all replicas at once, and the next one cannot be started
    start       a replica, and then the one that is being started in its place
    removal     a replica that is being removed from the cluster, while it drains
    cluster     the cluster is closed, with no time to drain

The exit code is 1 if a stream ended wrongly or too late, or a thread, process, open file or KV block is left.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import statistics
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import psutil

from benchmarks.process_replicas import ProcessTransport, fork_server
from benchmarks.report import format_table, new_parser
from llmengine import LLM, SamplingParams
from llmengine.batch import Batch
from llmengine.cluster import Cluster, ClusterConfig
from llmengine.cluster.transport import LocalTransport, Transport
from llmengine.cluster.wire import Command, ReplicaInfo, Update
from llmengine.errors import EngineClosedError, EngineDeadError
from llmengine.testing import FakeBackend, mixing_model

KINDS = ("replica", "rank", "node", "start", "removal", "cluster", "connection", "silence")

_VOCAB_SIZE = 258
_STEP_S = 0.001
_NEXT_TOKEN = mixing_model(_VOCAB_SIZE)
_POLL_S = 0.005


def make_llm(on_step: Callable[[Batch], None]) -> LLM:
    """An engine on a fake backend, whose steps take about a millisecond."""

    def step(batch: Batch) -> None:
        time.sleep(_STEP_S)
        on_step(batch)

    return LLM.from_backend(lambda: FakeBackend(vocab_size=_VOCAB_SIZE, num_blocks=257, on_step=step))


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


@dataclass(slots=True)
class Kill:
    """What followed a kill, until the next: endings of streams, and seconds until the cluster was whole again."""

    kind: str
    endings: Counter[str] = field(default_factory=Counter)
    whole_s: float = 0.0
    slowest_s: float = 0.0


class Killing:
    """One run.

    Args:
        new_victim: makes a replica that is to be started.
        bound_s: within this time every stream must end, and the cluster be whole again.

    Attributes:
        kills: what was killed, in order.
        faults: what went wrong, in words.
    """

    def __init__(
        self,
        new_victim: Callable[[], Victim],
        *,
        seed: int = 1,
        num_replicas: int = 2,
        num_clients: int = 12,
        rerun_requests: bool = False,
        bound_s: float = 30.0,
    ) -> None:
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self._new_victim = new_victim
        self._draw = random.Random(seed)
        self._num_clients = num_clients
        self._bound_s = bound_s
        self._config = ClusterConfig(
            num_replicas=num_replicas, rerun_requests=rerun_requests, max_reruns=1000, replica_timeout_s=2.0
        )
        self._victims: dict[int, Victim] = {}
        self._num_refused_starts = 0
        self._num_ended = 0
        self._is_over = False
        self._cluster: Cluster

    async def run(self, kinds: Sequence[str]) -> None:
        """Kill in this order under load, and close the cluster."""
        self._cluster = await self._new_cluster()
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_clients):
                group.create_task(self._be_client(self._draw.getrandbits(32)))
            for kind in kinds:
                await self._kill(kind)
            self._is_over = True
        await self._until(
            lambda: all(stats.num_used_blocks == 0 for stats in self._cluster.stats().values()), "KV blocks are left"
        )
        await self._cluster.aclose()
        self._victims.clear()

    async def _new_cluster(self) -> Cluster:
        return await Cluster.from_transports(self._new_transport, self._config)

    def _new_transport(self, number: int) -> Transport:
        if self._num_refused_starts:
            self._num_refused_starts -= 1
            raise ConnectionError("there is no connection")
        self._victims[number] = victim = self._new_victim()
        return victim

    async def _until(self, condition: Callable[[], bool], otherwise: str) -> None:
        """Wait for a condition; it is a fault if it takes longer than the bound."""
        try:
            async with asyncio.timeout(self._bound_s):
                while not condition():  # noqa: ASYNC110 - replicas tell nobody but the cluster
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self.faults.append(f"{otherwise} after {self._bound_s:g} s")

    async def _kill(self, kind: str) -> None:
        self.kills.append(Kill(kind))
        enough = self._num_ended + self._draw.randint(1, self._num_clients)
        await self._until(lambda: self._num_ended >= enough, "clients are stuck")
        began = time.monotonic()
        dead = await getattr(self, f"_kill_{kind}")()
        await self._until(lambda: self._is_whole_without(dead), f"{kind}: the cluster is not whole")
        self.kills[-1].whole_s = time.monotonic() - began

    def _is_whole_without(self, dead: Sequence[int]) -> bool:
        health = self._cluster.replica_health()
        is_whole = len(health) == self._config.num_replicas and all(each.ok for each in health.values())
        return is_whole and not health.keys() & set(dead)

    def _choose(self, count: int = 1) -> list[int]:
        return self._draw.sample(sorted(self._cluster.replica_health()), count)

    async def _kill_replica(self) -> list[int]:
        return self._die(self._choose())

    async def _kill_node(self) -> list[int]:
        return self._die(self._choose((self._config.num_replicas + 1) // 2))

    async def _kill_rank(self) -> list[int]:
        dead = self._choose()
        self._victims[dead[0]].fail()
        return dead

    async def _kill_silence(self) -> list[int]:
        dead = self._choose()
        self._victims[dead[0]].fall_silent()
        return dead

    async def _kill_connection(self) -> list[int]:
        self._num_refused_starts = 1
        return self._die(list(self._cluster.replica_health()))

    async def _kill_start(self) -> list[int]:
        latest = max(self._victims)
        dead = self._die(self._choose())
        await self._until(
            lambda: max(self._victims) > latest and self._victims[max(self._victims)].has_begun,
            "no replica is started",
        )
        return dead + self._die([max(self._victims)])

    async def _kill_removal(self) -> list[int]:
        num_replicas = self._config.num_replicas
        removal = asyncio.create_task(self._cluster.scale(num_replicas - 1, drain=self._draw.choice((0.0, 0.01, 5.0))))
        leaving = set(self._victims)
        dead: list[int] = []
        if self._draw.random() < 0.5:
            await asyncio.sleep(0)
            dead = self._die(self._choose())
        async with asyncio.timeout(self._bound_s):
            await removal
            await self._cluster.scale(num_replicas)
        assert set(self._victims) > leaving, "nothing was removed"
        return dead

    async def _kill_cluster(self) -> list[int]:
        old = self._cluster
        async with asyncio.timeout(self._bound_s):
            await old.aclose()
            self._victims.clear()
            self._cluster = await self._new_cluster()
        return []

    def _die(self, numbers: list[int]) -> list[int]:
        for number in numbers:
            self._victims[number].die()
        return numbers

    async def _be_client(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._is_over:
            cluster, began = self._cluster, time.monotonic()
            try:
                async with asyncio.timeout(self._bound_s):
                    ending = await self._request(cluster, draw)
            except (EngineDeadError, EngineClosedError) as error:
                ending = type(error).__name__
            except TimeoutError:
                ending = "hangs"
                self.faults.append(f"a stream has not ended after {self._bound_s:g} s")
            kill = self.kills[-1] if self.kills else Kill("")
            kill.endings[ending] += 1
            kill.slowest_s = max(kill.slowest_s, time.monotonic() - began)
            self._num_ended += 1
            if ending == "EngineClosedError":
                await self._until(partial(self._has_replaced, cluster), "no new cluster")

    def _has_replaced(self, closed: Cluster) -> bool:
        return self._cluster is not closed

    async def _request(self, cluster: Cluster, draw: random.Random) -> str:
        """Run one request; return how it ended, in a word."""
        prompt = [draw.randrange(_VOCAB_SIZE) for _ in range(draw.randint(1, 30))]
        num_tokens = draw.randint(5, 80)
        handle = cluster.generate_async(
            prompt, SamplingParams(max_new_tokens=num_tokens), streaming=draw.random() < 0.8
        )
        num_wanted = draw.randint(1, num_tokens) if draw.random() < 0.2 else num_tokens
        token_ids: list[int] = []
        try:
            async for output in handle:
                token_ids += output.token_ids_delta
                if len(token_ids) >= num_wanted:
                    handle.abort()
        finally:
            if token_ids != _expected(prompt, len(token_ids)):
                self.faults.append(f"wrong tokens: {token_ids} for the prompt {prompt}")
        reason = output.finish_reason
        if len(token_ids) == num_tokens and reason == "length":
            return "whole"
        if reason != "abort" or (num_wanted == num_tokens and cluster.health().state not in ("draining", "closed")):
            self.faults.append(f"{len(token_ids)} of {num_tokens} tokens, which ended with {reason!r}")
        return "aborted"


def _expected(prompt: Sequence[int], num_tokens: int) -> list[int]:
    context = list(prompt)
    for _ in range(num_tokens):
        token_id = _NEXT_TOKEN(context)
        assert token_id is not None
        context.append(token_id)
    return context[len(prompt) :]


@dataclass(frozen=True, slots=True)
class Resources:
    """What this process has: threads of ours, processes below it, open files, and engines that were not collected."""

    num_threads: int
    num_processes: int
    num_files: int
    num_engines: int

    @classmethod
    def now(cls, engines: Sequence[weakref.ref[LLM]]) -> Resources:
        """Count, after a garbage collection."""
        gc.collect()
        process = psutil.Process()
        return cls(
            sum(thread.name.startswith("llmengine") for thread in threading.enumerate()),
            len(process.children(recursive=True)),
            process.num_fds(),
            sum(engine() is not None for engine in engines),
        )


def kill_all(
    kinds: Sequence[str], *, processes: bool = False, bound_s: float = 30.0, **settings: Any
) -> tuple[list[Kill], list[str]]:
    """Run `Killing` in an event loop of its own; return the kills, and what went wrong or was left, in words.

    Args:
        kinds: what to kill, in order; see `KINDS`.
        processes: replicas are processes.
        settings: of `Killing`.
    """
    engines: list[weakref.ref[LLM]] = []
    if processes:
        context = fork_server()
        new_victim: Callable[[], Victim] = lambda: ProcessVictim(context, make_llm)  # noqa: E731
    else:
        new_victim = lambda: LocalVictim(engines)  # noqa: E731
    asyncio.run(Killing(new_victim, num_clients=1).run(()))  # what starts once and stays, such as the fork server
    before = Resources.now(engines)
    killing = Killing(new_victim, bound_s=bound_s, **settings)
    with _without_logs():
        asyncio.run(killing.run(kinds))
    until = time.monotonic() + bound_s
    while (left := Resources.now(engines)) != before and time.monotonic() < until:
        time.sleep(_POLL_S)
    if left != before:
        killing.faults.append(f"left behind: {left}; before: {before}")
    return killing.kills, killing.faults


@contextmanager
def _without_logs() -> Iterator[None]:
    """Each kill would log a traceback, and a record that is kept would keep an engine."""
    logger = logging.getLogger("llmengine")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def order_of(num_kills: int, seed: int) -> list[str]:
    """So many kinds in a random order, with the slow ones, silence and lost connections, a tenth as often as others."""
    weights = [1 if kind in ("silence", "connection", "start") else 10 for kind in KINDS]
    return [*KINDS, *random.Random(seed).choices(KINDS, weights, k=num_kills)][:num_kills]


def table(kills: Sequence[Kill]) -> str:
    """A row for each kind of kill, as Markdown."""
    by_kind: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        by_kind[kill.kind].append(kill)
    rows = []
    for kind in (kind for kind in KINDS if kind in by_kind):
        mine = by_kind[kind]
        endings = sum((kill.endings for kill in mine), Counter())
        errors = endings.total() - endings["whole"] - endings["aborted"]
        whole_s = [kill.whole_s for kill in mine]
        slowest_s = max(kill.slowest_s for kill in mine)
        rows.append(
            [
                kind,
                *map(str, (len(mine), endings["whole"], endings["aborted"], errors)),
                f"{slowest_s:.2f}",
                f"{statistics.median(whole_s):.2f}",
                f"{max(whole_s):.2f}",
            ]
        )
    header = ["killed", "times", "whole", "aborted", "error", "slowest stream, s", "whole again, s: median", "most"]
    return format_table(header, rows)


def main() -> None:
    """Print a table."""
    parser = new_parser("cluster_kills", __doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--bound", type=float, default=30.0, help="seconds (default: %(default)s)")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--rerun", action="store_true", help="requests of dead replicas run again")
    arguments = parser.parse_args()
    kills, faults = kill_all(
        order_of(arguments.kills, arguments.seed),
        processes=arguments.processes,
        bound_s=arguments.bound,
        seed=arguments.seed,
        num_replicas=arguments.replicas,
        num_clients=arguments.clients,
        rerun_requests=arguments.rerun,
    )
    print(table(kills))
    print(*faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
