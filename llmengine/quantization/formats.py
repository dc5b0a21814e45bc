"""Weight formats: the tensors that a stored matrix consists of, as types.

Everything that depends on how weights are stored asks a `WeightFormat`: what a file must hold, how much memory a matrix
takes, how it is cut for a rank of several GPUs, what it is worth in float32. A new format is one class here; the layout
of its tensors (`TensorSpec`) is all that cutting, stacking and sizes need. What multiplies by it is the backends' part.

A matrix is [out_features, in_features], as in `canonical_shapes`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from llmengine.dtypes import DType, ModelDType, dtype_name, item_bytes
from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["out", "in"]
"""An axis of a matrix: its rows or its columns."""

Shape = tuple[int, int]
"""(out_features, in_features)."""

_AXES: tuple[Axis, Axis] = ("out", "in")

_LARGEST_INT8 = 127
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Along:
    """A dimension of a tensor that follows an axis of the matrix, with one entry for every `step` rows or columns.

    The last entry may stand for fewer.
    """

    axis: Axis
    step: int = 1

    def size(self, shape: Shape) -> int:
        """Entries for a whole matrix."""
        return -(-shape[_AXES.index(self.axis)] // self.step)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype and shape of a stored tensor.

    Attributes:
        along: for each dimension, the axis of the matrix that it follows; None where it follows neither. Empty for a
            tensor that is cut along no axis. Specs that differ in this alone are equal.
    """

    dtype: DType
    shape: tuple[int, ...]
    along: tuple[Along | None, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """What a tensor is."""
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape))

    @classmethod
    def of_matrix(cls, dtype: DType, shape: Shape, *dims: Along | int) -> Self:
        """The tensor of a matrix of `shape` with these dimensions; an integer is the size of one along no axis."""
        sizes = tuple(dim if isinstance(dim, int) else dim.size(shape) for dim in dims)
        return cls(dtype, sizes, tuple(None if isinstance(dim, int) else dim for dim in dims))

    @property
    def size_bytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return prod(self.shape) * item_bytes(self.dtype)


