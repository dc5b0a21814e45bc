"""A rank of a replica is killed, and the process that has a cluster: what is told, what follows, and what is left."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmengine import LLM, KvCacheConfig, ModelConfig, ParallelConfig, ReplicaDeadError, SamplingParams
from llmengine.cluster import Cluster, ClusterConfig
from llmengine.cluster.transport import LocalTransport
from tests import ROOT
from tests.backends.helpers import save_tiny
from tests.backends.ranks.helpers import is_gone
from tests.cluster.test_cluster import read_some

GONE_S = 20.0
PROMPT = [5, 6, 7]
SHORT = SamplingParams(max_new_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_new_tokens=3000, ignore_eos=True)

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a long context."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, max_position_embeddings=4096)
    return directory


def shared(model: Path) -> ModelConfig:
    """On two ranks."""
    return ModelConfig(
        model,
        device="cpu",
        num_threads=1,
        parallel_config=ParallelConfig(tp_size=2),
        kv_cache_config=KvCacheConfig(max_bytes=16 << 20),
    )


def ranks_of(process: psutil.Process) -> list[int]:
    """Processes of ranks that a process has started."""
    return [one.pid for one in process.children(recursive=True) if any("ranks/process.py" in w for w in one.cmdline())]


async def test_streams_of_a_replica_whose_rank_is_killed_say_so_and_it_is_replaced(model: Path) -> None:
    def load() -> LLM:
        return LLM(shared(model), enable_tokenizer=False)

    this = psutil.Process()
    before = {*ranks_of(this)}
    async with (
        asyncio.timeout(300),
        await Cluster.from_transports(lambda _: LocalTransport(load), ClusterConfig()) as cluster,
    ):
        (rank,) = {*ranks_of(this)} - before
        expected = (await cluster.generate_async(PROMPT, SHORT)).token_ids
        # However late this task is, none ends before.
        handles = [
            cluster.generate_async([9, number], LONG, streaming=True, slow_consumer="pause") for number in range(3)
        ]
        for handle in handles:
            await read_some(handle, 2)
        os.kill(rank, signal.SIGKILL)
        for handle in handles:
            with pytest.raises(ReplicaDeadError, match=r"replica 0 is dead: .*rank 1 .*was killed by SIGKILL"):
                await handle
        assert (await cluster.generate_async(PROMPT, SHORT)).token_ids == expected
        assert list(cluster.stats()) == [1]
        (other,) = {*ranks_of(this)} - before
    assert is_gone(rank)
    assert is_gone(other, GONE_S)


RANK_OF_AN_ACTOR = """
import asyncio, os, signal, sys, time
from pathlib import Path
import psutil, ray
from benchmarks.cluster_kills.runs import actor_processes
from llmengine import ReplicaDeadError
from llmengine.cluster import Cluster, ClusterConfig
from tests.backends.ranks.helpers import is_gone
from tests.cluster.test_rank_kills import LONG, PROMPT, SHORT, ranks_of, shared

async def main():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    settings = ClusterConfig(num_replicas=2, actor_options={"num_cpus": 1})
    async with await Cluster.create(shared(Path(sys.argv[1])), settings, enable_tokenizer=False) as cluster:
        replicas = actor_processes()
        ranks = [rank for one in replicas for rank in ranks_of(one)]
        assert len(replicas) == len(ranks) == 2, (replicas, ranks)
        expected = (await cluster.generate_async(PROMPT, SHORT)).token_ids
        # However late this program is, none ends before, and few tokens are left for the replica that lives.
        params = LONG.replace(max_new_tokens=600)
        handles = [
            cluster.generate_async([9, number], params, streaming=True, slow_consumer="pause") for number in range(4)
        ]
        for handle in handles:
            await anext(handle)
        began = time.monotonic()
        os.kill(ranks[0], signal.SIGKILL)
        failed = 0
        for handle in handles:
            try:
                assert (await handle).num_tokens == params.max_new_tokens
            except ReplicaDeadError as error:
                failed += 1
                ended_s = time.monotonic() - began
                assert "rank 1" in str(error) and "was killed by SIGKILL" in str(error), str(error)
        assert 0 < failed < len(handles), failed
        while len(cluster.stats()) < 2 or replicas[0].is_running():
            await asyncio.sleep(0.05)
        print("failed", failed, "after", round(ended_s, 2), "s; whole after", round(time.monotonic() - began, 2), "s")
        outputs = await cluster.generate([PROMPT] * 4, SHORT)
        assert [output.token_ids for output in outputs] == [expected] * 4
        ranks += [rank for one in actor_processes() for rank in ranks_of(one)]
    assert all(is_gone(rank, 60.0) for rank in ranks)
    while ray.available_resources().get("CPU") != 2:  # Ray counts what actors leave behind after a moment
        await asyncio.sleep(0.05)
    ray.shutdown()
    print("done")

asyncio.run(main())
"""


@pytest.mark.slow
@needs_ray
def test_a_rank_of_an_actor_is_killed(model: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", RANK_OF_AN_ACTOR, str(model)], capture_output=True, text=True, timeout=900, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    print(ended.stdout)
    assert ended.stdout.endswith("done\n")


DRIVERS = """
import sys
from benchmarks.cluster_kills.driver_kills import kill_drivers

kills = kill_drivers(4, seed=5, model=sys.argv[1], on_hosts=bool(sys.argv[2]), bound_s=60.0)
assert [kill.was_serving for kill in kills] == [False, True] * 2
assert all(kill.gone_s is not None for kill in kills), kills
assert all(kill.num_processes == int(sys.argv[3]) for kill in kills if kill.was_serving), kills
"""
"""In a process of its own, since Ray leaves sockets open in one that starts it."""


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize(("ranks", "num_processes"), [("none", 2), ("on one host", 4), ("on two hosts", 6)])
def test_nothing_is_left_of_a_process_that_had_a_cluster(model: Path, ranks: str, num_processes: int) -> None:
    name = "" if ranks == "none" else str(model)
    arguments = [name, "hosts" if ranks == "on two hosts" else "", str(num_processes)]
    ended = subprocess.run(
        [sys.executable, "-c", DRIVERS, *arguments], capture_output=True, text=True, timeout=900, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
