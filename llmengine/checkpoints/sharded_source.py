"""A checkpoint as the source of one rank's weights, and the ranks' weights put together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from math import lcm
from typing import TYPE_CHECKING

from llmengine.checkpoints.source import ModelSource
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
    weights that share a scale, the shard has smaller groups with the same scale. A matrix that `source` quantizes as it
    streams is quantized whole before it is cut, so that the ranks together have what one rank alone would have.

    Of a dense tensor a reader reads only what the rank has, where it can. Memory while streaming peaks at that of
    `source` plus the shard of one tensor. Raises `ConfigError` naming the sizes that work if there is no such shard.
    """
    if shard.size == 1:
        return source
    plan = ShardPlan(source.arch, source.formats, shard.size)

    slices = {} if source.stream_slices is None else plan.dense_slices(shard.rank)

    def stream(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        weights = source.weights(dtype) if source.stream_slices is None else source.stream_slices(dtype, slices)
        for name, tensor in weights:
            yield name, tensor if name in slices else plan.shard(name, tensor, shard.rank)

    return dataclasses.replace(
        source,
        arch=plan.arch_of(shard.rank),
        formats=plan.formats_of(shard.rank),
        stream=stream,
        stream_slices=None,
        unrounded=None,
        plans=None,
    )


def join_shards(
    name: str, arch: ModelArch, shards: Sequence[Tensor], size: int, formats: ModelFormats = DENSE_MODEL
) -> Tensor:
    """The canonical tensor `name` of the whole model `arch`, of which the ranks have `shards`, bit for bit.

    `formats` are the whole model's. For many tensors make one `ShardPlan` and use its `join`.
    """
    return ShardPlan(arch, formats, size).join(name, shards)


class ShardPlan:
    """How a model is divided among ranks: which part of each of its tensors a rank has, and in which format."""

    def __init__(self, arch: ModelArch, formats: ModelFormats, size: int) -> None:
        """Raises `ConfigError` naming the sizes that work if the model cannot be divided among `size` ranks."""

        def check(ranks: list[Held]) -> None:
            for held in ranks:
                _formats_of(arch, formats, held)

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

    def dense_slices(self, rank: int) -> dict[str, Cut]:
        """What a rank has of the dense tensors of which it has a part."""
        return {
            name: cut
            for name, cut in self._cuts[rank].items()
            if cut.axis is not None and (len(self._shapes[name]) == 1 or self._place(name, rank)[1] == DENSE)
        }

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
            return torch.cat([tensor[part.start : part.stop] for part in cut.ranges])
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


def _finest(formats: set[WeightFormat]) -> set[WeightFormat]:
    return {item.finest() for item in formats}


def _formats_of(arch: ModelArch, formats: ModelFormats, held: Held) -> ModelFormats:
    """The formats of what a rank has; raises `ConfigError` for a matrix that cannot be cut so."""
    shapes, found, known = matrix_shapes(arch), cuts(arch, held), dict[tuple[object, ...], WeightFormat]()
    exceptions = dict(formats.exceptions)
    names = {name: name for name in shapes}
    if arch.tie_word_embeddings:
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
