"""Edits of single logits on the CPU, vectorised over rows; see `backends.logit_edits`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.logit_edits import INT_TABLES, FloatArray, Int32Array, SlotEdits

IntArray = NDArray[np.int64]

ScalarT = TypeVar("ScalarT", np.int32, np.float32)


class LogitEditor:
    """The edits of every slot; changes logits in place, remembers what they were, and counts chosen tokens."""

    def __init__(self, num_slots: int) -> None:
        self._edited = np.zeros(num_slots, dtype=np.bool_)
        self._counting = np.zeros(num_slots, dtype=np.bool_)
        self._penalties = np.zeros((num_slots, 3), dtype=np.float32)
        self._num_entries = np.zeros(num_slots, dtype=np.int64)
        self._num_words = np.zeros(num_slots, dtype=np.int64)
        self._ring_masks = np.zeros(num_slots, dtype=np.int64)

        # Line by line as in `SlotEdits`; as wide as any slot has needed.
        self._tables: dict[str, Int32Array] = {name: np.zeros((num_slots, 1), dtype=np.int32) for name in INT_TABLES}
        self._biases = np.zeros((num_slots, 1), dtype=np.float32)

    def init_slot(self, slot: int, edits: SlotEdits | None) -> None:
        """Replace the edits of a slot."""
        self._edited[slot] = edits is not None
        if edits is None:
            self._counting[slot] = False
            return
        self._counting[slot] = edits.counting
        self._penalties[slot] = edits.penalties
        self._num_entries[slot] = len(edits.entry_ids)
        self._num_words[slot] = len(edits.word_ends)
        self._ring_masks[slot] = len(edits.ring) - 1
        for name in INT_TABLES:
            line = getattr(edits, name)
            self._widen(name, len(line))
            self._tables[name][slot, : len(line)] = line
        self._biases = _widened(self._biases, len(edits.entry_biases))
        self._biases[slot, : len(edits.entry_biases)] = edits.entry_biases

    def edits(self, slots: IntArray) -> bool:
        """Whether any of the slots has edits."""
        return bool(self._edited[slots].any())

    def apply(self, logits: Tensor, slots: IntArray, positions: IntArray) -> SavedLogits:
        """Change the logits [num_rows, vocab] of the slots [num_rows] for the tokens at `positions` [num_rows].

        NaN and inf stay what they are, so that a row that holds one still fails.
        """
        rows = np.flatnonzero(self._edited[slots])
        slots, positions = slots[rows], positions[rows]
        flat: FloatArray = logits.view(-1).numpy()
        first = rows * logits.shape[1]
        entries, changed = self._changed_entries(flat, first, slots)
        words = self._forbidden(first, slots, positions)
        index = np.concatenate((entries, words))
        saved = SavedLogits(flat, index, flat[index])
        flat[entries] = changed
        flat[words[flat[words] < np.inf]] = -np.inf
        return saved

    def record(self, slots: IntArray, positions: IntArray, token_ids: IntArray) -> None:
        """Take over the tokens [num_rows] that were chosen for `positions`; each slot once."""
        rows = np.flatnonzero(self._edited[slots])
        slots, token_ids = slots[rows], token_ids[rows]
        self._tables["ring"][slots, positions[rows] & self._ring_masks[slots]] = token_ids
        rows = np.flatnonzero(self._counting[slots])
        if len(rows):
            self._count(slots[rows], token_ids[rows])

    def _changed_entries(self, flat: FloatArray, first: IntArray, slots: IntArray) -> tuple[IntArray, FloatArray]:
        """Indices into the flat logits, and the new values there."""
        ids, states = self._tables["entry_ids"], self._tables["entry_states"]
        counts = self._num_entries[slots]
        starts = slots * ids.shape[1] - (np.cumsum(counts) - counts)
        places = np.repeat(starts, counts) + np.arange(counts.sum())
        index = np.repeat(first, counts) + ids.reshape(-1).take(places)
        states = states.reshape(-1).take(places)
        repetition, frequency, presence = (np.repeat(column, counts) for column in self._penalties[slots].T)
        values = flat.take(index) + self._biases.reshape(-1).take(places)
        penalized = np.where(values < 0, values * repetition, values / repetition)
        values = np.where(states > 0, penalized, values)
        in_output = (states >> 1).astype(np.float32)
        return index, values - frequency * in_output - presence * (in_output > 0)

    def _forbidden(self, first: IntArray, slots: IntArray, positions: IntArray) -> IntArray:
        """Indices into the flat logits of the last tokens of words whose other tokens are the latest ones."""
        width = int(self._num_words[slots].max(initial=0))
        ends, lengths = self._tables["word_ends"][slots, :width], self._tables["word_lengths"][slots, :width]
        matched = (np.arange(width) < self._num_words[slots, None]) & (
            positions[:, None] < self._tables["word_untils"][slots, :width]
        )
        tokens = self._tables["word_tokens"]
        for back in range(1, int(lengths.max(initial=0))):
            row, word = np.nonzero(matched & (lengths > back))
            if not len(row):
                break
            latest = self._tables["ring"][slots, (positions - back) & self._ring_masks[slots]]
            matched[row, word] = tokens[slots[row], ends[row, word] - 1 - back] == latest[row]
        row, word = np.nonzero(matched)
        index: IntArray = first[row] + tokens[slots[row], ends[row, word] - 1]
        return index

    def _count(self, slots: IntArray, token_ids: IntArray) -> None:
        numbers = self._num_entries[slots]
        width = int(numbers.max()) + 1
        self._widen("entry_ids", width)
        self._widen("entry_states", width)
        self._biases = _widened(self._biases, width)
        ids, states, biases = self._tables["entry_ids"], self._tables["entry_states"], self._biases
        equal = (ids[slots, :width] == token_ids[:, None]) & (np.arange(width) < numbers[:, None])
        found = equal.any(axis=1)
        places = np.where(found, equal.argmax(axis=1), numbers)
        ids[slots, places] = token_ids
        states[slots, places] = np.where(found, states[slots, places], 0) + 2
        biases[slots, places] = np.where(found, biases[slots, places], 0)
        self._num_entries[slots] += ~found

    def _widen(self, name: str, width: int) -> None:
        self._tables[name] = _widened(self._tables[name], width)


def _widened(table: NDArray[ScalarT], width: int) -> NDArray[ScalarT]:
    """The table with at least `width` columns; it grows to a power of two."""
    if width <= table.shape[1]:
        return table
    return np.pad(table, ((0, 0), (0, (1 << (width - 1).bit_length()) - table.shape[1])))


@dataclass(frozen=True, slots=True)
class SavedLogits:
    """What `LogitEditor.apply` overwrote: `values` were at `index` of the flat logits."""

    flat: FloatArray
    index: IntArray
    values: FloatArray

    def restore(self) -> None:
        """Undo the edits."""
        self.flat[self.index] = self.values
