"""`Cluster.scale`, and requests that move or wait while replicas come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from llmengine import LLM
from llmengine.cluster import Cluster, ClusterConfig
from llmengine.cluster.transport import LocalTransport
from llmengine.cluster.wire import Update
from llmengine.errors import ConfigError, EngineClosedError, InvalidRequestError, ReplicaDeadError
from tests.cluster.test_cluster import Dies, make_cluster, read_some
from tests.engine.helpers import WAIT_S, StepGate, make_llm, oracle, timeout, tokens


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition of which nobody tells."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def leaving(cluster: Cluster) -> list[int]:
    """Replicas that are being removed."""
    return [number for number, health in cluster.replica_health().items() if health.state == "draining"]


async def test_replicas_are_added_and_take_requests() -> None:
    gate = StepGate()
    async with timeout(), await make_cluster(lambda number: make_llm(on_step=gate), num_replicas=1) as cluster:
        first = cluster.generate_async([1], tokens(3))
        await asyncio.to_thread(gate.wait)
        await cluster.scale(3)
        others = [cluster.generate_async([number], tokens(3)) for number in (2, 3)]
        for _ in others:
            await asyncio.to_thread(gate.wait)  # on a replica of its own: none has ended its step yet
        for _ in range(3):
            gate.open()  # lets one replica go on
        assert [(await handle).token_ids for handle in (first, *others)] == [oracle([n], 3) for n in (1, 2, 3)]
        assert sorted(cluster.replica_health()) == sorted(cluster.stats()) == [0, 1, 2]
        assert all(health.ok for health in cluster.replica_health().values())


async def test_a_replica_that_leaves_finishes_its_requests_and_gets_no_more() -> None:
    gates = [StepGate(), StepGate()]
    async with timeout(), await make_cluster(lambda number: make_llm(on_step=gates[number])) as cluster:
        running = [cluster.generate_async([number], tokens(30)) for number in (1, 2)]
        for gate in gates:
            await asyncio.to_thread(gate.wait)
        removal = asyncio.create_task(cluster.scale(1, drain=WAIT_S))
        await until(lambda: bool(leaving(cluster)))
        (number_leaving,) = leaving(cluster)
        gates[1 - number_leaving].open()
        later = [await cluster.generate_async([number], tokens(3)) for number in range(3, 9)]
        assert [output.token_ids for output in later] == [oracle([number], 3) for number in range(3, 9)]
        assert not removal.done()
        gates[number_leaving].open()
        await removal
        assert [(await handle).token_ids for handle in running] == [oracle([number], 30) for number in (1, 2)]
        assert list(cluster.replica_health()) == [1 - number_leaving]


@pytest.mark.parametrize("rerun", [False, True])
async def test_requests_that_outlast_the_drain_run_again_or_fail(rerun: bool) -> None:
    gates = [StepGate(), StepGate()]
    async with (
        timeout(),
        await make_cluster(lambda number: make_llm(on_step=gates[number]), rerun_requests=rerun) as cluster,
    ):
        handles = [cluster.generate_async([number], tokens(30), streaming=True) for number in (1, 2)]
        for gate in gates:
            for _ in range(3):
                await asyncio.to_thread(gate.wait)
                gate.let_go()
        for handle in handles:
            await read_some(handle, 1)
        removal = asyncio.create_task(cluster.scale(1, drain=0.05))
        endings = [asyncio.create_task(asyncio.wait_for(handle, WAIT_S)) for handle in handles]
        if not rerun:
            done, _ = await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
            (failed,) = done
            assert isinstance(failed.exception(), ReplicaDeadError)
            assert "was removed from the cluster, and had 0.05 s" in str(failed.exception())
            endings.remove(failed)
        await until(lambda: bool(leaving(cluster)))
        (number_leaving,) = leaving(cluster)
        gates[1 - number_leaving].open()
        assert [(await ending).num_tokens for ending in endings] == [30] * len(endings)
        gates[number_leaving].open()
        await removal
        assert len(cluster.replica_health()) == 1


async def test_what_cannot_be_added_is_said_and_the_rest_serves() -> None:
    def make(number: int) -> LLM:
        if number:
            raise ConfigError("no room here")
        return make_llm()

    async with timeout(), await make_cluster(make, num_replicas=1) as cluster:
        with pytest.raises(ConfigError, match="no room here"):
            await cluster.scale(2)
        assert (await cluster.generate_async([1], tokens(3))).token_ids == oracle([1], 3)
        await cluster.scale(1)
        for arguments in ((0,), (1, -1.0), (1.5,)):
            with pytest.raises(InvalidRequestError):
                await cluster.scale(*arguments)
    with pytest.raises(EngineClosedError):
        await cluster.scale(2)


async def test_a_start_is_given_up_when_its_replica_is_not_wanted_any_more() -> None:
    may_load, loads = threading.Event(), threading.Event()

    def make(number: int) -> LLM:
        if number:
            loads.set()
            assert may_load.wait(WAIT_S)
        return make_llm()

    async with timeout(), await make_cluster(make, num_replicas=1) as cluster:
        growth = asyncio.create_task(cluster.scale(2))
        await asyncio.to_thread(loads.wait, WAIT_S)
        await cluster.scale(1)
        await growth
        may_load.set()
        assert list(cluster.replica_health()) == [0]


async def test_deadlines_pass_while_there_is_no_replica() -> None:
    dies, may_load = Dies(0), threading.Event()

    def make(number: int) -> LLM:
        if number:
            assert may_load.wait(WAIT_S)
        return make_llm(on_step=None if number else dies)

    async with timeout(), await make_cluster(make, num_replicas=1) as cluster:
        dies.now.set()
        with pytest.raises(ReplicaDeadError):
            await cluster.generate_async([1], tokens(3))
        await until(lambda: not cluster.replica_health())
        late = cluster.generate_async([1], tokens(3), deadline_s=0.01)
        late_first_token = cluster.generate_async([1], tokens(3), first_token_deadline_s=0.01)
        assert [(await handle).finish_reason for handle in (late, late_first_token)] == ["timeout"] * 2
        patient = cluster.generate_async([1], tokens(3))
        may_load.set()
        assert (await patient).token_ids == oracle([1], 3)


async def test_an_abort_before_a_request_that_runs_again_has_caught_up() -> None:
    dies, gate = Dies(), StepGate()
    async with (
        timeout(),
        await make_cluster(
            lambda number: make_llm(on_step=gate if number else dies), num_replicas=1, rerun_requests=True
        ) as cluster,
    ):
        handle = cluster.generate_async([1], tokens(200), streaming=True)
        ids = await read_some(handle, 10)
        dies.now.set()
        await asyncio.to_thread(gate.wait)
        handle.abort()
        while not handle.done:  # slowly, so that the abort arrives before all tokens are made
            gate.let_go()
            await asyncio.sleep(0.05)
        gate.open()
        output = await handle
        assert output.finish_reason == "abort"
        assert output.token_ids[: len(ids)] == ids
        assert output.token_ids == oracle([1], output.num_tokens)


async def test_a_cluster_that_loses_a_replica_before_all_are_ready_says_so() -> None:
    may_load = threading.Event()

    def loaded_late() -> LLM:
        assert may_load.wait(WAIT_S)
        return make_llm()

    class Breaks(LocalTransport):
        async def updates(self) -> AsyncIterator[Update]:
            yield await anext(super().updates())
            raise ConnectionError("the actor was killed")

    config = ClusterConfig(num_replicas=2, replace_replicas=False)
    replicas: list[LocalTransport] = [Breaks(make_llm), LocalTransport(loaded_late)]
    async with timeout():
        try:
            with pytest.raises(ReplicaDeadError, match="the actor was killed"):
                await Cluster.from_transports(replicas.__getitem__, config)
        finally:
            may_load.set()
