"""A model on several GPUs, or on the CPU through Triton's interpreter: rank 0's side, and that of the others.

::

    rank 0    start ranks ── meet ─▶ weights (room) ─▶ size the KV cache ─▶ values, kernels, tuning ─▶ graphs, steps
                              │          ▲ free bytes        │ blocks                     ▲ ready          │ tells
    rank 1..  .... import ────┘ ─▶ weights (room) ───────────┴─▶ values, kernels, tuning ─┘                ▼ follow
"""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cuda.backend import CudaBackend, CudaParts
from llmengine.backends.cuda.following import Follower, Inputs, Message, NextWeight, decode, encode
from llmengine.backends.cuda.generic_segments import build_cuda_segments
from llmengine.backends.cuda.loading import Sharing, fit_cuda_pool, load_cuda_parts
from llmengine.backends.cuda.peers import Peers
from llmengine.backends.kv_layout import KvLayout, KvPool, joint_kv_layout
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.backends.ranks.store import connect_store, host_store
from llmengine.backends.shared_cuda.collectives import HostCollectives, NcclCollectives, RankCollectives
from llmengine.backends.shared_cuda.small_sums import with_small_sums
from llmengine.backends.shared_cuda.weights import WeightSender, joined_weights
from llmengine.backends.shared_weights import heard_source, is_calibrated, told_source
from llmengine.batch import BackendInfo
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.sharded_source import ShardPlan, shard_source
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.models.arch import ModelArch
from llmengine.models.sharding import Shard
from llmengine.rank_hosts import RankHosts

_MEET_TIMEOUT_S = 300.0
_LOOK_S = 0.05

_STUCK_AFTER_S = 4.0
"""So that requests fail within 5 s, in which where its threads are is asked as well."""


@dataclass(frozen=True, slots=True)
class _Payload:
    """What a rank is started with."""

    config: ModelConfig
    devices: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Meet:
    """Where the ranks meet for NCCL, and whether GPUs may map each other's memory, as on one host."""

    host: str
    port: int
    on_one_host: bool


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
) -> PreparingRanksBackend:
    """Load a model over as many processes as there are devices, each of its rank's host; this one has the first.

    `check_wanted` and `rank_hosts` are as for `backends.load_backend`.
    Raises what `backends.load_backend` raises, `ConfigError` for a model that cannot be cut into so many shards, and
    `EngineDeadError` for a rank that ends.
    """
    size = len(devices)
    plan = ShardPlan(source.arch, source.formats, size)  # raises before any process is started
    payload = _Payload(config, [str(device) for device in devices])
    group = RankGroup(size, f"{__name__}:serve", pickle.dumps(payload), hosts=rank_hosts, check_wanted=check_wanted)
    collectives: RankCollectives | None = None
    try:
        group.start()
        collectives = _collectives_of_rank_0(config, group, devices[0])
        group.watch(collectives.abort)
        leader = _Leader(config, source, plan, group)
        if is_calibrated(_stored(config), config.quant_config):
            source = told_source(source, group)
        own_source = shard_source(source, Shard(0, size))
        sharing = leader.sharing(_peers(config, plan, source.arch, collectives, devices[0]))
        parts = load_cuda_parts(config, own_source, devices[0], build_cuda_segments, sharing)
        info = leader.info(parts, collectives)
        own = CudaBackend(replace(parts, info=info))

        def weights() -> Iterator[tuple[str, Tensor]]:
            return joined_weights(plan, parts.program.model.weights.canonical, group)

        group.expect_progress(_STUCK_AFTER_S)
        return PreparingRanksBackend(own, group, info, weights, collectives)
    except BaseException as error:
        try:
            if collectives is not None and isinstance(error, Exception):
                group.check()  # if a rank has failed, that is the cause
            raise
        finally:
            group.close()
            if collectives is not None:
                collectives.close()


class _Leader:
    """What rank 0 says and hears while all load, and tells the others afterwards."""

    def __init__(self, config: ModelConfig, source: ModelSource, plan: ShardPlan, group: RankGroup) -> None:
        self._config = config
        self._arch = source.arch
        self._arches = [plan.arch_of(rank) for rank in range(group.size)]
        self._group = group
        self._held: list[Message] = []
        self._other_weight_bytes = 0

    def sharing(self, peers: Peers) -> Sharing:
        """How rank 0 loads."""
        return Sharing(peers, self._agree, self._await_others, self._tell)

    def info(self, parts: CudaParts, collectives: RankCollectives) -> BackendInfo:
        """Of all ranks together."""
        own = parts.info
        size = self._group.size
        return replace(
            own,
            description=f"{own.description}, {size} ranks share each matrix and add up by {collectives.description}",
            kv_bytes_per_block=_whole(parts.pool.layout, self._arches).bytes_per_block,
            weight_bytes=own.weight_bytes + self._other_weight_bytes,
        )

    def _agree(self, layout: KvLayout, limit: int, free_bytes: int) -> KvPool:
        rooms = [_Room(free_bytes), *map(pickle.loads, self._group.replies())]
        dtype = layout.tensors["kv"].dtype
        layouts = [_like(layout, arch, dtype) for arch in self._arches]
        whole_bytes = _whole(layout, self._arches).bytes_per_block
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
        self._other_weight_bytes = sum(pickle.loads(reply).weight_bytes for reply in self._group.replies())

    def _tell(self, message: Message) -> None:
        self._held.append(message)
        if not isinstance(message, Inputs):  # they travel with what is done with them
            held, self._held = self._held, []
            self._group.broadcast(encode(held))


