"""Grids of every format: rounding, what is stored, and the choice of ranges, on the activations themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.grid import Grid, GridFormat, best_grid, in_groups
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.mxfp4 import Mxfp4

INT4 = [Int4Groups(16), Int4Groups(16, zero_points=False), Int4Groups(-1)]
FP8 = [Fp8(scales, "none") for scales in ("tensor", "channel", "block")]  # type: ignore[arg-type]
FORMATS = pytest.mark.parametrize("format", [*INT4, *FP8, Mxfp4()], ids=str)


def make(rows: int = 150, columns: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and activations with a few large features."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, columns, generator=generator)
    x[:, ::9] *= 20.0
    return torch.randn(rows, columns, generator=generator), x


def group_errors(weight: torch.Tensor, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Squared error of each group's part of the product, float64 [rows that share scales, groups]."""
    groups = in_groups((grid.nearest(weight) - weight).double(), grid.group_size)
    inputs = in_groups(x.double(), grid.group_size)
    errors = torch.einsum("ngc,rgc->nrg", inputs, groups).square().sum(dim=0)
    return torch.stack([rows.sum(dim=0) for rows in errors.split(grid.group_rows)])


@FORMATS
def test_each_group_has_the_best_of_all_grids(format: GridFormat) -> None:
    weight, x = make()
    tried = torch.stack([group_errors(weight, x, grid) for grid in format.grids(weight)])
    found = group_errors(weight, x, best_grid(format, weight, x.t() @ x))
    torch.testing.assert_close(found, tried.amin(dim=0), rtol=1e-3, atol=1e-6)
    assert len(tried) > 1
    assert found.sum() < tried[0].sum()


@FORMATS
def test_without_activations_every_weight_counts_alike(format: GridFormat) -> None:
    weight, _ = make()
    chosen, same = best_grid(format, weight, None), best_grid(format, weight, torch.eye(weight.shape[1]))
    assert torch.equal(chosen.scale, same.scale)


@FORMATS
def test_points_are_stored_exactly(format: GridFormat) -> None:
    weight, x = make()
    grid = best_grid(format, weight, x.t() @ x)
    points = grid.nearest(weight)
    for matrix in (weight, points):
        assert torch.equal(format.dequantize(format.stored(matrix, grid)), points)


@FORMATS
def test_no_other_point_is_nearer(format: GridFormat) -> None:
    weight, _ = make()
    grid = format.grid(weight)
    distance = (grid.nearest(weight) - weight).abs()
    for factor in (0.97, 1.03):
        assert ((grid.nearest(weight * factor) - weight).abs() >= distance - 1e-6).all()
    columns = torch.stack([grid.nearest_in_column(weight[:, index], index) for index in range(weight.shape[1])], dim=1)
    assert torch.equal(columns, grid.nearest(weight))
    narrow = dataclasses.replace(grid, highest=torch.zeros_like(grid.highest), lowest=torch.zeros_like(grid.lowest))
    assert not narrow.nearest(weight).any()
