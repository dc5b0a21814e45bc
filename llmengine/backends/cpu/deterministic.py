"""Steps cut into pieces in which each token is computed in the same order of operations, whatever is beside it.

Sums of floating-point numbers depend on their order, and fast matrix products choose it by the number of rows. Two
ways of a fixed order are there: the native decoder computes every token of a step of five or more alike, and torch a
token that is alone. A token's attention reads its context in the order of positions in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llmengine.backends.cpu.step_inputs import StepInputs

_LEAST_TOKENS = 5
"""Fewer tokens go through other loops of the native decoder, which add up in another order."""


def native_pieces(inputs: StepInputs, max_tokens: int) -> Iterator[tuple[StepInputs, int]]:
    """Yield pieces for the native decoder, in order, and how many rows of their logits are the step's.

    A piece is filled up with its last token, which writes the same keys and values twice, until it has `_LEAST_TOKENS`
    tokens, and as many that sample if any does. Only what describes tokens is cut; rows are left as they are.
    """
    size = max_tokens - _LEAST_TOKENS + 1
    for begin in range(0, len(inputs.token_ids), size):
        end = min(begin + size, len(inputs.token_ids))
        samples = _samples_within(inputs, begin, end)
        missing = _LEAST_TOKENS - min(end - begin, len(samples) or _LEAST_TOKENS)
        tokens = np.concatenate((np.arange(begin, end), np.full(max(missing, 0), end - 1)))
        filled = np.arange(end - begin, len(tokens)) if len(samples) else samples
        piece = replace(
            inputs,
            token_ids=inputs.token_ids[tokens],
            positions=inputs.positions[tokens],
            token_slots=inputs.token_slots[tokens],
            sample_tokens=np.concatenate((samples, filled)),
        )
        yield piece, len(samples)


def token_pieces(inputs: StepInputs) -> Iterator[tuple[StepInputs, int]]:
    """Yield each token as a step of its own, in order, with 1 if it samples, else 0."""
    for token in range(len(inputs.token_ids)):
        samples = _samples_within(inputs, token, token + 1)
        one = slice(token, token + 1)
        piece = replace(
            inputs,
            token_ids=inputs.token_ids[one],
            positions=inputs.positions[one],
            token_slots=inputs.token_slots[one],
            row_slots=inputs.token_slots[one],
            context_lens=inputs.positions[one] + 1,
            row_starts=np.array([0, 1]),
            num_decodes=1,
            sample_tokens=samples,
        )
        yield piece, len(samples)


def sampling_all(inputs: StepInputs, tokens: slice) -> StepInputs:
    """These tokens of a step, each of which samples; the result is only fit to be cut into pieces."""
    token_ids = inputs.token_ids[tokens]
    return replace(
        inputs,
        token_ids=token_ids,
        positions=inputs.positions[tokens],
        token_slots=inputs.token_slots[tokens],
        sample_tokens=np.arange(len(token_ids)),
    )


def _samples_within(inputs: StepInputs, begin: int, end: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The tokens [begin, end) that sample, counted from `begin`."""
    first, last = np.searchsorted(inputs.sample_tokens, (begin, end))
    return inputs.sample_tokens[first:last] - begin
