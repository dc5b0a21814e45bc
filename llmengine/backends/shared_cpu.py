"""Tensor parallelism on CPUs: each rank holds a shard of every matrix, and all compute each forward pass together.

Rank 0 is the engine's process. It tells the other ranks what it is about to compute: changes of block tables, a step's
inputs, and the tokens whose logits it wants. They do the same with their shards, and the ranks meet in the sums of
attention's and the MLP's results. Only rank 0 gets all logits, and samples.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
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
from llmengine.backends.cpu.step_inputs import BlockTables, StepInputs
from llmengine.backends.cpu.weights import CpuEmbedding, CpuModel, load_cpu_model
from llmengine.backends.kv_layout import KvPool, context_limit
from llmengine.backends.ranks.backend import RanksBackend
from llmengine.backends.ranks.channel import RankChannel
from llmengine.backends.ranks.collectives import Collectives
from llmengine.backends.ranks.group import RankGroup
from llmengine.backends.shared_weights import heard_source, is_calibrated, told_source
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.sharded_source import ShardPlan, shard_source
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.config import ModelConfig
from llmengine.models.decoder import Linear
from llmengine.models.sharding import Shard, vocabulary_range

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


@dataclass(frozen=True, slots=True)
class _Forward:
    """A forward pass.

    Attributes:
        tables: changes of block tables before it: (slot, blocks to append; None empties the table).
        ends: whether the logits of `inputs.sample_tokens` are wanted at once; else `_Last` asks for some.
    """

    tables: Sequence[tuple[int, Sequence[int] | None]]
    inputs: StepInputs
    ends: bool


@dataclass(frozen=True, slots=True)
class _Last:
    """The logits of these tokens, int64 [n], of the forward pass that has begun."""

    tokens: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _NextWeight:
    """Each rank answers with its tensor of the next canonical weight, or of the first if `restarts`."""

    restarts: bool


_Message = _Start | _Forward | _Last | _NextWeight
_Peers = RankGroup | RankChannel


def load_shared_cpu_backend(config: ModelConfig, source: ModelSource) -> RanksBackend:
    """Load a model over `config.parallel_config.tp_size` processes, of which this one is rank 0.

    Raises what `backends.load_backend` raises, `ConfigError` for a model that cannot be cut into so many shards, and
    `EngineDeadError` for a rank that ends.
    """
    size = config.parallel_config.tp_size
    plan = ShardPlan(source.arch, source.formats, size)  # raises before any process is started
    arches = [plan.arch_of(rank) for rank in range(size)]
    group = RankGroup(size, f"{__name__}:serve", pickle.dumps(config), stuck_after_s=_STUCK_AFTER_S)
    library: NativeLibrary | None = None
    try:
        group.start()
        if _is_calibrated(config):
            source = told_source(source, group)
        with torch.inference_mode():
            model, library = _load_shard(config, source, Shard(0, size), group)
            weight_bytes = model.size_bytes + sum(_loaded(reply).weight_bytes for reply in group.replies())
            all_heads = replace(source.arch, num_kv_heads=sum(arch.num_kv_heads for arch in arches))
            whole = cpu_kv_pool(config, all_heads, context_limit(config, source.arch))
            group.broadcast(pickle.dumps(_Start(whole.num_blocks, whole.max_model_len)))
            tables = _RecordedTables(config.scheduler_config.max_batch_size, whole.max_blocks_per_request)
            pool = replace(whole, layout=cpu_kv_layout(config, arches[0]))
            forward_pass = _LeadingPass(model, paged_attention(arches[0], model, pool), tables, group)
        trim_heap()
        text = f"{size} processes share each matrix"
        info = replace(cpu_info(config, source, model, whole, text), weight_bytes=weight_bytes)
        own = CpuBackend(CpuParts(info, model, forward_pass, None, library, tables, deterministic=config.deterministic))
        return RanksBackend(own, group, info, lambda: _joined_weights(plan, model, group))
    except BaseException:
        if library is not None:
            library.close()
        group.close()
        raise


def serve(channel: RankChannel, payload: bytes) -> None:
    """Be a rank: load a shard, and follow rank 0 until it ends."""
    config: ModelConfig = pickle.loads(payload)
    source = open_model(config.model_dir, config.load_format)
    source = source_in_use(config, source)
    if is_calibrated(source, config.quant_config):
        source = heard_source(source, config.quant_config, channel)
    else:
        source = quantized_source(source, config.quant_config)
    shard = Shard(channel.rank, channel.size)
    with torch.inference_mode():
        model, _ = _load_shard(config, source, shard, channel)
        trim_heap()
        channel.reply(pickle.dumps(_Loaded(model.size_bytes)))
        start = pickle.loads(channel.receive())
        assert isinstance(start, _Start), start
        arch = ShardPlan(source.arch, source.formats, shard.size).arch_of(shard.rank)
        pool = KvPool(cpu_kv_layout(config, arch), start.num_blocks, start.max_model_len)
        tables = BlockTables(config.scheduler_config.max_batch_size, pool.max_blocks_per_request)
        _follow(channel, model, ForwardPass(model, paged_attention(arch, model, pool), tables), tables)


def _follow(channel: RankChannel, model: CpuModel, forward_pass: ForwardPass, tables: BlockTables) -> None:
    last: Callable[[Tensor], Tensor] | None = None
    weights = model.canonical()
    while True:
        message: _Message = pickle.loads(channel.receive())
        if isinstance(message, _Forward):
            for slot, block_ids in message.tables:
                if block_ids is None:
                    tables.reset(slot)
                else:
                    tables.append(slot, block_ids)
            if message.ends:
                forward_pass.run(message.inputs)
            else:
                last = forward_pass.begin(message.inputs)
        elif isinstance(message, _Last):
            assert last is not None
            last(torch.from_numpy(message.tokens))
        elif isinstance(message, _NextWeight):
            if message.restarts:
                weights = model.canonical()
            _, tensor = next(weights)
            channel.reply(_tensor_bytes(tensor))
        else:
            raise AssertionError(message)


class _RecordedTables(BlockTables):
    """Block tables that remember their changes until another rank is told."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        super().__init__(num_slots, max_blocks)
        self._changes: list[tuple[int, Sequence[int] | None]] = []

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self._changes.append((slot, None))

    def append(self, slot: int, block_ids: Sequence[int]) -> None:
        super().append(slot, block_ids)
        self._changes.append((slot, block_ids))

    def take_changes(self) -> list[tuple[int, Sequence[int] | None]]:
        """The changes since the last call."""
        changes, self._changes = self._changes, []
        return changes


