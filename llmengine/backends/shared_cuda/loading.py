"""A model on several GPUs, or on the CPU through Triton's interpreter: rank 0's side, and that of the others.

::

    rank 0    start ranks ── meet ─▶ weights (room) ─▶ size the KV cache ─▶ values, kernels, tuning ─▶ graphs, steps
                              │          ▲ free bytes        │ blocks                     ▲ ready          │ tells
    rank 1..  .... import ────┘ ─▶ weights (room) ───────────┴─▶ values, kernels, tuning ─┘                ▼ follow
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cuda.backend import CudaParts
from llmengine.backends.cuda.following import Follower, Inputs, Message, NextWeight, decode, encode
from llmengine.backends.cuda.loading import Sharing, fit_cuda_pool, load_cuda_parts
from llmengine.backends.cuda.peers import Peers
from llmengine.backends.kv_layout import KvLayout, KvPool, joint_kv_layout
from llmengine.backends.queued_pipeline import QueuedPipeline
from llmengine.backends.rank_places import RankPlaces
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.backends.shared_cuda.connections import RankConnections, connect_rank, connect_rank_0
from llmengine.backends.shared_cuda.segments import TORCH_SEGMENTS, Exchange, RankSegments
from llmengine.backends.shared_cuda.weights import WeightSender, joined_weights
from llmengine.backends.shared_weights import heard_source, is_calibrated, told_source
from llmengine.batch import BackendInfo
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.saved_files import PlanHolder
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.rank_hosts import RankHosts

_STUCK_AFTER_S = 4.0
"""So that requests fail within 5 s, in which where its threads are is asked as well."""


@dataclass(frozen=True, slots=True)
class _Payload:
    """What a rank is started with."""

    config: ModelConfig
    devices: Sequence[str]
    segments: RankSegments


@dataclass(frozen=True, slots=True)
class _Room:
    """A rank's reply when its weights have their places: what its device has left."""

    free_bytes: int


@dataclass(frozen=True, slots=True)
class _Pool:
    """Rank 0's answer: the size of the KV cache, the same on all ranks."""

    num_blocks: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class _Ready:
    """A rank's reply when it can run steps."""

    weight_bytes: int


def load_shared_cuda_backend(
    config: ModelConfig,
    source: ModelSource,
    devices: Sequence[torch.device],
    check_wanted: Callable[[], None] = lambda: None,
    rank_hosts: RankHosts | None = None,
    segments: RankSegments = TORCH_SEGMENTS,
) -> PreparingRanksBackend:
    """Load a model over as many processes as there are devices, each of its rank's host; this one has the first.

    `check_wanted` and `rank_hosts` are as for `backends.load_backend`; `segments` chooses what computes.
    Raises what `backends.load_backend` raises, `ConfigError` for a model that cannot be cut so, and `EngineDeadError`
    for a rank that ends.
    """
    places = RankPlaces(config.parallel_config, source)  # raises before any process is started
    payload = _Payload(config, [str(device) for device in devices], segments)
    group = RankGroup(
        places.size,
        f"{__name__}:serve",
        pickle.dumps(payload),
        hosts=rank_hosts,
        stage_size=places.tp_size,
        check_wanted=check_wanted,
    )
    connections: RankConnections | None = None
    try:
        group.start()
        connections = connect_rank_0(config, places, group, devices[0])
        group.watch(connections.abort)
        if is_calibrated(stored_source(config), config.quant_config):
            places = RankPlaces(config.parallel_config, told_source(source, group))
        leader = _Leader(config, places, group)
        sharing = leader.sharing(_peers(config, places, 0, connections, devices[0]), connections)
        own_source = places.source_of(0)
        factory = segments.factory(own_source, Exchange.of_rank_0(group))
        parts = load_cuda_parts(config, own_source, devices[0], factory, sharing)
        info = leader.info(parts, connections)
        own = segments.backend(replace(parts, info=info))

        def weights() -> Iterator[tuple[str, Tensor]]:
            return joined_weights(places, parts.program.model.weights.canonical, group)

        group.expect_progress(_STUCK_AFTER_S)
        pipeline = own if places.pp_size == 1 else QueuedPipeline(own, places.pp_size)
        saved_plans = own.saved_plans if isinstance(own, PlanHolder) else None
        return PreparingRanksBackend(pipeline, group, pipeline.info, weights, connections, saved_plans)
    except BaseException as error:
        try:
            if connections is not None and isinstance(error, Exception):
                group.check()  # if a rank has failed, that is the cause
            raise
        finally:
            group.close()
            if connections is not None:
                connections.close()


