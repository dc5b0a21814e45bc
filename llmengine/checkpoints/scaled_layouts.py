"""Layouts with a weight in each byte, or two floats of 4 bits: of compressed-tensors, FP8, MXFP4 and NVFP4."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from llmengine.checkpoints.packed_layouts import require_no_zero_points, shifted_zero_points
from llmengine.checkpoints.quantized_linears import (
    SCALE_DTYPES,
    Activations,
    Layout,
    Scales,
    StoredLinear,
    integer_format,
    num_groups,
    scale_shapes,
)
from llmengine.dtypes import DType
from llmengine.quantization import nvfp4
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import BLOCK, Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4

if TYPE_CHECKING:
    from torch import Tensor

_EXPONENTS: tuple[DType, ...] = ("uint8", "float8_e8m0fnu")
"""Dtypes in which files have exponents (e8m0)."""
_NAN_EXPONENT = 255


@dataclass(frozen=True, slots=True)
class Integers(Layout):
    """compressed-tensors' format "int-quantized".

    ::

        weight             int8 [out, in]
        weight_scale       [out, 1], [1] for scales="tensor", or [out, groups] with a group_size
        weight_zero_point  int8, in the shape of the scales; only if asymmetric
        input_scale        [1], only with activations="tensor"

    Source: compressed-tensors, `compressors/naive_quantized`.

    Attributes:
        group_size: only for weights alone; -1 for a scale for each row.
        symmetric: whether there are no zero points, with which only weights alone can be.
        rows_scaled: whether a matrix with one scale gets one for each row.
    """

    scales: Literal["channel", "tensor"]
    activations: Activations
    group_size: int = -1
    symmetric: bool = True
    rows_scaled: bool = False

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        linear.require("weight", ("int8",), (rows, columns))
        groups = num_groups(linear, self.group_size, divides=True)
        shapes = scale_shapes(self.scales, linear, groups)
        scale_dtype = linear.require("weight_scale", SCALE_DTYPES, *shapes)
        if not self.symmetric:
            linear.require("weight_zero_point", ("int8",), *shapes)
        if self.activations not in ("token", "tensor"):
            return integer_format(linear, 8, self.group_size, not self.symmetric, False, scale_dtype)
        if self.activations == "tensor":
            linear.require("input_scale", SCALE_DTYPES, (1,), ())
        return Int8W8A8("channel" if self.rows_scaled else self.scales, self.activations)

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return _activation_scale(linear, "input_scale") if self.activations == "tensor" else {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        stored = self.format(linear)
        weight, scale = linear.read("weight"), linear.read_scale("weight_scale")
        if isinstance(stored, Int8Groups):
            groups = num_groups(linear, self.group_size)
            scale = scale.reshape(-1, groups).expand(linear.shape[0], -1).contiguous()
            tensors = {"weight": weight.view(torch.uint8) ^ 0x80, "weight_scale": scale}
            if not self.symmetric:
                zeros = linear.read("weight_zero_point")
                tensors["zero_point"] = shifted_zero_points(linear, zeros, 8, groups)
            return tensors
        require_no_zero_points(linear, 8)
        scale = scale.float().reshape(-1)
        if stored == INT8 or (isinstance(stored, Int8W8A8) and stored.scales == "channel"):
            scale = scale.expand(linear.shape[0]).contiguous()
        return {"weight": weight, "weight_scale": scale, **self.shared(linear)}


@dataclass(frozen=True, slots=True)
class Floats(Layout):
    """e4m3 weights: of compressed-tensors ("float-quantized"), of `quant_method` "fp8", and of ModelOpt.

    ::

        weight       float8_e4m3fn [out, in]
        SCALE        factors of the weights: [1], [out, 1], or [blocks of 128 rows, blocks of 128 columns], in which
                     they may be exponents (e8m0)
        INPUT_SCALE  [1], divisor of the activations; only with activations="tensor"

    SCALE is `weight_scale` or `weight_scale_inv`, which is a factor too, despite its name; INPUT_SCALE is `input_scale`
    or `activation_scale`. Source: compressed-tensors, `compressors/naive_quantized`; the DeepSeek-V3 repository;
    transformers, `integrations/finegrained_fp8.py`; ModelOpt's unified checkpoints, whose blocks are [.., 1, .., 1].

    Attributes:
        scale_name: SCALE, where a file has neither name.
        rows_scaled: whether a matrix with one scale gets one for each row.
    """

    scales: Scales
    activations: Activations
    scale_name: str = "weight_scale"
    rows_scaled: bool = False

    def format(self, linear: StoredLinear) -> WeightFormat:
        linear.require("weight", ("float8_e4m3fn",), linear.shape)
        dtypes: tuple[DType, ...] = (*SCALE_DTYPES, *(_EXPONENTS if self.scales == "block" else ()))
        linear.require(self._scale(linear), dtypes, *scale_shapes(self.scales, linear))
        if self.activations == "tensor":
            linear.require(_input_scale(linear), SCALE_DTYPES, (1,), ())
        return Fp8("channel" if self.rows_scaled and self.scales == "tensor" else self.scales, self.activations)

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return _activation_scale(linear, _input_scale(linear)) if self.activations == "tensor" else {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        name = self._scale(linear)
        if self.scales == "block":
            blocks = scale_shapes("block", linear)[0]
            scale = (_exponents(linear, name) if _is_exponent(linear, name) else linear.read_scale(name)).float()
            return {"weight": linear.read("weight"), "weight_scale": scale.reshape(blocks)}
        scale = linear.read_scale(name).float().reshape(-1)
        if self.scales == "tensor" and self.rows_scaled:
            scale = scale.expand(linear.shape[0]).contiguous()
        return {"weight": linear.read("weight"), "weight_scale": scale, **self.shared(linear)}

    def _scale(self, linear: StoredLinear) -> str:
        names = (self.scale_name, "weight_scale", "weight_scale_inv")
        return next((name for name in names if name in linear.tensors), self.scale_name)


@dataclass(frozen=True, slots=True)
class Microscaled(Layout):
    """MXFP4: e2m1 numbers, the first of two in the low nibble, and e8m0 exponents.

    ::

        BLOCKS  uint8 [out, blocks, 16], or [out, in / 2]
        SCALES  uint8 or float8_e8m0fnu [out, blocks]

    Source: OCP Microscaling Formats 1.0; the gpt-oss checkpoints for names and shapes.
    """

    blocks_name: str = "weight_blocks"
    scale_name: str = "weight_scales"

    @property
    def main(self) -> str:
        return self.blocks_name

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        if columns % BLOCK:
            raise linear.unsupported(f"MXFP4 has blocks of {BLOCK} inputs, which do not divide {columns}")
        blocks = columns // BLOCK
        linear.require(self.main, ("uint8",), (rows, blocks, BLOCK // 2), (rows, columns // 2))
        linear.require(self.scale_name, _EXPONENTS, (rows, blocks))
        return Mxfp4()

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        scale = linear.read(self.scale_name).view(torch.uint8)
        if bool((scale == _NAN_EXPONENT).any()):
            raise linear.damaged(self.scale_name, "has a scale that is not finite")
        return {"weight": linear.read(self.main).reshape(linear.shape[0], -1), "weight_scale": scale}


@dataclass(frozen=True, slots=True)
class NvidiaFloats(Layout):
    """NVFP4: e2m1 numbers, the first of two in the low nibble, e4m3 scales of 16, and a scale for the matrix.

    ::

        WEIGHT        uint8 [out, in / 2]
        weight_scale  float8_e4m3fn [out, blocks]
        GLOBAL        float32 [1]

    compressed-tensors divides by GLOBAL, whose reciprocal is rounded to float32 here; ModelOpt multiplies by it.
    Source: compressed-tensors, `compressors/nvfp4`; ModelOpt's unified checkpoints.

    Attributes:
        rows_scaled: whether there is a global scale for each row.
    """

    weight_name: str
    global_name: str
    is_divisor: bool
    rows_scaled: bool = False

    @property
    def main(self) -> str:
        return self.weight_name

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        if columns % nvfp4.BLOCK:
            raise linear.unsupported(f"NVFP4 has blocks of {nvfp4.BLOCK} inputs, which do not divide {columns}")
        linear.require(self.main, ("uint8",), (rows, columns // 2))
        linear.require("weight_scale", ("float8_e4m3fn",), (rows, columns // nvfp4.BLOCK))
        linear.require(self.global_name, SCALE_DTYPES, (1,), ())
        if linear.has("pre_quant_scale"):
            raise linear.unsupported("factors of its inputs (pre_quant_scale) are not supported")
        return Nvfp4("channel" if self.rows_scaled else "tensor")

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        if self.is_divisor:
            whole = 1.0 / linear.read_divisor(self.global_name).reshape(1)
        else:
            whole = linear.read_scale(self.global_name).float().reshape(1)
        if self.rows_scaled:
            whole = whole.expand(linear.shape[0]).contiguous()
        scale = linear.read_scale("weight_scale")
        return {"weight": linear.read(self.main), "weight_scale": scale, "global_scale": whole}


def _is_exponent(linear: StoredLinear, suffix: str) -> bool:
    return linear.tensors[suffix].dtype in _EXPONENTS


def _exponents(linear: StoredLinear, suffix: str) -> Tensor:
    """The powers of two whose exponents (e8m0) a tensor has, float32."""
    import torch

    exponents = linear.read(suffix).view(torch.uint8)
    if bool((exponents == _NAN_EXPONENT).any()):
        raise linear.damaged(suffix, "has a scale that is not finite")
    return torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)


def _input_scale(linear: StoredLinear) -> str:
    return "activation_scale" if "activation_scale" in linear.tensors else "input_scale"


def _activation_scale(linear: StoredLinear, suffix: str) -> dict[str, Tensor]:
    return {"activation_scale": linear.read_divisor(suffix).reshape(1)}
