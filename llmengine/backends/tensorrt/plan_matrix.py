"""How plans read the matrices of a weight format: the tensors that they take, made from those that are stored.

TensorRT dequantizes by a layer of its own, which takes signed numbers and scales without zero points. A plan's tensors
have the values of the stored ones::

    weight            [out, in] in the model's dtype, int8, float8_e4m3fn or int4 (two columns in a byte); [in, out]
                      where rows, or all weights, have one scale (`is_transposed`)
    weight_scale      float32 [] or [out]; or of blocks, [out / rows, in / columns]
    zero_term         float32 [out, groups]: what groups with zero points add to each weight
    input_order, input_scale, activation_scale    as they are stored

Blocks divide a matrix: groups of 128 that do not divide its columns become groups of 64, 32 or 16 with the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Literal

from llmengine.dtypes import DType, ModelDType, torch_dtype
from llmengine.errors import ConfigError
from llmengine.quantization.formats import Dense, Shape, TensorSpec, WeightFormat
from llmengine.quantization.fp8 import BLOCK, Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import Int8PerChannel, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.stacked import Stacked

if TYPE_CHECKING:
    from torch import Tensor

PlanDType = DType | Literal["int4"]
"""The dtype of a plan's tensor."""

Block = tuple[int, int]
"""Rows and columns of weights that share a scale."""

LARGEST: Mapping[PlanDType, float] = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""The largest number that activations are rounded to."""

LEAST_SCALE = 1e-30
"""Least scale of a token's activations, which may all be 0."""

_LEAST_CAPABILITY: Mapping[PlanDType, int] = {"int4": 80, "float8_e4m3fn": 89}
_LEAST_BLOCK = 16
_INSTEAD = "use quant_config.weights='int8', 'int4', 'fp8' or 'none', or backend='torch'"


