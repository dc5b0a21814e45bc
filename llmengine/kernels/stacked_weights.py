"""Matrices in parts with formats of their own, one above the other; some may be dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.stacked import Stacked, stacked_tensors


class StackedMatrix(QuantizedMatrix):
    """A matrix whose parts are multiplied one by one.

    Attributes:
        parts: from the first rows on.
    """

    def __init__(self, weight_format: Stacked, parts: Sequence[Matrix | QuantizedMatrix]) -> None:
        self.format = weight_format
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        self.parts = parts
        self.tensors = {
            f"{index}.{name}": tensor for index, part in enumerate(parts) for name, tensor in part.tensors.items()
        }
        quantized = [part for part in parts if isinstance(part, QuantizedMatrix)]
        self.least_capability = max((part.least_capability for part in quantized), default=(0, 0))

    def split(self, tensors: Mapping[str, Tensor]) -> list[tuple[Matrix | QuantizedMatrix, dict[str, Tensor]]]:
        """Each part with its stored tensors, out of those of the whole."""
        assert isinstance(self.format, Stacked)
        return list(zip(self.parts, self.format.split(tensors), strict=True))

    def fill(self, tensors: Mapping[str, Tensor], first_row: int = 0) -> None:
        """Take over all stored tensors; parts can also be filled one by one."""
        assert first_row == 0, first_row
        for part, piece in self.split(tensors):
            if isinstance(part, QuantizedMatrix):
                part.fill(piece)
            else:
                part.weight.copy_(piece["weight"])

    def stored(self) -> Matrix:
        parts = [part.stored() if isinstance(part, QuantizedMatrix) else part for part in self.parts]
        return Matrix(self.format, self.shape, stacked_tensors(part.tensors for part in parts))
