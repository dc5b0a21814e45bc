"""A checkpoint as the source of one rank's weights, and the ranks' weights put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import lcm
from typing import TYPE_CHECKING

from llmengine.checkpoints.quantized_source import rounded_weights
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.sharding import Cut, Held, Shard, Units, arch_of, cuts, divided
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats, matrix_shapes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def shard_source(source: ModelSource, shard: Shard) -> ModelSource:
    """`source` as one rank has it: its `arch` is the shard's, and its stream yields the shard's tensors only.

    The values are those of `source`, and so are the formats wherever that can be: where a cut goes through a group of
    weights that share a scale, the shard has smaller groups with the same scale. A matrix that `source` rounds as it
    streams is rounded whole before it is cut, unless cutting first gives the same bits; if that is so for all of them,
    the shard has an `unrounded` source as well.

    Of a dense tensor a reader reads only what the rank has, where it can. Memory while streaming peaks at that of
    `source` plus the shard of one tensor. Raises `ConfigError` naming the sizes that work if there is no such shard.
    """
    if shard.size == 1:
        return source
    plan = ShardPlan(source.arch, source.formats, shard.size)
    own = dataclasses.replace(
        source,
        arch=plan.arch_of(shard.rank),
        formats=plan.formats_of(shard.rank),
        stream_slices=None,
        unrounded=None,
        plans=None,
    )
    if (dense := source.unrounded) is None:
        slices = plan.slices(shard.rank)
        return dataclasses.replace(own, stream=partial(_shard_stream, source, plan, shard.rank, slices))
    slices = plan.slices(shard.rank, is_rounding=True)
    if all(f"{name}.weight" in slices for name in matrix_shapes(source.arch)):
        stream = partial(_shard_stream, dense, plan, shard.rank, slices)
        unrounded = dataclasses.replace(dense, arch=own.arch, stream=stream, stream_slices=None)
        own = dataclasses.replace(own, unrounded=unrounded)
    return dataclasses.replace(own, stream=partial(_rounded_stream, source, dense, plan, shard.rank, slices))


def _shard_stream(
    source: ModelSource, plan: ShardPlan, rank: int, slices: Mapping[str, Cut], dtype: torch.dtype
) -> WeightStream:
    """The weights of a source as a rank has them; `slices` of its dense tensors are cut as they are read."""
    for name, tensor in _sliced(source, dtype, slices):
        yield name, tensor if name in slices else plan.shard(name, tensor, rank)


def _rounded_stream(
    source: ModelSource,
    dense: ModelSource,
    plan: ShardPlan,
    rank: int,
    slices: Mapping[str, Cut],
    dtype: torch.dtype,
) -> WeightStream:
    """Likewise, with matrices of `dense` rounded to the formats of `source`; those in `slices` are cut first."""
    for name, tensor in _sliced(dense, dtype, slices):
        for item, piece in rounded_weights(source.arch, source.formats, iter([(name, tensor)])):
            yield item, piece if name in slices else plan.shard(item, piece, rank)


def join_shards(
    name: str, arch: ModelArch, shards: Sequence[Tensor], size: int, formats: ModelFormats = DENSE_MODEL
) -> Tensor:
    """The canonical tensor `name` of the whole model `arch`, of which the ranks have `shards`, bit for bit.

    `formats` are the whole model's. For many tensors make one `ShardPlan` and use its `join`.
    """
    return ShardPlan(arch, formats, size).join(name, shards)


class ShardPlan:
    """How a model is divided among ranks: which part of each of its tensors a rank has, and in which format.

    Attributes:
        size: how many ranks there are.
    """

    def __init__(self, arch: ModelArch, formats: ModelFormats, size: int) -> None:
        """Raises `ConfigError` naming the sizes that work if the model cannot be divided among `size` ranks."""

        def check(ranks: list[Held]) -> None:
            for held in ranks:
                _formats_of(arch, formats, held)

        self.size = size
        self._arch, self._formats = arch, formats
        self._ranks = divided(arch, size, format_units(arch, formats), check)
        self._cuts = [cuts(arch, held) for held in self._ranks]
        self._shapes = canonical_shapes(arch)

    def arch_of(self, rank: int) -> ModelArch:
        """The model that a rank runs."""
        return arch_of(self._arch, self._ranks[rank])

    def formats_of(self, rank: int) -> ModelFormats:
        """The formats of that model."""
        return _formats_of(self._arch, self._formats, self._ranks[rank])

    def counts_keys(self, rank: int) -> bool:
        """Whether a rank is the first that has its heads of keys and values, so that each head is counted once."""
        return not rank or self._ranks[rank].kv_heads != self._ranks[rank - 1].kv_heads

    def slices(self, rank: int, *, is_rounding: bool = False) -> dict[str, Cut]:
        """What a rank has of the dense tensors that can be cut as they are read.

        With `is_rounding` the matrices that are to be quantized are among them, where cutting first gives the same.
        """

        def is_early(name: str, cut: Cut) -> bool:
            _, stored, _ = self._place(name, rank)
            if cut.axis is None or stored in (None, DENSE):
                return cut.axis is not None
            is_same = stored.sharded(self._shape(name), cut.axis, cut.ranges) == stored
            return is_rounding and is_same and stored.rounds_alone(cut.axis)

        return {name: cut for name, cut in self._cuts[rank].items() if is_early(name, cut)}

    def shard(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """What a rank has of the tensor `name`: a new contiguous tensor, or `tensor` itself if the rank has all of it.

        `name` is as in `ModelFormats.layout`.
        """
        import torch

        cut, stored, suffix = self._place(name, rank)
        if cut.is_term and rank:
            return torch.zeros_like(tensor)
        if cut.axis is None:
            return tensor
        if stored is None:
            return _slice(tensor, cut)
        return stored.shard(suffix, tensor, self._shape(name), cut.axis, cut.ranges)

    def join(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        """The tensor `name` of which ranks 0, 1 and so on have `shards`: undoes `shard`, in new memory."""
        first, stored, suffix = self._place(name, 0)
        assert len(shards) == len(self._ranks), (len(shards), len(self._ranks))
        if first.axis is None:
            return shards[0].clone()
        shape = self._shapes[name] if stored is None else stored.tensors(self._shape(name), "float32")[suffix].shape
        whole = shards[0].new_empty(shape)
        for rank, piece in enumerate(shards):
            cut, _, _ = self._place(name, rank)
            if stored is not None:
                stored.unshard(suffix, piece, whole, self._shape(name), first.axis, cut.ranges)
                continue
            position = 0
            for part in cut.ranges:
                whole[part.start : part.stop] = piece[position : position + len(part)]
                position += len(part)
        return whole

    def _place(self, name: str, rank: int) -> tuple[Cut, WeightFormat | None, str]:
        """How a tensor is cut, the format of the matrix that it is a tensor of (None: it is a vector), and its suffix.

        A vector is cut like the rows of a matrix.
        """
        cut = self._cuts[rank].get(name)
        matrix, _, suffix = name.rpartition(".")
        if cut is not None and len(self._shapes[name]) == 1:
            return cut, None, suffix
        return self._cuts[rank][f"{matrix}.weight"], self._formats.of(matrix), suffix

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self._shapes[f"{name.rpartition('.')[0]}.weight"]
        return rows, columns


def format_units(arch: ModelArch, formats: ModelFormats) -> Units:
    """The rows and columns that the formats of a model's matrices keep together."""
    by_kind: dict[str, set[WeightFormat]] = {}
    for name in matrix_shapes(arch):
        by_kind.setdefault(name.rpartition(".")[2], set()).add(formats.of(name))
    columns = {
        kind: tuple(lcm(*(item.step("in") for item in found)) for found in (by_kind[kind], _finest(by_kind[kind])))
        for kind in ("o", "down")
    }
    rows = {kind: lcm(*(item.step("out") for item in by_kind[kind])) for kind in ("qkv", "gate_up")}
    inner = tuple(lcm(unit, rows["gate_up"]) for unit in columns["down"])
    return Units(columns["o"], rows["qkv"], inner)