@dataclass(frozen=True, slots=True)
class PlanMatrix:
    """A matrix as a plan multiplies by it, or a part of one that is `Stacked`.

    Attributes:
        shape: (out_features, in_features).
        values: dtype of the weights in the plan; the model's for a dense matrix.
        scale_dtype: None for a dense matrix.
        block: weights that share a scale; all columns for a scale of each row, the whole shape for one scale.
        activations: how activations are rounded: "token" and "block" (128 columns of a token) with scales that are
            found at run time, "tensor" with one that is stored.
        has_zeros: weights have `zero_term`.
    """

    format: WeightFormat
    shape: Shape
    dtype: ModelDType
    values: PlanDType
    scale_dtype: ModelDType | None = None
    block: Block = (0, 0)
    activations: Literal["none", "token", "block", "tensor"] = "none"
    has_zeros: bool = False
    has_input_order: bool = False
    has_input_scale: bool = False

    @classmethod
    def of(cls, weight_format: WeightFormat, shape: Shape, dtype: ModelDType) -> PlanMatrix:
        """The form of a matrix in a plan that computes in `dtype`; raises `ConfigError` for a format without one."""
        row, whole = (1, shape[1]), shape
        if isinstance(weight_format, Dense):
            return cls(weight_format, shape, dtype, dtype)
        if isinstance(weight_format, Int8PerChannel):
            return cls(weight_format, shape, dtype, "int8", "float32", row)
        if isinstance(weight_format, Int8W8A8):
            block = row if weight_format.scales == "channel" else whole
            return cls(
                *(weight_format, shape, dtype, "int8", "float32", block, weight_format.activations),
                has_input_scale=weight_format.input_scale,
            )
        if isinstance(weight_format, Int4Groups | Int8Groups):
            return _of_groups(weight_format, shape, dtype)
        if isinstance(weight_format, Fp8):
            scales = {"tensor": whole, "channel": row}
            block = scales[weight_format.scales] if weight_format.scales in scales else _fp8_block(weight_format, shape)
            return cls(
                weight_format, shape, dtype, "float8_e4m3fn", "float32", block, activations=weight_format.activations
            )
        raise ConfigError(f"TensorRT plans have no product with weights in format {str(weight_format)!r}; {_INSTEAD}")

    @property
    def least_capability(self) -> int:
        """The least compute capability, as 89 for 8.9, of a GPU that the product is built for."""
        return _LEAST_CAPABILITY.get(self.values, 0)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is [in, out] in the plan."""
        return _is_transposed(self.format)

    @property
    def is_blocked(self) -> bool:
        """Whether scales have two dimensions; those of 4 bits always have."""
        return self.values == "int4" or self.block not in ((0, 0), (1, self.shape[1]), self.shape)

    @property
    def num_groups(self) -> int:
        """Groups of columns with a scale each."""
        return self.shape[1] // self.block[1]

    def tensors(self) -> dict[str, tuple[PlanDType, tuple[int, ...]]]:
        """Suffix -> dtype and shape in the plan, "weight" first."""
        rows, columns = self.shape
        shape = (columns, rows) if self.is_transposed else self.shape
        found: dict[str, tuple[PlanDType, tuple[int, ...]]] = {"weight": (self.values, shape)}
        if self.scale_dtype is not None:
            scales: tuple[int, ...] = (rows // self.block[0], self.num_groups)
            if not self.is_blocked:
                scales = () if self.block == self.shape else (rows,)
            found["weight_scale"] = (self.scale_dtype, scales)
        if self.has_zeros:
            found["zero_term"] = ("float32", (rows, self.num_groups))
        if self.has_input_order:
            found["input_order"] = ("int32", (columns,))
        if self.has_input_scale:
            found["input_scale"] = ("float32", (columns,))
        if self.activations == "tensor":
            found["activation_scale"] = ("float32", (1,))
        return found

    def converted(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The plan's tensors, made from those of the format; a tensor that needs no change is the stored one."""
        made = dict(stored)
        if isinstance(self.format, Int4Groups | Int8Groups):
            made |= _signed(self.format, self, stored)
        elif isinstance(self.format, Fp8) and self.format.scales == "block":
            made["weight_scale"] = self._per_block(stored["weight_scale"], (BLOCK, BLOCK))
        if self.is_transposed:
            made["weight"] = made["weight"].T.contiguous()
        specs = self.tensors()
        return {suffix: made[suffix].view(stored_spec(*specs[suffix]).shape) for suffix in specs}

    def per_weight(self, entries: Tensor, first: int = 0, end: int | None = None) -> Tensor:
        """What rows [first, end) of the matrix have of a tensor with an entry for each block: [rows, in]."""
        if not self.is_blocked:
            entries = entries.view(-1, 1).expand(self.shape[0], 1)
        else:
            entries = entries.repeat_interleave(self.block[0], dim=0)
        return entries[first:end].repeat_interleave(self.block[1], dim=1)

    def dequantized_rows(self, tensors: Mapping[str, Tensor], first: int, end: int) -> Tensor:
        """Rows of the matrix that the plan's product dequantizes, float64 [rows, in], columns as they are stored.

        Neither `zero_term` nor factors of columns are in them.

        Args:
            tensors: of the plan.
        """
        from llmengine.quantization.int4 import unpack_nibbles

        weight = (tensors["weight"].T if self.is_transposed else tensors["weight"])[first:end]
        if self.scale_dtype is None:
            return weight.double()
        numbers = (unpack_nibbles(weight) ^ 8).double() - 8 if self.values == "int4" else weight.double()
        return numbers * self.per_weight(tensors["weight_scale"], first, end).double()

    def _per_block(self, entries: Tensor, stored: Block) -> Tensor:
        """Entries of stored blocks, the last of which may be smaller, as those of the plan's blocks."""
        rows, columns = (size // block for size, block in zip(self.shape, self.block, strict=True))
        entries = entries.repeat_interleave(stored[0] // self.block[0], dim=0)[:rows]
        return entries.repeat_interleave(stored[1] // self.block[1], dim=1)[:, :columns].contiguous()


def stored_spec(dtype: PlanDType, shape: tuple[int, ...]) -> TensorSpec:
    """The tensor on the device, and in torch, for one of a plan."""
    if dtype == "int4":
        return TensorSpec("uint8", (*shape[:-1], shape[-1] // 2))
    return TensorSpec(dtype, shape)


def plan_parts(weight_format: WeightFormat, shape: Shape, dtype: ModelDType) -> dict[str, PlanMatrix]:
    """The parts of a matrix, one above the other, by what their tensors' names end with: "" for the first or only one.

    Raises `ConfigError` for a format that plans have no product with.
    """
    if not isinstance(weight_format, Stacked):
        return {"": PlanMatrix.of(weight_format, shape, dtype)}
    shapes = weight_format.part_shapes(shape)
    return {
        f"_{index}" if index else "": PlanMatrix.of(part.format, shapes[index], dtype)
        for index, part in enumerate(weight_format.parts)
    }


def matrix_shape(weight_format: WeightFormat, weights: Sequence[tuple[int, ...]]) -> Shape:
    """(out_features, in_features) of a matrix whose parts have weights of these shapes in the plan."""
    formats = [part.format for part in weight_format.parts] if isinstance(weight_format, Stacked) else [weight_format]
    shapes = [shape[::-1] if _is_transposed(item) else shape for item, shape in zip(formats, weights, strict=True)]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def plan_tensors(
    weight_format: WeightFormat, shape: Shape, dtype: ModelDType, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Suffix -> tensor of a matrix as plans read it, made from the stored tensors."""
    parts = plan_parts(weight_format, shape, dtype)
    pieces = weight_format.split(stored) if isinstance(weight_format, Stacked) else [stored]
    return {
        suffix + end: tensor
        for (end, part), piece in zip(parts.items(), pieces, strict=True)
        for suffix, tensor in part.converted(piece).items()
    }


def _is_transposed(weight_format: WeightFormat) -> bool:
    """Whether a plan reads the weight as [in, out]: as [out, in], TensorRT would copy all of it in each execution.

    It dequantizes blocks into a buffer all the same, unless they are constants of 4 bits.
    """
    is_fp8 = isinstance(weight_format, Fp8) and weight_format.scales != "block"
    is_rows = isinstance(weight_format, Int8Groups) and weight_format.group_size == -1
    return is_fp8 or is_rows or isinstance(weight_format, Int8PerChannel | Int8W8A8)


def _of_groups(weight_format: Int4Groups | Int8Groups, shape: Shape, dtype: ModelDType) -> PlanMatrix:
    is_int4 = isinstance(weight_format, Int4Groups)
    scale_dtype = weight_format.scale_dtype
    if weight_format.group_size != -1:
        columns = _divisor(weight_format, weight_format.group_size, shape)
    elif is_int4:  # a scale for each row: blocks are what dequantizes 4 bits
        columns = _divisor(weight_format, BLOCK, shape)
    else:
        columns = shape[1]
    is_blocked = columns != shape[1] or is_int4
    # Dequantizing 4 bits takes scales of its result's dtype, and other blocks either that or float32.
    scale_dtype = dtype if is_int4 or (is_blocked and scale_dtype == dtype) else "float32"
    return PlanMatrix(
        *(weight_format, shape, dtype, "int4" if is_int4 else "int8", scale_dtype, (1, columns)),
        has_zeros=weight_format.zero_points,
        has_input_order=weight_format.input_order,
        has_input_scale=isinstance(weight_format, Int4Groups) and weight_format.input_scale,
    )


def _fp8_block(weight_format: WeightFormat, shape: Shape) -> Block:
    columns = _divisor(weight_format, BLOCK, shape)
    is_whole = shape[0] % BLOCK == 0 and columns == BLOCK
    return (BLOCK if is_whole else 1, columns)


def _divisor(weight_format: WeightFormat, group_size: int, shape: Shape) -> int:
    """The largest group that divides the columns and that groups of `group_size` consist of."""
    columns = gcd(group_size, shape[1])
    if columns < _LEAST_BLOCK:
        raise ConfigError(
            f"TensorRT plans have no product with weights in format {str(weight_format)!r} in a matrix of {shape[0]} x "
            f"{shape[1]}, whose columns are not divisible by {_LEAST_BLOCK}; use quant_config.weights='int8', or "
            "backend='torch'"
        )
    return columns


def _signed(
    weight_format: Int4Groups | Int8Groups, matrix: PlanMatrix, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Unsigned numbers less half their range, and for zero points other than that half the terms that remain."""
    import torch

    is_int4 = matrix.values == "int4"
    size = weight_format.group_size if weight_format.group_size != -1 else -(-matrix.shape[1] // BLOCK) * BLOCK
    if not matrix.is_blocked and not is_int4:
        size = matrix.shape[1]
    weight, scale = stored["weight"], matrix._per_block(stored["weight_scale"], (1, size))
    made = {
        "weight": weight ^ 0x88 if is_int4 else (weight ^ 0x80).view(torch.int8),
        "weight_scale": scale.to(torch_dtype(matrix.scale_dtype or "float32")),
    }
    if matrix.has_zeros:
        zero = matrix._per_block(stored["zero_point"], (1, size))
        made["zero_term"] = ((8 if is_int4 else 128) - zero.float()) * made["weight_scale"].float()
    return made
