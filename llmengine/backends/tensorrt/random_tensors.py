"""Random tensors to run plans on: weights in every format, and activations like those of real models."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from llmengine.backends.tensorrt.plan_matrix import plan_tensors
from llmengine.backends.tensorrt.runtime import Sizes
from llmengine.backends.tensorrt.spec import PlanTensor, SegmentSpec, WeightSpec
from llmengine.dtypes import ModelDType, torch_dtype
from llmengine.quantization.formats import Shape, TensorSpec, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.stacked import Stacked, stacked_tensors

SENTINEL = 7.0
"""Value of the row behind an output."""

_OUTLIER_ROWS = 4
"""Every so many rows the hidden state has an outlier, like the hidden states of real models."""
_NORMS_OF_X = ("input_norm.weight", "post_attention_norm.weight", "next.input_norm.weight")
_OUTLIER = 1000.0
"""Its square is beyond float16's range."""
_MATRIX_ROWS = 8192
"""Rows of a matrix that are quantized at a time, a multiple of every block's."""

_ACTIVATION_SCALE = 0.05
"""The scale of all activations where one is stored: those around 1 are rounded, and the outliers of norms saturate."""


def random_tensors(spec: SegmentSpec, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """New tensors with random values for everything that an execution gets addresses of."""
    inputs = {weight.name for weight in spec.weight_inputs}
    tensors = {name: tensor for name, tensor in random_weights(spec, device).items() if name in inputs}
    tensors |= random_inputs(spec, sizes, device)
    return tensors | {tensor.name: empty_output(tensor, sizes, device) for tensor in spec.outputs}


def random_weights(spec: SegmentSpec, device: torch.device) -> dict[str, Tensor]:
    """Weights by their names in the plan that keep activations near 1."""
    formats = dict(spec.quantization)
    tensors = {}
    for name, weight_format in formats.items():
        shape = spec.matrix_shape(name)
        stored = random_matrix(weight_format, shape, spec.dtype, device)
        for suffix, tensor in plan_tensors(weight_format, shape, spec.dtype, stored).items():
            tensors[f"{name}.{suffix}"] = tensor
    dense = (weight for weight in spec.weights if weight.name not in tensors)
    return tensors | {weight.name: _random_weight(weight, device) for weight in dense}


def random_matrix(
    weight_format: WeightFormat, shape: Shape, dtype: ModelDType, device: torch.device
) -> dict[str, Tensor]:
    """The stored tensors of a matrix of `random_weights`, in a model of `dtype`; some rows at a time are quantized."""
    if isinstance(weight_format, Stacked):
        parts = zip(weight_format.parts, weight_format.part_shapes(shape), strict=True)
        return stacked_tensors(random_matrix(part.format, part_shape, dtype, device) for part, part_shape in parts)
    quantized = weight_format
    if isinstance(weight_format, Fp8 | Int8W8A8) and weight_format.activations == "tensor":
        quantized = dataclasses.replace(weight_format, activations="token")  # what has no scale to be calibrated
    pieces = []
    for begin in range(0, shape[0], _MATRIX_ROWS):
        dense = torch.empty((min(_MATRIX_ROWS, shape[0] - begin), shape[1]), device=device)
        pieces.append(quantized.quantize(dense.normal_(std=shape[1] ** -0.5).to(torch_dtype(dtype))))
    specs = quantized.tensors(shape, dtype).items()
    # Tensors that rows share, such as a scale for all, are those of the first rows: what is random may have any scale.
    tensors = {
        suffix: torch.cat([piece[suffix] for piece in pieces]) if _follows_rows(spec) else pieces[0][suffix]
        for suffix, spec in specs
    }
    for suffix, spec in weight_format.tensors(shape, dtype).items():
        if suffix == "activation_scale":
            tensors[suffix] = torch.full(spec.shape, _ACTIVATION_SCALE, device=device)
        elif suffix == "input_scale":
            tensors[suffix] = torch.empty(spec.shape, device=device).uniform_(0.5, 1.5)
        elif suffix == "input_order":
            tensors[suffix] = torch.randperm(shape[1], dtype=torch.int32, device=device)
    return tensors


def _follows_rows(spec: TensorSpec) -> bool:
    """Whether the first dimension of a tensor has an entry for each of some rows of the matrix."""
    first = spec.along[0] if spec.along else None
    return first is not None and first.axis == "out"


def _random_weight(weight: WeightSpec, device: torch.device) -> Tensor:
    tensor = torch.empty(weight.shape, dtype=torch_dtype(weight.stored.dtype), device=device)
    if len(weight.shape) == 2:
        return tensor.normal_(std=weight.shape[1] ** -0.5)
    return tensor.uniform_(0.5, 1.5) if "norm" in weight.role else tensor.normal_(std=0.2)


def random_inputs(spec: SegmentSpec, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Activations near 1, with outliers where a norm reads them; no token is sampled twice if there are enough."""
    values = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(T=sizes.tokens, S=sizes.samples)
        if tensor.dtype == "int32":
            rows = torch.randperm(sizes.tokens, dtype=torch.int32, device=device)
            values[tensor.name] = rows[torch.arange(*shape, device=device) % sizes.tokens]
        else:
            values[tensor.name] = torch.randn(shape, device=device).to(torch_dtype(tensor.dtype))
    if any(weight.name in _NORMS_OF_X for weight in spec.weights):
        x = values["x"]
        x[_OUTLIER_ROWS - 1 :: _OUTLIER_ROWS, int(torch.randint(x.shape[1], ()))] = _OUTLIER
    return values


def empty_output(tensor: PlanTensor, sizes: Sizes, device: torch.device) -> Tensor:
    """An output of NaN, which the plan must overwrite, and one more row, which it must not touch."""
    rows, columns = tensor.resolve(T=sizes.tokens, S=sizes.samples)
    output = torch.full((rows + 1, columns), math.nan, dtype=torch_dtype(tensor.dtype), device=device)
    output[-1] = SENTINEL
    return output
