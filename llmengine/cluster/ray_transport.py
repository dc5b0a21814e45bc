"""Replicas on Ray: each is an asynchronous actor that owns one `LLM`.

A streaming generator of an actor passes a few thousand items a second, whatever they hold, so an item is an update of
all requests. Commands are calls, of which at most one is under way, so that they arrive in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread

from llmengine.cluster.config import ClusterConfig
from llmengine.cluster.ray_hosts import HostPlan, RayHosts
from llmengine.cluster.replica import Replica
from llmengine.cluster.transport import TransportFactory
from llmengine.cluster.wire import Command, Fault, ReplicaInfo, Update
from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, LLMEngineError, PlacementError
from llmengine.llm import LLM

_logger = logging.getLogger("llmengine.cluster")

_MAX_CALLS = 8
"""Calls of an actor that may run at once: its updates, a batch of commands, closing."""

_UNUSUAL_WAIT_S = 30.0
"""After so long without room for a replica, the log says what it waits for."""

_ASK_S = 10.0
"""How long Ray may take to say what resources there are."""

_RESOURCES = ("num_cpus", "num_gpus", "memory", "resources", "accelerator_type", "label_selector")
"""Options of actors that say what they need."""


def ray_transports(
    config: ModelConfig | str | Path, cluster_config: ClusterConfig, tokenizer: Any, enable_tokenizer: bool
) -> TransportFactory:
    """Connect this process to the Ray cluster, unless it is, and return what makes replicas there.

    Raises `ConfigError` if Ray is not installed, and Ray's errors if there is no such cluster.
    """
    _connect(cluster_config)
    model = config if isinstance(config, ModelConfig) else ModelConfig(config)
    load = partial(LLM.create, model, tokenizer, enable_tokenizer)
    gpus, num_ranks = num_gpus(model), model.parallel_config.tp_size * model.parallel_config.pp_size
    options, strategy = cluster_config.actor_options, cluster_config.placement_strategy
    plan = HostPlan.of(num_ranks, cluster_config.ranks_per_host, strategy, gpus, options)
    if plan is None:
        return actor_transports(load, cluster_config, gpus)
    return actor_transports(load, cluster_config, plan.options["num_gpus"], plan.place)


def actor_transports(
    load: Callable[..., Awaitable[LLM]],
    cluster_config: ClusterConfig,
    gpus: float = 0,
    new_hosts: Callable[[], RayHosts] | None = None,
) -> TransportFactory:
    """`ray_transports` for engines that `load` makes, which is pickled and called on each actor's event loop.

    Args:
        gpus: of each replica's actor.
        new_hosts: the hosts of a new replica, which `load` is given as `rank_hosts`; None: each is on one host.

    Raises `ConfigError` also if `load` cannot be pickled.
    """
    ray = _connect(cluster_config)
    options = {"num_gpus": gpus, "max_concurrency": _MAX_CALLS, **cluster_config.actor_options}
    actor_class = ray.remote(_ReplicaActor)
    asked = {name: options[name] for name in _RESOURCES if options.get(name)}
    # Stored once: all replicas, and those that take their places, load it from there.
    try:
        stored = ray.put(load)
    except TypeError as error:
        raise ConfigError(f"what makes the engine of a replica cannot be sent to it: {error}") from error

    def new_transport(number: int) -> RayTransport:
        if new_hosts is None:
            return RayTransport(actor_class.options(**options), stored, asked, cluster_config.start_timeout_s)
        hosts = new_hosts()
        placed = actor_class.options(**{**options, **hosts.options_on(0)})
        each = {"hosts": 1 + hosts.hosts[-1], "on each": hosts.bundle}
        return RayTransport(placed, stored, each, cluster_config.start_timeout_s, hosts)

    return new_transport


def _connect(cluster_config: ClusterConfig) -> Any:
    """Ray, to whose cluster this process is connected now."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("a cluster needs Ray: pip install 'llmengine[ray]'") from error
    if not ray.is_initialized():
        ray.init(cluster_config.address, log_to_driver=False)
    return ray


