"""Weights of 4 bits as integers, in groups that share a scale: round-to-nearest, AWQ and GPTQ all end up here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, ClassVar, TypeVar

from llmengine.dtypes import MODEL_DTYPES, ModelDType, torch_dtype
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.quantization.formats import Along, Axis, Shape, TensorSpec, WeightFormat, require_setting
from llmengine.quantization.grid import Grid, GridFormat, in_groups
from llmengine.quantization.quotients import quotient

if TYPE_CHECKING:
    from torch import Tensor

    from llmengine.quantization.int8_groups import Int8Groups

GROUP_SIZES = (16, 32, 64, 128, -1)
"""Weights of a row that share a scale; -1: all of them."""

_MIDDLE = 8
"""The zero point of groups that have none of their own."""
_LARGEST = 15
SHRINKS = tuple(1.0 - 0.05 * step for step in range(11))
"""Fractions of a group's range that its grid may have; the first is the whole range."""

_LEAST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Int4Groups(GridFormat):
    """Unsigned 4-bit integers q, two a byte; a weight is (q - zero point) * scale.

    ::

        weight         uint8 [out, in / 2]: byte j has column 2 j in its low and column 2 j + 1 in its high nibble
        weight_scale   [out, groups] in `scale_dtype`, positive or negative
        zero_point     uint8 [out, groups], integers in [0, 16]; only with zero_points, else it is 8 everywhere
        input_order    int32 [in], only with input_order: stored column j meets activation input_order[j]
        input_scale    float32 [in], only with input_scale: activation i is multiplied by input_scale[i] first

    Groups are of consecutive stored columns; the last one of a row may be shorter. With both, activations are
    multiplied and then reordered, so that `input_scale` is in the order of the activations.

    Attributes:
        group_size: one of `GROUP_SIZES`.
        zero_points: whether groups have zero points (asymmetric).
        input_order: whether columns are stored in another order than they have, as GPTQ's act-order needs it for
            groups to be consecutive. Such a matrix is not cut along its columns.
        input_scale: whether the matrix has factors for its columns, as AWQ needs them where they cannot be folded into
            the weights that the activations come from.
        scale_dtype: of the scales. Files have them in the dtype of their model, and they are kept in it.
    """

    name: ClassVar[str] = "int4"
    usual: ClassVar[Mapping[str, object]] = {"scale_dtype": "float16"}
    group_size: int = 128
    zero_points: bool = True
    input_order: bool = False
    input_scale: bool = False
    scale_dtype: ModelDType = "float16"

    def __post_init__(self) -> None:
        require_setting(self, "group_size", GROUP_SIZES)
        require_setting(self, "scale_dtype", MODEL_DTYPES)
        for name in ("zero_points", "input_order", "input_scale"):
            require_setting(self, name, (False, True))

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        groups = 1 if self.group_size == -1 else Along("in", self.group_size)
        specs = {
            "weight": nibbles_of_matrix(self.name, shape),
            "weight_scale": TensorSpec.of_matrix(self.scale_dtype, shape, Along("out"), groups),
        }
        if self.zero_points:
            specs["zero_point"] = TensorSpec.of_matrix("uint8", shape, Along("out"), groups)
        if self.input_order:
            specs["input_order"] = TensorSpec.of_matrix("int32", shape, Along("in"))
        if self.input_scale:
            specs["input_scale"] = TensorSpec.of_matrix("float32", shape, Along("in"))
        return specs

    def grids(self, weight: Tensor) -> Iterator[Grid]:
        """Yield a grid for each of `SHRINKS`.

        With zero points, the least and largest weight of a group (and 0) are the ends of its range. Without, the weight
        of the largest magnitude is -8, so that no level is lost; the scale may then be negative.
        """
        size = self.columns_of_group(weight.shape[1])
        groups = in_groups(weight, size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        for shrink in SHRINKS:
            yield self._grid(low * shrink, high * shrink, size)

    def _grid(self, low: Tensor, high: Tensor, size: int) -> Grid:
        """The grid of groups whose ranges have these ends, [out, groups]."""
        import torch

        if self.zero_points:
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
            scale = _as_scale(quotient(high - low, _LARGEST), self.scale_dtype).float()
            zero = (-low / scale).round_().clamp_(0, _LARGEST)
        else:
            scale = _as_scale(quotient(torch.where(-low >= high, low, high), -_MIDDLE), self.scale_dtype).float()
            zero = torch.full_like(scale, _MIDDLE)
        return Grid(scale, -zero, _LARGEST - zero, size, torch.round)

    def stored(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        import torch

        size = self.columns_of_group(weight.shape[1])
        values = in_groups(grid.scaled(weight), size).round().sub_(grid.lowest[:, :, None])
        packed = pack_nibbles(values.flatten(1)[:, : weight.shape[1]].to(torch.uint8))
        tensors = {"weight": packed, "weight_scale": grid.scale.to(torch_dtype(self.scale_dtype))}
        if self.zero_points:
            tensors["zero_point"] = (-grid.lowest).to(torch.uint8)
        if self.input_order:
            tensors["input_order"] = torch.arange(weight.shape[1], dtype=torch.int32)
        if self.input_scale:
            tensors["input_scale"] = torch.ones(weight.shape[1])
        return tensors

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        import torch

        values = unpack_nibbles(tensors["weight"]).float()
        columns = values.shape[1]
        groups = in_groups(values, self.columns_of_group(columns))
        zero = tensors["zero_point"].float()[:, :, None] if self.zero_points else float(_MIDDLE)
        weight = groups.sub_(zero).mul_(tensors["weight_scale"].float()[:, :, None]).flatten(1)[:, :columns]
        if self.input_order:
            stored, weight = weight, torch.empty_like(weight)
            weight[:, tensors["input_order"].long()] = stored
        return weight * tensors["input_scale"] if self.input_scale else weight

    def cut(self, tensors: Mapping[str, Tensor], shape: Shape, axis: Axis, begin: int, end: int) -> dict[str, Tensor]:
        refuse_cut_of_order(self, shape, axis, [range(begin, end)])
        return super(Int4Groups, self).cut(tensors, shape, axis, begin, end)

    def finest(self) -> WeightFormat:
        return in_smaller_groups(self, GROUP_SIZES[0])

    def sharded(self, shape: Shape, axis: Axis, ranges: Sequence[range]) -> WeightFormat:
        refuse_cut_of_order(self, shape, axis, ranges)
        smaller = in_smaller_groups(self, columns_together(shape, ranges)) if axis == "in" else self
        return super(Int4Groups, smaller).sharded(shape, axis, ranges)

    def columns_of_group(self, columns: int) -> int:
        """Columns that share a scale, in a matrix of `columns`."""
        return columns if self.group_size == -1 else self.group_size


GroupsT = TypeVar("GroupsT", "Int4Groups", "Int8Groups")


def in_smaller_groups(format: GroupsT, columns: int) -> GroupsT:
    """A format with the same values in which a matrix can be cut at multiples of `columns`, if there is one.

    Weights of a group that is divided have the same scale and zero point as before. Else `format` itself.
    """
    size = gcd(format.group_size, columns)
    if format.group_size == -1 or size not in GROUP_SIZES:
        return format
    return replace(format, group_size=size)


def columns_together(shape: Shape, ranges: Sequence[range]) -> int:
    """The largest number of columns of which all ends of `ranges` are multiples, the end of the matrix aside."""
    return gcd(*(part.start for part in ranges), *(part.stop for part in ranges if part.stop != shape[1]))


def refuse_cut_of_order(format: Int4Groups | Int8Groups, shape: Shape, axis: Axis, ranges: Sequence[range]) -> None:
    """Raise `ConfigError` if columns that are stored in another order than they have would be cut."""
    if axis == "in" and format.input_order and list(ranges) != [range(shape[1])]:
        raise ConfigError(
            f"a matrix of {shape[0]} x {shape[1]} weights in format {format.name!r} has its columns in the order of "
            "GPTQ's act-order; it cannot be cut along them"
        )


def nibbles_of_matrix(format_name: str, shape: Shape) -> TensorSpec:
    """A matrix of 4-bit codes, two a byte: uint8 [out, in / 2]; raises `UnsupportedModelError` for odd columns."""
    if shape[1] % 2:
        raise UnsupportedModelError(
            f"a matrix of {shape[0]} x {shape[1]} weights cannot be stored as {format_name!r}, which has two "
            "columns in a byte: the number of columns must be even"
        )
    return TensorSpec.of_matrix("uint8", shape, Along("out"), Along("in", 2))


def pack_nibbles(values: Tensor) -> Tensor:
    """Integers below 16, uint8 [..., columns], two a byte: [..., columns / 2], even columns in the low nibbles."""
    return values[..., 0::2] | values[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Undoes `pack_nibbles`."""
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def numbers_of_nibbles(packed: Tensor, table: Sequence[float]) -> Tensor:
    """The numbers of a table of 16 whose codes `pack_nibbles` packed: float32 [..., columns]."""
    import torch

    numbers = torch.tensor(table, device=packed.device)
    # A byte is looked up as a pair of numbers: a quarter of the time of looking up each nibble.
    pairs = torch.stack((numbers.repeat(16), numbers.repeat_interleave(16)), dim=1).view(torch.float64).flatten()
    return torch.take(pairs, packed.long()).view(torch.float32)


def _as_scale(scale: Tensor, dtype: ModelDType) -> Tensor:
    """Scales within float16's range, away from zero; weights are rounded to the grid that is stored."""
    import torch

    magnitude = scale.abs().clamp_(_LEAST_SCALE, _LARGEST_SCALE)
    return torch.where(scale < 0, -magnitude, magnitude).half().to(torch_dtype(dtype))
