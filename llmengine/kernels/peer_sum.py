"""Sums over GPUs that write to each other's memory: one kernel a sum, for tensors of a few MiB, with what follows it.

Each rank writes its tensor to memory of every other one, says so, and waits for theirs (one shot); or it writes to each
other rank the part that this one adds up, and each then writes its part's sum to all (two shots, less traffic from
three ranks on). What a rank reads is always in its own memory, since a write that nobody waits for is quicker than a
read.
Sums are in the order of ranks, in float32, so they are the same on all ranks and whatever the size.

::

    data     [ parity ][ shot ][ rank ][ capacity ]  what `rank` wrote here
    flags    [ shot ][ program ][ rank ]             number of the last call that `rank` has arrived in; written by it

Calls are numbered, and call *n* uses the data of *n*'s parity. A rank that arrives in call *n* has ended call *n - 1*,
because kernels of a stream run one after the other. So nobody reads what call *n* writes over, which is of *n - 2*. The
numbers are in the device's memory: a CUDA graph can hold a call.

Rejected: torch's symmetric memory, which is slower for few bytes (docs/parallelism.md); NVLink multicast, which is not
everywhere; a kernel that stays, which would hold multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.norm import MAX_HIDDEN, row_warps
from llmengine.kernels.step import NUM_SAMPLES
from llmengine.kernels.step_numbers import await_number, tell_number

MAX_PROGRAMS = 256
"""Programs that a call has on a GPU; each has flags of its own."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCKS = (1024, 2048, 4096, 8192, 16384)
_FEW_PROGRAMS = 64
_SHOTS = 2
_ALIGNMENT = 8
_CHOICES = 256


def data_bytes(capacity: int, size: int) -> int:
    """Bytes of a rank's data for tensors of up to `capacity` bytes, for so many ranks."""
    return 2 * _SHOTS * size * capacity


def flags_size(size: int, max_programs: int) -> int:
    """Numbers of 32 bits that a rank's flags are, for so many ranks and programs."""
    return _SHOTS * max_programs * size


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """One rank's view of the memory of all.

    Attributes:
        data: int64 [size], the address of each rank's data, as this rank sees it.
        flags: int64 [size], likewise of flags, which begin as zeros.
        numbers: int32 [max_programs], of the last call, as every program knows it; begins as zeros. Its size, a power
            of two, is the number of programs that a call has at most, the same on all ranks.
        capacity: bytes of the largest tensor, a multiple of 16.
        pdl: see `linear.LinearKernels`.
    """

    rank: int
    size: int
    data: Tensor
    flags: Tensor
    numbers: Tensor
    capacity: int
    pdl: bool = False


@dataclass(frozen=True, slots=True)
class RowNorm:
    """The RMSNorm that comes after a sum.

    Attributes:
        weight: [hidden].
        out: [num_rows, hidden], where the result goes.
    """

    weight: Tensor
    eps: float
    out: Tensor

    def of(self, num_rows: int) -> RowNorm:
        """The same for the first rows of `out`."""
        return replace(self, out=self.out[:num_rows])


def can_sum(tensor: Tensor) -> bool:
    """Whether `sum_over_peers` takes a tensor."""
    return tensor.dtype in _DTYPES and tensor.numel() > 0


def can_add_rows(memory: PeerMemory, part: Tensor) -> bool:
    """Whether `add_over_peers` takes a tensor [num_rows, hidden]."""
    hidden = part.shape[1]
    row_bytes = hidden * part.element_size()
    return can_sum(part) and hidden <= MAX_HIDDEN and hidden % _ALIGNMENT == 0 and row_bytes <= memory.capacity


