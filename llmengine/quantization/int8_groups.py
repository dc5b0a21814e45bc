"""Weights of 8 bits as integers, in groups that share a scale: what GPTQ and compressed-tensors files have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmengine.dtypes import MODEL_DTYPES, ModelDType, torch_dtype
from llmengine.quantization.formats import Along, Axis, Shape, TensorSpec, WeightFormat, require_setting
from llmengine.quantization.int4 import GROUP_SIZES, columns_together, in_smaller_groups, refuse_cut_of_order
from llmengine.quantization.quotients import quotient

if TYPE_CHECKING:
    from torch import Tensor

_MIDDLE = 128
"""The zero point of groups that have none of their own."""
_LARGEST = 255
_LEAST_SCALE = 2.0**-24
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True, slots=True)
class Int8Groups(WeightFormat):
    """Unsigned 8-bit integers q; a weight is (q - zero point) * scale.

    ::

        weight         uint8 [out, in]
        weight_scale   [out, groups] in `scale_dtype`, positive or negative
        zero_point     uint8 [out, groups]; only with zero_points, else it is 128 everywhere
        input_order    int32 [in], only with input_order: stored column j meets activation input_order[j]

    Groups are of consecutive stored columns; the last one of a row may be shorter. The settings are those of
    `Int4Groups`. A matrix with one scale a row and no zero points is rather an `Int8PerChannel`.
    """

    name: ClassVar[str] = "int8-groups"
    usual: ClassVar[Mapping[str, object]] = {"scale_dtype": "float16"}
    group_size: int = 128
    zero_points: bool = True
    input_order: bool = False
    scale_dtype: ModelDType = "float16"

    def __post_init__(self) -> None:
        require_setting(self, "group_size", GROUP_SIZES)
        require_setting(self, "scale_dtype", MODEL_DTYPES)
        for name in ("zero_points", "input_order"):
            require_setting(self, name, (False, True))

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        groups = 1 if self.group_size == -1 else Along("in", self.group_size)
        specs = {
            "weight": TensorSpec.of_matrix("uint8", shape, Along("out"), Along("in")),
            "weight_scale": TensorSpec.of_matrix(self.scale_dtype, shape, Along("out"), groups),
        }
        if self.zero_points:
            specs["zero_point"] = TensorSpec.of_matrix("uint8", shape, Along("out"), groups)
        if self.input_order:
            specs["input_order"] = TensorSpec.of_matrix("int32", shape, Along("in"))
        return specs

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest, columns in their own order, with the grids of `Int4Groups.quantize`."""
        import torch
        import torch.nn.functional as F

        weight = weight.float()
        columns = weight.shape[1]
        size = columns if self.group_size == -1 else self.group_size
        groups = F.pad(weight, (0, -columns % size)).view(weight.shape[0], -1, size)
        low, high = groups.amin(dim=2), groups.amax(dim=2)
        if self.zero_points:
            low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
            exact = quotient(high - low, _LARGEST)
        else:
            exact = quotient(torch.where(-low >= high, low, high), -_MIDDLE)
        magnitude = exact.abs().clamp_(_LEAST_SCALE, _LARGEST_SCALE)
        scale = torch.where(exact < 0, -magnitude, magnitude).to(torch_dtype(self.scale_dtype))
        zero = torch.full_like(low, _MIDDLE)
        if self.zero_points:
            zero = (-low / scale.float()).round_().clamp_(0, _LARGEST)
        values = (groups / scale.float()[:, :, None]).round_().add_(zero[:, :, None]).clamp_(0, _LARGEST)
        tensors = {"weight": values.flatten(1)[:, :columns].to(torch.uint8).contiguous(), "weight_scale": scale}
        if self.zero_points:
            tensors["zero_point"] = zero.to(torch.uint8)
        if self.input_order:
            tensors["input_order"] = torch.arange(columns, dtype=torch.int32)
        return tensors

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        import torch

        weight = tensors["weight"].float()
        columns = weight.shape[1]
        size = columns if self.group_size == -1 else self.group_size
        weight -= _per_column(tensors["zero_point"], size, columns) if self.zero_points else float(_MIDDLE)
        weight *= _per_column(tensors["weight_scale"], size, columns)
        if self.input_order:
            stored, weight = weight, torch.empty_like(weight)
            weight[:, tensors["input_order"].long()] = stored
        return weight

    def cut(self, tensors: Mapping[str, Tensor], shape: Shape, axis: Axis, begin: int, end: int) -> dict[str, Tensor]:
        refuse_cut_of_order(self, shape, axis, [range(begin, end)])
        return super(Int8Groups, self).cut(tensors, shape, axis, begin, end)

    def finest(self) -> WeightFormat:
        return in_smaller_groups(self, GROUP_SIZES[0])

    def sharded(self, shape: Shape, axis: Axis, ranges: Sequence[range]) -> WeightFormat:
        refuse_cut_of_order(self, shape, axis, ranges)
        smaller = in_smaller_groups(self, columns_together(shape, ranges)) if axis == "in" else self
        return super(Int8Groups, smaller).sharded(shape, axis, ranges)


def _per_column(entries: Tensor, size: int, columns: int) -> Tensor:
    """What groups of `size` columns have, [rows, groups], for each column: float32 [rows, columns]."""
    return entries.float().repeat_interleave(size, dim=1)[:, :columns]
