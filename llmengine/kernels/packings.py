"""How formats whose weights alone are quantized are taken apart into values, scales and zero points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmengine.dtypes import torch_dtype
from llmengine.quantization.bnb4 import TABLES, Bnb4Bit
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import BLOCK, Fp8
from llmengine.quantization.int4 import Int4Groups, pack_nibbles, unpack_nibbles
from llmengine.quantization.int8 import Int8PerChannel
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import BLOCK as MX_BLOCK
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import BLOCK as NV_BLOCK
from llmengine.quantization.nvfp4 import Nvfp4

Kind = Literal["int2", "int3", "int4", "int5", "int6", "int8", "e4m3", "e2m1", "table"]
"""What a value is: an unsigned integer of 2 to 6 bits, a signed one of 8, a floating-point number of 8 or 4 bits, or
the place of a number in a table of 16."""

PLANES: Mapping[Kind, tuple[int, int]] = {
    "int2": (2, 0),
    "int3": (2, 1),
    "int4": (4, 0),
    "int5": (4, 1),
    "int6": (4, 2),
}
"""Of unsigned integers, the bits that are in words and, above them, those that are in words of their own."""

VALUES: Mapping[Kind, int] = {**dict.fromkeys(PLANES, 4), "e2m1": 4, "table": 4, "int8": 2, "e4m3": 2}
"""Values of a block at each place of its words."""


_NONE = torch.empty(0)

_FP4_UNITS = 12
"""The numbers of bitsandbytes's FP4 are multiples of 1 / 192."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A stored matrix taken apart.

    Attributes:
        values: uint8 [rows, columns], in the bits that `Kind` says.
        scales: of groups, [rows, groups], uint8 if they are e4m3 numbers or steps; empty if there are none.
        row_scales: float32 [rows]; empty if there are none.
        zeros: [rows, groups], what is subtracted from each value; None if that is the same for all.
        minima: [rows, groups], what is added to each value times its scale: float16, or steps; None if nothing is,
            or if their steps are paired with those of the scales.
        units: float16 [rows, columns / 256, 1 or 2], what the steps of scales and of minima are multiplied by.
    """

    values: Tensor
    scales: Tensor = _NONE
    row_scales: Tensor = _NONE
    zeros: Tensor | None = None
    minima: Tensor | None = None
    units: Tensor | None = None


class Packing(ABC):
    """How a weight format is taken apart.

    Attributes:
        kind: what a value is.
        table: the numbers of the codes of "table".
        group_size: columns that share a scale, -1: all of a row; 0: there are scales of rows alone.
        has_row_scales: rows have scales, float32.
        has_zeros: groups have zero points.
        has_minima: groups have minima.
        scale_dtype: of the scales of groups; int8 for steps, of which all in 256 columns have the same unit, and uint8
            for pairs of unsigned steps of 4 bits, those of minima in the high ones.
    """

    kind: Kind
    table: tuple[float, ...] = ()
    group_size: int = -1
    has_row_scales: bool = False
    has_zeros: bool = False
    has_minima: bool = False
    scale_dtype: torch.dtype = torch.float32

    def num_groups(self, slice_columns: int, columns: int) -> int | None:
        """Groups of a block of such slices; None if groups and blocks do not fit into each other."""
        block = slice_columns * VALUES[self.kind]
        size = self.group_size
        if size == 0:
            return 0
        if size == -1 or size % block == 0:
            return 1
        num_groups = block // size
        fits = size % slice_columns == 0 and block % size == 0 and num_groups * self.scale_dtype.itemsize <= 8
        return num_groups if fits else None

    @abstractmethod
    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        """What the stored tensors of some rows hold."""

    @abstractmethod
    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        """Undoes `take_apart`, without the tensors that only prepare activations."""


class _Int4Packing(Packing):
    kind = "int4"

    def __init__(self, weight_format: Int4Groups) -> None:
        self.group_size = weight_format.group_size
        self.has_zeros = weight_format.zero_points
        self.scale_dtype = torch_dtype(weight_format.scale_dtype)

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        return Codes(unpack_nibbles(tensors["weight"]), tensors["weight_scale"], zeros=tensors.get("zero_point"))

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        tensors = {"weight": pack_nibbles(codes.values), "weight_scale": codes.scales}
        return tensors if codes.zeros is None else {**tensors, "zero_point": codes.zeros.to(torch.uint8)}


class _Int8GroupsPacking(Packing):
    kind = "int8"

    def __init__(self, weight_format: Int8Groups) -> None:
        self.group_size = weight_format.group_size
        self.has_zeros = weight_format.zero_points
        self.scale_dtype = torch_dtype(weight_format.scale_dtype)

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        zeros = tensors["zero_point"].float() - 128 if self.has_zeros else None
        return Codes(tensors["weight"] ^ 0x80, tensors["weight_scale"], zeros=zeros)

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        tensors = {"weight": codes.values ^ 0x80, "weight_scale": codes.scales}
        return tensors if codes.zeros is None else {**tensors, "zero_point": (codes.zeros + 128).to(torch.uint8)}


class _Int8Packing(Packing):
    kind = "int8"
    group_size = 0
    has_row_scales = True

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        return Codes(tensors["weight"].view(torch.uint8), row_scales=tensors["weight_scale"])

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": codes.values.view(torch.int8), "weight_scale": codes.row_scales}


class _Fp8Packing(Packing):
    kind = "e4m3"

    def __init__(self, weight_format: Fp8) -> None:
        self._scales = weight_format.scales
        self.has_row_scales = weight_format.scales != "block"
        self.group_size = 0 if self.has_row_scales else BLOCK

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        values, scales = tensors["weight"].view(torch.uint8), tensors["weight_scale"]
        if self._scales == "block":
            return Codes(values, scales.repeat_interleave(BLOCK, dim=0)[: len(values)])
        return Codes(values, row_scales=scales.expand(len(values)))

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        scales = {
            "tensor": codes.row_scales[:1],
            "channel": codes.row_scales,
            "block": codes.scales[::BLOCK],
        }[self._scales]
        return {"weight": codes.values.view(torch.float8_e4m3fn), "weight_scale": scales.contiguous()}


class _Mxfp4Packing(Packing):
    kind = "e2m1"
    group_size = MX_BLOCK
    scale_dtype = torch.bfloat16

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        return Codes(unpack_nibbles(tensors["weight"]), scales_of_exponents(tensors["weight_scale"]))

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": pack_nibbles(codes.values), "weight_scale": exponents_of_scales(codes.scales)}


def scales_of_exponents(exponents: Tensor) -> Tensor:
    """Powers of two, bfloat16, of exponents in bytes with a bias of 127 (E8M0)."""
    wide = exponents.to(torch.int16)
    bits = (wide << 7).masked_fill_(wide == 0, 0x0040).masked_fill_(wide == 255, 0x7FC0)
    return bits.view(torch.bfloat16)


def exponents_of_scales(scales: Tensor) -> Tensor:
    """Undoes `scales_of_exponents`."""
    return (scales.view(torch.int16) >> 7).to(torch.uint8)


class _Nvfp4Packing(Packing):
    kind = "e2m1"
    group_size = NV_BLOCK
    has_row_scales = True
    scale_dtype = torch.float8_e4m3fn

    def __init__(self, weight_format: Nvfp4) -> None:
        self._is_single = weight_format.scales == "tensor"

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        values, scales = unpack_nibbles(tensors["weight"]), tensors["weight_scale"].view(torch.uint8)
        return Codes(values, scales, tensors["global_scale"].expand(len(values)))

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        return {
            "weight": pack_nibbles(codes.values),
            "weight_scale": codes.scales.view(torch.float8_e4m3fn),
            "global_scale": codes.row_scales[:1] if self._is_single else codes.row_scales,
        }


class _Bnb4BitPacking(Packing):
    kind = "table"

    def __init__(self, weight_format: Bnb4Bit) -> None:
        self.group_size = weight_format.block_size
        self.table = TABLES[weight_format.quant_type]
        self.has_row_scales = weight_format.quant_type == "fp4"
        if self.has_row_scales:
            # Whole numbers and 1/16, which 16 bits hold exactly.
            self.table = tuple(round(number * _FP4_UNITS * 16) / 16 for number in self.table)

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        values, scales = unpack_nibbles(tensors["weight"]), tensors["weight_scale"]
        return Codes(values, scales, scales.new_full((len(values),), 1 / _FP4_UNITS))

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        return {"weight": pack_nibbles(codes.values), "weight_scale": codes.scales}


def packing_of(weight_format: WeightFormat) -> Packing | None:
    """How a format is taken apart; None if it is not a format of weights alone, or has no product yet."""
    if isinstance(weight_format, Int4Groups):
        return _Int4Packing(weight_format)
    if isinstance(weight_format, Int8Groups):
        return _Int8GroupsPacking(weight_format)
    if isinstance(weight_format, Int8PerChannel):
        return _Int8Packing()
    if isinstance(weight_format, Fp8) and weight_format.activations == "none":
        return _Fp8Packing(weight_format)
    if isinstance(weight_format, Bnb4Bit):
        return _Bnb4BitPacking(weight_format)
    if isinstance(weight_format, Nvfp4):
        return _Nvfp4Packing(weight_format)
    return _Mxfp4Packing() if isinstance(weight_format, Mxfp4) else None