def _sliced(source: ModelSource, dtype: torch.dtype, slices: Mapping[str, Cut]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a source, its dense tensors in `slices` cut: by the reader, if it can do that."""
    if source.stream_slices is not None:
        yield from source.stream_slices(dtype, slices)
        return
    for name, tensor in source.weights(dtype):
        yield name, _slice(tensor, slices[name]) if name in slices else tensor


def _slice(tensor: Tensor, cut: Cut) -> Tensor:
    import torch

    dim = 0 if cut.axis == "out" else 1
    return torch.cat([tensor.narrow(dim, part.start, len(part)) for part in cut.ranges], dim)


def _finest(formats: set[WeightFormat]) -> set[WeightFormat]:
    return {item.finest() for item in formats}


def _formats_of(arch: ModelArch, formats: ModelFormats, held: Held) -> ModelFormats:
    """The formats of what a rank has; raises `ConfigError` for a matrix that cannot be cut so."""
    shapes, found, known = matrix_shapes(arch), cuts(arch, held), dict[tuple[object, ...], WeightFormat]()
    exceptions = dict(formats.exceptions)
    names = {name: name for name in shapes}
    if arch.tie_word_embeddings and arch.has_head:
        names["lm_head"] = "embed_tokens"
    for name, stored_name in names.items():
        stored, shape, cut = formats.of(name), shapes[stored_name], found[f"{stored_name}.weight"]
        assert cut.axis is not None
        key = (stored, shape, cut)
        if key not in known:
            known[key] = stored.sharded(shape, cut.axis, cut.ranges)
        if known[key] != stored:
            exceptions[name] = known[key]
    return ModelFormats(formats.default, exceptions)
