"""GPTQ against its definition in float64, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.gptq import DAMPING, rounded_columns
from llmengine.quantization.grid import Grid, GridFormat
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.mxfp4 import Mxfp4

INT4 = [Int4Groups(16), Int4Groups(16, zero_points=False), Int4Groups(-1)]
FORMATS = pytest.mark.parametrize("format", [*INT4, Fp8(), Fp8("block", "block"), Fp8("tensor"), Mxfp4()], ids=str)


def activations(columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(400, columns, generator=generator) @ mixing * (1 + torch.arange(columns) % 7)


def by_definition(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The optimal brain quantizer: the inverse of what is left is computed anew for each column."""
    hessian, w = gram.double().numpy().copy(), weight.double().numpy().copy()
    hessian[np.diag_indices_from(hessian)] += DAMPING * np.diag(hessian).mean()
    left = list(np.argsort(-gram.diagonal().numpy(), kind="stable"))
    result = np.zeros(w.shape, dtype=np.float32)
    while left:
        column = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        result[:, column] = grid.nearest_in_column(torch.tensor(w[:, column].astype(np.float32)), column)
        error = (w[:, column] - result[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return torch.from_numpy(result)


@FORMATS
@pytest.mark.parametrize("columns", [40, 160])
def test_weights_are_those_of_the_definition(format: GridFormat, columns: int) -> None:
    weight, x = torch.randn(12, columns, generator=torch.Generator().manual_seed(1)), activations(columns)
    gram = x.t() @ x / len(x)
    grid = format.grid(weight)
    fitted = rounded_columns(weight, gram.clone(), grid)
    # A float32 tie may fall to the other side, and changes what follows in its row.
    assert (fitted == by_definition(weight, gram, grid)).all(dim=1).float().mean() > 0.8
    assert torch.equal(format.dequantize(format.stored(fitted, grid)), fitted), "all weights are on the grid"
    nearest = format.dequantize(format.quantize(weight))
    assert (x @ (fitted - weight).t()).norm() < 0.8 * (x @ (nearest - weight).t()).norm()


@FORMATS
def test_activations_that_are_always_zero(format: GridFormat) -> None:
    weight, x = torch.randn(8, 32), activations(32)
    x[:, 5] = 0.0
    fitted = rounded_columns(weight, x.t() @ x / len(x), format.grid(weight))
    assert not fitted[:, 5].any()
    assert torch.isfinite(fitted).all()
