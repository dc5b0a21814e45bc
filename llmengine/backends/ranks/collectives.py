"""What ranks compute together: sums and gathers of tensors.

Imports torch when the first tensor comes, as does everything that a rank needs before its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Collectives", "PeerLostError", "add_up"]


class PeerLostError(RuntimeError):
    """A collective failed because another rank is gone or late: a consequence, whose cause is that rank's."""


class Collectives(Protocol):
    """Operations that every rank must call in the same order, with tensors of the same dtype.

    An operation that cannot end because of another rank raises. Afterwards none can be used.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace the contiguous tensor, of one shape on all ranks, by its sum over them."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """The tensors of all ranks in their order; None on ranks other than 0."""

    def close(self) -> None:
        """Close the connections; idempotent."""


def add_up(parts: Sequence[torch.Tensor], result: torch.Tensor) -> None:
    """Write the sum of the parts to `result`, added in their order."""
    import torch

    first, *rest = parts
    if len(parts) > 2 and result.dtype in (torch.float16, torch.bfloat16):
        total = first.float()
        for part in rest:
            total += part
        result.copy_(total)
        return
    for part in rest:
        first = torch.add(first, part, out=result)
