"""NF4 and FP4 of bitsandbytes: weights of 4 bits that are entries of a table, in blocks that share their maximum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, ClassVar, Literal

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError
from llmengine.quantization.formats import Along, Axis, Shape, TensorSpec, WeightFormat, require_setting
from llmengine.quantization.grid import in_groups
from llmengine.quantization.int4 import columns_together, nibbles_of_matrix, numbers_of_nibbles, pack_nibbles

if TYPE_CHECKING:
    from torch import Tensor

BnbTable = Literal["nf4", "fp4"]
"""A table of 16 numbers in [-1, 1]."""

_FP4 = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

TABLES: Mapping[BnbTable, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, *(-value for value in _FP4)),
}
"""Numbers by their codes. NF4 has quantiles of the normal distribution (QLoRA, arXiv 2305.14314). FP4 has the numbers
of two bits of exponent and one of mantissa, divided by the largest."""

_TINY = 1e-30
_LEAST_BLOCK = 16
"""Columns of the smallest blocks into which larger ones are divided."""


@dataclass(frozen=True, slots=True)
class Bnb4Bit(WeightFormat):
    """Codes of a table, two a byte; a weight is its code's number times the largest magnitude of its block.

    ::

        weight         uint8 [out, in / 2]: byte j has column 2 j in its low and column 2 j + 1 in its high nibble
        weight_scale   float32 [out, blocks]

    The last block of a row may be shorter.

    Attributes:
        quant_type: the table.
        block_size: weights of a row that share a scale.
    """

    name: ClassVar[str] = "bnb-4bit"
    quant_type: BnbTable = "nf4"
    block_size: int = 64

    def __post_init__(self) -> None:
        require_setting(self, "quant_type", tuple(TABLES))
        if type(self.block_size) is not int or self.block_size < 1:
            raise ConfigError(f"block_size of format {self.name!r} must be a positive integer, not {self.block_size!r}")

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        return {
            "weight": nibbles_of_matrix(self.name, shape),
            "weight_scale": TensorSpec.of_matrix("float32", shape, Along("out"), Along("in", self.block_size)),
        }

    def finest(self) -> WeightFormat:
        return self._in_smaller_blocks(_LEAST_BLOCK)

    def sharded(self, shape: Shape, axis: Axis, ranges: Sequence[range]) -> WeightFormat:
        smaller = self._in_smaller_blocks(columns_together(shape, ranges)) if axis == "in" else self
        return super(Bnb4Bit, smaller).sharded(shape, axis, ranges)

    def _in_smaller_blocks(self, columns: int) -> Bnb4Bit:
        """A format with the same values that can be cut at multiples of `columns`; else this one."""
        size = gcd(self.block_size, columns)
        return self if size < _LEAST_BLOCK else Bnb4Bit(self.quant_type, size)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Round to the nearest number of the table."""
        import torch

        blocks = in_groups(weight.float(), self.block_size)
        scale = blocks.abs().amax(dim=2)
        numbers, codes = torch.tensor(TABLES[self.quant_type], device=weight.device).sort()
        nearest = torch.bucketize(blocks / scale.clamp(min=_TINY)[:, :, None], (numbers[1:] + numbers[:-1]) / 2)
        return {
            "weight": pack_nibbles(codes.to(torch.uint8)[nearest].flatten(1)[:, : weight.shape[1]]),
            "weight_scale": scale,
        }

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        values = numbers_of_nibbles(tensors["weight"], TABLES[self.quant_type])
        blocks = in_groups(values, self.block_size)
        return (blocks * tensors["weight_scale"][:, :, None]).flatten(1)[:, : values.shape[1]]
