"""A format with groups and packed weights, as the tests' own: what the shared methods must cope with beside int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmengine.dtypes import ModelDType
from llmengine.quantization.formats import Along, Shape, TensorSpec, WeightFormat


@dataclass(frozen=True, slots=True)
class Int4Groups(WeightFormat):
    """Two weights a byte along the input axis, a scale in the model's dtype for `group_size` of them, and one factor.

    The factor belongs to the whole matrix, so it is along no axis.
    """

    name: ClassVar[str] = "test-int4"
    group_size: int

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec.of_matrix("uint8", shape, Along("out"), Along("in", 2)),
            "weight_scale": TensorSpec.of_matrix(dtype, shape, Along("out"), Along("in", self.group_size)),
            "factor": TensorSpec.of_matrix("float32", shape, 1),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        groups = weight.view(rows, columns // self.group_size, self.group_size)
        scale = groups.abs().amax(dim=2).clamp_(min=1e-30) / 7
        values = ((groups / scale[:, :, None]).round() + 8).to(torch.uint8).view(rows, columns)
        packed = values[:, 0::2] | values[:, 1::2] << 4
        return {"weight": packed, "weight_scale": scale / 2, "factor": torch.tensor([2.0])}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        packed = tensors["weight"]
        values = torch.stack((packed & 15, packed >> 4), dim=2).view(packed.shape[0], -1).float() - 8
        scale = tensors["weight_scale"].repeat_interleave(self.group_size, dim=1)
        return values * scale * tensors["factor"]
