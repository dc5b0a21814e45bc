"""Host-side state of the slots, and a step's rows flattened into arrays. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmengine.batch import NULL_BLOCK, Batch, BatchRow, SlotInit

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, its rows reordered: those of one token first, by growing context, then the longer ones.

    Attributes:
        token_ids: [num_tokens], the rows' tokens one after another.
        positions: [num_tokens].
        token_slots: [num_tokens], the slot that each token belongs to.
        row_slots: [num_rows].
        context_lens: [num_rows], tokens before and in the step.
        row_starts: [num_rows + 1]; row r has the tokens [row_starts[r], row_starts[r + 1]).
        num_decodes: rows of one token; they are the first ones, so they own the tokens [0, num_decodes).
        sample_tokens: [num_samples], last tokens of the rows that sample.
        sample_slots: [num_samples].
        sample_positions: [num_samples], the positions that the sampled tokens take.
    """

    token_ids: IntArray
    positions: IntArray
    token_slots: IntArray
    row_slots: IntArray
    context_lens: IntArray
    row_starts: IntArray
    num_decodes: int
    sample_tokens: IntArray
    sample_slots: IntArray
    sample_positions: IntArray


class BlockTables:
    """Block table of each slot, in host memory.

    Attributes:
        array: int32 [num_slots, max_blocks]; `NULL_BLOCK` beyond the blocks that a slot holds.
    """

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.array: NDArray[np.int32] = np.full((num_slots, max_blocks), NULL_BLOCK, dtype=np.int32)
        self._num_blocks = [0] * num_slots

    def reset(self, slot: int) -> None:
        """Empty a slot's table."""
        self.array[slot] = NULL_BLOCK
        self._num_blocks[slot] = 0

    def append(self, slot: int, block_ids: Sequence[int]) -> None:
        """Add blocks to a slot's table."""
        begin = self._num_blocks[slot]
        end = begin + len(block_ids)
        assert end <= self.array.shape[1], "a request never outgrows max_model_len"
        self.array[slot, begin:end] = block_ids
        self._num_blocks[slot] = end


class HostSlotState:
    """Block table and latest sampled token of each slot, in host memory."""

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self._last_token_ids = [0] * len(tables.array)

    @property
    def block_tables(self) -> NDArray[np.int32]:
        """See `BlockTables.array`."""
        return self._tables.array

    def init_slot(self, init: SlotInit) -> None:
        """Empty the slot's block table and take over its latest token."""
        self._tables.reset(init.slot)
        self._last_token_ids[init.slot] = init.token_ids[-1]

    def store_sampled(self, slots: IntArray, token_ids: list[int]) -> None:
        """Remember the tokens [num_samples] that a step sampled."""
        for slot, token_id in zip(slots.tolist(), token_ids, strict=True):
            self._last_token_ids[slot] = token_id

    def flatten(self, batch: Batch) -> StepInputs:
        """Append the batch's new blocks to the block tables and return its rows as arrays."""
        rows = in_step_order(batch.rows)
        token_ids: list[int] = []
        for row in rows:
            if row.new_block_ids:
                self._tables.append(row.slot, row.new_block_ids)
            token_ids.extend(row.token_ids)
            if len(row.token_ids) < row.num_tokens:
                token_ids.append(self._last_token_ids[row.slot])
        slots, starts, counts = (
            _array([row.slot for row in rows]),
            _array([row.start for row in rows]),
            _array([row.num_tokens for row in rows]),
        )
        row_starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(counts, out=row_starts[1:])
        assert len(token_ids) == row_starts[-1], "a row brings num_tokens ids, or one fewer"
        samples = _array([index for index, row in enumerate(rows) if row.sample])
        return StepInputs(
            token_ids=_array(token_ids),
            positions=np.arange(len(token_ids)) + np.repeat(starts - row_starts[:-1], counts),
            token_slots=np.repeat(slots, counts),
            row_slots=slots,
            context_lens=starts + counts,
            row_starts=row_starts,
            num_decodes=sum(row.num_tokens == 1 for row in rows),
            sample_tokens=row_starts[samples + 1] - 1,
            sample_slots=slots[samples],
            sample_positions=(starts + counts)[samples],
        )


def in_step_order(rows: Sequence[BatchRow]) -> list[BatchRow]:
    """Rows in the order of `StepInputs`: those of one token first, by growing context, then the longer ones."""
    return sorted(rows, key=_row_order)


def _row_order(row: BatchRow) -> tuple[bool, int]:
    return row.num_tokens > 1, row.start


def _array(values: list[Any]) -> IntArray:
    return np.array(values, dtype=np.int64)
