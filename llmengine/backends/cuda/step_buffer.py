"""A step's rows on their way to the device: one pinned buffer, one copy.

All int32 arrays of a `DeviceStep` are parts of one device buffer, mirrored in pinned host memory, so a step costs one
asynchronous copy of what it uses. The host side is a ring, because the next step is written while steps in flight may
still be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cuda.buckets import Bucket
from llmengine.backends.cuda.stream import StepStream
from llmengine.batch import Batch, BatchRow, SlotInit
from llmengine.kernels.step import (
    FROM_SLOT,
    IDS_LAG,
    NUM_DECODES,
    NUM_QUERY_BLOCKS,
    NUM_ROWS,
    NUM_SAMPLES,
    NUM_TOKENS,
    NUM_UPDATES,
    RING_INDEX,
    DeviceStep,
    SlotState,
)

_ALIGNMENT = 64
"""Parts begin at multiples of 256 bytes: kernels then load wide words, and TensorRT accepts the addresses."""

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Sizes of a step buffer.

    Attributes:
        max_tokens: most tokens of a step.
        max_rows: most rows.
        max_query_blocks: most blocks of query tokens, over all rows with more than one token; 0: no such rows.
        max_updates: most changes to slot state in a step.
    """

    max_tokens: int
    max_rows: int
    max_query_blocks: int
    max_updates: int

    def sections(self) -> dict[str, int]:
        """Size of each part, in order; a step's copy ends with what it uses of the last one."""
        return {
            "counts": 8,
            "row_slots": self.max_rows,
            "row_starts": self.max_rows + 1,
            "context_lens": self.max_rows,
            "sample_tokens": self.max_rows,
            "sample_slots": self.max_rows,
            "sample_positions": self.max_rows,
            "token_ids": self.max_tokens,
            "positions": self.max_tokens,
            "token_slots": self.max_tokens,
            "query_block_rows": self.max_query_blocks,
            "query_block_starts": self.max_query_blocks,
            "updates": 2 * self.max_updates,
        }


