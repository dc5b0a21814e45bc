"""Linears of quantized checkpoints as tools write them, and what all of their layouts need.

A layout (`packed_layouts`, `scaled_layouts`) knows the tensors of one linear. It checks them, says which `WeightFormat`
has the same integers and scales, and rearranges them into that format's tensors. Nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from llmengine.checkpoints.huggingface_tensors import WEIGHT_DTYPES, StoredTensor
from llmengine.dtypes import DType, ModelDType
from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.fp8 import BLOCK
from llmengine.quantization.int4 import GROUP_SIZES, Int4Groups
from llmengine.quantization.int8 import INT8
from llmengine.quantization.int8_groups import Int8Groups

if TYPE_CHECKING:
    from torch import Tensor

SCALE_DTYPES: tuple[ModelDType, ...] = ("float16", "bfloat16", "float32")
"""Dtypes in which files have scales."""

Scales = Literal["tensor", "channel", "block"]
"""Weights that share a scale: all, those of a row, or 128 x 128."""

Activations = Literal["none", "token", "block", "tensor"]
"""How activations are rounded: not at all; with a scale for each token, or for 128 of its values; with one for all."""


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """One linear of a checkpoint.

    Attributes:
        name: its module, as transformers names it.
        shape: (out_features, in_features), by the architecture.
        where: the directory.
        tensors: its tensors by what follows the module's name ("qweight", "weight.absmax").
        load: reads a tensor as it is stored.
    """

    name: str
    shape: Shape
    where: str
    tensors: Mapping[str, StoredTensor[Any]]
    load: Callable[[StoredTensor[Any]], Tensor]

    def has(self, suffix: str) -> bool:
        """Whether there is a tensor of this name that has elements."""
        return suffix in self.tensors and 0 not in self.tensors[suffix].shape

    def require(self, suffix: str, dtypes: tuple[DType, ...], *shapes: tuple[int, ...]) -> DType:
        """The dtype of a tensor that must be there with one of these dtypes and shapes.

        Raises `CorruptFileError` for one that is missing or misshapen, `UnsupportedModelError` for another dtype.
        """
        stored = self.tensors.get(suffix)
        if stored is None:
            found = ", ".join(sorted(self.tensors)) or "no tensor"
            raise CorruptFileError(
                f"{self.where}: layer {self.name!r}: tensor '{self.name}.{suffix}' is missing; the layer has {found}"
            )
        for dtype in dtypes:
            if stored.dtype == dtype:
                break
        else:
            raise UnsupportedModelError(
                f"{stored.path}: tensor {stored.name!r} has dtype {stored.dtype}, which is not supported; supported: "
                f"{', '.join(dtypes)}"
            )
        if stored.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise CorruptFileError(
                f"{stored.path}: tensor {stored.name!r} has shape {stored.shape}, expected {wanted} for a layer of "
                f"{self.shape[0]} x {self.shape[1]} weights"
            )
        return dtype

    def read(self, suffix: str) -> Tensor:
        """A tensor as it is stored."""
        return self.load(self.tensors[suffix])

    def read_scale(self, suffix: str) -> Tensor:
        """A tensor of factors as it is stored; raises `CorruptFileError` unless all are finite."""
        scale = self.read(suffix)
        if not bool(scale.float().isfinite().all()):
            raise self.damaged(suffix, "has a scale that is not finite")
        return scale

    def read_divisor(self, suffix: str) -> Tensor:
        """A tensor by which numbers are divided, float32; raises `CorruptFileError` unless all are positive."""
        scale = self.read_scale(suffix).float()
        if not bool((scale > 0).all()):
            raise self.damaged(suffix, "has a scale that is not positive")
        return scale

    def damaged(self, suffix: str, reason: str) -> CorruptFileError:
        """The error for a tensor whose values cannot be right."""
        stored = self.tensors[suffix]
        return CorruptFileError(f"{stored.path}: tensor {stored.name!r} {reason}")

    def unsupported(self, reason: str) -> UnsupportedModelError:
        """The error for a linear that no format of ours has."""
        return UnsupportedModelError(f"{self.where}: layer {self.name!r}: {reason}")


class LinearLayout(Protocol):
    """How a tool stores a linear."""

    def stores(self, tensors: Mapping[str, StoredTensor[Any]]) -> bool:
        """Whether a linear with these tensors, as `StoredLinear` has them, is quantized."""

    def format(self, linear: StoredLinear) -> WeightFormat:
        """The weight format of a linear, whose tensors are checked."""

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        """The tensors of that format, new and contiguous."""

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        """Those that belong to no row; they must be equal for linears to become one matrix."""

    def by_row(self) -> Self:
        """The layout with a scale for each row where a linear has one, which it must have within a larger matrix."""


class Layout:
    """What most layouts have in common.

    Attributes:
        main: the tensor that has the weights.
    """

    __slots__ = ()

    @property
    def main(self) -> str:
        """ "weight", in a dtype that a dense linear cannot have, unless the layout has a name of its own for it."""
        return "weight"

    def stores(self, tensors: Mapping[str, StoredTensor[Any]]) -> bool:
        weight = tensors.get("weight")
        if weight is None:
            return self.main in tensors
        return self.main == "weight" and weight.dtype not in WEIGHT_DTYPES

    def by_row(self) -> Self:
        return self

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return {}


def num_groups(linear: StoredLinear, group_size: int, *, divides: bool = False) -> int:
    """Groups of a row; raises `UnsupportedModelError` if the size must divide the number of inputs and does not."""
    columns = linear.shape[1]
    if group_size == -1:
        return 1
    if divides and columns % group_size:
        raise linear.unsupported(f"group_size={group_size} does not divide its {columns} inputs")
    return -(-columns // group_size)


def scale_shapes(scales: Scales, linear: StoredLinear, groups: int = 1) -> list[tuple[int, ...]]:
    """Shapes in which files have scales."""
    rows, columns = linear.shape
    if scales == "tensor":
        return [(1,), (), (1, 1)]
    if scales == "block":
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        return [blocks, (blocks[0], 1, blocks[1], 1)]
    return [(rows, groups)] if groups > 1 else [(rows, 1), (rows,)]


def integer_format(
    linear: StoredLinear, bits: int, group_size: int, zero_points: bool, has_order: bool, scale_dtype: DType
) -> WeightFormat:
    """The format of integers in groups; raises `UnsupportedModelError` for a group size that none has."""
    size = -1 if group_size not in GROUP_SIZES and group_size >= linear.shape[1] else group_size
    if bits == 8 and size == -1 and not zero_points:
        return INT8
    kind = Int4Groups if bits == 4 else Int8Groups
    dtype = next(dtype for dtype in SCALE_DTYPES if dtype == scale_dtype)
    try:
        stored = kind(size, zero_points, has_order, scale_dtype=dtype)
        stored.tensors(linear.shape, "float32")
    except ConfigError as error:
        listed = ", ".join(map(str, GROUP_SIZES))
        raise linear.unsupported(f"group_size={group_size} is not supported; supported: {listed}") from error
    except UnsupportedModelError as error:
        raise linear.unsupported(str(error)) from error
    return stored