class RayTransport:
    """The wire to a replica's actor, see `Transport`. The actor ends with this object.

    Args:
        load: for the actor.
        asked: the resources that it asks for, for messages.
        start_timeout_s: see `ClusterConfig`.
        hosts: of its ranks; removed with this object. None: they are all where the actor is.
    """

    def __init__(
        self,
        actor_class: Any,
        load: Any,
        asked: Mapping[str, Any],
        start_timeout_s: float,
        hosts: RayHosts | None = None,
    ) -> None:
        self._hosts = hosts
        self._asked = asked
        self._actor = actor_class.remote(load, hosts)
        self._start_timeout_s = start_timeout_s

    async def start(self) -> ReplicaInfo:
        """See `Transport`. Raises what loading raised on the replica, or `PlacementError`."""
        await self._wait_for_process()
        answer: ReplicaInfo | Fault = await self._actor.load.remote()
        if isinstance(answer, Fault):
            raise answer.restore()
        return answer

    async def _wait_for_process(self) -> None:
        """Wait until Ray has placed the actor and it answers; without room for it, Ray would wait forever."""
        ready = asyncio.wrap_future(self._actor.__ray_ready__.remote().future())
        first_wait_s = min(_UNUSUAL_WAIT_S, self._start_timeout_s)
        try:
            done, _ = await asyncio.wait([ready], timeout=first_wait_s)
            if not done and first_wait_s < self._start_timeout_s:
                _logger.warning("Ray has not started a replica for %g s: %s", first_wait_s, await self._lack())
                done, _ = await asyncio.wait([ready], timeout=self._start_timeout_s - first_wait_s)
            if not done:
                text = f"Ray has not started a replica within start_timeout_s={self._start_timeout_s:g}"
                raise PlacementError(f"{text}: {await self._lack()}")
            await ready
        finally:
            ready.cancel()

    async def _lack(self) -> str:
        """What the actor asks for, and what there is."""
        there_is = "nothing is known of what there is"
        with contextlib.suppress(Exception):  # Ray cannot be asked, which may be why nothing starts
            async with asyncio.timeout(_ASK_S):
                there_is = await anyio.to_thread.run_sync(_resources, abandon_on_cancel=True)
        return f"it asks for {dict(self._asked) or 'nothing'}; {there_is}"

    async def send(self, commands: Sequence[Command]) -> None:
        """See `Transport`."""
        await self._actor.execute.remote(commands)

    async def updates(self) -> AsyncIterator[Update]:
        """See `Transport`."""
        references = self._actor.updates.options(num_returns="streaming").remote()
        async for reference in references:
            yield await reference

    async def stop(self, drain_s: float) -> None:
        """See `Transport`."""
        await self._actor.close.remote(drain_s)

    def kill(self) -> None:
        """See `Transport`."""
        import ray

        with contextlib.suppress(Exception):  # Ray may have been shut down
            ray.kill(self._actor)
        if self._hosts is not None:
            self._hosts.remove()


def _resources() -> str:
    """What the nodes of the cluster have, and how much of it is free."""
    import ray

    free = ray.available_resources()
    kept = {name: amount for name, amount in ray.cluster_resources().items() if not name.startswith("node:")}
    return "free are " + ", ".join(f"{free.get(name, 0):g} of {amount:g} {name}" for name, amount in kept.items())


class _ReplicaActor:
    """The actor: a `Replica` whose engine is loaded by `load`, so that its errors arrive as they are."""

    def __init__(self, load: Callable[..., Awaitable[LLM]], hosts: RayHosts | None) -> None:
        self._load = load if hosts is None else partial(load, rank_hosts=hosts)
        self._replica: Replica

    async def load(self) -> ReplicaInfo | Fault:
        try:
            self._replica = Replica(await self._load())
        except LLMEngineError as error:
            return Fault.of(error)
        return self._replica.info

    async def execute(self, commands: Sequence[Command]) -> None:
        self._replica.execute(commands)

    async def updates(self) -> AsyncGenerator[Update, None]:
        async for update in self._replica.updates():
            yield update

    async def close(self, drain_s: float) -> None:
        await self._replica.aclose(drain_s)


def num_gpus(config: ModelConfig) -> int:
    """GPUs of a replica, all of one host: those that its ranks run on. None where the cluster has none."""
    import ray

    parallel = config.parallel_config
    on_cpu = config.device == "cpu" or (config.device == "auto" and not ray.cluster_resources().get("GPU"))
    return 0 if on_cpu else parallel.tp_size * parallel.pp_size
