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
