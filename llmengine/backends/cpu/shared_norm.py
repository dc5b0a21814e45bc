"""RMSNorm over all heads, of which each rank of several has some."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class SharedNorm:
    """RMSNorm of q or of k over all heads of a model: ranks add up the squares of those that they have.

    Args:
        weight: of this rank's heads, [num_heads * head_dim].
        eps: as for `CpuNorm`.
        num_columns: of all ranks' heads together, each head counted once.
        counts: whether this rank's heads count; of ranks that have the same head of keys, those of one do.
        add_up: replaces a contiguous float32 tensor by its sum over the ranks; all of them call it.
    """

    def __init__(
        self, weight: Tensor, eps: float, num_columns: int, counts: bool, add_up: Callable[[Tensor], None]
    ) -> None:
        self._scaled_weight = weight.float() * num_columns**0.5
        self._floor = num_columns * eps
        self._counts = counts
        self._add_up = add_up

    def __call__(self, heads: Tensor) -> Tensor:
        """The normalised [num_tokens, num_heads, head_dim], float32; the rank's part of the heads."""
        x = heads.flatten(1)
        squares = torch.linalg.vector_norm(x, 2, -1, True).square_() if self._counts else x.new_zeros(len(x), 1)
        self._add_up(squares)
        return torch.mul(x, self._scaled_weight).div_(squares.add_(self._floor).sqrt_()).view(heads.shape)
