"""Copies of weights to a device, through pinned memory."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 128 << 20
_NUM_CHUNKS = 2


class Uploads:
    """Copies in the current stream, chunk by chunk: while some travel, the next ones are read.

    A plain copy of pageable memory waits for the device, at a fraction of the link's speed. Holds 256 MiB of pinned
    memory in large chunks, since threads that compile take the interpreter between two copies. Works on a CPU as well,
    for tests, where nothing is pinned.
    """

    def __init__(self, device: torch.device, chunk_bytes: int = _CHUNK_BYTES) -> None:
        on_gpu = device.type == "cuda"
        self._chunk_bytes = chunk_bytes
        self._chunks = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(_NUM_CHUNKS)]
        self._travelled = [torch.cuda.Event() if on_gpu else None for _ in range(_NUM_CHUNKS)]
        self._num_copies = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy to `target`, contiguous, of the same shape; `source` may be changed afterwards."""
        assert target.shape == source.shape, (target.shape, source.shape)
        flat_target = target.view(-1).view(torch.uint8)
        flat_source = source.to(target.dtype).contiguous().view(-1).view(torch.uint8)
        for begin in range(0, len(flat_source), self._chunk_bytes):
            part = flat_source[begin : begin + self._chunk_bytes]
            index = self._num_copies % _NUM_CHUNKS
            self._num_copies += 1
            travelled = self._travelled[index]
            if travelled is not None:
                travelled.synchronize()
            chunk = self._chunks[index][: len(part)]
            chunk.copy_(part)
            flat_target[begin : begin + len(part)].copy_(chunk, non_blocking=True)
            if travelled is not None:
                travelled.record()
