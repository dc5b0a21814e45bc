"""Shared by the tests of quantized segments: every format that plans multiply by, and weights in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.plan_matrix import plan_tensors
from llmengine.backends.tensorrt.random_tensors import random_matrix
from llmengine.backends.tensorrt.spec import PlacedSegment
from llmengine.dtypes import ModelDType
from llmengine.models.arch import ModelArch
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.model_formats import ModelFormats, matrix_shapes
from llmengine.quantization.stacked import Stacked, StackedPart
from tests.backends.tensorrt.segment_helpers import DTYPES, PROFILES, ReferenceSegments, random_weights, tiny_arch

FORMATS: dict[str, WeightFormat] = {
    "int8": INT8,
    "int8-groups": Int8Groups(32, zero_points=False),
    "int8-groups, zeros": Int8Groups(64, input_order=True),
    "int8-rows, zeros": Int8Groups(-1),
    "int4-32": Int4Groups(32, zero_points=False),
    "int4-64": Int4Groups(64, zero_points=False),
    "int4-128": Int4Groups(128, zero_points=False),
    "int4-128, zeros": Int4Groups(128),
    "int4-128, act-order, AWQ": Int4Groups(128, input_order=True, input_scale=True, scale_dtype="bfloat16"),
    "int4-rows": Int4Groups(-1, zero_points=False),
    "w8a8": Int8W8A8(input_scale=True),
    "w8a8, one scale": Int8W8A8("tensor", "tensor"),
    "fp8": Fp8(),
    "fp8, one scale": Fp8("tensor", "tensor"),
    "fp8, weights": Fp8("channel", "none"),
    "fp8-block": Fp8("block", "block"),
    "fp8-block, weights": Fp8("block", "none"),
    "stacked": Stacked((StackedPart(1, INT8), StackedPart(3, Int4Groups(32)), StackedPart(4, DENSE))),
}

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_heads": 4,
    "head_dim": 32,
    "attention_bias": True,
}
"""Blocks of 128 x 128 that divide matrices, and some that do not."""


def quantized_arch(**changes: Any) -> ModelArch:
    """An architecture whose matrices all formats can store."""
    return tiny_arch(**{**SIZES, **changes})


def model_formats(weight_format: WeightFormat) -> ModelFormats:
    """The layers' matrices in a format, the output matrix in int8."""
    return ModelFormats(weight_format, {"lm_head": INT8})


def quantized_segment(arch: ModelArch, dtype: ModelDType, mode: Any, kind: str, formats: ModelFormats) -> PlacedSegment:
    """The segment of a kind; `mid` is the second one, so that layer indices matter."""
    found = [segment for segment in segments_of(arch, dtype, PROFILES, mode, formats) if segment.spec.kind == kind]
    return found[-1]


class QuantizedWeights:
    """A model's random weights in the formats of its matrices.

    Attributes:
        dense: what is not quantized, by canonical name.
        stored: matrix -> the tensors of its format, for what is.
    """

    def __init__(self, arch: ModelArch, dtype: ModelDType, formats: ModelFormats, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.arch, self.dtype, self.formats = arch, dtype, formats
        self.shapes = matrix_shapes(arch)
        self.dense = random_weights(arch, DTYPES[dtype], seed)
        self.stored: dict[str, dict[str, Tensor]] = {}
        for name in [*self.shapes, "lm_head"]:
            if formats.of(name) != DENSE:
                self.shapes.setdefault(name, self.shapes["embed_tokens"])
                self.dense.pop(f"{name}.weight", None)
                self.stored[name] = random_matrix(formats.of(name), self.shapes[name], dtype, torch.device("cpu"))

    def of_plans(self) -> dict[str, Tensor]:
        """What plans read, by canonical name."""
        found = dict(self.dense)
        for name, tensors in self.stored.items():
            made = plan_tensors(self.formats.of(name), self.shapes[name], self.dtype, tensors)
            found |= {f"{name}.{suffix}": tensor for suffix, tensor in made.items()}
        return found

    def reference(self) -> QuantizedReference:
        """The model's formulas with these weights."""
        return QuantizedReference(self)


class QuantizedReference(ReferenceSegments):
    """`ReferenceSegments` with dequantized matrices, and activations rounded as the formats say."""

    def __init__(self, weights: QuantizedWeights) -> None:
        dequantized = {
            f"{name}.weight": weights.formats.of(name).dequantize(tensors) for name, tensors in weights.stored.items()
        }
        super().__init__(weights.arch, {**weights.dense, **dequantized})
        self._quantized = weights

    def _linear(self, x: Tensor, name: str) -> Tensor:
        if name == "embed_tokens" and "lm_head" in self._quantized.stored:
            name = "lm_head"
        if name not in self._quantized.stored:
            return super()._linear(x, name)
        weight_format, tensors = self._quantized.formats.of(name), self._quantized.stored[name]
        return super()._linear(_rounded(weight_format, x, tensors), name)


def _rounded(weight_format: WeightFormat, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """x itself, to the last bit of float64, where the format does not round it."""
    rounded = weight_format.rounded_activations(x, tensors)
    return x if torch.equal(rounded, x.float()) else rounded.double()
