"""Integers that order as logits do, weights in fixed point, and random numbers for `kernels.sampling`."""

from __future__ import annotations

import triton
import triton.language as tl

_ONE = tl.constexpr(float(1 << 44))
"""The likeliest token's weight in fixed point."""


@triton.jit
def load_logits(pointers, mask):
    """Load logits as fp32: NaN becomes inf, so one maximum finds both; -0 becomes 0, so equal logits have one key."""
    values = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)
    values = tl.where(values < float("inf"), values, float("inf"))
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def load_allowed(line, mask_words, ids, mask):
    """Load logits, with -inf for tokens that a line of `TokenMasks.words`, if there is one, forbids; inf stays."""
    values = load_logits(line + ids, mask)
    if mask_words is not None:
        words = tl.load(mask_words + (ids >> 5), mask=mask, other=0)
        forbidden = ((words >> (ids & 31)) & 1) == 0
        values = tl.where(forbidden & (values < float("inf")), -float("inf"), values)
    return values


@triton.jit
def key_of(values):
    """int32 keys that order as the fp32 values do."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def value_of(keys):
    """Inverse of `key_of`."""
    return tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(temperature):
    """Factor from a difference of logits to log2 of the ratio of probabilities; finite, so that 0 stays 0."""
    return tl.where(temperature > 0.0, tl.minimum(1.4426950408889634 / tl.maximum(temperature, 1e-37), 1e38), 1.0)


@triton.jit
def fixed(weights):
    return (weights * _ONE).to(tl.int64)


@triton.jit
def _mix(state):
    """One step of splitmix64 on uint64."""
    mixed = state + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return mixed ^ (mixed >> 31)


@triton.jit
def uniform(seed, position):
    """float64 in [0, 1) from int64 seed and position: bit for bit `llmengine.backends.cpu.sampler.uniform`."""
    state = _mix(seed.to(tl.uint64)) ^ position.to(tl.uint64)
    return (_mix(_mix(state)) >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)
