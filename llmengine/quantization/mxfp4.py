"""MXFP4: floating-point weights of 4 bits in blocks of 32 that share a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmengine.dtypes import ModelDType
from llmengine.errors import UnsupportedModelError
from llmengine.quantization.formats import Along, Shape, TensorSpec, WeightFormat
from llmengine.quantization.int4 import numbers_of_nibbles, pack_nibbles

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 32
"""Weights of a row that share a scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by the low three bits of a nibble; the fourth is the sign."""

E2M1_NUMBERS = (*E2M1, *(-value for value in E2M1))
"""The numbers of all codes."""

_BIAS = 127
_LARGEST_EXPONENT = 2
_NAN_SCALE = 255


@dataclass(frozen=True, slots=True)
class Mxfp4(WeightFormat):
    """OCP Microscaling FP4, weight-only: e2m1 numbers, two a byte, times 2 ** (scale - 127).

    ::

        weight         uint8 [out, in / 2]: byte j has column 2 j in its low and column 2 j + 1 in its high nibble
        weight_scale   uint8 [out, blocks], e8m0 exponents; 255 is NaN

    The last block of a row may be shorter. Source: OCP Microscaling Formats (MX) 1.0.
    """

    name: ClassVar[str] = "mxfp4"

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        if shape[1] % 2:
            raise UnsupportedModelError(
                f"a matrix of {shape[0]} x {shape[1]} weights cannot be stored as {self.name!r}, which has two "
                "columns in a byte: the number of columns must be even"
            )
        return {
            "weight": TensorSpec.of_matrix("uint8", shape, Along("out"), Along("in", 2)),
            "weight_scale": TensorSpec.of_matrix("uint8", shape, Along("out"), Along("in", BLOCK)),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest with the scale of the specification or twice it, whichever has the smaller squared error.

        The specification's scale saturates a block's weights of more than 6 times it.
        """
        import torch
        import torch.nn.functional as F

        weight = weight.float()
        blocks = F.pad(weight, (0, -weight.shape[1] % BLOCK)).view(weight.shape[0], -1, BLOCK)
        _, exponent = torch.frexp(blocks.abs().amax(dim=2))
        exponent = exponent - 1 - _LARGEST_EXPONENT + _BIAS
        numbers = torch.tensor(E2M1_NUMBERS, device=weight.device)
        best: list[Tensor] = []
        for candidate in (exponent, exponent + 1):
            scale = candidate.clamp(0, _NAN_SCALE - 1).to(torch.uint8)
            codes = nearest_e2m1_codes(blocks / _powers_of_two(scale)[:, :, None])
            error = (numbers[codes.long()] * _powers_of_two(scale)[:, :, None] - blocks).square().sum(dim=2)
            if best:
                better = error < best[2]
                codes, scale = torch.where(better[:, :, None], codes, best[0]), torch.where(better, scale, best[1])
            best = [codes, scale, error]
        packed = pack_nibbles(best[0].flatten(1)[:, : weight.shape[1]])
        return {"weight": packed, "weight_scale": best[1]}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = numbers_of_nibbles(tensors["weight"], E2M1_NUMBERS)
        scale = _powers_of_two(tensors["weight_scale"]).repeat_interleave(BLOCK, dim=1)
        return values * scale[:, : values.shape[1]]


def _powers_of_two(scale: Tensor) -> Tensor:
    import torch

    powers = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - _BIAS)
    return powers.masked_fill_(scale == _NAN_SCALE, torch.nan)


def nearest_e2m1_codes(x: Tensor) -> Tensor:
    """Codes of the nearest e2m1 numbers, uint8; larger magnitudes than 6 become 6."""
    import torch

    grid = torch.tensor(E2M1, device=x.device)
    magnitude = torch.bucketize(x.abs(), (grid[1:] + grid[:-1]) / 2)
    return (magnitude + 8 * (x < 0)).to(torch.uint8)
