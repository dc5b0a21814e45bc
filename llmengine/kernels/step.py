"""One step's rows on the device, and the two kernels that open and close a step.

A CUDA graph is captured for a bucket of tokens and replayed for any step that fits into it, so all that differs from
step to step is in these tensors, at addresses that never change. A kernel has the bucket's grid and leaves early beyond
the counts. Padding tokens have position 0 and the slot after the last one, whose block table is all `NULL_BLOCK`:
they may be computed, and what they write hurts nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_TOKENS, NUM_ROWS, NUM_DECODES, NUM_QUERY_BLOCKS, NUM_SAMPLES, NUM_UPDATES, RING_INDEX, IDS_LAG = range(8)
"""Indices into `DeviceStep.counts`; of the last one see `kernels.stage_link`."""

FROM_SLOT = -1
"""Token id that stands for the slot's latest sampled token."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The rows of one step, all int32, rows of one token (decodes) first.

    Attributes:
        counts: [8], how much of the following is in use.
        token_ids: [max_tokens]; `FROM_SLOT` until `begin_step` has run.
        positions: [max_tokens].
        token_slots: [max_tokens], the slot that each token belongs to.
        row_slots: [max_rows].
        row_starts: [max_rows + 1]; row r has the tokens [row_starts[r], row_starts[r + 1]); row r < NUM_DECODES is
            token r.
        context_lens: [max_rows], tokens before and in the step.
        query_block_rows: [max_query_blocks], the row of each block of query tokens; only rows from NUM_DECODES on.
        query_block_starts: [max_query_blocks], its first token (an index into the step's tokens).
        sample_tokens: [max_rows], the tokens whose logits are sampled.
        sample_slots: [max_rows]; the slot after the last one for a token that nobody wants.
        sample_positions: [max_rows], the positions that the sampled tokens take.
        updates: [max_updates, 2], pairs of a place in `SlotState.values` and the value that `begin_step` puts there.
        block_tables: [num_slots + 1, max_blocks]; the token at position p of a slot is in block p // block_size.
    """

    counts: Tensor
    token_ids: Tensor
    positions: Tensor
    token_slots: Tensor
    row_slots: Tensor
    row_starts: Tensor
    context_lens: Tensor
    query_block_rows: Tensor
    query_block_starts: Tensor
    sample_tokens: Tensor
    sample_slots: Tensor
    sample_positions: Tensor
    updates: Tensor
    block_tables: Tensor


@dataclass(frozen=True, slots=True)
class SlotState:
    """What the device keeps of each slot between steps: `values`, int32, and its two parts as views.

    Attributes:
        values: [(num_slots + 1) * max_blocks + num_slots + 1].
        block_tables: [num_slots + 1, max_blocks], the front of `values`.
        last_token_ids: [num_slots + 1], the rest.
    """

    values: Tensor
    block_tables: Tensor
    last_token_ids: Tensor

    @staticmethod
    def empty(num_slots: int, max_blocks: int, device: Any) -> SlotState:
        """A state in which all blocks are `NULL_BLOCK` and all tokens are 0."""
        size = (num_slots + 1) * max_blocks
        values = torch.zeros(size + num_slots + 1, dtype=torch.int32, device=device)
        return SlotState(values, values[:size].view(num_slots + 1, max_blocks), values[size:])


@triton.jit(do_not_specialize=["num_programs"])
def _begin_step(
    counts,
    token_ids,
    token_slots,
    updates,
    values,
    last_token_ids,
    embedding,
    out,
    hidden,
    num_programs,
    NUM_UPDATES: tl.constexpr,
    EMBED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    token_id = tl.load(token_ids + token)
    if token_id < 0:
        token_id = tl.load(last_token_ids + tl.load(token_slots + token))
        tl.store(token_ids + token, token_id)
    if EMBED:
        row = embedding + token_id.to(tl.int64) * hidden
        for begin in tl.range(0, hidden, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            tl.store(
                out + token.to(tl.int64) * hidden + columns,
                tl.load(row + columns, mask=columns < hidden),
                mask=columns < hidden,
            )
    num_updates = tl.load(counts + NUM_UPDATES)
    for chunk in tl.range(0, tl.cdiv(num_updates - token * BLOCK, num_programs * BLOCK)):
        entries = (token + chunk * num_programs) * BLOCK + tl.arange(0, BLOCK)
        used = entries < num_updates
        places = tl.load(updates + 2 * entries, mask=used, other=0)
        tl.store(values + places, tl.load(updates + 2 * entries + 1, mask=used, other=0), mask=used)


def begin_step(step: DeviceStep, state: SlotState, embedding: Tensor | None, out: Tensor) -> None:
    """Apply the step's updates to `state`, look up the tokens' ids where they come from a slot, and embed them.

    A slot whose last token is updated in a step must not be read by `FROM_SLOT` in the same step.

    Args:
        embedding: [vocab, hidden]; None: tokens are not embedded, which is done by the ids afterwards.
        out: [num_tokens, hidden] of the same dtype; num_tokens is the bucket.
    """
    num_tokens, hidden = out.shape
    _begin_step[(num_tokens,)](
        step.counts,
        step.token_ids,
        step.token_slots,
        step.updates,
        state.values,
        state.last_token_ids,
        out if embedding is None else embedding,
        out,
        hidden,
        num_tokens,
        NUM_UPDATES=NUM_UPDATES,
        EMBED=embedding is not None,
        BLOCK=min(1024, triton.next_power_of_2(hidden)),
        num_warps=4,
    )


def begin_step_reference(step: DeviceStep, state: SlotState, embedding: Tensor, out: Tensor) -> None:
    """The same in torch."""
    num_updates = int(step.counts[NUM_UPDATES])
    tokens = slice(0, len(out))
    from_slot = state.last_token_ids[step.token_slots[tokens].long()]
    step.token_ids[tokens] = from_slot.where(step.token_ids[tokens] < 0, step.token_ids[tokens])
    state.values[step.updates[:num_updates, 0].long()] = step.updates[:num_updates, 1]
    out.copy_(embedding[step.token_ids[tokens].long()])


@triton.jit
def _end_step(
    counts,
    sample_slots,
    ids,
    failed,
    last_token_ids,
    ring,
    max_rows,
    MAX_SAMPLES: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    RING_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = rows < tl.load(counts + NUM_SAMPLES)
    has_failed = tl.load(failed + rows, mask=used, other=0) != 0
    entries = ring + (tl.load(counts + RING_INDEX) * max_rows + rows) * MAX_SAMPLES
    last = tl.zeros([BLOCK], dtype=tl.int32)
    for index in tl.static_range(MAX_SAMPLES):
        chosen = tl.load(ids + rows * MAX_SAMPLES + index, mask=used, other=0)
        last = tl.where(chosen >= 0, chosen, last)
        tl.store(entries + index, tl.where(has_failed, -1, chosen), mask=used)
    slots = tl.load(sample_slots + rows, mask=used, other=0)
    tl.store(last_token_ids + slots, last, mask=used)


def end_step(step: DeviceStep, state: SlotState, ids: Tensor, failed: Tensor, ring: Tensor, num_samples: int) -> None:
    """Make the last sampled ids the slots' last tokens and publish all of them in `ring[counts[RING_INDEX]]`.

    Args:
        ids: int32 [>= num_samples, max_samples], contiguous; -1 after the last one of a row.
        failed: int32 [>= num_samples]; a row that failed is published as -1 throughout.
        ring: int32 [depth, max_rows, max_samples], contiguous, on the device or in pinned host memory.
        num_samples: the bucket; counts[NUM_SAMPLES] of it are in use.
    """
    block = 256
    _end_step[(triton.cdiv(num_samples, block),)](
        step.counts,
        step.sample_slots,
        ids,
        failed,
        state.last_token_ids,
        ring,
        ring.shape[1],
        MAX_SAMPLES=ring.shape[2],
        NUM_SAMPLES=NUM_SAMPLES,
        RING_INDEX=RING_INDEX,
        BLOCK=block,
        num_warps=4,
    )


def end_step_reference(
    step: DeviceStep, state: SlotState, ids: Tensor, failed: Tensor, ring: Tensor, num_samples: int
) -> None:
    """The same in torch."""
    used = min(int(step.counts[NUM_SAMPLES]), num_samples)
    last = ((ids[:used] >= 0).sum(dim=1, keepdim=True) - 1).clamp_(min=0)
    state.last_token_ids[step.sample_slots[:used].long()] = ids[:used].gather(1, last)[:, 0]
    ring[int(step.counts[RING_INDEX]), :used] = ids[:used].masked_fill(failed[:used, None] != 0, -1)
