"""Sums over GPUs that read each other's memory: one kernel a sum, for tensors of a few MiB.

Each rank copies its tensor to memory that the others map, says so, and waits for them. Then it reads all of theirs (one
shot), or first adds up one part of the tensor and then reads the other parts' sums (two shots, less traffic from three
ranks on). Sums are in the order of ranks, in float32, so they are the same on all ranks and whatever the size.

::

    data     [ parity 0 | parity 1 ]  in each: the tensor, then the sums of this rank's parts
    flags    [ shot ][ program ][ rank ]  number of the last call that `rank` has arrived in; written by `rank`

Calls are numbered, and call *n* uses the data of *n*'s parity. A rank that arrives in call *n* has ended call *n - 1*,
because kernels of a stream run one after the other. So nobody reads what call *n* writes over, which is of *n - 2*. The
numbers are in the device's memory: a CUDA graph can hold a call.

Rejected: torch's symmetric memory, which is slower for few bytes (docs/parallelism.md); NVLink multicast, which is not
everywhere; a kernel that stays, which would hold multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 256
"""Programs of a call; each has flags of its own."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCKS = (1024, 2048, 4096, 8192, 16384)
_FEW_PROGRAMS = 64
_SHOTS = 2


def data_bytes(capacity: int) -> int:
    """Bytes of a rank's data for tensors of up to `capacity` bytes."""
    return 2 * _SHOTS * capacity


def flags_size(size: int) -> int:
    """Numbers of 32 bits that a rank's flags are, for so many ranks."""
    return _SHOTS * MAX_PROGRAMS * size


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """One rank's view of the memory of all.

    Attributes:
        data: int64 [size], the address of each rank's data, as this rank sees it.
        flags: int64 [size], likewise of flags, which begin as zeros.
        numbers: int32 [MAX_PROGRAMS], of the last call, as every program knows it; begins as zeros.
        capacity: bytes of the largest tensor.
    """

    rank: int
    size: int
    data: Tensor
    flags: Tensor
    numbers: Tensor
    capacity: int


def can_sum(memory: PeerMemory, tensor: Tensor) -> bool:
    """Whether `sum_over_peers` takes a tensor."""
    fits = tensor.nbytes <= memory.capacity and 0 < tensor.numel() <= MAX_PROGRAMS * _BLOCKS[-1]
    return fits and tensor.dtype in _DTYPES


def sum_over_peers(memory: PeerMemory, tensor: Tensor, shots: int) -> None:
    """Replace a contiguous tensor, of one shape on all ranks, by its sum over them, in one shot or in two.

    All ranks call this in the same order, with the same arguments. Allocates nothing.
    """
    assert can_sum(memory, tensor), (tensor.shape, tensor.dtype, memory.capacity)
    assert tensor.is_contiguous()
    numel = tensor.numel()
    block = next((block for block in _BLOCKS if numel <= block * _FEW_PROGRAMS), _BLOCKS[-1])
    part = triton.next_power_of_2(triton.cdiv(block, memory.size)) if shots == 2 else block
    columns = part * memory.size if shots == 2 else block
    num_programs = triton.cdiv(numel, columns)
    assert num_programs <= MAX_PROGRAMS, (numel, block)
    kernel = _sum_in_two_shots if shots == 2 else _sum_in_one_shot
    kernel[(num_programs,)](
        tensor,
        memory.data,
        memory.flags,
        memory.numbers,
        numel,
        memory.capacity // tensor.element_size(),
        RANK=memory.rank,
        SIZE=memory.size,
        PART=part,
        MAX_PROGRAMS=MAX_PROGRAMS,
        num_warps=max(4, min(16, block // 512)),
    )


@triton.jit
def _tensor_at(address, element: tl.constexpr):
    """A pointer that is known to lie at a multiple of 16 bytes, so that threads move words of that size."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(element)), 16)


@triton.jit
def _arrive(flags, number, shot, RANK: tl.constexpr, SIZE: tl.constexpr, MAX_PROGRAMS: tl.constexpr):
    """Tell all ranks that this one has written what they read after it, and wait until they have."""
    first = (shot * MAX_PROGRAMS + tl.program_id(0)) * SIZE
    tl.debug_barrier()  # all threads have written
    for peer in tl.static_range(SIZE):
        theirs = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + first + RANK, number, sem="release", scope="sys")
    ours = tl.load(flags + RANK).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(SIZE):
        arrived = tl.atomic_cas(ours + first + peer, 0, 0, sem="acquire", scope="sys")
        while arrived - number < 0:  # a rank may be one call ahead, and numbers may wrap around
            arrived = tl.atomic_cas(ours + first + peer, 0, 0, sem="acquire", scope="sys")
    tl.debug_barrier()  # no thread reads before


@triton.jit
def _number(numbers, MAX_PROGRAMS: tl.constexpr):
    """The number of this call; also tells the programs that only later calls have."""
    number = tl.load(numbers + tl.program_id(0)) + 1
    places = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, MAX_PROGRAMS)
    tl.debug_barrier()
    tl.store(numbers + places, tl.zeros([MAX_PROGRAMS], tl.int32) + number, mask=places < MAX_PROGRAMS)
    return number


@triton.jit
def _sum_in_one_shot(
    x,
    data,
    flags,
    numbers,
    numel,
    capacity,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    number = _number(numbers, MAX_PROGRAMS)
    columns = tl.program_id(0) * PART + tl.arange(0, PART)
    mask = columns < numel
    places = (number & 1).to(tl.int64) * 2 * capacity + columns
    element = x.dtype.element_ty
    ours = _tensor_at(data + RANK, element)
    tl.store(ours + places, tl.load(x + columns, mask=mask), mask=mask)
    _arrive(flags, number, 0, RANK, SIZE, MAX_PROGRAMS)
    total = tl.zeros([PART], tl.float32)
    for peer in tl.static_range(SIZE):
        theirs = _tensor_at(data + peer, element)
        total += tl.load(theirs + places, mask=mask, other=0.0, volatile=True).to(tl.float32)
    tl.store(x + columns, total.to(element), mask=mask)


@triton.jit
def _sum_in_two_shots(
    x,
    data,
    flags,
    numbers,
    numel,
    capacity,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    PART: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    number = _number(numbers, MAX_PROGRAMS)
    first = tl.program_id(0) * (PART * SIZE) + tl.arange(0, PART)
    begin = (number & 1).to(tl.int64) * 2 * capacity
    element = x.dtype.element_ty
    ours = _tensor_at(data + RANK, element)
    for peer in tl.static_range(SIZE):
        columns = first + peer * PART
        tl.store(ours + begin + columns, tl.load(x + columns, mask=columns < numel), mask=columns < numel)
    _arrive(flags, number, 0, RANK, SIZE, MAX_PROGRAMS)
    columns = first + RANK * PART
    total = tl.zeros([PART], tl.float32)
    for peer in tl.static_range(SIZE):
        theirs = _tensor_at(data + peer, element)
        part = tl.load(theirs + begin + columns, mask=columns < numel, other=0.0, volatile=True)
        total += part.to(tl.float32)
    tl.store(ours + begin + capacity + columns, total.to(element), mask=columns < numel)
    _arrive(flags, number, 1, RANK, SIZE, MAX_PROGRAMS)
    for peer in tl.static_range(SIZE):
        columns = first + peer * PART
        theirs = _tensor_at(data + peer, element)
        part = tl.load(theirs + begin + capacity + columns, mask=columns < numel, other=0.0, volatile=True)
        tl.store(x + columns, part, mask=columns < numel)
