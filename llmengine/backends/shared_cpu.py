"""A model shared by ranks on CPUs, by stages of layers (pipeline parallelism) and by matrices (tensor parallelism).

Rank 0 is the engine's process. It tells the other ranks what to compute: changes of block tables, a step's inputs, and
the tokens whose logits it wants. They do the same with their shards. The ranks of a stage meet in the sums of
attention's and the MLP's results, and pass the hidden states on to the next stage. Rank 0 is of the last stage: only it
gets all logits, and samples.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cpu.backend import CpuBackend, CpuParts, trim_heap
from llmengine.backends.cpu.forward_pass import ForwardPass
from llmengine.backends.cpu.linear import CpuLinear
from llmengine.backends.cpu.loading import cpu_info, cpu_kv_layout, cpu_kv_pool, paged_attention
from llmengine.backends.cpu.native_library import (
    NATIVE_DIRECTORY,
    NativeLibrary,
    NativeUnavailableError,
    load_native_library,
)
from llmengine.backends.cpu.shared_norm import SharedNorm
from llmengine.backends.cpu.step_inputs import BlockTables, StepInputs
from llmengine.backends.cpu.weights import CpuEmbedding, CpuModel, load_cpu_model
from llmengine.backends.kv_layout import KvPool, context_limit
from llmengine.backends.pipelined import PipelinedBackend
from llmengine.backends.rank_places import RankPlaces
from llmengine.backends.ranks.backend import RanksBackend
from llmengine.backends.ranks.channel import RankChannel
from llmengine.backends.ranks.collectives import Collectives
from llmengine.backends.ranks.group import RankGroup
from llmengine.backends.ranks.pipe import Pipe
from llmengine.backends.shared_cpu_passes import (
    Follower,
    LeadingPass,
    NextWeight,
    RecordedTables,
    StagesAhead,
)
from llmengine.backends.shared_weights import heard_source, is_calibrated, tensor_of, told_source
from llmengine.batch import BackendInfo
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.checkpoints.stage_source import stage_source
from llmengine.config import ModelConfig
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import Linear, Norm
from llmengine.models.sharding import Shard, vocabulary_range
from llmengine.rank_hosts import RankHosts

_STUCK_AFTER_S = 4.0
"""So that requests fail within 5 s, in which where its threads are is asked as well."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a rank answers when its weights are there."""

    weight_bytes: int


@dataclass(frozen=True, slots=True)
class _Start:
    """Rank 0's answer: the size of the KV cache, the same on all ranks."""

    num_blocks: int
    max_model_len: int


_Peers = RankGroup | RankChannel


def load_shared_cpu_backend(
    config: ModelConfig,
    source: ModelSource,
    check_wanted: Callable[[], None] = lambda: None,
    rank_hosts: RankHosts | None = None,
) -> RanksBackend:
    """Load a model over the processes that `config.parallel_config` asks for, of which this one is rank 0.

    `check_wanted` and `rank_hosts` are as for `backends.load_backend`.

    Raises what `backends.load_backend` raises, `ConfigError` for a model that cannot be cut so, and `EngineDeadError`
    for a rank that ends.
    """
    places = RankPlaces(config.parallel_config, source)  # raises before any process is started
    group = RankGroup(
        places.size,
        f"{__name__}:serve",
        pickle.dumps(config),
        hosts=rank_hosts,
        stuck_after_s=_STUCK_AFTER_S,
        stage_size=places.tp_size,
        check_wanted=check_wanted,
    )
    library: NativeLibrary | None = None
    try:
        group.start()
        if _is_calibrated(config):
            places = RankPlaces(config.parallel_config, told_source(source, group))
        with torch.inference_mode():
            model, library = _load_part(config, places, 0, group)
            weight_bytes = model.size_bytes + sum(_loaded(reply).weight_bytes for reply in group.replies())
            whole = cpu_kv_pool(config, _whole_kv_arch(places), context_limit(config, source.arch))
            group.broadcast(pickle.dumps(_Start(whole.num_blocks, whole.max_model_len)))
            info = _info(config, places, model, whole, weight_bytes)
            own = _own_backend(config, places, model, library, whole, info, group)
        trim_heap()
        return RanksBackend(own, group, own.info, lambda: _joined_weights(places, model, own, group))
    except BaseException:
        if library is not None:
            library.close()
        group.close()
        raise


