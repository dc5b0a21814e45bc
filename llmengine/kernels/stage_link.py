"""What passes between the stages of a pipeline, from GPU to GPU: hidden states forward, and sampled ids to the start.

The ranks that have the same part of each stage are a ring. Each of them writes into memory of the one after it: hidden
states, or, from the last stage to the first, ids. Then it writes the number of the step, for which the other waits at
the start of its own. Nothing else is said: no host takes part, and stages run freely beside each other::

    header   [ number of the latest step that has arrived ]...[ not 0: nobody waits any more ]
    ids      [ slot ]                     latest sampled token of each slot; in the first stage
    hidden   [ step % depth ][ token ]    in the others

Steps are numbered on the device, so a CUDA graph can hold all of this. Every rank counts the same steps.

**Nothing is overwritten that is still to be read.** The first stage begins step *n* when the last one has ended step
*n - depth*, or a later one if step *n* takes its ids from there. Since that has read all that was sent to it, and so
have those before, place *n % depth* is free everywhere.

**Ids that are in flight hurt nobody.** The last stage writes a slot's id whenever it has one, also while the first
stage copies others. A step that takes a slot's id begins after the step that sampled it, and no later one samples for
that slot before it: a request's next token needs its latest.

Rejected: NCCL, whose send waits for a receive, so that a stage would hold up the one before it, and which needs a
second stream not to; an acknowledgement for each border, since the ids say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.step import IDS_LAG, NUM_SAMPLES, DeviceStep, SlotState
from llmengine.kernels.step_numbers import await_number_or_release, tell_number

_ALIGNMENT = 256
RELEASED_BYTE = 128
"""Where the word lies that ends all waiting; the number of the latest step is the first word."""

_BLOCK = 4096
_IDS_BLOCK = 256


def link_depth(num_stages: int) -> int:
    """Places for hidden states, a power of two: one for each stage, and at least one more for steps of unequal size."""
    return 1 << num_stages.bit_length()


@dataclass(frozen=True, slots=True)
class LinkLayout:
    """What lies where in the memory that a rank gives the one before it.

    Attributes:
        num_ids: slots, the one for padding included.
        place_bytes: of the hidden states of the largest step.
        depth: see `link_depth`.
    """

    num_ids: int
    place_bytes: int
    depth: int

    @classmethod
    def of(cls, num_slots: int, max_tokens: int, hidden_size: int, dtype: torch.dtype, num_stages: int) -> LinkLayout:
        """The layout for steps of so many tokens."""
        return cls(num_slots + 1, _aligned(max_tokens * hidden_size * dtype.itemsize), link_depth(num_stages))

    @property
    def hidden_byte(self) -> int:
        """Where hidden states begin."""
        return _ALIGNMENT + _aligned(4 * self.num_ids)

    def size_bytes(self, *, is_first: bool) -> int:
        """Bytes of the memory of a rank; that of the first stage gets no hidden states."""
        return self.hidden_byte + (0 if is_first else self.depth * self.place_bytes)


@dataclass(frozen=True, slots=True)
class LinkMemory:
    """A rank's memory and that of the rank after it, which begin as zeros.

    Attributes:
        at: int64 [2], their addresses as this rank sees them.
        number: int32 [1], of the latest step that this rank has begun; begins as zero.
    """

    layout: LinkLayout
    at: Tensor
    number: Tensor


def take_ids(memory: LinkMemory, step: DeviceStep, state: SlotState) -> None:
    """Begin a step in the first stage: wait for the ids that it needs, and make them the slots' last tokens.

    `step.counts[IDS_LAG]` says which step has sampled them: this one less so many; 0 if it needs none.
    """
    layout = memory.layout
    assert len(state.last_token_ids) == layout.num_ids
    _take_ids[(1,)](
        memory.at,
        memory.number,
        step.counts,
        state.last_token_ids,
        layout.num_ids,
        layout.depth,
        IDS_LAG=IDS_LAG,
        IDS_AT=_ALIGNMENT // 4,
        RELEASED_AT=RELEASED_BYTE // 4,
        ON_GPU=memory.number.is_cuda,
        BLOCK=_IDS_BLOCK,
        num_warps=4,
    )


def take_hidden(memory: LinkMemory, x: Tensor) -> None:
    """Begin a step in a later stage: wait for the hidden states [num_tokens, hidden], and copy them to x."""
    on_gpu = memory.number.is_cuda
    _await_hidden[(1,)](memory.at, memory.number, RELEASED_AT=RELEASED_BYTE // 4, ON_GPU=on_gpu, num_warps=1)
    _copy(memory, x, sends=False)


def send_hidden(memory: LinkMemory, x: Tensor) -> None:
    """End a step in a stage before the last: give x [num_tokens, hidden] to the next one."""
    _copy(memory, x, sends=True)
    _tell_next[(1,)](memory.at, memory.number, ON_GPU=memory.number.is_cuda, num_warps=1)


def send_ids(memory: LinkMemory, step: DeviceStep, state: SlotState) -> None:
    """End a step in the last stage, after `end_step`: give the last tokens of the slots that sampled to the first."""
    _send_ids[(1,)](
        memory.at,
        memory.number,
        step.counts,
        step.sample_slots,
        state.last_token_ids,
        NUM_SAMPLES=NUM_SAMPLES,
        IDS_AT=_ALIGNMENT // 4,
        ON_GPU=memory.number.is_cuda,
        BLOCK=_IDS_BLOCK,
        num_warps=4,
    )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _copy(memory: LinkMemory, x: Tensor, *, sends: bool) -> None:
    layout, numel = memory.layout, x.numel()
    assert x.is_contiguous()
    assert x.nbytes <= layout.place_bytes, (x.shape, layout)
    _copy_hidden[(triton.cdiv(numel, _BLOCK),)](
        memory.at,
        memory.number,
        x,
        numel,
        layout.hidden_byte // x.element_size(),
        layout.place_bytes // x.element_size(),
        layout.depth - 1,
        SENDS=sends,
        BLOCK=_BLOCK,
        num_warps=8,
    )


@triton.jit
def _words(address):
    return tl.load(address).to(tl.pointer_type(tl.int32))


@triton.jit
def _take_ids(
    at,
    number,
    counts,
    last_token_ids,
    num_ids,
    most_lag,
    IDS_LAG: tl.constexpr,
    IDS_AT: tl.constexpr,
    RELEASED_AT: tl.constexpr,
    ON_GPU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = _words(at)
    current = tl.load(number) + 1
    lag = tl.load(counts + IDS_LAG)
    lag = tl.where(lag == 0, most_lag, tl.minimum(lag, most_lag))
    await_number_or_release(own, current - lag, own + RELEASED_AT, ON_GPU)
    tl.store(number, current)
    for begin in tl.range(0, num_ids, BLOCK):
        slots = begin + tl.arange(0, BLOCK)
        mask = slots < num_ids
        ids = tl.load(own + IDS_AT + slots, mask=mask, other=0, volatile=True)
        tl.store(last_token_ids + slots, ids, mask=mask)


@triton.jit
def _await_hidden(at, number, RELEASED_AT: tl.constexpr, ON_GPU: tl.constexpr):
    own = _words(at)
    current = tl.load(number) + 1
    await_number_or_release(own, current, own + RELEASED_AT, ON_GPU)
    tl.store(number, current)


@triton.jit
def _copy_hidden(at, number, x, numel, hidden_at, place, last_place, SENDS: tl.constexpr, BLOCK: tl.constexpr):
    """Copy x to its place in the memory of the rank after this one, or from its place in this one's own."""
    base = tl.load(at + SENDS).to(tl.pointer_type(x.dtype.element_ty))
    # Places begin at multiples of 256 bytes: threads move words of 16.
    offset = tl.multiple_of(hidden_at + (tl.load(number) & last_place).to(tl.int64) * place, 16)
    there = tl.multiple_of(base, 16) + offset
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    if SENDS:
        tl.store(there + index, tl.load(x + index, mask=mask), mask=mask)
    else:
        tl.store(x + index, tl.load(there + index, mask=mask, volatile=True), mask=mask)


@triton.jit
def _tell_next(at, number, ON_GPU: tl.constexpr):
    """Say that what the kernels before this one wrote is there."""
    one = tl.zeros([1], tl.int32)
    tell_number(_words(at + 1) + one, tl.load(number), one == 0, ON_GPU)


@triton.jit
def _send_ids(
    at,
    number,
    counts,
    sample_slots,
    last_token_ids,
    NUM_SAMPLES: tl.constexpr,
    IDS_AT: tl.constexpr,
    ON_GPU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    theirs = _words(at + 1)
    num_samples = tl.load(counts + NUM_SAMPLES)
    for begin in tl.range(0, num_samples, BLOCK):
        rows = begin + tl.arange(0, BLOCK)
        mask = rows < num_samples
        slots = tl.load(sample_slots + rows, mask=mask, other=0)
        tl.store(theirs + IDS_AT + slots, tl.load(last_token_ids + slots, mask=mask, other=0), mask=mask)
    one = tl.zeros([1], tl.int32)
    tell_number(theirs + one, tl.load(number), one == 0, ON_GPU)