def sum_over_peers(memory: PeerMemory, tensor: Tensor, shots: int) -> None:
    """Replace a contiguous tensor, of one shape on all ranks, by its sum over them, in one shot or in two.

    More than `PeerMemory.capacity` is summed in several calls. All ranks call this in the same order, with the same
    arguments. Allocates nothing.
    """
    assert can_sum(tensor), (tensor.shape, tensor.dtype)
    assert tensor.is_contiguous()
    for part in tensor.view(-1).split(memory.capacity // tensor.element_size()):
        block = next((block for block in _BLOCKS if part.numel() <= block * _FEW_PROGRAMS), _BLOCKS[-1])
        _launch(memory, part, part, None, block, shots)


def add_over_peers(memory: PeerMemory, part: Tensor, x: Tensor, norm: RowNorm | None, shots: int) -> None:
    """Add to x [num_rows, hidden], the same on all ranks, the sum over them of `part`, and write the norm of that.

    The sum is rounded to the dtype of x before it is added. More than `PeerMemory.capacity` is summed in several
    calls. All ranks call this in the same order, with arguments of the same shapes. Allocates nothing.
    """
    assert can_add_rows(memory, part), (part.shape, part.dtype, memory.capacity)
    assert part.is_contiguous()
    assert x.is_contiguous()
    assert x.shape == part.shape
    assert x.dtype == part.dtype
    num_rows, hidden = part.shape
    most = memory.capacity // (hidden * part.element_size())
    for begin in range(0, num_rows, most):
        rows = slice(begin, begin + most)
        own_norm = None if norm is None else replace(norm, out=norm.out[rows])
        _launch(memory, part[rows], x[rows], own_norm, hidden, shots, add=True)


def choose_over_peers(
    memory: PeerMemory, logits: Tensor, counts: Tensor, ids: Tensor, failed: Tensor, start: int
) -> None:
    """Replace what each rank chose among its columns of logits by the choice among all, of equal ones the lowest id.

    Args:
        logits: fp32 [num_rows, columns of this rank], contiguous.
        counts: `DeviceStep.counts`; rows from counts[NUM_SAMPLES] on are left alone.
        ids: int32 [num_rows]: column of the choice -> its id in the whole vocabulary.
        failed: int32 [num_rows], 1 where there is none -> where some rank has none.
        start: id of the first column.
    """
    num_rows = len(logits)
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    assert ids.dtype == failed.dtype == torch.int32
    assert 8 * num_rows <= memory.capacity
    assert num_rows <= _CHOICES * len(memory.numbers)
    _choose_over_peers[(triton.cdiv(num_rows, _CHOICES),)](
        logits,
        counts,
        ids,
        failed,
        memory.data,
        memory.flags,
        memory.numbers,
        num_rows,
        logits.shape[1],
        start,
        memory.capacity // 4,
        RANK=memory.rank,
        SIZE=memory.size,
        BLOCK=_CHOICES,
        NUM_SAMPLES=NUM_SAMPLES,
        MAX_PROGRAMS=len(memory.numbers),
        ON_GPU=memory.numbers.is_cuda,
        PDL=memory.pdl,
        num_warps=4,
        launch_pdl=memory.pdl,
    )


def _launch(
    memory: PeerMemory, part: Tensor, x: Tensor, norm: RowNorm | None, columns: int, shots: int, add: bool = False
) -> None:
    """Give each program so many columns at a time."""
    numel = part.numel()
    num_pieces = triton.cdiv(numel, columns)
    num_programs = min(len(memory.numbers), num_pieces)
    share = triton.cdiv(triton.cdiv(columns, memory.size), _ALIGNMENT) * _ALIGNMENT
    block = triton.next_power_of_2(columns)
    if norm is not None:
        assert norm.out.is_contiguous()
        assert norm.out.shape == x.shape
    _sum_over_peers[(num_programs,)](
        part,
        x,
        part if norm is None else norm.weight,
        x if norm is None else norm.out,
        memory.data,
        memory.flags,
        memory.numbers,
        numel,
        triton.cdiv(num_pieces, num_programs),
        memory.capacity // part.element_size(),
        0.0 if norm is None else norm.eps,
        RANK=memory.rank,
        SIZE=memory.size,
        COLUMNS=columns,
        BLOCK=block,
        SHARE=share,
        SHARE_BLOCK=triton.next_power_of_2(share),
        EVEN=numel == columns * num_programs,
        SHOTS=shots,
        ADD=add,
        NORM=norm is not None,
        MAX_PROGRAMS=len(memory.numbers),
        ON_GPU=memory.numbers.is_cuda,
        PDL=memory.pdl,
        num_warps=row_warps(block) if norm is not None else max(4, row_warps(block)),
        launch_pdl=memory.pdl,
    )


@triton.jit
def _tensor_at(address, element: tl.constexpr):
    """A pointer that is known to lie at a multiple of 16 bytes, so that threads move words of that size."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(element)), 16)


@triton.jit
def _arrive(
    flags, number, shot, RANK: tl.constexpr, SIZE: tl.constexpr, MAX_PROGRAMS: tl.constexpr, ON_GPU: tl.constexpr
):
    """Tell the other ranks that this one has written what they read after it, and wait until they have.

    A rank may be one call ahead.
    """
    first = (shot * MAX_PROGRAMS + tl.program_id(0)) * SIZE
    peers = tl.arange(0, triton.next_power_of_2(SIZE))
    is_other = (peers < SIZE) & (peers != RANK)
    theirs = tl.load(flags + peers, mask=is_other, other=0).to(tl.pointer_type(tl.int32))
    ours = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + first + peers
    tell_number(theirs + first + RANK, number, is_other, ON_GPU)
    await_number(ours, number, is_other, ON_GPU)


@triton.jit
def _number(numbers, MAX_PROGRAMS: tl.constexpr):
    """The number of this call; also tells the programs that only later calls have."""
    number = tl.load(numbers + tl.program_id(0)) + 1
    places = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, MAX_PROGRAMS)
    tl.debug_barrier()
    tl.store(numbers + places, tl.zeros([MAX_PROGRAMS], tl.int32) + number, mask=places < MAX_PROGRAMS)
    return number


@triton.jit
def _place(number, shot, source, capacity, SIZE: tl.constexpr):
    """Where in the data of any rank that begins which `source` writes in a call."""
    return (((number & 1) * 2 + shot) * SIZE + source).to(tl.int64) * capacity


@triton.jit(do_not_specialize=["num_turns"])
def _sum_over_peers(
    part,
    x,
    norm_weight,
    normed,
    data,
    flags,
    numbers,
    numel,
    num_turns,
    capacity,
    eps,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    SHOTS: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    ON_GPU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the sum of `part` over the ranks to x, or add it, and the RMSNorm of x, of COLUMNS columns, to `normed`.

    A program has COLUMNS columns in each of its turns; with EVEN a single turn, of as many as there are.
    """
    element = x.dtype.element_ty
    columns = tl.arange(0, BLOCK)
    if NORM:
        scale = tl.load(norm_weight + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    number = _number(numbers, MAX_PROGRAMS)
    ours = _tensor_at(data + RANK, element)
    each = tl.num_programs(0) * COLUMNS
    begin = tl.program_id(0) * COLUMNS
    if SHOTS == 1:
        for turn in range(0, num_turns):
            first = begin + turn * each
            mask = _wanted(columns, first, numel, COLUMNS, EVEN)
            own = tl.load(part + first + columns, mask=mask, other=0.0)
            for peer in tl.static_range(SIZE):
                if peer != RANK:
                    theirs = _tensor_at(data + peer, element) + _place(number, 0, RANK, capacity, SIZE)
                    tl.store(theirs + first + columns, own, mask=mask)
    else:
        in_share = tl.arange(0, SHARE_BLOCK)
        own_place = RANK * SHARE + in_share
        for turn in range(0, num_turns):
            first = begin + turn * each
            for step in tl.static_range(1, SIZE):
                peer = (RANK + step) % SIZE  # never all to the same
                place = peer * SHARE + in_share
                wanted = (in_share < SHARE) & _wanted(place, first, numel, COLUMNS, EVEN)
                theirs = _tensor_at(data + peer, element) + _place(number, 0, RANK, capacity, SIZE)
                tl.store(theirs + first + place, tl.load(part + first + place, mask=wanted, other=0.0), mask=wanted)
        _arrive(flags, number, 1, RANK, SIZE, MAX_PROGRAMS, ON_GPU)
        for turn in range(0, num_turns):
            first = begin + turn * each
            wanted = (in_share < SHARE) & _wanted(own_place, first, numel, COLUMNS, EVEN)
            share = _summed(part, ours, number, 0, first + own_place, wanted, capacity, SHARE_BLOCK, RANK, SIZE)
            for peer in tl.static_range(SIZE):
                theirs = _tensor_at(data + peer, element) + _place(number, 1, RANK, capacity, SIZE)
                tl.store(theirs + first + own_place, share, mask=wanted)
    _arrive(flags, number, 0, RANK, SIZE, MAX_PROGRAMS, ON_GPU)
    for turn in range(0, num_turns):
        first = begin + turn * each
        mask = _wanted(columns, first, numel, COLUMNS, EVEN)
        if SHOTS == 1:
            total = _summed(part, ours, number, 0, first + columns, mask, capacity, BLOCK, RANK, SIZE)
        else:
            owner = (columns // SHARE).to(tl.int64) * capacity
            places = tl.max_contiguous(tl.multiple_of(owner + first + columns, 8), 8)
            at = ours + _place(number, 1, 0, capacity, SIZE) + places
            total = tl.load(at, mask=mask, other=0.0, volatile=True)
        if ADD:
            before = tl.load(x + first + columns, mask=mask, other=0.0).to(tl.float32)
            total = (before + total.to(tl.float32)).to(element)
        tl.store(x + first + columns, total, mask=mask)
        if NORM:
            values = total.to(tl.float32)
            inverse = tl.rsqrt(tl.sum(values * values, 0) / COLUMNS + eps)
            tl.store(normed + first + columns, (values * inverse * scale).to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _wanted(columns, first, numel, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Which columns of a turn there are."""
    mask = columns < COLUMNS
    if not EVEN:
        mask = mask & (first + columns < numel)
    return mask


@triton.jit
def _summed(
    part, ours, number, shot, places, mask, capacity, BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr
):
    """The sum of `part` and of what the others have written, in the order of ranks."""
    total = tl.zeros([BLOCK], tl.float32)
    for source in tl.static_range(SIZE):
        if source == RANK:
            total += tl.load(part + places, mask=mask, other=0.0).to(tl.float32)
        else:
            at = ours + _place(number, shot, source, capacity, SIZE) + places
            total += tl.load(at, mask=mask, other=0.0, volatile=True).to(tl.float32)
    return total.to(part.dtype.element_ty)


@triton.jit
def _choose_over_peers(
    logits,
    counts,
    ids,
    failed,
    data,
    flags,
    numbers,
    num_rows,
    vocab,
    start,
    capacity,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    ON_GPU: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    number = _number(numbers, MAX_PROGRAMS)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < tl.load(counts + NUM_SAMPLES)
    own_ids = tl.load(ids + rows, mask=mask, other=0)
    own = tl.load(logits + rows.to(tl.int64) * vocab + own_ids, mask=mask, other=0.0)
    own = tl.where(tl.load(failed + rows, mask=mask, other=0) != 0, float("inf"), own)
    own_ids += start
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            place = _place(number, 0, RANK, capacity, SIZE)
            tl.store(_tensor_at(data + peer, tl.float32) + place + rows, own, mask=mask)
            tl.store(_tensor_at(data + peer, tl.int32) + place + num_rows + rows, own_ids, mask=mask)
    _arrive(flags, number, 0, RANK, SIZE, MAX_PROGRAMS, ON_GPU)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    chosen = tl.zeros([BLOCK], tl.int32)
    for source in tl.static_range(SIZE):
        if source == RANK:
            value = own
            candidate = own_ids
        else:
            place = _place(number, 0, source, capacity, SIZE)
            at = _tensor_at(data + RANK, tl.float32) + place + rows
            value = tl.load(at, mask=mask, other=0.0, volatile=True)
            at = _tensor_at(data + RANK, tl.int32) + place + num_rows + rows
            candidate = tl.load(at, mask=mask, other=0, volatile=True)
        chosen = tl.where(value > best, candidate, chosen)
        best = tl.maximum(best, value)
    is_failed = tl.abs(best) == float("inf")
    tl.store(ids + rows, tl.where(is_failed, 0, chosen), mask=mask)
    tl.store(failed + rows, is_failed.to(tl.int32), mask=mask)