def serve(channel: RankChannel, payload: bytes) -> None:
    """Be a rank: load a part of the model, and follow rank 0 until it ends."""
    config: ModelConfig = pickle.loads(payload)
    source = open_model(config.model_dir, config.load_format)
    source = source_in_use(config, source)
    if is_calibrated(source, config.quant_config):
        source = heard_source(source, config.quant_config, channel)
    else:
        source = quantized_source(source, config.quant_config)
    places = RankPlaces(config.parallel_config, source)
    with torch.inference_mode():
        model, _ = _load_part(config, places, channel.rank, channel)
        trim_heap()
        channel.reply(pickle.dumps(_Loaded(model.size_bytes)))
        start = pickle.loads(channel.receive())
        assert isinstance(start, _Start), start
        pool = KvPool(cpu_kv_layout(config, source.arch), start.num_blocks, start.max_model_len)
        tables = BlockTables(config.scheduler_config.max_batch_size, pool.max_blocks_per_request)
        own = _own_pass(config, places, channel.rank, model, pool, tables, channel.pipe)
        Follower(channel, places.stage_of(channel.rank), model, own, tables).run()


def _whole_kv_arch(places: RankPlaces) -> ModelArch:
    """The model whose KV blocks are as large as those of all ranks together."""
    num_kv_heads = sum(places.arch_of(rank).num_kv_heads for rank in range(places.tp_size))
    return replace(places.source.arch, num_kv_heads=num_kv_heads)


def _info(config: ModelConfig, places: RankPlaces, model: CpuModel, whole: KvPool, weight_bytes: int) -> BackendInfo:
    description = places.describe(f"{places.tp_size} processes share each matrix")
    info = replace(cpu_info(config, places.source, model, whole, description), weight_bytes=weight_bytes)
    return info if places.pp_size == 1 else replace(info, max_steps_in_flight=2, wants_early_launches=True)


def _own_backend(
    config: ModelConfig,
    places: RankPlaces,
    model: CpuModel,
    library: NativeLibrary | None,
    whole: KvPool,
    info: BackendInfo,
    group: RankGroup,
) -> CpuBackend | PipelinedBackend:
    """What rank 0 steps: its part of each forward pass, and the sampler; over the stages before, if there are any."""
    sizes = (config.scheduler_config.max_batch_size, whole.max_blocks_per_request)
    recorded = RecordedTables(*sizes)
    tables = recorded if places.pp_size == 1 else BlockTables(*sizes)
    leading = LeadingPass(_own_pass(config, places, 0, model, whole, tables, group.pipe), recorded, group)
    own = CpuBackend(CpuParts(info, model, leading, None, library, tables, deterministic=config.deterministic))
    if places.pp_size == 1:
        return own
    ahead = StagesAhead(recorded, leading, group, deterministic=config.deterministic)
    return PipelinedBackend(own, ahead, places.pp_size)


def _own_pass(
    config: ModelConfig, places: RankPlaces, rank: int, model: CpuModel, whole: KvPool, tables: BlockTables, pipe: Pipe
) -> ForwardPass:
    """The forward passes of a rank, over a KV cache with as many blocks as all ranks have."""
    arch = places.arch_of(rank)
    pool = replace(whole, layout=cpu_kv_layout(config, arch))

    def received(inputs: StepInputs) -> Tensor:
        return pipe.receive((len(inputs.token_ids), arch.hidden_size), torch.float32)

    begin_with = None if places.stage_of(rank).is_first else received
    return ForwardPass(model, paged_attention(arch, model, pool), tables, begin_with)


class _SummedLinear:
    """A linear whose inputs are shared out among the ranks of a stage: the sum of all their results."""

    def __init__(self, own: Linear, name: str, peers: _Peers) -> None:
        self._own = own
        self._name = name.encode()
        self._peers = peers
        self._is_first = peers.collectives.rank == 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._peers.progress.mark(self._name)
        result = self._own(x, residual if self._is_first else None)
        if self._peers.collectives.size > 1:
            self._peers.collectives.all_reduce(result)
        return result


class _SharedEmbedding(CpuEmbedding):
    """An embedding of which each rank has some of the vocabulary's rows."""

    def __init__(self, own: CpuEmbedding, rows: range, collectives: Collectives) -> None:
        super().__init__(own.source, own.scale)
        self._rows = rows
        self._collectives = collectives

    def __call__(self, token_ids: Tensor) -> Tensor:
        is_own = (token_ids >= self._rows.start) & (token_ids < self._rows.stop)
        found = super().__call__(torch.where(is_own, token_ids - self._rows.start, 0))
        found[~is_own] = 0.0
        self._collectives.all_reduce(found)
        return found


class _SharedHead:
    """An output matrix of which each rank has some rows: rank 0 gets all logits, the others their own."""

    def __init__(self, own: CpuLinear, sizes: Sequence[int], collectives: Collectives) -> None:
        self._own = own
        self._sizes = sizes
        self._collectives = collectives

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        assert residual is None
        logits = self._own(x)
        widest = max(self._sizes)
        gathered = self._collectives.gather(F.pad(logits, (0, widest - logits.shape[1])))
        if gathered is None:
            return logits
        return torch.cat([part[:, :size] for part, size in zip(gathered, self._sizes, strict=True)], dim=1)


