"""Weights in pages of 2 MiB, where the system has them.

A step with one token reads all weights once. With pages of 4 KiB it waits for address translations, and at the end of
each page for memory: processors do not prefetch across it.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20
_ALIGNMENT_BYTES = 64


class HugePages:
    """Memory for tensors that are read together.

    It grows by chunks, of which only what is used is resident. A chunk is given back with the last of its tensors.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor, behind the copy before it."""
        size_bytes = -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if size_bytes > len(self._free):
            self._free = _new_chunk(max(size_bytes, _CHUNK_BYTES))
        place, self._free = self._free[: tensor.nbytes], self._free[size_bytes:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _new_chunk(size_bytes: int) -> Tensor:
    """Memory of the process, uint8 [size_bytes], that begins with a huge page."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size_bytes, dtype=torch.uint8)
    mapping = mmap.mmap(-1, size_bytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    chunk = torch.frombuffer(mapping, dtype=torch.uint8)
    begin = -chunk.data_ptr() % _HUGE_PAGE_BYTES
    return chunk[begin : begin + size_bytes]
