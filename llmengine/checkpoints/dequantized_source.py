"""A checkpoint as a source of dequantized weights: matrices in some formats become dense as they are streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llmengine.checkpoints.canonical_weights import COPY_ELEMENTS
from llmengine.checkpoints.source import ModelSource
from llmengine.dtypes import model_dtype_name
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.gguf_blocks import GgufBlocks
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import ModelFormats, matrix_shapes
from llmengine.quantization.stacked import Stacked, StackedPart, stacked_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def dequantized_source(source: ModelSource, reasons: Mapping[WeightFormat, str]) -> ModelSource:
    """`source` with the matrices, or parts of matrices, in the formats of `reasons` dense.

    Memory peaks at one matrix in both forms.

    Args:
        reasons: format -> why it is dequantized, for people.
    """
    arch = source.arch
    names = [*matrix_shapes(arch), *(("lm_head",) if arch.tie_word_embeddings else ())]
    formats = ModelFormats.of_matrices({name: _without(source.formats.of(name), reasons) for name in names})
    return dataclasses.replace(
        source,
        formats=formats,
        stream=lambda dtype: _stream(source, formats, dtype),
        stream_slices=None,
        dequantized=_text(reasons),
    )


def without_blocks(source: ModelSource, reason: str = "dense weights are needed") -> ModelSource:
    """`source` with GGUF's blocks dequantized; itself if it has none."""
    reasons: dict[WeightFormat, str] = {item: reason for item in source.formats.kinds if isinstance(item, GgufBlocks)}
    return dequantized_source(source, reasons) if reasons else source


def _without(stored: WeightFormat, dequantized: Mapping[WeightFormat, str]) -> WeightFormat:
    if not isinstance(stored, Stacked):
        return DENSE if stored in dequantized else stored
    parts = tuple(StackedPart(part.share, _without(part.format, dequantized)) for part in stored.parts)
    return DENSE if all(part.format == DENSE for part in parts) else Stacked(parts)


def _text(reasons: Mapping[WeightFormat, str]) -> str:
    names: dict[str, list[str]] = {}
    for item, reason in reasons.items():
        names.setdefault(reason, []).append(str(item))
    return "; ".join(f"{', '.join(sorted(items))} dequantized: {reason}" for reason, items in sorted(names.items()))


def _stream(source: ModelSource, formats: ModelFormats, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    shapes = matrix_shapes(source.arch)
    arrived: dict[str, Tensor] = {}
    for name, tensor in source.weights(dtype):
        matrix, _, suffix = name.rpartition(".")
        if suffix == "bias" or matrix not in shapes or source.formats.of(matrix) == formats.of(matrix):
            yield name, tensor
            continue
        stored = source.formats.of(matrix)
        arrived[suffix] = tensor
        if len(arrived) == len(stored.tensors(shapes[matrix], model_dtype_name(dtype))):
            whole, arrived = Matrix(stored, shapes[matrix], arrived), {}
            for suffix, converted in _converted(whole, formats.of(matrix), dtype).items():
                yield f"{matrix}.{suffix}", converted


def _converted(matrix: Matrix, wanted: WeightFormat, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tensors of a matrix some parts of which become dense."""
    import torch

    if matrix.format == wanted:
        return matrix.tensors
    if wanted != DENSE:
        assert isinstance(matrix.format, Stacked)
        assert isinstance(wanted, Stacked)
        parts = zip(matrix.format.matrices(matrix.tensors, matrix.shape), wanted.parts, strict=True)
        return stacked_tensors(_converted(part, target.format, dtype) for part, target in parts)
    weight = torch.empty(matrix.shape, dtype=dtype)
    for first, rows in matrix.format.dequantized_rows(matrix.tensors, matrix.shape, COPY_ELEMENTS):
        weight[first : first + len(rows)] = rows
    return {"weight": weight}
