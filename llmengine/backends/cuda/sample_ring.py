"""The sampled tokens of the latest steps, in memory that the device writes and the host reads."""

from __future__ import annotations

import torch
from torch import Tensor


class SampleRing:
    """One entry for each step that may be in flight; `end_step` writes them, `read` takes them out.

    Args:
        token_ids: int32 [depth, max_rows, max_samples], pinned where the device is a GPU; see `kernels.step.end_step`.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self.token_ids = token_ids
        self._first_ids = token_ids[:, :, 0]

    @classmethod
    def allocate(cls, depth: int, max_rows: int, max_samples: int, device: torch.device) -> SampleRing:
        """Allocate a ring of `depth` entries."""
        shape = (depth, max_rows, max_samples)
        return cls(torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda"))

    @property
    def depth(self) -> int:
        """Number of entries."""
        return len(self.token_ids)

    def read(self, index: int, num_rows: int) -> list[int]:
        """The first token of each row of entry `index`, -1 for a row that failed; valid when its step has ended."""
        ids: list[int] = self._first_ids[index, :num_rows].tolist()
        return ids