class WeightFormat(ABC):
    """How a matrix is stored. Subclasses are frozen dataclasses whose fields, such as a group size, are JSON values.

    Attributes:
        name: in configurations and in the manifests of saved engines; never changed.
    """

    __slots__ = ()

    name: ClassVar[str]

    @abstractmethod
    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        """Suffix -> tensor of a matrix in a model of `dtype`, in the order of a file; "weight" comes first.

        Raises `UnsupportedModelError` for a shape that the format cannot have.
        """

    @abstractmethod
    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors of a dense matrix [out_features, in_features].

        Raises `ConfigError` for a format whose weights have to be calibrated on data.
        """

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The reference: float32 [out_features, in_features], which products are compared with."""

    def size_bytes(self, shape: Shape, dtype: ModelDType) -> int:
        """Bytes of all tensors of a matrix."""
        return sum(spec.size_bytes for spec in self.tensors(shape, dtype).values())

    def cut(self, tensors: Mapping[str, Tensor], shape: Shape, axis: Axis, begin: int, end: int) -> dict[str, Tensor]:
        """Views of the rows ("out") or columns ("in") [begin, end) of a matrix; tensors along neither stay whole.

        Raises `ConfigError` if the cut goes through a group or block of weights that share an entry.
        """
        pieces = {}
        for suffix, spec in self.tensors(shape, "float32").items():
            pieces[suffix] = tensors[suffix]
            for dim, along in enumerate(spec.along):
                if along is not None and along.axis == axis:
                    first, stop = self._entries(along, shape, begin, end)
                    pieces[suffix] = pieces[suffix].narrow(dim, first, stop - first)
        return pieces

    def join(self, pieces: Sequence[Mapping[str, Tensor]], shape: Shape, axis: Axis) -> dict[str, Tensor]:
        """The matrix of `shape` of which `pieces` are consecutive rows ("out") or columns ("in"): undoes `cut`.

        Tensors along neither must be the same in all pieces.
        """
        import torch

        joined = dict(pieces[0])
        for suffix, spec in self.tensors(shape, "float32").items() if len(pieces) > 1 else ():
            dims = [dim for dim, along in enumerate(spec.along) if along is not None and along.axis == axis]
            parts = [piece[suffix] for piece in pieces]
            if dims:
                joined[suffix] = torch.cat(parts, dims[0])
            else:
                assert all(torch.equal(part, parts[0]) for part in parts), f"{suffix} differs between the pieces"
        return joined

    def shard(
        self,
        tensors: Mapping[str, Tensor],
        shape: Shape,
        axis: Axis,
        rank: int,
        num_ranks: int,
        parts: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """What rank `rank` of `num_ranks` holds of a matrix, contiguous: an equal share of its rows or columns.

        Args:
            parts: sizes along `axis` of what is fused in the matrix (q, k and v; gate and up), of each of which a rank
                gets a share; empty: the matrix is one part.

        Raises `ConfigError` if a part, or a group or block of weights that share an entry, cannot be divided so.
        """
        pieces, first = [], 0
        whole = shape[_AXES.index(axis)]
        for size in parts or (whole,):
            if size % num_ranks:
                raise ConfigError(
                    f"parallel_config.tp_size={num_ranks} does not divide the {size} {_WORDS[axis]} of a matrix"
                )
            share = size // num_ranks
            pieces.append(self.cut(tensors, shape, axis, first + rank * share, first + (rank + 1) * share))
            first += size
        shard = (whole // num_ranks, shape[1]) if axis == "out" else (shape[0], whole // num_ranks)
        return {suffix: tensor.contiguous() for suffix, tensor in self.join(pieces, shard, axis).items()}

    def __str__(self) -> str:
        """Name and settings: "int8", or "int4(group_size=128)"."""
        settings = ", ".join(f"{item.name}={getattr(self, item.name)}" for item in _fields(type(self)))
        return f"{self.name}({settings})" if settings else self.name

    def to_json(self) -> dict[str, Any]:
        """The format as `format_from_json` reads it."""
        return {"weights": self.name, **{item.name: getattr(self, item.name) for item in _fields(type(self))}}

    def _entries(self, along: Along, shape: Shape, begin: int, end: int) -> tuple[int, int]:
        size, step = shape[_AXES.index(along.axis)], along.step
        if begin % step or (end % step and end != size):
            raise ConfigError(
                f"a matrix of {shape[0]} x {shape[1]} weights in format {self.name!r} has an entry for every {step} "
                f"{_WORDS[along.axis]}; it cannot be cut at {begin} and {end}: choose another parallel_config.tp_size"
            )
        return begin // step, -(-end // step)


_WORDS: dict[Axis, str] = {"out": "rows", "in": "columns"}


def _fields(kind: type[WeightFormat]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Dense(WeightFormat):
    """A matrix that is not quantized: `weight`, [out, in] in the model's dtype."""

    name: ClassVar[str] = "none"

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec.of_matrix(dtype, shape, Along("out"), Along("in"))}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float()


@dataclass(frozen=True, slots=True)
class Int8PerChannel(WeightFormat):
    """`weight`, int8 [out, in], times `weight_scale`, float32 [out]; the largest weight of each row is 127."""

    name: ClassVar[str] = "int8"

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec.of_matrix("int8", shape, Along("out"), Along("in")),
            "weight_scale": TensorSpec.of_matrix("float32", shape, Along("out")),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        import torch

        weight = weight.float()
        scale = (weight.abs().amax(dim=1) / _LARGEST_INT8).clamp_(min=_TINY)
        return {"weight": (weight / scale[:, None]).round_().to(torch.int8), "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"][:, None]


DENSE = Dense()
INT8 = Int8PerChannel()

FORMATS: Mapping[str, type[WeightFormat]] = {kind.name: kind for kind in (Dense, Int8PerChannel)}
"""Every weight format by its name."""


def format_from_json(values: Mapping[str, Any], where: str) -> WeightFormat:
    """The format that `WeightFormat.to_json` gave; without a name it is dense.

    `where` names the file and key in messages. Raises `UnsupportedModelError` for a format that this version does not
    know, `CorruptFileError` for settings that the format does not have.
    """
    name = values.get("weights", Dense.name)
    kind = FORMATS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedModelError(
            f"{where}: weights in format {name!r} are not supported; supported are: {', '.join(FORMATS)}"
        )
    expected, found = {item.name for item in _fields(kind)}, values.keys() - {"weights"}
    if expected != found:
        raise CorruptFileError(
            f"{where}: format {name!r} has the settings {sorted(expected)}, but these are given: {sorted(found)}"
        )
    return kind(**{key: values[key] for key in expected})
