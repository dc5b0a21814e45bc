"""A checkpoint as the source of one pipeline stage's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from llmengine.checkpoints.quantized_source import rounded_weights
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import item_bytes
from llmengine.models.arch import canonical_shapes
from llmengine.models.sharding import NOTHING, Cut
from llmengine.models.stages import Stage, cut_into_stages
from llmengine.quantization.formats import TensorSpec
from llmengine.quantization.model_formats import ModelFormats

if TYPE_CHECKING:
    import torch


def plan_stages(source: ModelSource, size: int) -> list[Stage]:
    """The stages of a model whose weights are stored as `source` has them, cut by bytes.

    With tied embeddings they count on both ends, as they are there. Raises `ConfigError` if there are more stages than
    layers.
    """
    arch, dtype = source.arch, source.checkpoint_dtype
    layer_bytes, ends = [0] * arch.num_layers, {"embed_tokens": 0, "lm_head": 0}
    for name, spec in source.formats.layout(arch, dtype).items():
        prefix, _, rest = name.partition(".")
        size_bytes = _bytes_of(spec)
        if prefix == "layers":
            layer_bytes[int(rest.partition(".")[0])] += size_bytes
        elif prefix in ends:
            ends[prefix] += size_bytes
    if arch.tie_word_embeddings:
        shape = (arch.vocab_size, arch.hidden_size)
        ends["lm_head"] = sum(map(_bytes_of, source.formats.of("lm_head").tensors(shape, dtype).values()))
    return cut_into_stages(layer_bytes, ends["embed_tokens"], ends["lm_head"], size)


def stage_source(source: ModelSource, stage: Stage) -> ModelSource:
    """`source` as one stage has it: its `arch` is the stage's, and its stream yields the stage's tensors only.

    Names of layers are counted from the stage's first one. Other tensors are not read where the reader can leave them
    out, and are dropped where it cannot. Nothing but the stage's matrices is rounded, where `source` rounds.
    """
    if stage.is_first and stage.is_last:
        return source
    arch, formats = stage.arch_of(source.arch), _formats_of(source.formats, stage)
    own = dataclasses.replace(source, arch=arch, formats=formats, plans=None)
    if source.unrounded is None:
        return dataclasses.replace(
            own,
            stream=partial(_stream, source, stage, cuts={}),
            stream_slices=None if source.stream_slices is None else partial(_stream_slices, source, stage),
        )
    dense = stage_source(source.unrounded, stage)

    def rounded(dtype: torch.dtype) -> WeightStream:
        return rounded_weights(arch, formats, dense.weights(dtype))

    return dataclasses.replace(own, stream=rounded, stream_slices=None, unrounded=dense)


def _stream_slices(source: ModelSource, stage: Stage, dtype: torch.dtype, cuts: Mapping[str, Cut]) -> WeightStream:
    return _stream(source, stage, dtype, cuts)


def _stream(source: ModelSource, stage: Stage, dtype: torch.dtype, cuts: Mapping[str, Cut]) -> WeightStream:
    """The stage's weights under its own names; `cuts` of them by these names, where `source` can cut."""
    names = stage.own_names(source.arch)
    if source.stream_slices is None:
        weights = source.weights(dtype)
    else:
        everything = dict.fromkeys(canonical_shapes(source.arch), NOTHING)
        left_out = {name: cut for name, cut in everything.items() if name not in names}
        whole_cuts = {stage.whole_name(name): cut for name, cut in cuts.items()}
        weights = source.stream_slices(dtype, {**left_out, **whole_cuts})
    matrices = {name.rpartition(".")[0] for name in names}
    for name, tensor in weights:
        if name.rpartition(".")[0] in matrices:
            own = stage.own_name(name)
            assert own is not None, name
            yield own, tensor


def _formats_of(formats: ModelFormats, stage: Stage) -> ModelFormats:
    exceptions = {}
    for name, item in formats.exceptions.items():
        if (own := stage.own_name(name)) is not None:
            exceptions[own] = item
    return ModelFormats(formats.default, exceptions)


def _bytes_of(spec: TensorSpec) -> int:
    return prod(spec.shape) * item_bytes(spec.dtype)