class _Leader:
    """What rank 0 says and hears while all load, and tells the others afterwards."""

    def __init__(self, config: ModelConfig, places: RankPlaces, group: RankGroup) -> None:
        self._config = config
        self._places = places
        self._arches = [places.arch_of(rank) for rank in range(places.size)]
        self._group = group
        self._held: list[Message] = []
        self._other_weight_bytes = 0
        self._kv_bytes_per_block = 0

    def sharing(self, peers: Peers | None, connections: RankConnections) -> Sharing:
        """How rank 0 loads."""
        return Sharing(peers, connections.link, self._agree, self._await_others, self._tell)

    def info(self, parts: CudaParts, connections: RankConnections) -> BackendInfo:
        """Of all ranks together."""
        own, tp_size = parts.info, self._places.tp_size
        each = f"{tp_size} ranks share each matrix and add up by {connections.sums}"
        return replace(
            own,
            description=f"{own.description}, {self._places.describe(each)}",
            kv_bytes_per_block=self._kv_bytes_per_block,
            weight_bytes=own.weight_bytes + self._other_weight_bytes,
        )

    def _agree(self, layout: KvLayout, limit: int, free_bytes: int) -> KvPool:
        """The KV cache of rank 0, of as many blocks as fit on all; tells the others."""
        rooms = [_Room(free_bytes), *map(pickle.loads, self._group.replies())]
        dtype = layout.tensors["kv"].dtype
        layouts = [joint_kv_layout(arch, layout.block_size, dtype) for arch in self._arches]
        whole_bytes = self._kv_bytes_per_block = sum(each.bytes_per_block for each in layouts)
        pools = []
        for own, room in zip(layouts, rooms, strict=True):
            kv = self._config.kv_cache_config
            if kv.max_bytes is not None:  # it bounds what all ranks have
                kv = replace(kv, max_bytes=max(1, kv.max_bytes * own.bytes_per_block // whole_bytes))
            pools.append(fit_cuda_pool(own, replace(self._config, kv_cache_config=kv), limit, room.free_bytes))
        least = min(pools, key=lambda pool: pool.num_blocks)
        self._group.broadcast(pickle.dumps(_Pool(least.num_blocks, least.max_model_len)))
        return replace(least, layout=layout)

    def _await_others(self) -> None:
        """Return when the others can run steps."""
        self._other_weight_bytes = sum(pickle.loads(reply).weight_bytes for reply in self._group.replies())

    def _tell(self, message: Message) -> None:
        """See `Tell`."""
        self._held.append(message)
        if not isinstance(message, Inputs):  # they travel with what is done with them
            held, self._held = self._held, []
            self._group.broadcast(encode(held))


def serve(channel: RankChannel, payload: bytes) -> None:
    """Be a rank: load a shard, and follow rank 0 until it ends."""
    start: _Payload = pickle.loads(payload)
    config, device = start.config, torch.device(start.devices[channel.rank])
    source = stored_source(config)
    if is_calibrated(source, config.quant_config):
        source = heard_source(source, config.quant_config, channel)
    else:
        source = quantized_source(source, config.quant_config)
    places = RankPlaces(config.parallel_config, source)
    connections = connect_rank(config, places, channel, device)

    def agree(layout: KvLayout, limit: int, free_bytes: int) -> KvPool:
        channel.reply(pickle.dumps(_Room(free_bytes)))
        pool: _Pool = pickle.loads(channel.receive())
        return KvPool(layout, pool.num_blocks, pool.max_model_len)

    try:
        own_source = places.source_of(channel.rank)
        sharing = Sharing(
            _peers(config, places, channel.rank, connections, device), connections.link, agree, lambda: None, None
        )
        factory = start.segments.factory(own_source, Exchange.of_rank(channel))
        parts = load_cuda_parts(config, own_source, device, factory, sharing)
        channel.reply(pickle.dumps(_Ready(parts.info.weight_bytes)))
        stage = places.stage_of(channel.rank)
        sender = WeightSender(stage.index, parts.program.model.weights.canonical, channel)
        follower = Follower(parts.program, parts.stream, parts.graphs)
        while True:
            for message in decode(channel.receive()):
                if isinstance(message, NextWeight):
                    sender.send(message)
                else:
                    follower.follow(message)
    finally:
        connections.abort()


def stored_source(config: ModelConfig) -> ModelSource:
    """The model's files, before `quant_config`."""
    return source_in_use(config, open_model(config.model_dir, config.load_format))


def _peers(
    config: ModelConfig, places: RankPlaces, rank: int, connections: RankConnections, device: torch.device
) -> Peers | None:
    """The ranks of a rank's stage; None if it is alone there."""
    if connections.collectives is None:
        return None
    counts_keys = places.plan_of(rank).counts_keys(places.shard_of(rank).rank)
    arch = places.stage_of(rank).arch_of(places.source.arch)
    return Peers.of(connections.collectives, arch, counts_keys, config.scheduler_config.max_batch_size, device)
