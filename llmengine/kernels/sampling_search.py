"""Searches for the tokens that a row keeps and the one that is drawn, by one program per row.

Candidates are the tokens that `top_k`, `top_p` or `min_p` may keep, as a tuple:

- line: the row's logits; mask_words: its line of `TokenMasks.words`, or None;
- segments: a list of segments of tokens; single: one segment in its place, or -1; size: tokens in these segments;
- vocab;
- reference: the logit whose weight is 1; scale: factor from a difference of logits to log2 of a ratio of weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.kernels.sampling_values import fixed, key_of, load_allowed

_FLOOR = tl.constexpr(-45.0)
"""log2 of a weight that is 0 in fixed point."""
_BOUND_ROUNDS = tl.constexpr(12)
NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def lower_bound(log_weights, masses, top_k, top_p, min_p, SEGMENT: tl.constexpr):
    """log2 of a weight (relative to the likeliest token) that every kept token reaches.

    A probed bound holds with top_k if that many segments have a maximum above it. With top_p it holds if less than
    1 - top_p of the mass is below it. A segment whose maximum is above the bound has at most all its other mass below.
    """
    weights = tl.exp2(log_weights)
    rest = tl.maximum(masses - 1.0, 0.0) * weights
    masses *= weights
    # The margin is wider than the rounding of these sums.
    spare = tl.sum(masses, 0) * (1.0 - top_p) * 0.999
    low = tl.full([], _FLOOR, tl.float32)
    high = tl.full([], 0.0, tl.float32)
    probe = tl.maximum(tl.min(log_weights, 0), _FLOOR)
    for _ in range(_BOUND_ROUNDS):
        above = log_weights >= probe
        if top_k > 0:
            holds = tl.sum(above.to(tl.int32), 0) >= top_k
        else:
            below = tl.where(above, tl.minimum(rest, SEGMENT * tl.exp2(probe)), masses)
            holds = tl.sum(below, 0) <= spare
        low = tl.where(holds, probe, low)
        high = tl.where(holds, high, probe)
        probe = (low + high) * 0.5
    low = tl.where((top_k > 0) | (top_p < 1.0), low, _FLOOR)
    return tl.maximum(low, tl.where(min_p > 0.0, tl.log2(tl.maximum(min_p, 1e-30)) - 0.01, _FLOOR))


@triton.jit
def _block_of(candidates, begin, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Ids, ascending, and logits of a block of candidates; from `size` on, ids are meaningless and logits -inf."""
    line, mask_words, segments, single, size, vocab, _reference, _scale = candidates
    entries = begin + tl.arange(0, BLOCK)
    listed = tl.where(single < 0, entries, size) < size
    segment = tl.load(segments + entries // SEGMENT, mask=listed, other=0)
    ids = tl.where(single < 0, segment, single) * SEGMENT + entries % SEGMENT
    return ids, load_allowed(line, mask_words, ids, (entries < size) & (ids < vocab))


@triton.jit
def search(candidates, low, needed, by_count, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key at or above which candidates are `needed` or more, by count or by mass; or `low`."""
    _line, _mask_words, _segments, _single, size, _vocab, reference, scale = candidates
    high = key_of(reference).to(tl.int64)
    while low < high:
        step = (high - low) // 5 + 1
        sum1 = tl.zeros([BLOCK], tl.int64)
        sum2 = tl.zeros([BLOCK], tl.int64)
        sum3 = tl.zeros([BLOCK], tl.int64)
        sum4 = tl.zeros([BLOCK], tl.int64)
        for begin in range(0, size, BLOCK):
            _, values = _block_of(candidates, begin, SEGMENT, BLOCK)
            keys = key_of(values).to(tl.int64) - low
            amounts = tl.where(by_count, 1, fixed(tl.exp2((values - reference) * scale)))
            sum1 += tl.where(keys >= step, amounts, 0)
            sum2 += tl.where(keys >= 2 * step, amounts, 0)
            sum3 += tl.where(keys >= 3 * step, amounts, 0)
            sum4 += tl.where(keys >= 4 * step, amounts, 0)
        # One reduction for all four.
        sums = tl.sum(tl.join(tl.join(sum1, sum2), tl.join(sum3, sum4)), 0)
        reached = tl.sum(tl.sum((sums >= needed).to(tl.int64), 0), 0)
        low += reached * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def total_above(candidates, threshold, min_p, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Count and mass of the candidates with keys above `threshold` and weights of at least min_p."""
    _line, _mask_words, _segments, _single, size, _vocab, reference, scale = candidates
    number = tl.zeros([BLOCK], tl.int64)
    mass = tl.zeros([BLOCK], tl.int64)
    for begin in range(0, size, BLOCK):
        _, values = _block_of(candidates, begin, SEGMENT, BLOCK)
        weights = tl.exp2((values - reference) * scale)
        kept = (key_of(values) > threshold) & (weights >= min_p)
        number += kept.to(tl.int64)
        mass += tl.where(kept, fixed(weights), 0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def invert(candidates, threshold, num_ties, min_p, target, SEGMENT: tl.constexpr, BLOCK: tl.constexpr):
    """The first kept id at which the cumulative mass exceeds `target`."""
    _line, _mask_words, _segments, _single, size, _vocab, reference, scale = candidates
    chosen = 0
    found = False
    begin = 0
    ties = tl.zeros([], tl.int64)
    mass = tl.zeros([], tl.int64)
    while (begin < size) & (not found):
        ids, values = _block_of(candidates, begin, SEGMENT, BLOCK)
        weights = tl.exp2((values - reference) * scale)
        keys = key_of(values)
        tied = (keys == threshold).to(tl.int64)
        kept = ((keys > threshold) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= num_ties))) & (weights >= min_p)
        amounts = tl.where(kept, fixed(weights), 0)
        passed = kept & (mass + tl.cumsum(amounts, 0) > target)
        first = tl.min(tl.where(passed, ids, NO_ID), 0)
        found = first < NO_ID
        chosen = tl.where(found, first, chosen)
        ties += tl.sum(tied, 0)
        mass += tl.sum(amounts, 0)
        begin += BLOCK
    return chosen
