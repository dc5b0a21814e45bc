"""GPTQ (Frantar et al., arXiv 2210.17323): columns are rounded one after the other, the rest makes up for the error.

Columns come by falling second moment of their activations (act-order), but groups and their grids are those of the
columns in their own order, fixed before (the "static groups" of AutoGPTQ). So nothing is reordered at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmengine.quantization.int4 import Int4Groups

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Share of the mean second moment that is added to each, so that the Gram matrix can be inverted."""

_BLOCK = 128
"""Columns whose errors reach the later ones in one product."""


def rounded_columns(weight: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, format: Int4Groups) -> Tensor:
    """The integers of `format`, uint8 [out_features, in_features], on grids that are given.

    Args:
        weight: float32 [out_features, in_features].
        gram: sum of x x^T over activations, float32 [in_features, in_features], or a multiple of it.
        scale: of each group, [out_features, groups].
        zero: likewise.
    """
    import torch

    second_moments = gram.diagonal()
    order = second_moments.argsort(descending=True, stable=True)
    inverse = _inverse_factor(gram[order][:, order])
    # A column is a row here: contiguous.
    columns = weight.t()[order].contiguous()
    columns[second_moments[order] == 0] = 0.0
    group_of = (order // format.columns_of_group(weight.shape[1])).tolist()
    scales, zeros = scale.float().t().contiguous(), zero.float().t().contiguous()
    values = torch.empty(columns.shape, dtype=torch.uint8)
    for begin in range(0, len(columns), _BLOCK):
        end = min(begin + _BLOCK, len(columns))
        errors = columns.new_empty(end - begin, columns.shape[1])
        for index in range(begin, end):
            column, step, middle = columns[index], scales[group_of[index]], zeros[group_of[index]]
            rounded = (column / step).round_().add_(middle).clamp_(0, 15)
            values[index] = rounded
            error = column.sub_(rounded.sub_(middle).mul_(step)).div_(inverse[index, index])
            columns[index + 1 : end].addr_(inverse[index, index + 1 : end], error, alpha=-1.0)
            errors[index - begin] = error
        columns[end:].addmm_(inverse[begin:end, end:].t(), errors, alpha=-1.0)
    result = torch.empty_like(values)
    result[order] = values
    return result.t().contiguous()


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the Gram matrix, which is damped in place."""
    import torch

    gram.diagonal().add_(float(gram.diagonal().mean().clamp(min=1e-30)) * DAMPING)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    return factor
