"""Ranks that sum tensors through a file that they map, as GPUs do through memory that they map."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.backends.ranks import RankChannel
from llmengine.kernels.norm import rms_norm_reference
from llmengine.kernels.peer_sum import (
    PeerMemory,
    RowNorm,
    add_over_peers,
    choose_over_peers,
    data_bytes,
    flags_size,
    sum_over_peers,
)
from llmengine.kernels.step import NUM_SAMPLES

CAPACITY = 16384
PROGRAMS = 8

Call = tuple[int, torch.dtype, int]
"""Elements of a tensor, its dtype, and the shots that it is summed in."""

Addition = tuple[int, int, torch.dtype, int, bool]
"""Rows and columns of a tensor, its dtype, shots, and whether a norm follows."""


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
        numbers = torch.zeros(PROGRAMS, dtype=torch.int32)
        return cls(PeerMemory(rank, size, data, data + data_bytes(CAPACITY, size), numbers, CAPACITY), flat)


def file_size(ranks: int, size: int) -> int:
    """Bytes of so many ranks of `size`."""
    return ranks * (data_bytes(CAPACITY, size) + 4 * flags_size(size, PROGRAMS))


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


def addends(rank: int, addition: Addition) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's part, and x and the norm's weight, which are the same on all."""
    rows, columns, dtype = addition[:3]
    x, weight = term(1000, rows, rows * columns, dtype).view(rows, columns), term(1001, rows, columns, dtype)
    return term(rank, columns, rows * columns, dtype).view(rows, columns), x, weight


def add(memory: PeerMemory, addition: Addition) -> list[Tensor]:
    """Take part in an addition; x and its norm."""
    part, x, weight = addends(memory.rank, addition)
    out = torch.full_like(x, torch.nan)
    add_over_peers(memory, part, x, RowNorm(weight, 1e-5, out) if addition[4] else None, addition[3])
    return [x, out] if addition[4] else [x]


def expected_addition(size: int, addition: Addition) -> list[Tensor]:
    """What `add` gives on every rank."""
    _, x, weight = addends(0, addition)
    total = torch.stack([addends(rank, addition)[0].float() for rank in range(size)])
    summed = total[0]
    for row in total[1:]:
        summed = summed + row
    x = (x.float() + summed.to(x.dtype).float()).to(x.dtype)
    return [x, rms_norm_reference(x, weight, 1e-5).to(x.dtype)] if addition[4] else [x]


COLUMNS = 40
"""Of a rank's logits."""


def rank_logits(rank: int) -> Tensor:
    """Logits of five rows, with equal largest ones, some that are no number, and a row of padding."""
    logits = torch.randn(6, COLUMNS, generator=torch.Generator().manual_seed(7 + rank))
    logits[1, 3 + rank] = 50.0  # the same in every rank: the first counts
    logits[2, 7] = 60.0 + rank
    if rank == 1:
        logits[3, 5] = float("inf")
    return logits


def choose(memory: PeerMemory) -> list[Tensor]:
    """Take part in the choice of the likeliest tokens; ids and whether there is none."""
    logits = rank_logits(memory.rank)
    ids, failed = logits.argmax(1).int(), torch.isinf(logits.amax(1)).int()
    ids[5], counts = 9999, torch.zeros(8, dtype=torch.int32)
    counts[NUM_SAMPLES] = 5
    choose_over_peers(memory, logits, counts, ids, failed, COLUMNS * memory.rank)
    return [ids, failed]


def expected_choice(size: int) -> list[Tensor]:
    """What `choose` gives on every rank."""
    whole = torch.cat([rank_logits(rank) for rank in range(size)], dim=1)
    failed = torch.isinf(whole.amax(1)).int()
    ids = whole.argmax(1).int().masked_fill_(failed != 0, 0)
    ids[1], ids[5] = 3, 9999
    return [ids, failed]


def serve(channel: RankChannel, payload: bytes) -> None:
    """Take part, and reply with whether all results were right."""
    path, calls, additions = pickle.loads(payload)
    mapped = MappedMemory.open(path, channel.rank, channel.size)
    channel.reply(pickle.dumps(are_right(mapped.memory, calls, additions)))
    channel.receive()  # a rank that ends before the group is closed has failed


def are_right(memory: PeerMemory, calls: list[Call], additions: list[Addition]) -> list[bool]:
    """Do everything that ranks do together; whether each result is right."""
    size = memory.size
    good = [
        torch.equal(result, expected_sum(size, index, *call[:2]))
        for index, (result, call) in enumerate(zip(take_part(memory, calls), calls, strict=True))
    ]
    for addition in additions:
        for result, expected in zip(add(memory, addition), expected_addition(size, addition), strict=True):
            good.append(torch.allclose(result, expected, rtol=2e-3, atol=1e-3))
    good += [torch.equal(one, other) for one, other in zip(choose(memory), expected_choice(size), strict=True)]
    return good
