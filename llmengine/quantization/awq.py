"""AWQ (Lin et al., arXiv 2306.00978): factors for columns whose activations are large, then ranges for groups.

Columns of a matrix are multiplied by factors before rounding, and their activations divided by them. A large factor
makes the error of a column smaller and that of its group larger. The factors are powers of the mean magnitude of each
activation; the power is searched on a grid, for the least squared error of the product. The error follows from the
activations' Gram matrix, over all calibration tokens, at the cost of one product for each point of the grid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmengine.quantization.int4 import Int4Groups, in_groups

if TYPE_CHECKING:
    from torch import Tensor

GRID = 20
"""Powers that are tried, from 0 (no factors) on, in steps of 1 / GRID."""

SEARCHED_ROWS = 512
"""Rows whose errors are looked at together; a few MiB, whatever the model."""

SHRINKS = tuple(1.0 - 0.05 * step for step in range(11))
"""Fractions of a group's range that are tried."""


def column_factors(weight: Tensor, magnitude: Tensor, gram: Tensor, format: Int4Groups) -> Tensor:
    """Factors of the columns, float32 [in_features], the largest times the smallest of which is 1.

    They are judged by up to `SEARCHED_ROWS` rows, evenly spread.

    Args:
        weight: float32 [out_features, in_features].
        magnitude: mean magnitude of each activation, [in_features].
        gram: sum of x x^T over activations, [in_features, in_features], or a multiple of it.
    """
    import torch

    weight = weight[:: -(-weight.shape[0] // SEARCHED_ROWS)].contiguous()
    magnitude = magnitude.clamp(min=1e-4 * float(magnitude.max().clamp(min=1e-30)))
    best, factors = float("inf"), torch.ones_like(magnitude)
    for step in range(GRID):
        tried = magnitude ** (step / GRID)
        tried /= (tried.max() * tried.min()).sqrt()
        groups = in_groups(weight * tried, format.columns_of_group(weight.shape[1]))
        scale, zero = format.grid(groups.amin(dim=2), groups.amax(dim=2))
        difference = rounding_errors(groups, scale, zero, format).flatten(1)[:, : weight.shape[1]] / tried
        error = squared_error(difference, gram)
        if error < best:
            best, factors = error, tried
    return factors


def squared_error(difference: Tensor, gram: Tensor) -> float:
    """Squared error of all products by a matrix that is off by `difference`; `gram` is that of the activations."""
    return float((difference @ gram).mul_(difference).sum())


def rounding_errors(groups: Tensor, scale: Tensor, zero: Tensor, format: Int4Groups) -> Tensor:
    """Rounded weights less the weights, in groups as these: float32 [out_features, groups, columns of a group]."""
    rounded = format.on_grid(groups, scale, zero).sub_(zero[:, :, None]).mul_(scale.float()[:, :, None])
    return rounded.sub_(groups)


def clipped_ranges(weight: Tensor, gram: Tensor, format: Int4Groups) -> tuple[Tensor, Tensor]:
    """The least and largest weight of each group's grid, float32 [out_features, groups].

    A range smaller than that of the weights has a finer grid. For each group of each row, the fraction is taken whose
    error, by the group's own columns of `gram`, is least.
    """
    import torch

    size = format.columns_of_group(weight.shape[1])
    blocks = _diagonal_blocks(gram, size)
    pieces = [_clipped(in_groups(rows, size), blocks, format) for rows in weight.split(SEARCHED_ROWS)]
    low, high = zip(*pieces, strict=True)
    return torch.cat(low), torch.cat(high)


def _clipped(groups: Tensor, blocks: Tensor, format: Int4Groups) -> tuple[Tensor, Tensor]:
    """The ends of the grids of `groups`, with the diagonal blocks of the Gram matrix."""
    import torch

    low, high = groups.amin(dim=2), groups.amax(dim=2)
    best, chosen = torch.full_like(low, torch.inf), torch.ones_like(low)
    for shrink in SHRINKS:
        difference = rounding_errors(groups, *format.grid(low * shrink, high * shrink), format)
        products = torch.bmm(difference.transpose(0, 1), blocks).transpose(0, 1)
        error = products.mul_(difference).sum(dim=2)
        better = error < best
        best = torch.where(better, error, best)
        chosen.masked_fill_(better, shrink)
    return low * chosen, high * chosen


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """[groups, size, size]: the blocks of size x size on the diagonal, the last one filled up with zeros."""
    import torch.nn.functional as F

    missing = -gram.shape[0] % size
    padded = F.pad(gram, (0, missing, 0, missing)) if missing else gram
    count = padded.shape[0] // size
    return padded.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