def _load_part(
    config: ModelConfig, places: RankPlaces, rank: int, peers: _Peers
) -> tuple[CpuModel, NativeLibrary | None]:
    """A rank's part of the model, whose products meet those of the other ranks of its stage."""
    num_threads = config.num_threads or torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // peers.num_on_host))
    try:
        library = load_native_library(NATIVE_DIRECTORY, borrowed_threads=True)
    except NativeUnavailableError:
        library = None
    own = load_cpu_model(config, _marked(places.source_of(rank), peers), library, row_major=config.deterministic)
    return _meeting(own, places, rank, peers), library


def _meeting(own: CpuModel, places: RankPlaces, rank: int, peers: _Peers) -> CpuModel:
    """A rank's part of its stage, with marks of progress, and the sums and gathers over the ranks of the stage."""
    first = places.stage_of(rank).layers.start
    layers = [
        replace(
            layer,
            o=_SummedLinear(layer.o, f"layers.{index}.o", peers),
            down=_SummedLinear(layer.down, f"layers.{index}.down", peers),
        )
        for index, layer in enumerate(own.segments.layers, first)
    ]
    own = replace(own, segments=replace(own.segments, layers=layers))
    if places.tp_size == 1:
        return own
    rows = [vocabulary_range(places.source.arch, Shard(each, places.tp_size)) for each in range(places.tp_size)]
    embed, segments = own.embed, own.segments
    if own.lm_head is not None:
        head = _SharedHead(own.lm_head, [len(some) for some in rows], peers.collectives)
        segments = replace(segments, lm_head=head)
    if embed is not None:
        embed = _SharedEmbedding(embed, rows[rank % places.tp_size], peers.collectives)
    qk_norms = own.qk_norms
    if places.source.arch.qk_norm == "projection":
        counts_keys = places.plan_of(rank).counts_keys(rank % places.tp_size)
        qk_norms = _shared_norms(places.source.arch, own, counts_keys, peers)
    return replace(own, embed=embed, segments=segments, qk_norms=qk_norms)


def _shared_norms(
    arch: ModelArch, own: CpuModel, counts_keys: bool, peers: _Peers
) -> Sequence[tuple[Norm | None, Norm | None]]:
    """The norms of q and k over all heads, for each layer of the rank's part `own` of the model `arch`."""
    counts = {"q": True, "k": counts_keys}
    columns = {"q": arch.num_heads * arch.head_dim, "k": arch.num_kv_heads * arch.head_dim}

    def norm(index: int, name: str) -> Norm:
        weight = own.norms[f"layers.{index}.{name}_norm"].weight
        return SharedNorm(weight, arch.rms_norm_eps, columns[name], counts[name], peers.collectives.all_reduce)

    return [(norm(index, "q"), norm(index, "k")) for index in range(len(own.qk_norms))]


def _marked(source: ModelSource, peers: _Peers) -> ModelSource:
    """`source`, whose streams mark the rank's progress with each tensor."""

    def stream(dtype: torch.dtype) -> WeightStream:
        for name, tensor in source.stream(dtype):
            if isinstance(peers, RankGroup):
                peers.check()
            peers.progress.mark(f"loading {name}".encode())
            yield name, tensor

    return replace(source, stream=stream, stream_slices=None)


def _joined_weights(
    places: RankPlaces, model: CpuModel, backend: CpuBackend | PipelinedBackend, group: RankGroup
) -> Iterator[tuple[str, Tensor]]:
    """The canonical weights, each put together from the ranks' parts."""
    if isinstance(backend, PipelinedBackend):
        backend.settle()
    for stage in places.stages:
        own = model.canonical() if stage.is_last else iter(())
        stored = stage_source(places.source, stage)
        for index, name in enumerate(stored.formats.layout(stored.arch, stored.checkpoint_dtype)):
            group.broadcast(pickle.dumps(NextWeight(stage.index, restarts=index == 0)))
            parts = [tensor for _, tensor in islice(own, 1)]
            parts += [tensor_of(reply) for reply in group.replies() if reply]
            if stage.is_first or not name.startswith("embed_tokens."):
                yield stage.whole_name(name), places.plans[stage.index].join(name, parts)


def _is_calibrated(config: ModelConfig) -> bool:
    """Whether the weights that rank 0 loads are quantized on data."""
    source = source_in_use(config, open_model(config.model_dir, config.load_format))
    return is_calibrated(source, config.quant_config)


def _loaded(reply: bytes) -> _Loaded:
    loaded = pickle.loads(reply)
    assert isinstance(loaded, _Loaded), loaded
    return loaded
