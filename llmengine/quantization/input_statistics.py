"""What calibration keeps of the activations that a matrix is multiplied with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmengine.quantization.formats import WeightFormat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_PROBES = 8
"""Tokens of each text that are kept, to measure errors with."""


class InputStatistics:
    """Sums over the activations [num_tokens, in_features] of all texts, in float32.

    Attributes:
        num_tokens: how many there were.
        largest: largest magnitude of each feature, [in_features].
        gram: sum of x x^T over tokens, [in_features, in_features], None where it is not wanted. The squared error of
            all products by a matrix that is off by d is the trace of d gram d^T, so that it needs no activations.
    """

    def __init__(self, columns: int, *, with_gram: bool) -> None:
        import torch

        self.num_tokens = 0
        self.largest = torch.zeros(columns)
        self._magnitudes = torch.zeros(columns)
        self.gram = torch.zeros(columns, columns) if with_gram else None
        self._probes: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Count the activations of a text, [num_tokens, in_features]."""
        import torch

        self.num_tokens += x.shape[0]
        magnitudes = x.abs()
        self._magnitudes += magnitudes.sum(dim=0)
        torch.maximum(self.largest, magnitudes.amax(dim=0), out=self.largest)
        if self.gram is not None:
            self.gram.addmm_(x.t(), x)
        self._probes.append(x[:: -(-x.shape[0] // _PROBES)].clone())

    @property
    def mean_magnitude(self) -> Tensor:
        """Mean magnitude of each feature, [in_features]."""
        return self._magnitudes / self.num_tokens

    def take_gram(self) -> Tensor:
        """Give away `gram`, which may take as much memory as several layers; it is None afterwards."""
        gram, self.gram = self.gram, None
        assert gram is not None
        return gram

    def divide_by(self, factors: Tensor) -> None:
        """Change the statistics to those of activations that are divided by `factors`, [in_features]."""
        self.largest /= factors
        self._magnitudes /= factors
        if self.gram is not None:
            self.gram.div_(factors).div_(factors[:, None])
        self._probes = [probe / factors for probe in self._probes]

    def relative_error(self, weight: Tensor, format: WeightFormat, tensors: Mapping[str, Tensor]) -> float:
        """Norm of the error of a quantized product over the norm of the product, on a few tokens of each text.

        Rounded activations are part of it where the format rounds them.

        Args:
            weight: the dense matrix, float32 [out_features, in_features].
            tensors: of the quantized one.
        """
        import torch

        x = torch.cat(self._probes)
        expected = x @ weight.t()
        found = format.rounded_activations(x, tensors) @ format.dequantize(tensors).t()
        return float((found - expected).norm() / expected.norm().clamp(min=1e-30))
