"""Replicas whose ranks lie on two nodes of a real Ray cluster of this machine, in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.backends.helpers import save_tiny

TWO_NODES = r"""
import asyncio, re, sys, time
import ray
from ray.cluster_utils import Cluster as Nodes
from llmengine import LLM, KvCacheConfig, ModelConfig, ParallelConfig, ReplicaDeadError, SamplingParams
from llmengine.cluster import Cluster, ClusterConfig
from tests.cluster.test_ray_hosts import ranks_below as ranks

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)

async def until(condition):
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0.05)

async def failing_streams(cluster, what, kill, says):
    params = GREEDY.replace(max_new_tokens=3000)
    handles = [cluster.generate_async(prompt, params, streaming=True) for prompt in PROMPTS]
    for handle in handles:
        await anext(handle)
    began = time.monotonic()
    kill()
    for handle in handles:
        try:
            await handle
        except ReplicaDeadError as error:
            assert re.search(says, str(error)), (what, str(error))
            text = str(error)
        else:
            raise AssertionError("a stream goes on without its rank")
    print(f"{what}: {time.monotonic() - began:.1f} s: {text}", flush=True)

async def main():
    config = ModelConfig(
        sys.argv[1], device="cpu", dtype="float32", num_threads=1, kv_cache_config=KvCacheConfig(max_bytes=16 << 20)
    )
    with LLM(config, enable_tokenizer=False) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
    ray.init(nodes.address, log_to_driver=False)
    spread = {"placement_strategy": "STRICT_SPREAD", "actor_options": {"num_cpus": 1}}

    def groups():
        return [one for one in ray.util.placement_group_table().values() if one["state"] != "REMOVED"]

    config.parallel_config = ParallelConfig(tp_size=2)
    settings = ClusterConfig(ranks_per_host=1, **spread)
    async with await Cluster.create(config, settings, enable_tokenizer=False) as cluster:
        assert [output.token_ids for output in await cluster.generate(PROMPTS, GREEDY)] == expected
        assert len(ranks("RankAgent")) == 1
        assert not ranks("ReplicaActor"), "rank 0 starts no process"
    await until(lambda: not ranks("ray::"))

    config.parallel_config = ParallelConfig(tp_size=2, pp_size=2)
    settings = ClusterConfig(ranks_per_host=2, **spread)
    async with await Cluster.create(config, settings, enable_tokenizer=False) as cluster:

        async def whole():
            await until(lambda: len(cluster.stats()) == 1)
            assert [output.token_ids for output in await cluster.generate(PROMPTS, GREEDY)] == expected
            assert (len(ranks("RankAgent")), len(ranks("ReplicaActor"))) == (2, 1)

        await whole()
        a_rank = r"rank [23] of 4 \(process \d+ on [\d.]+\) "
        await failing_streams(cluster, "a rank", ranks("RankAgent")[0].kill, a_rank + "was killed by SIGKILL")
        await whole()
        agent = ranks("RankAgent")[0].parent()
        await failing_streams(cluster, "an agent", agent.kill, a_rank + "was lost with its host")
        await whole()
        before = set(ranks("ray::"))
        replica = ranks("ReplicaActor")[0].parent()
        await failing_streams(cluster, "the replica's actor", replica.kill, "replica")
        await until(lambda: not before & set(ranks("ray::")))
        await whole()
        (group,) = groups()
        (lost,) = [node for node in workers if node.node_id == group["bundles_to_node_id"][1]]
        await failing_streams(cluster, "a node", lambda: nodes.remove_node(lost, allow_graceful=False), a_rank)
        nodes.add_node(num_cpus=1)
        await whole()
    await until(lambda: not ranks("ray::"))
    await until(lambda: not groups() and ray.available_resources().get("CPU") == 2.0)
    ray.shutdown()
    nodes.shutdown()
    print("done")

asyncio.run(main())
"""

BEHIND_SERVE = r"""
import asyncio, sys
import httpx, psutil, ray
from ray import serve
from ray.cluster_utils import Cluster as Nodes
from benchmarks.ray_serve import free_port
from llmengine import LLM, KvCacheConfig, ModelConfig, ParallelConfig, SamplingParams
from llmengine.cluster.serve import ServeConfig, build_app
from llmengine.server import ServerConfig
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.cluster.test_ray_hosts import ranks_below

ASKED = {"model": "model", "prompt": "to tell a story", "max_tokens": 24, "temperature": 0.0}

port = free_port()

async def text():
    async with httpx.AsyncClient(timeout=120) as http:
        answer = await http.post(f"http://127.0.0.1:{port}/v1/completions", json=ASKED)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"]

async def until(condition):
    async with asyncio.timeout(300):
        while not await condition():
            await asyncio.sleep(0.2)

async def main():
    config = ModelConfig(
        sys.argv[1], device="cpu", dtype="float32", num_threads=1, kv_cache_config=KvCacheConfig(max_bytes=16 << 20)
    )
    with LLM(config, ByteTokenizer()) as llm:
        params = SamplingParams(max_new_tokens=24, temperature=0.0)
        (output,) = llm.generate([ASKED["prompt"]], params)
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config.parallel_config = ParallelConfig(tp_size=2)
    settings = ServeConfig(ranks_per_host=1, placement_strategy="STRICT_SPREAD", health_check_period_s=0.5)
    serve.run(build_app(config, settings, ServerConfig(model_name="model"), tokenizer=ByteTokenizer()))
    assert await text() == output.text
    (rank,) = ranks_below("RankAgent")
    rank.kill()

    async def is_replaced():
        try:
            return await text() == output.text and rank not in ranks_below("RankAgent")
        except httpx.HTTPError:
            return False

    await until(is_replaced)
    assert len(ranks_below("RankAgent")) == 1
    serve.shutdown()

    async def is_over():
        return not ranks_below("ray::") and ray.available_resources().get("CPU") == 2.0

    await until(is_over)
    ray.shutdown()
    nodes.shutdown()
    print("done")

asyncio.run(main())
"""

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python")


@pytest.mark.slow
@needs_ray
def test_ranks_on_two_nodes_that_are_killed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", max_position_embeddings=4096, num_hidden_layers=4)
    command = [sys.executable, "-c", TWO_NODES, str(tmp_path / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert ended.stdout.splitlines()[-1] == "done"
    print(ended.stdout)


@pytest.mark.slow
@needs_ray
def test_a_replica_of_serve_on_two_nodes_is_replaced_when_a_rank_dies(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    command = [sys.executable, "-c", BEHIND_SERVE, str(tmp_path / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
    assert ended.stdout.splitlines()[-1] == "done"


def ranks_below(name: str) -> list[psutil.Process]:
    """Processes of ranks whose parent is an actor of this name; other programs' ranks have other parents."""
    found = []
    for process in psutil.process_iter():
        try:
            is_rank = "ranks/process.py" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
            if is_rank and name in process.parent().name():
                found.append(process)
        except (psutil.Error, AttributeError):
            continue
    return found
