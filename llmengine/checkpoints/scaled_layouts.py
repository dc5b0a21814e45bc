"""Layouts with a weight in each byte, or two of MXFP4: integers and floats of compressed-tensors, FP8, MXFP4."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from llmengine.checkpoints.quantized_linears import (
    SCALE_DTYPES,
    Activations,
    Scales,
    StoredLinear,
    integer_format,
    num_groups,
    scale_shapes,
)
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import BLOCK, Mxfp4

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Integers:
    """compressed-tensors' format "int-quantized".

    ::

        weight        int8 [out, in]
        weight_scale  [out, 1], [1] for scales="tensor", or [out, groups] with a group_size
        input_scale   [1], only with activations="tensor"

    Source: compressed-tensors, `compressors/quantized_compressors/naive_quantized.py`.

    Attributes:
        group_size: only for weights alone; -1 for a scale for each row.
        rows_scaled: whether a matrix with one scale gets one for each row.
    """

    main: ClassVar[str] = "weight"
    scales: Literal["channel", "tensor"]
    activations: Literal["none", "token", "tensor"]
    group_size: int = -1
    rows_scaled: bool = False

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        linear.require("weight", ("int8",), (rows, columns))
        groups = num_groups(linear, self.group_size, divides=True)
        scale_dtype = linear.require("weight_scale", SCALE_DTYPES, *scale_shapes(self.scales, linear, groups))
        if self.activations == "none":
            return integer_format(linear, 8, self.group_size, False, False, scale_dtype)
        if self.activations == "tensor":
            linear.require("input_scale", SCALE_DTYPES, (1,), ())
        return Int8W8A8("channel" if self.rows_scaled else self.scales, self.activations)

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return _activation_scale(linear) if self.activations == "tensor" else {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        stored = self.format(linear)
        weight, scale = linear.read("weight"), linear.read("weight_scale")
        if isinstance(stored, Int8Groups):
            return {"weight": weight.view(torch.uint8) ^ 0x80, "weight_scale": scale}
        scale = scale.float().reshape(-1)
        if stored == INT8 or (isinstance(stored, Int8W8A8) and stored.scales == "channel"):
            scale = scale.expand(linear.shape[0]).contiguous()
        return {"weight": weight, "weight_scale": scale, **self.shared(linear)}


@dataclass(frozen=True, slots=True)
class Floats:
    """e4m3 weights, of compressed-tensors ("float-quantized") and of `quant_method` "fp8".

    ::

        weight       float8_e4m3fn [out, in]
        SCALE        factors of the weights: [1], [out, 1], or [blocks of 128 rows, blocks of 128 columns]
        input_scale  [1], divisor of the activations; only with activations="tensor"

    Source: compressed-tensors, `naive_quantized.py`; the DeepSeek-V3 repository for `weight_scale_inv`, which despite
    its name is a factor too.

    Attributes:
        scale_name: "weight_scale" or "weight_scale_inv".
        rows_scaled: whether a matrix with one scale gets one for each row.
    """

    main: ClassVar[str] = "weight"
    scales: Scales
    activations: Activations
    scale_name: str = "weight_scale"
    rows_scaled: bool = False

    def format(self, linear: StoredLinear) -> WeightFormat:
        linear.require("weight", ("float8_e4m3fn",), linear.shape)
        linear.require(self.scale_name, SCALE_DTYPES, *scale_shapes(self.scales, linear))
        if self.activations == "tensor":
            linear.require("input_scale", SCALE_DTYPES, (1,), ())
        return Fp8("channel" if self.rows_scaled and self.scales == "tensor" else self.scales, self.activations)

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return _activation_scale(linear) if self.activations == "tensor" else {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        scale = linear.read(self.scale_name).float()
        if self.scales != "block":
            scale = scale.reshape(-1)
        if self.scales == "tensor" and self.rows_scaled:
            scale = scale.expand(linear.shape[0]).contiguous()
        return {"weight": linear.read("weight"), "weight_scale": scale, **self.shared(linear)}


@dataclass(frozen=True, slots=True)
class Microscaled:
    """MXFP4: e2m1 numbers, the first of two in the low nibble, and e8m0 exponents.

    ::

        BLOCKS  uint8 [out, blocks, 16], or [out, in / 2]
        SCALES  uint8 or float8_e8m0fnu [out, blocks]

    Source: OCP Microscaling Formats 1.0; the gpt-oss checkpoints for names and shapes.
    """

    main: str = "weight_blocks"
    scale_name: str = "weight_scales"

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        if columns % BLOCK:
            raise linear.unsupported(f"MXFP4 has blocks of {BLOCK} inputs, which do not divide {columns}")
        blocks = columns // BLOCK
        linear.require(self.main, ("uint8",), (rows, blocks, BLOCK // 2), (rows, columns // 2))
        linear.require(self.scale_name, ("uint8", "float8_e8m0fnu"), (rows, blocks))
        return Mxfp4()

    def by_row(self) -> Self:
        return self

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        scale = linear.read(self.scale_name).view(torch.uint8)
        return {"weight": linear.read(self.main).reshape(linear.shape[0], -1), "weight_scale": scale}


def _activation_scale(linear: StoredLinear) -> dict[str, Tensor]:
    return {"activation_scale": linear.read("input_scale").float().reshape(1)}
