"""AWQ (Lin et al., arXiv 2306.00978): factors for columns whose activations are large.

Columns of a matrix are multiplied by factors before rounding, and their activations divided by them. A large factor
makes the error of a column smaller and that of its group larger. The factors are powers of the mean magnitude of each
activation; the power is searched on a grid, for the least squared error of the product. The error follows from the
activations' Gram matrix, over all calibration tokens, at the cost of one product for each point of the grid. The ranges
of the groups are chosen after that (`best_grid`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmengine.quantization.grid import GridFormat

if TYPE_CHECKING:
    from torch import Tensor

GRID = 20
"""Powers that are tried, from 0 (no factors) on, in steps of 1 / GRID."""

_JUDGED_ROWS = 512


def column_factors(weight: Tensor, magnitude: Tensor, gram: Tensor, format: GridFormat) -> Tensor:
    """Factors of the columns, float32 [in_features], the largest times the smallest of which is 1.

    They are judged by up to `_JUDGED_ROWS` rows, evenly spread.

    Args:
        weight: float32 [out_features, in_features].
        magnitude: mean magnitude of each activation, [in_features].
        gram: sum of x x^T over activations, [in_features, in_features], or a multiple of it.
    """
    import torch

    weight = weight[:: -(-weight.shape[0] // _JUDGED_ROWS)].contiguous()
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max().clamp(min=1e-30)))
    best, factors = float("inf"), torch.ones_like(magnitude)
    for step in range(GRID):
        tried = magnitude ** (step / GRID)
        tried /= (tried.max() * tried.min()).sqrt()
        multiplied = weight * tried
        difference = format.grid(multiplied).nearest(multiplied).sub_(multiplied).div_(tried)
        error = squared_error(difference, gram)
        if error < best:
            best, factors = error, tried
    return factors


def squared_error(difference: Tensor, gram: Tensor) -> float:
    """Squared error of all products by a matrix that is off by `difference`; `gram` is that of the activations."""
    return float((difference @ gram).mul_(difference).sum())
