"""Grids: the numbers that the weights of a matrix can become once its scales are chosen, in any format.

Rounding to nearest, the choice of ranges, AWQ and GPTQ ask grids alone, so that they work for every `GridFormat`.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmengine.quantization.formats import WeightFormat

if TYPE_CHECKING:
    from torch import Tensor

_SEARCHED_WEIGHTS = 1 << 18
"""Weights whose errors are looked at together: each of the tensors that this takes has 1 MiB, whatever the model."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales, times the numbers of a code that lie within a range; float32 throughout.

    Attributes:
        scale: of each group of consecutive columns, [out, groups], rounded to the dtype that it is stored in.
        lowest: the least number of each group, before it is scaled, [out, groups].
        highest: likewise the largest.
        group_size: columns of a group; the last one of a row may be shorter.
        nearest_number: the nearest numbers of the code, element by element, for a tensor of any shape.
        group_rows: consecutive rows that have the same scales.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor
    group_size: int
    nearest_number: Callable[[Tensor], Tensor]
    group_rows: int = 1

    def scaled(self, weight: Tensor) -> Tensor:
        """Weights divided by their scales, within the range and not rounded, [out, in]."""
        return self._scaled(in_groups(weight, self.group_size)).flatten(1)[:, : weight.shape[1]]

    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest points of the grid, [out, in]."""
        numbers = self.nearest_number(self._scaled(in_groups(weight, self.group_size)))
        return numbers.mul_(self.scale[:, :, None]).flatten(1)[:, : weight.shape[1]]

    def nearest_in_column(self, weights: Tensor, column: int) -> Tensor:
        """The nearest points of the grid for the weights of one column, [out]."""
        group = column // self.group_size
        scale = self.scale[:, group]
        numbers = (weights / scale).clamp_(self.lowest[:, group], self.highest[:, group])
        return self.nearest_number(numbers) * scale

    def squared_errors(self, weight: Tensor, moments: Tensor | None) -> Tensor:
        """Squared errors of the groups of a matrix rounded to nearest, [out, groups].

        Rows that share their scales have the sum of their errors.

        Args:
            moments: second moments of the activations of each group, [groups, group_size, group_size], which errors
                are weighted with; None: every weight counts alike.
        """
        import torch

        errors = weight.new_empty(self.scale.shape)
        num_rows = max(1, _SEARCHED_WEIGHTS // weight.shape[1])
        for begin in range(0, weight.shape[0], num_rows):
            rows = slice(begin, begin + num_rows)
            groups = in_groups(weight[rows], self.group_size)
            part = dataclasses.replace(
                self, scale=self.scale[rows], lowest=self.lowest[rows], highest=self.highest[rows]
            )
            difference = self.nearest_number(part._scaled(groups)).mul_(part.scale[:, :, None]).sub_(groups)
            weighted = difference
            if moments is not None:
                weighted = torch.bmm(difference.transpose(0, 1), moments).transpose(0, 1)
            errors[rows] = (weighted * difference).sum(dim=2)
        return self._summed(errors)

    def _summed(self, errors: Tensor) -> Tensor:
        """Errors [out, groups] with those of rows that share their scales replaced by their sum."""
        import torch

        if self.group_rows == 1:
            return errors
        size = self.group_rows
        sums = torch.stack([rows.sum(dim=0) for rows in errors.split(size)])
        return sums.repeat_interleave(size, dim=0)[: errors.shape[0]]

    def _scaled(self, groups: Tensor) -> Tensor:
        """[out, groups, columns of a group], likewise."""
        return (groups / self.scale[:, :, None]).clamp_(self.lowest[:, :, None], self.highest[:, :, None])


class GridFormat(WeightFormat):
    """A format whose weights are the points of a grid."""

    __slots__ = ()

    @abstractmethod
    def grids(self, weight: Tensor) -> Iterator[Grid]:
        """Yield the grids that a matrix, float32 [out, in], may be rounded to. They differ in scales and ranges.

        If there are several, each group may have that of another one.
        """

    @abstractmethod
    def stored(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        """The tensors of a matrix, float32 [out, in], whose weights are rounded to the nearest points of a grid.

        Columns are in their own order, and have no factors.
        """

    def grid(self, weight: Tensor) -> Grid:
        """The grid for rounding to nearest without data."""
        return next(self.grids(weight))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        weight = weight.float()
        return self.stored(weight, self.grid(weight))


def best_grid(format: GridFormat, weight: Tensor, gram: Tensor | None) -> Grid:
    """The grid of a matrix in which each group has the least squared error of all that `format` offers.

    A smaller range cuts off the largest weights and has a finer grid for the others.

    Args:
        weight: float32 [out_features, in_features].
        gram: sum of x x^T over activations, [in_features, in_features], or a multiple of it. A group is judged by its
            own block on the diagonal. None: every weight counts alike.
    """
    import torch

    candidates = format.grids(weight)
    best = next(candidates)
    moments = least = None
    for grid in candidates:
        if least is None:
            moments = None if gram is None else _diagonal_blocks(gram, grid.group_size)
            least = best.squared_errors(weight, moments)
        errors = grid.squared_errors(weight, moments)
        better = errors < least
        least = torch.where(better, errors, least)
        best = dataclasses.replace(
            best,
            scale=torch.where(better, grid.scale, best.scale),
            lowest=torch.where(better, grid.lowest, best.lowest),
            highest=torch.where(better, grid.highest, best.highest),
        )
    return best


def in_groups(values: Tensor, size: int) -> Tensor:
    """[rows, columns] as [rows, groups, size]; a last group that is shorter is filled up with zeros."""
    import torch.nn.functional as F

    missing = -values.shape[1] % size
    return (F.pad(values, (0, missing)) if missing else values).view(values.shape[0], -1, size)


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """[groups, size, size]: the blocks of size x size on the diagonal, the last one filled up with zeros."""
    import torch.nn.functional as F

    missing = -gram.shape[0] % size
    padded = F.pad(gram, (0, missing, 0, missing)) if missing else gram
    count = padded.shape[0] // size
    return padded.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
