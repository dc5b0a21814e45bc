"""Copies of weights to a device, through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 128 << 20
_NUM_CHUNKS = 2


class Uploads:
    """Copies in the current stream, chunk by chunk: while some travel, the next ones are read.

    A plain copy of pageable memory waits for the device, at a fraction of the link's speed. Holds 256 MiB of pinned
    memory in large chunks, since threads that compile take the interpreter between two copies; on a CPU nothing, since
    there copies are plain.
    """

    def __init__(self, device: torch.device) -> None:
        self._chunks: list[tuple[Tensor, torch.cuda.Event]] = []
        if device.type == "cuda":
            for _ in range(_NUM_CHUNKS):
                chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
                self._chunks.append((chunk, torch.cuda.Event()))
        self._num_copies = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy to `target`, contiguous, of the same shape; `source` may be changed afterwards."""
        if not self._chunks:
            target.copy_(source)
            return
        assert target.shape == source.shape, (target.shape, source.shape)
        flat_target = target.view(-1).view(torch.uint8)
        flat_source = source.to(target.dtype).contiguous().view(-1).view(torch.uint8)
        for begin in range(0, len(flat_source), _CHUNK_BYTES):
            part = flat_source[begin : begin + _CHUNK_BYTES]
            chunk, travelled = self._chunks[self._num_copies % _NUM_CHUNKS]
            self._num_copies += 1
            travelled.synchronize()
            pinned = chunk[: len(part)]
            pinned.copy_(part)
            flat_target[begin : begin + len(part)].copy_(pinned, non_blocking=True)
            travelled.record()
