"""Edits of the logits of single tokens, as a request's parameters ask for them: bias, penalties, forbidden words.

A slot has *entries*: distinct tokens whose logits change. These are tokens with a bias and, with penalties, the tokens
of its prompt and output, which every chosen token joins. It also has *words*: sequences of tokens whose last one must
not be chosen after the others. These are bad words and, at some positions, stop tokens. So a step's work grows with
entries and words, not with the vocabulary. `SlotEdits` describes one slot to every backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from llmengine.batch import SlotInit

Int32Array = NDArray[np.int32]
FloatArray = NDArray[np.float32]

INT_TABLES = ("entry_ids", "entry_states", "word_tokens", "word_ends", "word_lengths", "word_untils", "ring")
"""The int32 arrays of `SlotEdits`."""

NO_MASKS: Mapping[int, Int32Array] = MappingProxyType({})
"""Masks of a step in which every slot may choose any token."""


def mask_words(masks: Mapping[int, bytes]) -> Mapping[int, Int32Array]:
    """A batch's masks as samplers take them, slot -> int32 [ceil(vocab / 32)]."""
    return {slot: np.frombuffer(mask, dtype="<i4") for slot, mask in masks.items()} if masks else NO_MASKS


ALWAYS = 2**31 - 1
"""Position that no request reaches."""


@dataclass(frozen=True, slots=True)
class SlotEdits:
    """Edits of one slot's logits; arrays are int32 unless another dtype is given.

    Attributes:
        penalties: repetition, frequency and presence penalty.
        counting: chosen tokens become entries.
        entry_ids: [num_entries], distinct.
        entry_states: [num_entries], twice the number of times that the token is in the output, plus 1 if it is in the
            prompt; 0 for a token that only has a bias.
        entry_biases: fp32 [num_entries].
        word_tokens: [num_word_tokens], the words one after another.
        word_ends: [num_words], where each word ends in `word_tokens`.
        word_lengths: [num_words].
        word_untils: [num_words], the first position at which the word is allowed again.
        ring: [power of two], the latest tokens, as many as the longest word has before its last one: the token at
            position p is at p % len(ring), -1 where there is none.
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
    """Edits of a slot that a request takes, given all its tokens so far; None if there are none."""
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
    """Ids, states and biases of the entries."""
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
