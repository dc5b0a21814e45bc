"""`QuantizedMatrix`: what all layouts of quantized matrices on a device have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.matrix import Matrix

ROW_UNIT = 128
"""Rows are filled from multiples of this on: tiles, and blocks that share a scale, begin there."""


class QuantizedMatrix(ABC):
    """A quantized matrix as the products of its format read it; its tensors have their places, and are filled later.

    Attributes:
        format: how the matrix is stored.
        shape: (out_features, in_features).
        tensors: what is resident.
        least_capability: of a GPU whose instructions the products need.
    """

    format: WeightFormat
    shape: Shape
    tensors: dict[str, Tensor]
    least_capability: tuple[int, int] = (8, 0)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.tensors.values())).device

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @abstractmethod
    def fill(self, tensors: Mapping[str, Tensor], first_row: int = 0) -> None:
        """Take over the stored tensors of the rows from `first_row` on, a multiple of 128; they are on the device."""

    @abstractmethod
    def stored(self) -> Matrix:
        """The matrix as it is stored, on the device; a new copy where the layout is another."""
