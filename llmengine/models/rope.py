"""Rotary position encoding as one table of cos and sin for each position, with transformers' frequencies.

The table depends on the position alone, so a KV cache, prefix reuse and any chunking of the prompt are exact. For two
types this took a choice.

"dynamic" (NTK): transformers recomputes the base from the running length, but keys in its cache stay rotated with older
bases. Here position p has the frequencies of a context of p + 1 tokens. These are the ones that transformers uses for a
token that it decodes with a cache; up to the original context length everything is equal. (The alternative, one base
for factor times the original length, differs from transformers at every length.)

"longrope": transformers uses the short factors until a context outgrows the original length, and then the long factors,
for which Phi-3's generation recomputes all keys. Here the longest context that the table covers decides: up to the
original length all positions have the short factors, as in transformers; otherwise all have the long factors, which
transformers uses for the contexts that need them. (llama.cpp and vLLM choose in the same way.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmengine.models.arch import ModelArch, RopeConfig


def layer_tables(arch: ModelArch, num_positions: int) -> list[Tensor]:
    """Each layer's `rope_table`; layers with the same encoding share one."""
    tables: dict[RopeConfig | None, Tensor] = {}
    for index in range(arch.num_layers):
        rope = arch.layer_rope(index)
        if rope not in tables:
            tables[rope] = rope_table(rope, arch.head_dim, num_positions)
    return [tables[arch.layer_rope(index)] for index in range(arch.num_layers)]


def rope_table(rope: RopeConfig | None, head_dim: int, num_positions: int) -> Tensor:
    """Table fp32 [num_positions, head_dim]: cos of the head_dim / 2 angles, then their sin.

    Both are multiplied by the attention factor. Dimension j of a head rotates together with j + head_dim / 2 (halves,
    not interleaved). Pairs that do not rotate have cos 1 and sin 0: the last ones of each half, or all if `rope` is
    None.
    """
    half = head_dim // 2
    cos, sin = torch.ones(num_positions, half), torch.zeros(num_positions, half)
    if rope is not None:
        rotary_dim, positions = rope.rotary_dim or head_dim, torch.arange(num_positions, dtype=torch.float32)
        if rope.type == "dynamic":
            angles = positions[:, None] * _dynamic_frequencies(rope, rotary_dim, num_positions)
        else:
            angles = torch.outer(positions, inverse_frequencies(rope, rotary_dim, num_positions))
        factor = attention_factor(rope)
        cos[:, : rotary_dim // 2] = angles.cos() * factor
        sin[:, : rotary_dim // 2] = angles.sin() * factor
    return torch.cat((cos, sin), dim=-1)


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, context: int) -> Tensor:
    """Radians per position, fp32 [rotary_dim / 2], for contexts of up to `context` tokens.

    For "dynamic", these are the frequencies within the original context length.
    """
    if rope.type == "longrope":
        is_long = context > rope.original_max_position_embeddings
        factors = torch.tensor(rope.long_factor if is_long else rope.short_factor)
        return 1.0 / (factors * rope.theta ** _exponents(rotary_dim))
    frequencies = 1.0 / (rope.theta ** _exponents(rotary_dim))
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    if rope.type == "yarn":
        return _yarn(rope, rotary_dim)
    return frequencies


def stretched_context(rope: RopeConfig) -> int:
    """Context length to which scaling extends the original one, for types whose `factor` is a ratio of lengths.

    For the other types it is the original length; their configurations name the extended one as
    `max_position_embeddings`.
    """
    factor = rope.factor if rope.type in ("linear", "dynamic", "yarn") else 1.0
    return int(factor * rope.original_max_position_embeddings)


def attention_factor(rope: RopeConfig) -> float:
    """Factor of cos and sin: 1 for every type except yarn and longrope.

    Sources: Peng et al., arXiv 2309.00071; Ding et al., arXiv 2402.13753.
    """
    if rope.type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.type == "longrope":
        original = rope.original_max_position_embeddings
        return math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """Frequencies fp32 [num_positions, head_dim / 2]; row p is NTK-scaled for a context of p + 1 tokens."""
    if head_dim <= 2:
        return inverse_frequencies(rope, head_dim, num_positions).expand(num_positions, -1)
    original = rope.original_max_position_embeddings
    lengths = torch.arange(1, num_positions + 1, dtype=torch.float64).clamp_(min=original)
    bases = rope.theta * (rope.factor * lengths / original - (rope.factor - 1)) ** (head_dim / (head_dim - 2))
    return 1.0 / (bases.float()[:, None] ** _exponents(head_dim))


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, and those in between blended."""
    original = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    low_wavelength, high_wavelength = original / rope.low_freq_factor, original / rope.high_freq_factor
    stretched = torch.where(wavelengths > low_wavelength, frequencies / rope.factor, frequencies)
    smooth = (original / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelengths >= high_wavelength) & (wavelengths <= low_wavelength)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, extrapolate fast ones, a linear ramp between."""
    scaled = rope.theta ** _exponents(head_dim)
    extrapolated, interpolated = 1.0 / scaled, 1.0 / (rope.factor * scaled)
    low, high = (_yarn_dimension(rope, head_dim, rotations) for rotations in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    fast = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp_(0, 1)
    return interpolated * (1 - fast) + extrapolated * fast


def _yarn_dimension(rope: RopeConfig, head_dim: int, num_rotations: float) -> float:
    """The dimension that turns `num_rotations` times within the original context."""
    turns = rope.original_max_position_embeddings / (num_rotations * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(rope.theta))


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
