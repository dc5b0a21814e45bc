"""NVFP4: floating-point weights of 4 bits in blocks of 16, whose scales are e4m3 numbers with a scale of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from llmengine.dtypes import ModelDType
from llmengine.quantization.formats import Along, Shape, TensorSpec, WeightFormat, require_setting
from llmengine.quantization.grid import in_groups
from llmengine.quantization.int4 import nibbles_of_matrix, numbers_of_nibbles, pack_nibbles
from llmengine.quantization.mxfp4 import E2M1_NUMBERS, nearest_e2m1_codes
from llmengine.quantization.quotients import quotient

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 16
"""Weights of a row that share a scale."""

_LARGEST = 6.0
_LARGEST_SCALE = 448.0
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Nvfp4(WeightFormat):
    """e2m1 numbers, two a byte, times the e4m3 scale of their block and a float32 scale; weight-only.

    ::

        weight         uint8 [out, in / 2]: byte j has column 2 j in its low and column 2 j + 1 in its high nibble
        weight_scale   float8_e4m3fn [out, blocks]
        global_scale   float32 [1] or [out], a factor

    The last block of a row may be shorter. Source: NVIDIA's description of the FP4 formats of Blackwell.

    Attributes:
        scales: weights that share a `global_scale`: all ("tensor") or, where parts with one each are fused, those of a
            row ("channel").
    """

    name: ClassVar[str] = "nvfp4"
    scales: Literal["tensor", "channel"] = "tensor"

    def __post_init__(self) -> None:
        require_setting(self, "scales", ("tensor", "channel"))

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        rows = Along("out") if self.scales == "channel" else 1
        return {
            "weight": nibbles_of_matrix(self.name, shape),
            "weight_scale": TensorSpec.of_matrix("float8_e4m3fn", shape, Along("out"), Along("in", BLOCK)),
            "global_scale": TensorSpec.of_matrix("float32", shape, rows),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest; the largest scale that shares a `global_scale` becomes 448, the largest weight 6."""
        import torch

        blocks = in_groups(weight.float(), BLOCK)
        largest = blocks.abs().amax(dim=2)
        whole = largest.amax(dim=1) if self.scales == "channel" else largest.max().view(1)
        factor = quotient(whole, _LARGEST * _LARGEST_SCALE).clamp_(min=_TINY)
        scale = (quotient(largest, _LARGEST) / factor[:, None]).clamp_(max=_LARGEST_SCALE).to(torch.float8_e4m3fn)
        divisor = (scale.float() * factor[:, None]).clamp(min=_TINY)[:, :, None]
        codes = nearest_e2m1_codes(blocks / divisor).flatten(1)[:, : weight.shape[1]]
        return {"weight": pack_nibbles(codes), "weight_scale": scale, "global_scale": factor}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = numbers_of_nibbles(tensors["weight"], E2M1_NUMBERS)
        scale = tensors["weight_scale"].float() * tensors["global_scale"][:, None]
        return (in_groups(values, BLOCK) * scale[:, :, None]).flatten(1)[:, : values.shape[1]]
