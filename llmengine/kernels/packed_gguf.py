"""How GGUF's blocks are taken apart for the packed layout, type by type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.kernels.packings import Codes, Kind, Packing, exponents_of_scales, scales_of_exponents
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.gguf_blocks import GgufBlocks
from llmengine.quantization.gguf_codes import Factors, from_blocks, to_blocks

_STEPS, _PAIRS = torch.int8, torch.uint8

_IQ4 = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
"""ggml's `kvalues_iq4nl`."""


@dataclass(frozen=True, slots=True)
class _Type:
    """What the codes of a type of blocks are.

    Attributes:
        group_size: columns that share a scale.
        scale_dtype: see `Packing`.
        has_minima: scales have minima beside them.
    """

    kind: Kind
    group_size: int
    scale_dtype: torch.dtype = torch.float16
    has_minima: bool = False


_TYPES: Mapping[str, _Type] = {
    "Q4_0": _Type("int4", 32),
    "Q4_1": _Type("int4", 32, has_minima=True),
    "Q5_0": _Type("int5", 32),
    "Q5_1": _Type("int5", 32, has_minima=True),
    "Q8_0": _Type("int8", 32),
    "Q2_K": _Type("int2", 16, _PAIRS, has_minima=True),
    "Q3_K": _Type("int3", 16, _STEPS),
    "Q4_K": _Type("int4", 32, _STEPS, has_minima=True),
    "Q5_K": _Type("int5", 32, _STEPS, has_minima=True),
    "Q6_K": _Type("int6", 16, _STEPS),
    "IQ4_NL": _Type("table", 32),
    "IQ4_XS": _Type("table", 32, _STEPS),
    # Values from -1 on: the scale is the minimum too, negated.
    "TQ2_0": _Type("int2", 256, has_minima=True),
    "MXFP4": _Type("e2m1", 32, torch.bfloat16),
    # Scales are unsigned: no tool sets the sign, or writes 0x7F, which stands for 0 there.
    "NVFP4": _Type("e2m1", 16, torch.float8_e4m3fn),
}


class GgufPacking(Packing):
    """Codes and factors of blocks, which `gguf_codes` takes apart and puts together."""

    def __init__(self, blocks: GgufBlocks) -> None:
        chosen = _TYPES[blocks.type_name]
        self._blocks = blocks
        self.kind = chosen.kind
        self.table = _IQ4 if chosen.kind == "table" else ()
        self.group_size = chosen.group_size
        self.has_minima = chosen.has_minima
        self.scale_dtype = chosen.scale_dtype

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        codes, factors = from_blocks(self._blocks.type_name, tensors["weight"], 0)
        values, scales, minima = codes.flatten(1), factors.scales, factors.minima
        if factors.steps is not None:
            units = torch.stack((scales,) if minima is None else (scales, minima), dim=2)
            steps, *steps_of_minima = factors.steps.unbind(2)
            if not steps_of_minima:  # signed, with an offset of 128
                return Codes(values, steps ^ 128, units=units)
            if self.scale_dtype == _PAIRS:
                return Codes(values, steps | steps_of_minima[0] << 4, units=units)
            return Codes(values, steps, minima=steps_of_minima[0], units=units)
        if self.scale_dtype == torch.bfloat16:
            scales = scales_of_exponents(scales)
        if self._blocks.type_name == "TQ2_0":
            minima = -scales
        return Codes(values, scales, minima=minima)

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        type_name = self._blocks.type_name
        values = codes.values.unflatten(1, (-1, self._blocks.block_size))
        return {"weight": to_blocks(type_name, values, self._factors(codes), 0)}

    def _factors(self, codes: Codes) -> Factors:
        """Undoes what `take_apart` did to factors."""
        if codes.units is None:
            is_exponents = self.scale_dtype == torch.bfloat16
            return Factors(exponents_of_scales(codes.scales) if is_exponents else codes.scales, codes.minima)
        units, *units_of_minima = codes.units.unbind(2)
        if not units_of_minima:
            return Factors(units, steps=codes.scales[:, :, None] ^ 128)
        steps = (codes.scales & 15, codes.scales >> 4) if codes.minima is None else (codes.scales, codes.minima)
        return Factors(units, units_of_minima[0], torch.stack(steps, dim=2))


def why_not_packed(weight_format: WeightFormat) -> str | None:
    """Why no kernel multiplies by blocks of a format; None if one does."""
    assert isinstance(weight_format, GgufBlocks), weight_format
    return None if weight_format.type_name in _TYPES else "no kernel multiplies by them"


def gguf_packing(blocks: GgufBlocks) -> GgufPacking | None:
    """How blocks of a type are taken apart; None if no kernel multiplies by them."""
    return GgufPacking(blocks) if blocks.type_name in _TYPES else None
