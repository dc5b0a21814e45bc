"""What a request's parameters do to the logits of single tokens before one is chosen: bias, penalties, forbidden words.

A slot has *entries*, distinct tokens whose logits change: those with a bias and, with penalties, those of its prompt
and output, which a chosen token joins. And it has *words*, sequences of tokens whose last one cannot be chosen after
the others: bad words and, for some positions, stop tokens. So a step's work grows with these and not with the
vocabulary. `SlotEdits` is one slot's part, as every backend takes it over; `LogitEditor` has the tables of all slots
on the CPU, vectorised over rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmengine.batch import SlotInit

IntArray = NDArray[np.int64]
Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32]

ScalarT = TypeVar("ScalarT", np.int32, np.float32)

INT_TABLES = ("entry_ids", "entry_states", "word_tokens", "word_ends", "word_lengths", "word_untils", "ring")
"""The int32 arrays of `SlotEdits`."""

NO_MASKS: Mapping[int, Int32Array] = MappingProxyType({})
"""Masks of a step in which every slot may choose any token."""


def mask_words(masks: Mapping[int, bytes]) -> Mapping[int, Int32Array]:
    """Return a batch's masks as samplers take them."""
    return {slot: np.frombuffer(mask, dtype="<i4") for slot, mask in masks.items()} if masks else NO_MASKS


ALWAYS = 2**31 - 1
"""Position that no request reaches."""


@dataclass(frozen=True, slots=True)
class SlotEdits:
    """What is to be done to a slot's logits, int32 unless said otherwise.

    Attributes:
        penalties: repetition, frequency and presence penalty.
        counting: chosen tokens become entries.
        entry_ids: [num_entries], distinct.
        entry_states: [num_entries], twice how often the token is in the output, plus 1 if it is in the prompt; 0: it
            has a bias only.
        entry_biases: fp32 [num_entries].
        word_tokens: [num_word_tokens], the words one after another.
        word_ends: [num_words], where each word ends in `word_tokens`.
        word_lengths: [num_words].
        word_untils: [num_words], the first position at which the word is allowed again.
        ring: [power of two], the latest tokens: that of position p at p % len(ring), -1 where there is none; as many
            as the longest word has before its last.
    """

    penalties: tuple[float, float, float]
    counting: bool
    entry_ids: Int32Array
    entry_states: Int32Array
    entry_biases: FloatArray
    word_tokens: Int32Array
    word_ends: Int32Array
    word_lengths: Int32Array
    word_untils: Int32Array
    ring: Int32Array


def slot_edits(init: SlotInit, vocab_size: int) -> SlotEdits | None:
    """Return the edits of a slot that is taken, from all tokens that it has so far; None: there are none."""
    params = init.sampling_params
    stops = sorted(init.stop_token_ids) if params.min_new_tokens else ()
    if not (params.penalizes or params.logit_bias or params.bad_words or stops):
        return None
    words: list[Sequence[int]] = [(stop,) for stop in stops if stop < vocab_size]
    allowed_from = [init.num_prompt_tokens + params.min_new_tokens] * len(words)
    for word in params.bad_words:
        assert not isinstance(word, str), "bad words are token ids once a request is submitted"
        words.append(word)
    lengths = _int32([len(word) for word in words])
    return SlotEdits(
        (params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
        params.penalizes,
        *_entries(init),
        _int32([token_id for word in words for token_id in word]),
        np.cumsum(lengths, dtype=np.int32),
        lengths,
        _int32([*allowed_from, *[ALWAYS] * len(params.bad_words)]),
        _ring(init.token_ids, int(lengths.max(initial=1)) - 1),
    )


def _entries(init: SlotInit) -> tuple[Int32Array, Int32Array, FloatArray]:
    """Return ids, states and biases."""
    bias = dict(init.sampling_params.logit_bias)
    known = _int32(init.token_ids if init.sampling_params.penalizes else ())
    ids, places = np.unique(np.concatenate((known, _int32(list(bias)))), return_inverse=True)
    prompt, output, biased = np.split(places, [min(init.num_prompt_tokens, len(known)), len(known)])
    states = 2 * np.bincount(output, minlength=len(ids)).astype(np.int32)
    states[prompt] |= 1
    biases = np.zeros(len(ids), dtype=np.float32)
    biases[biased] = list(bias.values())
    return ids, states, biases


def _ring(token_ids: Sequence[int], num_before: int) -> Int32Array:
    size = 1 << max(num_before - 1, 0).bit_length()
    ring = np.full(size, -1, dtype=np.int32)
    latest = _int32(token_ids[-size:])
    ring[np.arange(len(token_ids) - len(latest), len(token_ids)) % size] = latest
    return ring


def _int32(values: Sequence[int]) -> Int32Array:
    return np.array(values, dtype=np.int32)


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
        """Return whether any of the slots has edits."""
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
        """Return where entries are in the flat logits, and their new values."""
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
        """Return where in the flat logits the last tokens are of words whose other tokens were the latest."""
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
    """Return the table with a power of two of columns, `width` or more, if it has fewer."""
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