class StepBuffer:
    """The device's arrays of a step and their pinned mirrors; written by `fill`, sent by `send`.

    Args:
        step: views of `packed`.
        packed: int32 [size] on the device, all parts one after another.
        mirrors: int32 [depth, size], pinned.
        host: of each mirror, its parts by name.
        query_block: tokens of a query block.
        decodes: rows of one token are decodes; otherwise they have query blocks like all others, in mixed steps.
    """

    def __init__(
        self,
        step: DeviceStep,
        packed: Tensor,
        mirrors: Tensor,
        host: Sequence[dict[str, Int32Array]],
        query_block: int,
        decodes: bool,
    ) -> None:
        self.step = step
        self._packed = packed
        self._mirrors = mirrors
        self._mirror_arrays: Int32Array = mirrors.numpy()
        self._host = host
        self._query_block = query_block
        self._decodes = decodes
        self._updates_offset = int(step.updates.storage_offset())
        self._dummy_slot = len(step.block_tables) - 1
        self._num_update_words = 0

    @classmethod
    def allocate(
        cls, limits: StepLimits, state: SlotState, query_block: int, depth: int, decodes: bool = True
    ) -> StepBuffer:
        """Allocate the arrays of the largest step, and `depth` mirrors of them."""
        sections = limits.sections()
        offsets, size = {}, 0
        for name, length in sections.items():
            offsets[name] = size
            size += -(-length // _ALIGNMENT) * _ALIGNMENT
        device = state.values.device
        packed = torch.zeros(size, dtype=torch.int32, device=device)
        mirrors = torch.zeros((depth, size), dtype=torch.int32, pin_memory=device.type == "cuda")
        places = {name: slice(begin, begin + sections[name]) for name, begin in offsets.items()}
        parts = {name: packed[place] for name, place in places.items()}
        parts["updates"] = parts["updates"].view(-1, 2)
        step = DeviceStep(**parts, block_tables=state.block_tables)
        host = [{name: mirror[place] for name, place in places.items()} for mirror in mirrors.numpy()]
        return cls(step, packed, mirrors, host, query_block, decodes)

    def fill(
        self, batch: Batch, updates: Sequence[int], bucket: Bucket, ring_index: int, ids_lag: int = 0
    ) -> list[int]:
        """Write a step into the mirror `ring_index`; return the slot of each sampled token, -1 for an unwanted one.

        Args:
            updates: place and value in turn, see `DeviceStep.updates`.
            ids_lag: see `stage_link.IdsLag`.
        """
        rows = in_mixed_order(batch.rows) if bucket.mixed else batch.rows
        host = self._host[ring_index]
        slots = [row.slot for row in rows]
        host["row_slots"][: len(rows)] = slots
        starts = np.array([row.start for row in rows], dtype=np.int32)
        if bucket.mixed:
            num_tokens, sampled = self._fill_mixed(host, rows, starts, batch.slot_inits)
        else:
            num_tokens, sampled = len(rows), [row.slot if row.sample else -1 for row in rows]
            host["token_ids"][:num_tokens] = [row.token_ids[0] if row.token_ids else FROM_SLOT for row in rows]
            host["positions"][:num_tokens] = starts
            host["token_slots"][:num_tokens] = slots
            host["context_lens"][:num_tokens] = host["sample_positions"][:num_tokens] = starts + 1
            host["counts"][NUM_DECODES] = num_tokens
        assert num_tokens <= bucket.num_tokens, "a step never outgrows its bucket"
        assert len(sampled) <= bucket.num_samples
        for name, value in (("token_ids", 0), ("positions", 0), ("token_slots", self._dummy_slot)):
            host[name][num_tokens : bucket.num_tokens] = value
        host["sample_tokens"][len(sampled) : bucket.num_samples] = 0
        host["sample_slots"][: len(sampled)] = [slot if slot >= 0 else self._dummy_slot for slot in sampled]
        counts = host["counts"]
        counts[NUM_TOKENS], counts[NUM_ROWS], counts[NUM_SAMPLES] = num_tokens, len(rows), len(sampled)
        counts[RING_INDEX], counts[NUM_UPDATES], counts[IDS_LAG] = ring_index, len(updates) // 2, ids_lag
        host["updates"][: len(updates)] = updates
        self._num_update_words = len(updates)
        return sampled

    def send(self, ring_index: int, stream: StepStream) -> None:
        """Queue the copy of what the last `fill` wrote."""
        used = self._updates_offset + self._num_update_words
        stream.copy(self._packed[:used], self._mirrors[ring_index, :used])

    def written(self, ring_index: int) -> bytes:
        """What the last `fill` wrote into the mirror `ring_index`, for `take` on another rank."""
        return self._mirror_arrays[ring_index, : self._updates_offset + self._num_update_words].tobytes()

    def take(self, ring_index: int, data: bytes) -> None:
        """Write into the mirror `ring_index` what `fill` wrote on another rank."""
        values = np.frombuffer(data, dtype=np.int32)
        self._mirror_arrays[ring_index, : len(values)] = values
        self._num_update_words = len(values) - self._updates_offset

    def _fill_mixed(
        self, host: dict[str, Int32Array], rows: Sequence[BatchRow], starts: Int32Array, inits: Sequence[SlotInit]
    ) -> tuple[int, list[int]]:
        """Write rows of any length; return the number of tokens and the slots that are sampled."""
        # Their tokens come from the host: the device's own copy is only written in this step.
        latest = {init.slot: init.token_ids[-1] for init in inits}
        num_rows = len(rows)
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int32)
        row_starts = host["row_starts"]
        row_starts[0] = 0
        np.cumsum(lengths, out=row_starts[1 : num_rows + 1])
        num_tokens = int(row_starts[num_rows])
        token_ids: list[int] = []
        for row in rows:
            token_ids.extend(row.token_ids)
            if len(row.token_ids) < row.num_tokens:
                token_ids.append(latest.get(row.slot, FROM_SLOT))
        host["token_ids"][:num_tokens] = token_ids
        host["positions"][:num_tokens] = np.arange(num_tokens) + np.repeat(starts - row_starts[:num_rows], lengths)
        host["token_slots"][:num_tokens] = np.repeat(host["row_slots"][:num_rows], lengths)
        host["context_lens"][:num_rows] = starts + lengths
        self._fill_query_blocks(host, lengths)
        sampled = np.flatnonzero([row.sample for row in rows])
        host["sample_tokens"][: len(sampled)] = row_starts[1:][sampled] - 1
        host["sample_positions"][: len(sampled)] = (starts + lengths)[sampled]
        return num_tokens, host["row_slots"][sampled].tolist()

    def _fill_query_blocks(self, host: dict[str, Int32Array], lengths: Int32Array) -> None:
        num_decodes = int(np.count_nonzero(lengths == 1)) if self._decodes else 0
        counts = -(-lengths[num_decodes:] // self._query_block)
        num_blocks = int(counts.sum())
        host["counts"][NUM_DECODES], host["counts"][NUM_QUERY_BLOCKS] = num_decodes, num_blocks
        rows = np.repeat(np.arange(num_decodes, len(lengths)), counts)
        inner = np.arange(num_blocks) - np.repeat(np.cumsum(counts) - counts, counts)
        host["query_block_rows"][:num_blocks] = rows
        host["query_block_starts"][:num_blocks] = host["row_starts"][rows] + inner * self._query_block


def in_mixed_order(rows: Sequence[BatchRow]) -> list[BatchRow]:
    """Rows in the order that their tokens have in a mixed step: those of one token first."""
    return sorted(rows, key=_is_chunk)


def _is_chunk(row: BatchRow) -> bool:
    return row.num_tokens > 1


class SlotStateUpdater:
    """Turns batches into updates of the device's `SlotState`; knows how many blocks each slot holds."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self._num_blocks = [0] * num_slots
        self._max_blocks = max_blocks
        self._last_tokens_at = (num_slots + 1) * max_blocks

    def updates(self, rows: Sequence[BatchRow], inits: Sequence[SlotInit]) -> list[int]:
        """Places and values in turn: what the step changes in `SlotState.values`."""
        changes: list[int] = []
        for init in inits:
            self._num_blocks[init.slot] = 0
            changes += (self._last_tokens_at + init.slot, init.token_ids[-1])
        for row in rows:
            if row.new_block_ids:
                held = self._num_blocks[row.slot]
                self._num_blocks[row.slot] = held + len(row.new_block_ids)
                assert self._num_blocks[row.slot] <= self._max_blocks, "a request never outgrows max_model_len"
                place = row.slot * self._max_blocks + held
                for offset, block_id in enumerate(row.new_block_ids):
                    changes += (place + offset, block_id)
        return changes
