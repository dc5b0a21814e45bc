"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, the rest makes up for the error.

Columns come by falling second moment of their activations (act-order), but groups and their grids are those of the
columns in their own order, fixed before (the "static groups" of AutoGPTQ). So nothing is reordered at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmengine.quantization.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Share of the mean second moment that is added to each, so that the Gram matrix can be inverted."""

_BLOCK = 128
"""Columns whose errors reach the later ones in one product."""


def rounded_columns(weight: Tensor, gram: Tensor, grid: Grid) -> Tensor:
    """The matrix with every weight on a point of the grid, float32 [out_features, in_features].

    Memory: another matrix of the size of `gram`, and two of that of `weight`; a `gram` that nobody else holds is freed.

    Args:
        weight: float32 [out_features, in_features].
        gram: sum of x x^T over activations, float32 [in_features, in_features], or a multiple of it.
    """
    import torch

    second_moments = gram.diagonal().clone()
    order = second_moments.argsort(descending=True, stable=True)
    # A column is a row here: contiguous.
    columns = weight.t()[order].contiguous()
    columns[second_moments[order] == 0] = 0.0
    gram = gram[order[:, None], order]
    inverse = _inverse_factor(gram)
    numbers = order.tolist()
    for begin in range(0, len(columns), _BLOCK):
        end = min(begin + _BLOCK, len(columns))
        errors = columns.new_empty(end - begin, columns.shape[1])
        for index in range(begin, end):
            column = columns[index]
            rounded = grid.nearest_in_column(column, numbers[index])
            error = torch.sub(column, rounded, out=errors[index - begin]).div_(inverse[index, index])
            columns[index + 1 : end].addr_(inverse[index, index + 1 : end], error, alpha=-1.0)
            column.copy_(rounded)
        columns[end:].addmm_(inverse[begin:end, end:].t(), errors, alpha=-1.0)
    result = torch.empty_like(weight)
    result.t()[order] = columns
    return result


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the Gram matrix, which takes its place."""
    import torch

    gram.diagonal().add_(float(gram.diagonal().mean().clamp(min=1e-30)) * DAMPING)
    torch.linalg.cholesky(gram, out=gram)
    inverse = torch.cholesky_inverse(gram)
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True, out=gram)
    return factor
