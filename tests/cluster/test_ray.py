"""Replicas on real Ray clusters of this machine, each in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.backends.helpers import save_tiny

TWO_NODES = """
import asyncio, os, signal, sys, time
import ray
from ray.cluster_utils import Cluster as Nodes
from benchmarks.marked_processes import MarkedProcesses
from llmengine import LLM, KvCacheConfig, ModelConfig, ReplicaDeadError, SamplingParams
from llmengine.cluster import Cluster, ClusterConfig

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
LONG = SamplingParams(max_new_tokens=3000, ignore_eos=True)

def all_replicas():
    return marked.find("ReplicaActor")

async def until(condition):
    async with asyncio.timeout(600):
        while not condition():
            await asyncio.sleep(0.05)

async def failing_streams(cluster, kill):
    handles = [cluster.generate_async(prompt, LONG, streaming=True) for prompt in PROMPTS]
    for handle in handles:
        await anext(handle)
    began = time.monotonic()
    kill()
    failed = 0
    for handle in handles:
        try:
            assert (await handle).num_tokens == 3000
        except ReplicaDeadError as error:
            failed += 1
            assert "replica" in str(error) and chr(10) not in str(error), str(error)
            assert error.__cause__ is not None
    assert 0 < failed < len(handles), failed
    print("failed", failed, "after", round(time.monotonic() - began, 1), "s")

async def main():
    config = ModelConfig(sys.argv[1], device="cpu", num_threads=1, kv_cache_config=KvCacheConfig(max_bytes=16 << 20))
    with LLM(config, enable_tokenizer=False) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, SamplingParams(max_new_tokens=12))]
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    second = nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False)
    settings = ClusterConfig(num_replicas=2, actor_options={"num_cpus": 1, "scheduling_strategy": "SPREAD"})
    async with await Cluster.create(config, settings, enable_tokenizer=False) as cluster:
        outputs = await cluster.generate(PROMPTS, SamplingParams(max_new_tokens=12))
        assert [output.token_ids for output in outputs] == expected
        assert all(stats.counters.num_steps for stats in cluster.stats().values()), "a replica did nothing"

        handle = cluster.generate_async([1, 2], LONG, streaming=True)
        async for output in handle:
            if output.num_tokens > 3:
                break
        handle.abort()
        assert (await handle).finish_reason == "abort"
        await until(lambda: all(stats.num_used_blocks == 0 for stats in cluster.stats().values()))

        mine = all_replicas()
        assert len(mine) == 2, mine
        await failing_streams(cluster, mine[0].kill)
        await until(lambda: len(cluster.stats()) == 2)  # it was replaced
        await failing_streams(cluster, lambda: nodes.remove_node(second, allow_graceful=False))
        nodes.add_node(num_cpus=1)
        await until(lambda: len(cluster.stats()) == 2)
        outputs = await cluster.generate(PROMPTS, SamplingParams(max_new_tokens=12))
        assert [output.token_ids for output in outputs] == expected
    await until(lambda: not all_replicas())
    try:
        await Cluster.create(ModelConfig(sys.argv[1] + "-missing"), ClusterConfig(actor_options={"num_cpus": 1}))
    except Exception as error:
        print(type(error).__name__, error)
    ray.shutdown()
    nodes.shutdown()
    print("done")

with MarkedProcesses.running() as marked:  # others of this machine may have replicas too
    asyncio.run(main())
"""

ONE_REPLICA = """
import asyncio, contextlib, dataclasses, sys, threading
import ray
from llmengine import LLM, KvCacheConfig, ModelConfig, SamplingParams
from llmengine import ConfigError, InvalidRequestError, PlacementError
from llmengine.cluster import Cluster, ClusterConfig

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
PARAMS = SamplingParams(max_new_tokens=12)

async def main():
    config = ModelConfig(sys.argv[1], device="cpu", num_threads=1, kv_cache_config=KvCacheConfig(max_bytes=16 << 20))
    with LLM(config, enable_tokenizer=False) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    settings = ClusterConfig(num_replicas=1, actor_options={"num_cpus": 1})
    async with await Cluster.create(config, settings, enable_tokenizer=False) as cluster:
        assert [output.token_ids for output in await cluster.generate(PROMPTS, PARAMS)] == expected
        long = SamplingParams(max_new_tokens=3000, ignore_eos=True)
        # However late this program is, the request does not end before it is aborted.
        handle = cluster.generate_async([1, 2], long, streaming=True, slow_consumer="pause")
        await anext(handle)
        handle.abort()
        assert (await handle).finish_reason == "abort"
        with contextlib.suppress(InvalidRequestError):
            await cluster.generate_async([1, 2], PARAMS, cache_salt=lambda: None)
            assert False, "a lambda went to a replica"
        assert [output.token_ids for output in await cluster.generate(PROMPTS, PARAMS)] == expected
        try:
            await Cluster.create(config, settings, tokenizer=threading.Lock())
        except ConfigError as error:
            assert "what makes the engine of a replica cannot be sent to it" in str(error), error
        else:
            assert False, "a lock went to a replica"
        try:
            # The only processor is taken.
            await Cluster.create(config, dataclasses.replace(settings, start_timeout_s=0.5), enable_tokenizer=False)
        except PlacementError as error:
            print(error)
    ray.shutdown()
    print("done")

asyncio.run(main())
"""

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python")


def run(program: str, directory: Path) -> list[str]:
    """The lines that a program prints about a tiny model, in a process of its own."""
    save_tiny(directory / "model", max_position_embeddings=4096)
    command = [sys.executable, "-c", program, str(directory / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout.splitlines()


@needs_ray
def test_a_replica_answers_as_an_llm_does(tmp_path: Path) -> None:
    *_, said, done = run(ONE_REPLICA, tmp_path)
    assert done == "done"
    assert "within start_timeout_s=0.5: it asks for {'num_cpus': 1}; free are " in said
    assert "0 of 1 CPU" in said


@pytest.mark.slow
@needs_ray
def test_two_nodes_replicas_that_are_killed_and_a_node_that_is_lost(tmp_path: Path) -> None:
    printed = run(TWO_NODES, tmp_path)
    assert printed[-1] == "done"
    assert any("ModelLoadError" in line for line in printed)
    print(*printed, sep="\n")
