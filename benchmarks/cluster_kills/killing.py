"""Killing: clients run requests on a cluster, whose parts die one after the other."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.cluster_kills.victims import NEXT_TOKEN, VOCAB_SIZE, Victim
from benchmarks.kills import Kill
from llmengine import SamplingParams
from llmengine.cluster import Cluster, ClusterConfig
from llmengine.cluster.transport import Transport
from llmengine.errors import EngineClosedError, EngineDeadError

KINDS = ("replica", "rank", "node", "start", "removal", "cluster", "connection", "silence")

POLL_S = 0.005


class Killing:
    """One run.

    Args:
        new_victim: makes a replica that is to be started.
        bound_s: within this time every stream must end, and the cluster be whole again.
        replica_timeout_s: of the cluster; the kind "silence" takes this long.

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
        replica_timeout_s: float = 2.0,
    ) -> None:
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self._new_victim = new_victim
        self._draw = random.Random(seed)
        self._num_clients = num_clients
        self._bound_s = bound_s
        self._config = ClusterConfig(
            num_replicas=num_replicas,
            rerun_requests=rerun_requests,
            max_reruns=1000,
            replica_timeout_s=replica_timeout_s,
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
                    await asyncio.sleep(POLL_S)
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
            kill.note(ending, time.monotonic() - began)
            self._num_ended += 1
            if ending == "EngineClosedError":
                await self._until(partial(self._has_replaced, cluster), "no new cluster")

    def _has_replaced(self, closed: Cluster) -> bool:
        return self._cluster is not closed

    async def _request(self, cluster: Cluster, draw: random.Random) -> str:
        """Run one request; return how it ended, in a word."""
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 30))]
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
        token_id = NEXT_TOKEN(context)
        assert token_id is not None
        context.append(token_id)
    return context[len(prompt) :]
