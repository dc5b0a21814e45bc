"""MXFP4: floating-point weights of 4 bits in blocks of 32 that share a power of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmengine.dtypes import ModelDType
from llmengine.quantization.formats import Along, Shape, TensorSpec
from llmengine.quantization.grid import Grid, GridFormat, best_grid, in_groups
from llmengine.quantization.int4 import nibbles_of_matrix, numbers_of_nibbles, pack_nibbles

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
class Mxfp4(GridFormat):
    """OCP Microscaling FP4, weight-only: e2m1 numbers, two a byte, times 2 ** (scale - 127).

    ::

        weight         uint8 [out, in / 2]: byte j has column 2 j in its low and column 2 j + 1 in its high nibble
        weight_scale   uint8 [out, blocks], e8m0 exponents; 255 is NaN

    The last block of a row may be shorter. Source: OCP Microscaling Formats (MX) 1.0.
    """

    name: ClassVar[str] = "mxfp4"

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        return {
            "weight": nibbles_of_matrix(self.name, shape),
            "weight_scale": TensorSpec.of_matrix("uint8", shape, Along("out"), Along("in", BLOCK)),
        }

    def grids(self, weight: Tensor) -> Iterator[Grid]:
        """Yield the grid with the scales of the specification, and that with twice them.

        The specification's scale saturates a block's weights of more than 6 times it.
        """
        import torch

        _, exponent = torch.frexp(in_groups(weight, BLOCK).abs().amax(dim=2))
        exponent = exponent - 1 - _LARGEST_EXPONENT + _BIAS
        for candidate in (exponent, exponent + 1):
            scale = _powers_of_two(candidate.clamp(0, _NAN_SCALE - 1).to(torch.uint8))
            highest = torch.full_like(scale, E2M1[-1])
            yield Grid(scale, -highest, highest, BLOCK, _nearest_numbers)

    def grid(self, weight: Tensor) -> Grid:
        """The grid of the least squared error, block by block."""
        return best_grid(self, weight, None)

    def stored(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        import torch

        _, exponent = torch.frexp(grid.scale)
        codes = nearest_e2m1_codes(grid.scaled(weight))
        return {"weight": pack_nibbles(codes), "weight_scale": (exponent - 1 + _BIAS).to(torch.uint8)}

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


def _nearest_numbers(x: Tensor) -> Tensor:
    """The numbers of `nearest_e2m1_codes`, for magnitudes of at most 6; a tie becomes the smaller one, as there."""
    import torch

    magnitude = x.abs()
    steps = torch.where(magnitude < 4, 1.0, 2.0).masked_fill_(magnitude < 2, 0.5)
    return magnitude.div_(steps).sub_(0.5).ceil_().mul_(steps).copysign_(x)
