"""Replicas on Ray: each is an asynchronous actor that owns one `LLM`.

A streaming generator of an actor passes a few thousand items a second, whatever they hold, so an item is an update of
all requests. Commands are calls, of which at most one is under way, so that they arrive in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llmengine.cluster.config import ClusterConfig
from llmengine.cluster.replica import Replica
from llmengine.cluster.transport import TransportFactory
from llmengine.cluster.wire import Command, Fault, ReplicaInfo, Update
from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, LLMEngineError
from llmengine.llm import LLM

_MAX_CALLS = 8
"""Calls of an actor that may run at once: its updates, a batch of commands, closing."""


def ray_transports(
    config: ModelConfig | str | Path, cluster_config: ClusterConfig, tokenizer: Any, enable_tokenizer: bool
) -> TransportFactory:
    """Connect this process to the Ray cluster, unless it is, and return what makes replicas there.

    Raises `ConfigError` if Ray is not installed, and Ray's errors if there is no such cluster.
    """
    _connect(cluster_config)
    model = config if isinstance(config, ModelConfig) else ModelConfig(config)
    load = partial(LLM.create, model, tokenizer, enable_tokenizer)
    return actor_transports(load, cluster_config, num_gpus(model))


def actor_transports(
    load: Callable[[], Awaitable[LLM]], cluster_config: ClusterConfig, gpus: float = 0
) -> TransportFactory:
    """`ray_transports` for engines that `load` makes, which is pickled and called on each actor's event loop.

    Args:
        gpus: of each replica.
    """
    ray = _connect(cluster_config)
    options = {"num_gpus": gpus, "max_concurrency": _MAX_CALLS, **cluster_config.actor_options}
    actor_class = ray.remote(_ReplicaActor).options(**options)
    # Stored once: all replicas, and those that take their places, load it from there.
    stored = ray.put(load)
    return lambda number: RayTransport(actor_class, stored)


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
    """The wire to a replica's actor, see `Transport`. The actor ends with this object."""

    def __init__(self, actor_class: Any, load: Any) -> None:
        self._actor = actor_class.remote(load)

    async def start(self) -> ReplicaInfo:
        """See `Transport`. Raises what loading raised on the replica."""
        answer: ReplicaInfo | Fault = await self._actor.load.remote()
        if isinstance(answer, Fault):
            raise answer.restore()
        return answer

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


class _ReplicaActor:
    """The actor: a `Replica` whose engine is loaded by `load`, so that its errors arrive as they are."""

    def __init__(self, load: Callable[[], Awaitable[LLM]]) -> None:
        self._load = load
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
