"""AWQ's search against a naive one in float64, on the activations themselves."""

from __future__ import annotations

import pytest
import torch

from llmengine.quantization.awq import GRID, column_factors, squared_error
from llmengine.quantization.int4 import Int4Groups

FORMATS = pytest.mark.parametrize(
    "format", [Int4Groups(16), Int4Groups(16, zero_points=False), Int4Groups(-1)], ids=str
)


def make(rows: int = 20, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and activations with a few large features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, columns, generator=generator)
    x[:, ::9] *= 20.0
    return torch.randn(rows, columns, generator=generator), x


def error(x: torch.Tensor, difference: torch.Tensor) -> float:
    return float((x.double() @ difference.double().t()).square().sum(dim=1).mean())


@FORMATS
def test_factors_are_the_best_of_the_grid(format: Int4Groups) -> None:
    weight, x = make()
    magnitude, gram = x.abs().mean(dim=0), x.t() @ x / len(x)
    tried = []
    for step in range(GRID):
        factors = magnitude.double() ** (step / GRID)
        factors = (factors / (factors.max() * factors.min()).sqrt()).float()
        rounded = format.dequantize(format.quantize(weight * factors)) / factors
        tried.append((error(x, rounded - weight), factors))
    best, expected = min(tried, key=lambda item: item[0])
    torch.testing.assert_close(column_factors(weight, magnitude, gram, format), expected)
    assert best < 0.5 * tried[0][0]


def test_the_error_follows_from_the_gram_matrix() -> None:
    weight, x = make()
    difference = 0.01 * weight
    assert squared_error(difference, x.t() @ x / len(x)) == pytest.approx(error(x, difference), rel=1e-4)
