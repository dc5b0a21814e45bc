"""A matrix whose parts have formats of their own, one above the other.

Checkpoints may store in different formats what is one matrix here: a GGUF file of type Q4_K_M has q and k in Q4_K and
v in Q6_K. Nothing is quantized again to make them equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Self

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.quantization.formats import Axis, Shape, TensorSpec, WeightFormat
from llmengine.quantization.matrix import Matrix

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StackedPart:
    """One part of a `Stacked` matrix.

    Attributes:
        share: its rows, in proportion to those of the other parts.
    """

    share: int
    format: WeightFormat


@dataclass(frozen=True, slots=True)
class Stacked(WeightFormat):
    """Parts stacked along the rows, each with the tensors of its own format.

    The tensors of the first part keep their names ("weight"); those of a later one end with its number ("weight_1").
    Parts have proportions rather than numbers of rows: an equal share of every part, as a rank of several often holds,
    then has the same format as the whole.
    """

    name: ClassVar[str] = "stacked"
    parts: tuple[StackedPart, ...]

    def __post_init__(self) -> None:
        if any(isinstance(part.format, Stacked) for part in self.parts):
            raise ConfigError(f"the parts of a matrix in format {self.name!r} must not have parts themselves")

    @classmethod
    def of_rows(cls, parts: Sequence[tuple[int, WeightFormat]]) -> Self:
        """The format of a matrix whose parts have these numbers of rows."""
        unit = gcd(*(rows for rows, _ in parts))
        return cls(tuple(StackedPart(rows // unit, part) for rows, part in parts))

    def part_shapes(self, shape: Shape) -> list[Shape]:
        """The shape of each part of a matrix of `shape`."""
        total = sum(part.share for part in self.parts)
        if shape[0] % total:
            raise UnsupportedModelError(
                f"a matrix of {shape[0]} x {shape[1]} weights cannot be stored as {self.name!r} in {total} equal "
                "shares of its rows"
            )
        return [(shape[0] // total * part.share, shape[1]) for part in self.parts]

    def split(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of each part, under the names that its own format gives them."""
        split: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for name, tensor in tensors.items():
            index, suffix = _part_of(name)
            split[index][suffix] = tensor
        return split

    def matrices(self, tensors: Mapping[str, Tensor], shape: Shape) -> list[Matrix]:
        """The parts of a matrix of `shape`."""
        pieces = zip(self.parts, self.part_shapes(shape), self.split(tensors), strict=True)
        return [Matrix(part.format, part_shape, piece) for part, part_shape, piece in pieces]

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        shapes = self.part_shapes(shape)
        return {
            _numbered(suffix, index): spec
            for index, part in enumerate(self.parts)
            for suffix, spec in part.format.tensors(shapes[index], dtype).items()
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        shapes = self.part_shapes((weight.shape[0], weight.shape[1]))
        pieces = weight.split([rows for rows, _ in shapes])
        return stacked_tensors(part.format.quantize(piece) for part, piece in zip(self.parts, pieces, strict=True))

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        import torch

        pieces = zip(self.parts, self.split(tensors), strict=True)
        return torch.cat([part.format.dequantize(piece) for part, piece in pieces])

    def dequantized_rows(
        self, tensors: Mapping[str, Tensor], shape: Shape, max_weights: int
    ) -> Iterator[tuple[int, Tensor]]:
        first = 0
        for part in self.matrices(tensors, shape):
            for row, weight in part.format.dequantized_rows(part.tensors, part.shape, max_weights):
                yield first + row, weight
            first += part.shape[0]

    def cut(self, tensors: Mapping[str, Tensor], shape: Shape, axis: Axis, begin: int, end: int) -> dict[str, Tensor]:
        """Views of columns of every part. Rows are cut by `shard`, since a range of them has other proportions."""
        if axis == "out" and (begin, end) != (0, shape[0]):
            raise ConfigError(
                f"a matrix of {shape[0]} x {shape[1]} weights in format {self.name!r} has parts in different formats; "
                f"it cannot be cut at rows {begin} and {end}"
            )
        if axis == "out":
            return dict(tensors)
        parts = self.matrices(tensors, shape)
        return stacked_tensors(part.format.cut(part.tensors, part.shape, axis, begin, end) for part in parts)

    def join(self, pieces: Sequence[Mapping[str, Tensor]], shape: Shape, axis: Axis) -> dict[str, Tensor]:
        """Undoes `cut` along the columns. Along the rows, each part gets those of the same part of all pieces."""
        split = [self.split(piece) for piece in pieces]
        shapes = self.part_shapes(shape)
        return stacked_tensors(
            part.format.join([piece[index] for piece in split], shapes[index], axis)
            for index, part in enumerate(self.parts)
        )

    def finest(self) -> WeightFormat:
        return Stacked(tuple(StackedPart(part.share, part.format.finest()) for part in self.parts))

    def sharded(self, shape: Shape, axis: Axis, ranges: Sequence[range]) -> WeightFormat:
        """See `WeightFormat.sharded`; each range of rows lies within a part, of which every rank holds some."""
        held = self._ranges_of_parts(shape, axis, ranges)
        shapes = self.part_shapes(shape)
        formats = [
            part.format.sharded(part_shape, axis, own)
            for part, part_shape, own in zip(self.parts, shapes, held, strict=True)
        ]
        rows = [sum(map(len, own)) if axis == "out" else size for own, (size, _) in zip(held, shapes, strict=True)]
        return Stacked.of_rows(list(zip(rows, formats, strict=True)))

    def shard(self, suffix: str, tensor: Tensor, shape: Shape, axis: Axis, ranges: Sequence[range]) -> Tensor:
        index, own = _part_of(suffix)
        held = self._ranges_of_parts(shape, axis, ranges)[index]
        return self.parts[index].format.shard(own, tensor, self.part_shapes(shape)[index], axis, held)

    def unshard(
        self, suffix: str, piece: Tensor, whole: Tensor, shape: Shape, axis: Axis, ranges: Sequence[range]
    ) -> None:
        index, own = _part_of(suffix)
        held = self._ranges_of_parts(shape, axis, ranges)[index]
        self.parts[index].format.unshard(own, piece, whole, self.part_shapes(shape)[index], axis, held)

    def _ranges_of_parts(self, shape: Shape, axis: Axis, ranges: Sequence[range]) -> list[Sequence[range]]:
        """For each part the ranges of its own rows or columns that a rank holds."""
        if axis == "in":
            return [ranges] * len(self.parts)
        held: list[Sequence[range]] = []
        first = 0
        for rows, _ in self.part_shapes(shape):
            inside = [part for part in ranges if first <= part.start and part.stop <= first + rows]
            held.append([range(part.start - first, part.stop - first) for part in inside])
            first += rows
        if not all(held) or sum(map(len, held)) != len(ranges):
            raise ConfigError(
                f"a matrix of {shape[0]} x {shape[1]} weights in format {self.name!r} has parts in different formats; "
                f"it cannot be cut at {' and '.join(f'rows {part.start} to {part.stop}' for part in ranges)}"
            )
        return held

    def __str__(self) -> str:
        """For people: "stacked(gguf-q4_k, gguf-q4_k, gguf-q6_k)"."""
        return f"{self.name}({', '.join(part.format.name for part in self.parts)})"

    def to_json(self) -> dict[str, Any]:
        parts = [{"share": part.share, **part.format.to_json()} for part in self.parts]
        return {"weights": self.name, "parts": parts}


def _numbered(suffix: str, index: int) -> str:
    return f"{suffix}_{index}" if index else suffix


def _part_of(name: str) -> tuple[int, str]:
    """Undoes `_numbered`: the part's index, and the suffix that its own format gives a tensor."""
    suffix, _, number = name.rpartition("_")
    return (int(number), suffix) if number.isdigit() else (0, name)


def stacked_tensors(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of consecutive parts under the names that they have in the whole."""
    return {_numbered(suffix, index): tensor for index, part in enumerate(parts) for suffix, tensor in part.items()}