def serve(channel: RankChannel, payload: bytes) -> None:
    """Be a rank: load a shard, and follow rank 0 until it ends."""
    start: _Payload = pickle.loads(payload)
    config, device = start.config, torch.device(start.devices[channel.rank])
    source = _stored(config)
    if is_calibrated(source, config.quant_config):
        source = heard_source(source, config.quant_config, channel)
    else:
        source = quantized_source(source, config.quant_config)
    shard = Shard(channel.rank, channel.size)
    collectives = _collectives_of_rank(config, channel, device)

    def agree(layout: KvLayout, limit: int, free_bytes: int) -> KvPool:
        channel.reply(pickle.dumps(_Room(free_bytes)))
        pool: _Pool = pickle.loads(channel.receive())
        return KvPool(layout, pool.num_blocks, pool.max_model_len)

    try:
        plan = ShardPlan(source.arch, source.formats, channel.size)
        sharing = Sharing(_peers(config, plan, source.arch, collectives, device), agree, lambda: None, None)
        parts = load_cuda_parts(config, shard_source(source, shard), device, build_cuda_segments, sharing)
        channel.reply(pickle.dumps(_Ready(parts.info.weight_bytes)))
        sender = WeightSender(parts.program.model.weights.canonical, channel)
        follower = Follower(parts.program, parts.stream, parts.graphs)
        while True:
            for message in decode(channel.receive()):
                if isinstance(message, NextWeight):
                    sender.send(message)
                else:
                    follower.follow(message)
    finally:
        collectives.abort()


def _stored(config: ModelConfig) -> ModelSource:
    """The model's files, before `quant_config`."""
    return source_in_use(config, open_model(config.model_dir, config.load_format))


def _peers(
    config: ModelConfig, plan: ShardPlan, arch: ModelArch, collectives: RankCollectives, device: torch.device
) -> Peers:
    counts_keys = plan.counts_keys(collectives.rank)
    return Peers.of(collectives, arch, counts_keys, config.scheduler_config.max_batch_size, device)


def _collectives_of_rank_0(config: ModelConfig, group: RankGroup, device: torch.device) -> RankCollectives:
    if device.type != "cuda":
        return HostCollectives(group.collectives)
    listener = socket.create_server((group.address, 0), backlog=group.size + 16)
    port: int = listener.getsockname()[1]
    store = host_store(listener, _MEET_TIMEOUT_S)
    on_one_host = group.num_on_host == group.size
    group.broadcast(pickle.dumps(_Meet(group.address, port, on_one_host)))
    nccl = NcclCollectives(store, 0, group.size, device, deterministic=config.deterministic)
    found: list[RankCollectives] = []
    try:
        _unless_ranks_fail(group, lambda: found.append(_connected(nccl, store, device, on_one_host)))
    except BaseException:
        nccl.abort()
        raise
    return found[0]


def _collectives_of_rank(config: ModelConfig, channel: RankChannel, device: torch.device) -> RankCollectives:
    if device.type != "cuda":
        return HostCollectives(channel.collectives)
    torch.cuda.set_device(device)
    meet: _Meet = pickle.loads(channel.receive())
    store = connect_store(meet.host, meet.port, _MEET_TIMEOUT_S)
    nccl = NcclCollectives(store, channel.rank, channel.size, device, deterministic=config.deterministic)
    return _connected(nccl, store, device, meet.on_one_host)


def _connected(nccl: NcclCollectives, store: TCPStore, device: torch.device, on_one_host: bool) -> RankCollectives:
    """Meet the other ranks, which call this too; with kernels of our own for small sums where memory can be mapped."""
    if on_one_host:
        return with_small_sums(nccl, store, device)
    torch.cuda.set_device(device)
    nccl.connect()
    return nccl


def _unless_ranks_fail(group: RankGroup, function: Callable[[], None]) -> None:
    """Call a function that blocks, in a thread; raises as soon as a rank fails, when it may never return."""
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="llmengine-rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_S)
        group.check()
    if errors:
        raise errors[0]


def _like(layout: KvLayout, arch: ModelArch, dtype: torch.dtype) -> KvLayout:
    """The layout of another rank's KV cache."""
    return joint_kv_layout(arch, layout.block_size, dtype)


def _whole(layout: KvLayout, arches: Sequence[ModelArch]) -> KvLayout:
    """The layout of a KV cache of all ranks together."""
    heads = sum(arch.num_kv_heads for arch in arches)
    return _like(layout, replace(arches[0], num_kv_heads=heads), layout.tensors["kv"].dtype)
