"""The kernels that open and close a step, and the arrays through which they read a batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from llmengine.backends.cuda.buckets import Bucket
from llmengine.backends.cuda.step_buffer import SlotStateUpdater, StepBuffer, StepLimits
from llmengine.backends.cuda.stream import CudaStream, HostStream
from llmengine.batch import Batch, BatchRow, SlotInit
from llmengine.kernels.step import (
    FROM_SLOT,
    NUM_DECODES,
    NUM_QUERY_BLOCKS,
    NUM_SAMPLES,
    NUM_TOKENS,
    SlotState,
    begin_step,
    begin_step_reference,
    end_step,
    end_step_reference,
)
from llmengine.sampling_params import SamplingParams

STREAMS = {"cpu": HostStream, "cuda": partial(CudaStream.open, 1)}
NUM_SLOTS, MAX_BLOCKS, QUERY_BLOCK = 5, 6, 4
LIMITS = StepLimits(max_tokens=32, max_rows=NUM_SLOTS, max_query_blocks=12, max_updates=40)


def make_init(slot: int, token_ids: Sequence[int]) -> SlotInit:
    return SlotInit(slot, token_ids, len(token_ids), SamplingParams(), 0, frozenset())


def make_buffer(device: str) -> tuple[StepBuffer, SlotState]:
    state = SlotState.empty(NUM_SLOTS, MAX_BLOCKS, device)
    return StepBuffer.allocate(LIMITS, state, QUERY_BLOCK, depth=2), state


MIXED = Batch(
    step=1,
    rows=[
        BatchRow(2, 3, 6, [10, 11, 12, 13, 14, 15], [4, 5], sample=1),
        BatchRow(0, 7, 1, [], [], sample=1),
        BatchRow(4, 0, 2, [20, 21], [9], sample=0),
        BatchRow(1, 2, 1, [], [7], sample=1),
    ],
    slot_inits=[make_init(1, [30, 31, 32]), make_init(4, [20, 21, 22])],
)


def test_a_mixed_batch_becomes_arrays_with_decodes_first(device: str) -> None:
    buffer, _ = make_buffer(device)
    tables = SlotStateUpdater(NUM_SLOTS, MAX_BLOCKS)
    sampled = buffer.fill(MIXED, tables.updates(MIXED.rows, MIXED.slot_inits), Bucket(16, 4, mixed=True), 1)
    buffer.send(1, STREAMS[device]())
    step = buffer.step
    assert sampled == [0, 1, 2]
    assert step.counts[[NUM_TOKENS, NUM_DECODES, NUM_QUERY_BLOCKS, NUM_SAMPLES]].tolist() == [10, 2, 3, 3]
    # Slot 1 is initialised in this step: its latest token comes from the host.
    assert step.token_ids[:16].tolist() == [FROM_SLOT, 32, 10, 11, 12, 13, 14, 15, 20, 21, *[0] * 6]
    assert step.positions[:16].tolist() == [7, 2, 3, 4, 5, 6, 7, 8, 0, 1, *[0] * 6]
    assert step.token_slots[:16].tolist() == [0, 1, *[2] * 6, 4, 4, *[NUM_SLOTS] * 6]
    assert step.row_slots[:4].tolist() == [0, 1, 2, 4]
    assert step.row_starts[:5].tolist() == [0, 1, 2, 8, 10]
    assert step.context_lens[:4].tolist() == [8, 3, 9, 2]
    assert step.query_block_rows[:3].tolist() == [2, 2, 3]
    assert step.query_block_starts[:3].tolist() == [2, 6, 8]
    assert step.sample_tokens[:4].tolist() == [0, 1, 7, 0]
    assert step.sample_slots[:3].tolist() == [0, 1, 2]
    assert step.sample_positions[:3].tolist() == [8, 3, 9]


def test_a_batch_of_decodes_becomes_arrays(device: str) -> None:
    buffer, _ = make_buffer(device)
    rows = [BatchRow(3, 8, 1, [], [2], 1), BatchRow(1, 4, 1, [77], [], 0)]
    sampled = buffer.fill(Batch(1, rows), [], Bucket(4, 4, mixed=False), 0)
    buffer.send(0, STREAMS[device]())
    step = buffer.step
    assert sampled == [3, -1]
    assert step.counts[[NUM_TOKENS, NUM_DECODES, NUM_QUERY_BLOCKS, NUM_SAMPLES]].tolist() == [2, 2, 0, 2]
    assert step.token_ids[:4].tolist() == [FROM_SLOT, 77, 0, 0]
    assert step.token_slots[:4].tolist() == [3, 1, NUM_SLOTS, NUM_SLOTS]
    assert step.context_lens[:2].tolist() == [9, 5]
    assert step.sample_slots[:2].tolist() == [3, NUM_SLOTS]
    assert step.sample_positions[:2].tolist() == [9, 5]


def test_block_tables_grow_until_the_slot_is_initialised_again(device: str) -> None:
    buffer, state = make_buffer(device)
    tables = SlotStateUpdater(NUM_SLOTS, MAX_BLOCKS)
    embedding = torch.zeros(100, 8, device=device)
    out = torch.zeros(2, 8, device=device)
    for batch, expected in (
        (Batch(1, [BatchRow(2, 0, 2, [1, 2], [5, 6], 1)], [make_init(2, [1, 2])]), [5, 6, 0]),
        (Batch(2, [BatchRow(2, 2, 1, [], [8], 1)]), [5, 6, 8]),
        (Batch(3, [BatchRow(2, 0, 2, [1, 2], [3], 1)], [make_init(2, [1, 2, 3])]), [3, 6, 8]),
    ):
        buffer.fill(batch, tables.updates(batch.rows, batch.slot_inits), Bucket(2, 2, mixed=True), 0)
        buffer.send(0, STREAMS[device]())
        begin_step(buffer.step, state, embedding, out)
        assert state.block_tables[2, :3].tolist() == expected
    assert int(state.last_token_ids[2]) == 3
    assert not state.block_tables[[0, 1, 3, 4, 5]].any()


@pytest.mark.parametrize("hidden", [8, 40, 1100])
def test_begin_step_equals_its_reference(device: str, hidden: int) -> None:
    results = []
    for function in (begin_step, begin_step_reference):
        buffer, state = make_buffer(device)
        state.last_token_ids.copy_(torch.arange(50, 50 + NUM_SLOTS + 1))
        updates = SlotStateUpdater(NUM_SLOTS, MAX_BLOCKS).updates(MIXED.rows, MIXED.slot_inits)
        buffer.fill(MIXED, updates, Bucket(12, 4, mixed=True), 0)
        buffer.send(0, STREAMS[device]())
        embedding = torch.randn(100, hidden, generator=torch.Generator().manual_seed(0)).to(device)
        out = torch.full((12, hidden), torch.nan, device=device)
        function(buffer.step, state, embedding, out)
        results.append((buffer.step.token_ids[:12], state.values, out))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize(
    ("ids", "last", "published"),
    [
        ([[5], [6], [7], [8]], [5, 6, 7], [[5], [-1], [7]]),
        ([[5, 6, 7], [8, 9, -1], [10, -1, -1], [11, 12, 13]], [7, 9, 10], [[5, 6, 7], [-1] * 3, [10, -1, -1]]),
    ],
    ids=["one token", "up to three tokens"],
)
def test_end_step_equals_its_reference_and_marks_failed_rows(
    device: str, ids: list[list[int]], last: list[int], published: list[list[int]]
) -> None:
    results = []
    unused = [-7] * len(ids[0])
    for function in (end_step, end_step_reference):
        buffer, state = make_buffer(device)
        buffer.fill(MIXED, [], Bucket(12, 4, mixed=True), 1)
        buffer.send(1, STREAMS[device]())
        ring = torch.full((2, NUM_SLOTS, len(unused)), -7, dtype=torch.int32, device=device)
        failed = torch.tensor([0, 1, 0, 0], dtype=torch.int32, device=device)
        function(buffer.step, state, torch.tensor(ids, dtype=torch.int32, device=device), failed, ring, 4)
        results.append((state.last_token_ids, ring))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)
    assert results[0][0][:3].tolist() == last
    assert results[0][1].tolist() == [[unused] * 5, [*published, unused, unused]]
