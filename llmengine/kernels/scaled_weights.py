"""Quantized matrices whose products round activations to 8 bits as well: FP8 (e4m3) and W8A8, as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from llmengine.dtypes import torch_dtype
from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.matrix import Matrix

WeightScales = Literal["tensor", "channel", "block"]
ActivationScales = Literal["tensor", "token", "block"]


def has_scaled_products(weight_format: WeightFormat) -> bool:
    """Whether `ScaledMatrix` can hold a matrix."""
    return isinstance(weight_format, Int8W8A8) or (
        isinstance(weight_format, Fp8) and weight_format.activations != "none"
    )


class ScaledMatrix(QuantizedMatrix):
    """The stored tensors.

    Attributes:
        weight_scales: weights that share a scale: all, those of a row, or 128 x 128.
        activation_scales: activations that share a scale: all, those of a token, or 128 columns of a token.
    """

    def __init__(self, weight_format: WeightFormat, shape: Shape, device: torch.device | str) -> None:
        assert isinstance(weight_format, Fp8 | Int8W8A8), weight_format
        self.format = weight_format
        self.shape = shape
        self.weight_scales: WeightScales = weight_format.scales
        assert weight_format.activations != "none", weight_format
        self.activation_scales: ActivationScales = weight_format.activations
        if isinstance(weight_format, Fp8):
            self.least_capability = (8, 9)
        specs = weight_format.tensors(shape, "float32")
        self.tensors = {
            name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device) for name, spec in specs.items()
        }

    @property
    def values_dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.tensors["weight"].dtype

    def fill(self, tensors: Mapping[str, Tensor], first_row: int = 0) -> None:
        num_rows = len(tensors["weight"])
        places = self.format.cut(self.tensors, self.shape, "out", first_row, first_row + num_rows)
        for name, place in places.items():
            place.copy_(tensors[name])

    def stored(self) -> Matrix:
        return Matrix(self.format, self.shape, self.tensors)
