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


@dataclass(frozen=True, slots=True)
class _Type:
    """What the codes of a type of blocks are.

    Attributes:
        group_size: columns that share a scale.
    """

    kind: Kind
    group_size: int
    scale_dtype: torch.dtype = torch.float16


_TYPES: Mapping[str, _Type] = {
    "Q4_0": _Type("int4", 32),
    "Q8_0": _Type("int8", 32),
    "MXFP4": _Type("e2m1", 32, torch.bfloat16),
}


class GgufPacking(Packing):
    """Codes and factors of blocks, which `gguf_codes` takes apart and puts together."""

    def __init__(self, blocks: GgufBlocks) -> None:
        chosen = _TYPES[blocks.type_name]
        self._blocks = blocks
        self.kind = chosen.kind
        self.group_size = chosen.group_size
        self.scale_dtype = chosen.scale_dtype

    def take_apart(self, tensors: Mapping[str, Tensor]) -> Codes:
        codes, factors = from_blocks(self._blocks.type_name, tensors["weight"], 0)
        is_exponents = factors.scales.dtype == torch.uint8
        scales = scales_of_exponents(factors.scales) if is_exponents else factors.scales
        return Codes(codes.flatten(1), scales)

    def put_together(self, codes: Codes) -> dict[str, Tensor]:
        values = codes.values.unflatten(1, (-1, self._blocks.block_size))
        is_exponents = self.scale_dtype == torch.bfloat16
        scales = exponents_of_scales(codes.scales) if is_exponents else codes.scales
        return {"weight": to_blocks(self._blocks.type_name, values, Factors(scales), 0)}


def why_not_packed(weight_format: WeightFormat) -> str | None:
    """Why no kernel multiplies by blocks of a format; None if one does."""
    assert isinstance(weight_format, GgufBlocks), weight_format
    return None if weight_format.type_name in _TYPES else "no kernel multiplies by them"


def gguf_packing(blocks: GgufBlocks) -> GgufPacking | None:
    """How blocks of a type are taken apart; None if no kernel multiplies by them."""
    return GgufPacking(blocks) if blocks.type_name in _TYPES else None