class _LeadingPass(ForwardPass):
    """Forward passes of rank 0, which the other ranks are told of first."""

    def __init__(self, model: CpuModel, attention: Any, tables: _RecordedTables, group: RankGroup) -> None:
        super().__init__(model, attention, tables)
        self._recorded = tables
        self._group = group

    def run(self, inputs: StepInputs) -> Tensor | None:
        self._tell(_Forward(self._recorded.take_changes(), inputs, ends=True))
        return super().run(inputs)

    def begin(self, inputs: StepInputs) -> Callable[[Tensor], Tensor]:
        self._tell(_Forward(self._recorded.take_changes(), inputs, ends=False))
        own = super().begin(inputs)

        def last(tokens: Tensor) -> Tensor:
            self._tell(_Last(tokens.numpy()))
            return own(tokens)

        return last

    def _tell(self, message: _Message) -> None:
        self._group.broadcast(pickle.dumps(message))


class _SummedLinear:
    """A linear whose inputs are shared out among the ranks: the sum of all ranks' results."""

    def __init__(self, own: Linear, name: str, peers: _Peers) -> None:
        self._own = own
        self._name = name.encode()
        self._peers = peers
        self._is_first = peers.collectives.rank == 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._peers.progress.mark(self._name)
        result = self._own(x, residual if self._is_first else None)
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


def _load_shard(
    config: ModelConfig, source: ModelSource, shard: Shard, peers: _Peers
) -> tuple[CpuModel, NativeLibrary | None]:
    """A rank's part of the model, whose products meet those of the other ranks."""
    num_threads = config.num_threads or torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // shard.size))
    try:
        library = load_native_library(NATIVE_DIRECTORY, borrowed_threads=True)
    except NativeUnavailableError:
        library = None
    own = load_cpu_model(config, _marked(shard_source(source, shard), peers), library, row_major=config.deterministic)
    rows = [vocabulary_range(source.arch, Shard(rank, shard.size)) for rank in range(shard.size)]
    layers = [
        replace(
            layer,
            o=_SummedLinear(layer.o, f"layers.{index}.o", peers),
            down=_SummedLinear(layer.down, f"layers.{index}.down", peers),
        )
        for index, layer in enumerate(own.segments.layers)
    ]
    head = _SharedHead(own.lm_head, [len(some) for some in rows], peers.collectives)
    model = dataclasses.replace(
        own,
        embed=_SharedEmbedding(own.embed, rows[shard.rank], peers.collectives),
        segments=replace(own.segments, layers=layers, lm_head=head),
    )
    return model, library


def _marked(source: ModelSource, peers: _Peers) -> ModelSource:
    """`source`, whose streams mark the rank's progress with each tensor."""

    def stream(dtype: torch.dtype) -> WeightStream:
        for name, tensor in source.stream(dtype):
            peers.progress.mark(f"loading {name}".encode())
            yield name, tensor

    return replace(source, stream=stream, stream_slices=None)


def _joined_weights(plan: ShardPlan, model: CpuModel, group: RankGroup) -> Iterator[tuple[str, Tensor]]:
    """The canonical weights, each put together from the ranks' parts."""
    for index, (name, tensor) in enumerate(model.canonical()):
        group.broadcast(pickle.dumps(_NextWeight(restarts=index == 0)))
        yield name, plan.join(name, [tensor, *map(_tensor_of, group.replies())])


def _tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor of any dtype; torch pickles numbers of 8 bits wrongly, but saves them right."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _tensor_of(message: bytes) -> Tensor:
    """Undoes `_tensor_bytes`."""
    tensor = torch.load(io.BytesIO(message), weights_only=True)
    assert isinstance(tensor, Tensor), tensor
    return tensor


def _is_calibrated(config: ModelConfig) -> bool:
    """Whether the weights that rank 0 loads are quantized on data."""
    source = source_in_use(config, open_model(config.model_dir, config.load_format))
    return is_calibrated(source, config.quant_config)


def _loaded(reply: bytes) -> _Loaded:
    loaded = pickle.loads(reply)
    assert isinstance(loaded, _Loaded), loaded
    return loaded
