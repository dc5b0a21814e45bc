"""Weight formats: the tensors that a stored matrix consists of, as types.

Everything that depends on how weights are stored asks a `WeightFormat`: what a file must hold, how much memory a matrix
takes, how it is cut for a rank of several GPUs, what it is worth in float32. A new format is one class here; the layout
of its tensors (`TensorSpec`) is all that cutting, stacking and sizes need. What multiplies by it is the backends' part.
This module has the base and the dense format; the other formats are in modules beside it, and `known_formats`
lists them all.

A matrix is [out_features, in_features], as in `canonical_shapes`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm, prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from llmengine.dtypes import DType, ModelDType, dtype_name, item_bytes
from llmengine.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Axis = Literal["out", "in"]
"""An axis of a matrix: its rows or its columns."""

Shape = tuple[int, int]
"""(out_features, in_features)."""

_AXES: tuple[Axis, Axis] = ("out", "in")


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

    A constructor raises `ConfigError` for a setting that the format does not have. Manifests list every field; a field
    that is added later needs a default with the meaning of the manifests before it.

    Attributes:
        name: in configurations and in the manifests of saved engines; never changed.
        usual: values of settings that need no mention to people.
    """

    __slots__ = ()

    name: ClassVar[str]
    usual: ClassVar[Mapping[str, object]] = {}

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
        """The reference: float32 [out_features, in_features], which products are compared with.

        Activations are multiplied by it as they come: it includes every factor of a column, and its columns are in the
        order of the activations.
        """

    def rounded_activations(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Activations [num_tokens, in_features] with the values that a product computes with, in float32.

        They are `x` itself unless the format quantizes activations. A row depends on no other row.
        """
        return x.float()

    def dequantized_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, max_weights: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, `dequantize` of the rows from it on) for the whole matrix.

        Each part has up to `max_weights` weights, or a single row, or the fewest rows that share an entry.
        """
        specs = self.tensors(shape, "float32").values()
        step = max(along.step for spec in specs for along in spec.along if along is not None and along.axis == "out")
        num_rows = max(1, max_weights // (shape[1] * step)) * step
        for begin in range(0, shape[0], num_rows):
            yield begin, self.dequantize(self.cut(tensors, shape, "out", begin, min(begin + num_rows, shape[0])))

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

    def finest(self) -> WeightFormat:
        """The format with the same values in which a matrix can be cut in the most places; see `sharded`."""
        return self

    def step(self, axis: Axis) -> int:
        """Rows or columns between the places where a matrix can be cut without another format."""
        specs = self.tensors((0, 0), "float32").values()
        return lcm(*(along.step for spec in specs for along in spec.along if along is not None and along.axis == axis))

    def rounds_alone(self, axis: Axis) -> bool:
        """Whether `quantize` gives rows ("out") or columns ("in") alone what they have in the whole matrix."""
        specs = self.tensors((0, 0), "float32").values()
        return all(any(along is not None and along.axis == axis for along in spec.along) for spec in specs)

    def sharded(self, shape: Shape, axis: Axis, ranges: Sequence[range]) -> WeightFormat:
        """The format of what a rank holds of a matrix of `shape`: these rows or columns, one range behind the other.

        It is this format wherever that can be. Raises `ConfigError` if a range cuts through weights that share an entry
        and no other format has the same values.
        """
        for spec in self.tensors(shape, "float32").values():
            for along in spec.along:
                if along is not None and along.axis == axis:
                    for part in ranges:
                        self._entries(along, shape, part.start, part.stop)
        return self

    def shard(self, suffix: str, tensor: Tensor, shape: Shape, axis: Axis, ranges: Sequence[range]) -> Tensor:
        """What a rank holds of the tensor `suffix` of a matrix of `shape`: a new tensor in the format `sharded`.

        A tensor that does not follow `axis` is returned as it is.
        """
        import torch

        dim, steps = self._shard_steps(suffix, shape, axis, ranges)
        if dim is None:
            return tensor
        if steps[0] == steps[1]:
            entries = (tensor.narrow(dim, *_entries_of(part, steps[0])) for part in ranges)
            return torch.cat(list(entries), dim)
        return tensor.index_select(dim, _repeated_entries(ranges, *steps))

    def unshard(
        self, suffix: str, piece: Tensor, whole: Tensor, shape: Shape, axis: Axis, ranges: Sequence[range]
    ) -> None:
        """Undo `shard`: write what a rank holds to its place in the tensor `whole`."""
        dim, steps = self._shard_steps(suffix, shape, axis, ranges)
        if dim is None:
            whole.copy_(piece)
        elif steps[0] == steps[1]:
            position = 0
            for part in ranges:
                first, count = _entries_of(part, steps[0])
                whole.narrow(dim, first, count).copy_(piece.narrow(dim, position, count))
                position += count
        else:
            whole.index_copy_(dim, _repeated_entries(ranges, *steps), piece)

    def _shard_steps(
        self, suffix: str, shape: Shape, axis: Axis, ranges: Sequence[range]
    ) -> tuple[int | None, tuple[int, int]]:
        """Dimension of a tensor that follows `axis`, None if none does, and its step here and in a rank's tensor."""
        held = sum(map(len, ranges))
        shard = (held, shape[1]) if axis == "out" else (shape[0], held)
        specs = self.tensors(shape, "float32"), self.sharded(shape, axis, ranges).tensors(shard, "float32")
        for dim, (along, in_shard) in enumerate(zip(specs[0][suffix].along, specs[1][suffix].along, strict=True)):
            if along is not None and along.axis == axis:
                assert in_shard is not None
                return dim, (along.step, in_shard.step)
        return None, (1, 1)

    def __str__(self) -> str:
        """Name and settings for people and for keys: "int8", or "int4(group_size=128, zero_points)"."""
        values = {item.name: getattr(self, item.name) for item in settings(type(self))}
        values = {name: value for name, value in values.items() if self.usual.get(name) != value}
        texts = [name if value is True else f"{name}={value}" for name, value in values.items() if value is not False]
        return f"{self.name}({', '.join(texts)})" if texts else self.name

    def to_json(self) -> dict[str, Any]:
        """The format as `known_formats.format_from_json` reads it."""
        return {"weights": self.name, **{item.name: getattr(self, item.name) for item in settings(type(self))}}

    def _entries(self, along: Along, shape: Shape, begin: int, end: int) -> tuple[int, int]:
        size, step = shape[_AXES.index(along.axis)], along.step
        if begin % step or (end % step and end != size):
            raise ConfigError(
                f"a matrix of {shape[0]} x {shape[1]} weights in format {self.name!r} has an entry for every {step} "
                f"{_WORDS[along.axis]}; it cannot be cut at {begin} and {end}"
            )
        return begin // step, -(-end // step)


def _entries_of(part: range, step: int) -> tuple[int, int]:
    """First entry and number of entries of a range of rows or columns that begins with an entry."""
    return part.start // step, -(-len(part) // step)


def _repeated_entries(ranges: Sequence[range], step: int, step_in_shard: int) -> Tensor:
    """For each entry of a rank's tensor, the entry of the whole tensor that it repeats."""
    import torch

    return torch.cat([torch.arange(part.start, part.stop, step_in_shard) // step for part in ranges])


_WORDS: dict[Axis, str] = {"out": "rows", "in": "columns"}


def settings(kind: type[WeightFormat]) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a format, which are its settings in manifests."""
    return dataclasses.fields(kind)  # type: ignore[arg-type]


def require_setting(given: WeightFormat, name: str, choices: tuple[object, ...]) -> None:
    """Raise `ConfigError` unless the field `name` of a format has one of these values, and their type."""
    value = getattr(given, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ConfigError(f"{name} of format {given.name!r} must be one of {listed}, not {value!r}")


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


DENSE = Dense()
