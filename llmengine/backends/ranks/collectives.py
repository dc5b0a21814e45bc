"""What ranks compute together: sums and gathers of tensors.

Imports torch when the first tensor comes, as does everything that a rank needs before its target.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Collectives", "PeerLostError", "Waiting", "add_up"]

# Looking for longer than this would keep the interpreter's lock from other threads and cores from late ranks.
_SPIN_S = 50e-6
# More time than this between two looks means that this process was stopped, and counts as this much.
_LONGEST_LOOK_S = 1.0


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


class Waiting:
    """A rank that looks again and again whether others have come.

    Attributes:
        waited_s: for how long, without what this process was stopped for.
    """

    def __init__(self) -> None:
        self.waited_s = 0.0
        self._looked_at = time.perf_counter()

    def spins(self) -> bool:
        """Whether it looks again at once, after it has let others have the core; called after each look."""
        before, self._looked_at = self._looked_at, time.perf_counter()
        self.waited_s += min(self._looked_at - before, _LONGEST_LOOK_S)
        if self.waited_s < _SPIN_S:
            os.sched_yield()
            return True
        return False


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
