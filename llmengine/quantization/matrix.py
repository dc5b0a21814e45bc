"""`Matrix`: a weight format with the tensors of one matrix, which is what the linears of every backend bind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmengine.quantization.formats import DENSE, Shape, WeightFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A stored matrix; its bias, where there is one, stays beside it.

    Attributes:
        shape: (out_features, in_features).
        tensors: suffix -> tensor, as `WeightFormat.tensors` lists them; all on one device, contiguous.
    """

    format: WeightFormat
    shape: Shape
    tensors: Mapping[str, Tensor]

    @classmethod
    def dense(cls, weight: Tensor) -> Matrix:
        """The matrix of a weight [out_features, in_features] that is not quantized."""
        rows, columns = weight.shape
        return cls(DENSE, (rows, columns), {"weight": weight})

    def quantized(self, format: WeightFormat) -> Matrix:
        """This dense matrix in another format; itself if it is in that format already."""
        if self.format == format:
            return self
        assert self.format == DENSE, f"{self.format} cannot become {format}"
        return Matrix(format, self.shape, format.quantize(self.weight))

    def dequantized(self) -> Tensor:
        """The reference: float32 [out_features, in_features]."""
        return self.format.dequantize(self.tensors)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows: float32 [len(indices), in_features]; `indices` are integers."""
        picked = dict(self.tensors)
        for suffix, spec in self.format.tensors(self.shape, "float32").items():
            for dim, along in enumerate(spec.along):
                if along is not None and along.axis == "out":
                    assert along.step == 1, f"rows of {self.format} share entries"
                    picked[suffix] = picked[suffix].index_select(dim, indices)
        return self.format.dequantize(picked)

    @property
    def weight(self) -> Tensor:
        """The tensor "weight"; in a dense matrix all there is."""
        return self.tensors["weight"]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.weight.device

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def named_tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors as `ModelFormats.layout` names those of the matrix `name`, in order."""
        for suffix, tensor in self.tensors.items():
            yield f"{name}.{suffix}", tensor
