"""A model's weights as plans read them: on the device, and on their way from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llmengine.backends.cuda.memory_errors import memory_error_context
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.backends.tensorrt.model_segments import head_format
from llmengine.backends.tensorrt.plan_matrix import plan_tensors
from llmengine.backends.tensorrt.spec import PlacedSegment
from llmengine.dtypes import model_dtype_name
from llmengine.models.arch import ModelArch
from llmengine.quantization.formats import DENSE
from llmengine.quantization.model_formats import ModelFormats, matrix_shapes

_logger = logging.getLogger("llmengine.tensorrt")


def device_weights(segments: Sequence[PlacedSegment], weights: CudaWeights) -> Mapping[str, Tensor]:
    """What plans read of a model's weights, by canonical name; those of quantized matrices have to be in their places.

    Quantized matrices are copied one after the other. Raises `OutOfMemoryError` if the copies do not fit.
    """
    found = dict(weights.by_name)
    advice = "set backend='torch', which needs no copies"
    with memory_error_context("quantized weights as TensorRT plans read them", weights.device, advice):
        for segment in segments:
            names = segment.weight_names()
            found |= {names[name]: tensor for name, tensor in segment_weights(segment, weights).items()}
    num_bytes = sum(tensor.nbytes for name, tensor in found.items() if name not in weights.by_name)
    if num_bytes:
        _logger.info(
            "TensorRT plans read quantized weights in a layout of their own: %.0f MiB beside those that save() needs",
            num_bytes / 2**20,
        )
    return found


def segment_weights(segment: PlacedSegment, weights: CudaWeights) -> dict[str, Tensor]:
    """What the plan of one segment reads, by name in the plan; see `device_weights`."""
    tensors = {
        name: weights.by_name[canonical]
        for name, canonical in segment.weight_names().items()
        if canonical in weights.by_name
    }
    for matrix, weight_format in segment.spec.quantization:
        stored = weights.quantized[segment.canonical_matrix(matrix)].stored()
        made = plan_tensors(weight_format, stored.shape, segment.spec.dtype, stored.tensors)
        tensors |= {f"{matrix}.{suffix}": tensor for suffix, tensor in made.items()}
    return tensors


def streamed_weights(
    stream: Iterable[tuple[str, Tensor]], formats: ModelFormats, arch: ModelArch, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield what plans read of a stream of stored weights, by canonical name; memory peaks at one matrix twice.

    With tied embeddings, an output matrix with a format of its own is rounded from the embedding.
    """
    shapes, model_dtype = matrix_shapes(arch), model_dtype_name(dtype)
    arrived: dict[str, Tensor] = {}
    stored: Mapping[str, Tensor] = {}
    for name, tensor in stream:
        matrix, _, suffix = name.rpartition(".")
        weight_format = formats.of(matrix) if matrix in shapes and suffix != "bias" else DENSE
        if weight_format == DENSE:
            yield name, tensor
        else:
            arrived[suffix] = tensor
            if arrived.keys() != weight_format.tensors(shapes[matrix], model_dtype).keys():
                continue
            stored, arrived = arrived, {}
            if matrix != "embed_tokens":  # whose rows no plan looks up
                yield from _named(matrix, plan_tensors(weight_format, shapes[matrix], model_dtype, stored))
        if matrix == "embed_tokens" and arch.tie_word_embeddings and (head := head_format(arch, formats)) != DENSE:
            if head != weight_format:
                dense = tensor if weight_format == DENSE else weight_format.dequantize(stored).to(dtype)
                stored = head.quantize(dense)
            yield from _named("lm_head", plan_tensors(head, shapes[matrix], model_dtype, stored))
    assert not arrived, sorted(arrived)


def _named(matrix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for suffix, tensor in tensors.items():
        yield f"{matrix}.{suffix}", tensor
