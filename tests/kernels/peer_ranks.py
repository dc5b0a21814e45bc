"""Ranks that sum tensors through a file that they map, as GPUs do through memory that they map."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.backends.ranks import RankChannel
from llmengine.kernels.peer_sum import MAX_PROGRAMS, PeerMemory, data_bytes, flags_size, sum_over_peers

CAPACITY = 16384

Call = tuple[int, torch.dtype, int]
"""Elements of a tensor, its dtype, and the shots that it is summed in."""


@dataclass(frozen=True)
class MappedMemory:
    """Memory of all ranks in one file; `memory` is one rank's view of it."""

    memory: PeerMemory
    mapped: Tensor

    @classmethod
    def open(cls, path: str, rank: int, size: int) -> MappedMemory:
        """Map a file of `file_size` zeros."""
        flat = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+"))
        each = file_size(1, size)
        starts = [flat.data_ptr() + each * other for other in range(size)]
        data = torch.tensor(starts, dtype=torch.int64)
        numbers = torch.zeros(MAX_PROGRAMS, dtype=torch.int32)
        return cls(PeerMemory(rank, size, data, data + data_bytes(CAPACITY), numbers, CAPACITY), flat)


def file_size(ranks: int, size: int) -> int:
    """Bytes of so many ranks of `size`."""
    return ranks * (data_bytes(CAPACITY) + 4 * flags_size(size))


def term(rank: int, call: int, numel: int, dtype: torch.dtype) -> Tensor:
    """What a rank adds in a call."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * call + rank)).to(dtype)


def expected_sum(size: int, call: int, numel: int, dtype: torch.dtype) -> Tensor:
    """The sum over the ranks, in their order, in float32."""
    total = torch.zeros(numel)
    for rank in range(size):
        total += term(rank, call, numel, dtype).float()
    return total.to(dtype)


def take_part(memory: PeerMemory, calls: list[Call]) -> list[Tensor]:
    """Sum a tensor in each call; the results."""
    results = []
    for index, (numel, dtype, shots) in enumerate(calls):
        tensor = term(memory.rank, index, numel, dtype)
        sum_over_peers(memory, tensor, shots)
        results.append(tensor)
    return results


def serve(channel: RankChannel, payload: bytes) -> None:
    """Take part, and reply with whether all results were right."""
    path, calls = pickle.loads(payload)
    mapped = MappedMemory.open(path, channel.rank, channel.size)
    results = take_part(mapped.memory, calls)
    good = [
        torch.equal(result, expected_sum(channel.size, index, *call[:2]))
        for index, (result, call) in enumerate(zip(results, calls, strict=True))
    ]
    channel.reply(pickle.dumps(good))
    channel.receive()  # a rank that ends before the group is closed has failed
