"""AWQ's searches against naive ones in float64, on the activations themselves."""

from __future__ import annotations

import pytest
import torch

from llmengine.quantization.awq import GRID, SHRINKS, clipped_ranges, column_factors, squared_error
from llmengine.quantization.int4 import Int4Groups, in_groups

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


@FORMATS
def test_ranges_are_the_best_of_their_groups(format: Int4Groups) -> None:
    weight, x = make()
    low, high = clipped_ranges(weight, x.t() @ x / len(x), format)
    size = format.columns_of_group(weight.shape[1])
    groups, inputs = in_groups(weight, size), in_groups(x, size)
    found = group_errors(groups, inputs, low, high, format)
    least, most = groups.amin(dim=2), groups.amax(dim=2)
    tried = [group_errors(groups, inputs, least * shrink, most * shrink, format) for shrink in SHRINKS]
    torch.testing.assert_close(found, torch.stack(tried).amin(dim=0), rtol=1e-3, atol=1e-6)
    assert found.sum() < tried[0].sum()


def group_errors(
    groups: torch.Tensor, inputs: torch.Tensor, low: torch.Tensor, high: torch.Tensor, format: Int4Groups
) -> torch.Tensor:
    """Mean squared error of each group's part of the product, [rows, groups]."""
    scale, zero = format.grid(low, high)
    rounded = (format.on_grid(groups, scale, zero) - zero[:, :, None]) * scale.float()[:, :, None]
    products = torch.einsum("ngc,rgc->nrg", inputs.double(), (rounded - groups).double())
    return products.square().mean(dim=0).float()
