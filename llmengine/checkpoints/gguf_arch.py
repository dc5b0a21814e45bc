"""`ModelArch` from a GGUF file's metadata, with llama.cpp's defaults where the format has no key."""

from __future__ import annotations

import dataclasses
import math
import struct

from llmengine.checkpoints.gguf_file import GgufFile
from llmengine.checkpoints.metadata_fields import MAX_SIZE, Fields
from llmengine.checkpoints.unsupported_adapters import refuse_gguf_adapter
from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import LayerArch, ModelArch, RopeConfig, check_arch, fold_residual_scale
from llmengine.models.families import FAMILIES, ModelFamily, family_layers, unsupported_architecture

_LLAMA3_DIVISORS = "rope_freqs.weight"
_SHORT_FACTORS = "rope_factors_short.weight"
_LONG_FACTORS = "rope_factors_long.weight"
ROPE_TENSORS = (_LLAMA3_DIVISORS, _SHORT_FACTORS, _LONG_FACTORS)
"""Tensors that are part of the architecture."""

_NOPE_INTERVAL = 4
"""In families with NoPE layers, one layer in this many does not rotate; the format has no key for it."""


def arch_from_gguf(gguf: GgufFile, metadata: Fields) -> ModelArch:
    """The architecture of a GGUF file.

    Raises `CorruptFileError` naming the key and what was expected, `UnsupportedModelError` for an unsupported
    architecture or option.
    """
    where = metadata.where
    _reject_other_kinds(gguf, metadata)
    name = metadata.string("general.architecture")
    family = next((family for family in FAMILIES if family.gguf_architecture == name), None)
    if family is None:
        raise unsupported_architecture(where, f"{name!r} (GGUF)")
    _reject_unsupported(metadata, name)
    hidden_size = metadata.integer(f"{name}.embedding_length", low=1)
    num_heads = metadata.integer(f"{name}.attention.head_count", low=1, high=hidden_size)
    head_dim = metadata.integer(f"{name}.attention.key_length", hidden_size // num_heads, low=2)
    value_length = metadata.integer(f"{name}.attention.value_length", head_dim)
    if value_length != head_dim:
        raise UnsupportedModelError(
            f"{where}: {name}.attention.value_length={value_length} is not supported; supported: the head size, "
            f"{head_dim}"
        )
    embedding = gguf.tensors.get("token_embd.weight")
    max_positions = metadata.integer(f"{name}.context_length", low=1)
    num_layers = metadata.integer(f"{name}.block_count", low=1, high=len(gguf.tensors))
    rope = _rope(gguf, metadata, family, max_positions, head_dim)
    arch = ModelArch(
        architecture=family.architecture,
        vocab_size=metadata.integer(f"{name}.vocab_size", embedding.shape[0] if embedding else None, low=1),
        hidden_size=hidden_size,
        intermediate_size=metadata.integer(f"{name}.feed_forward_length", low=1),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=metadata.integer(f"{name}.attention.head_count_kv", num_heads, low=1, high=num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=metadata.number(f"{name}.attention.layer_norm_rms_epsilon", above=0.0),
        hidden_act=family.hidden_act,
        tie_word_embeddings="output.weight" not in gguf.tensors,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        attention_out_bias="blk.0.attn_output.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_down.bias" in gguf.tensors,
        rope=rope,
        local_rope=_local_rope(metadata, family, max_positions),
        layers=_layers(metadata, family, num_layers),
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm,
        attention_scale=_attention_scale(metadata, family, hidden_size, num_layers, num_heads, head_dim),
        attention_soft_cap=_soft_cap(metadata, family, "attn_logit_softcapping"),
        embedding_scale=hidden_size**0.5
        if family.scaled_embedding
        else metadata.number(f"{name}.embedding_scale", 1.0, above=0.0),
        logit_scale=1.0 / metadata.number(f"{name}.logit_scale", 1.0, above=0.0),
        logit_soft_cap=_soft_cap(metadata, family, "final_logit_softcapping"),
        float32_norms=family.norms_plus_one,
    )
    check_arch(arch, where)
    return fold_residual_scale(arch, metadata.number(f"{name}.residual_scale", 1.0, above=0.0))


def _reject_other_kinds(gguf: GgufFile, metadata: Fields) -> None:
    """Raise `UnsupportedModelError` for a file that does not contain a model."""
    kind = gguf.kind
    if kind == "adapter":
        refuse_gguf_adapter(metadata.where, str(gguf.metadata.get("adapter.type", "unknown type")))
    if kind != "model":
        raise UnsupportedModelError(
            f"{metadata.where}: general.type={kind!r}: the file does not contain the weights of a language model"
        )
    if not gguf.tensors:
        raise UnsupportedModelError(f"{metadata.where}: contains no tensors: it is a vocabulary or a plan, not a model")


def _reject_unsupported(metadata: Fields, name: str) -> None:
    num_experts = metadata.integer(f"{name}.expert_count", 0)
    if num_experts:
        raise UnsupportedModelError(
            f"{metadata.where}: {name}.expert_count={num_experts}: mixtures of experts are not supported"
        )


def _layers(metadata: Fields, family: ModelFamily, num_layers: int) -> tuple[LayerArch, ...]:
    """`ModelArch.layers`. The family says which layers have a sliding window."""
    key, pattern = f"{family.gguf_architecture}.attention.sliding_window", family.layer_pattern
    rotates = [pattern != "nope" or (index + 1) % _NOPE_INTERVAL != 0 for index in range(num_layers)]
    window = metadata.integer(key, 0, high=MAX_SIZE)
    if window and pattern not in ("all_sliding", "alternating"):
        raise UnsupportedModelError(f"{metadata.where}: {key}={window} is not supported for {family.architecture}")
    slides = [window > 0] * num_layers
    if pattern == "alternating" and window:
        period = metadata.integer(f"{key}_pattern", family.config_defaults["sliding_window_pattern"], low=1)
        slides = [(index + 1) % period != 0 for index in range(num_layers)]
    return family_layers(family, window or None, slides, rotates)


def _soft_cap(metadata: Fields, family: ModelFamily, key: str) -> float | None:
    if key not in family.config_defaults:
        return None
    cap = metadata.number(f"{family.gguf_architecture}.{key}", family.config_defaults[key] or 0.0)
    return cap if cap > 0.0 else None


def _attention_scale(
    metadata: Fields, family: ModelFamily, hidden_size: int, num_layers: int, num_heads: int, head_dim: int
) -> float | None:
    """Factor of the attention scores, None for head_dim ** -0.5."""
    is_wide = num_layers == family.wide_scale_layers
    default = (hidden_size / num_heads if is_wide else head_dim) ** -0.5
    scale = metadata.number(f"{family.gguf_architecture}.attention.scale", default)
    return None if scale in (0.0, head_dim**-0.5) else scale


def _local_rope(metadata: Fields, family: ModelFamily, max_positions: int) -> RopeConfig | None:
    if family.local_theta is None:
        return None
    key = f"{family.gguf_architecture}.rope.freq_base_swa"
    theta = metadata.number(key, family.local_theta, above=1.0)
    return RopeConfig(theta=theta, original_max_position_embeddings=max_positions)


def _rope(gguf: GgufFile, metadata: Fields, family: ModelFamily, max_positions: int, head_dim: int) -> RopeConfig:
    """The rotary encoding. Raises `UnsupportedModelError` for a scaling that `RopeConfig` cannot express."""
    name = family.gguf_architecture
    rotary_dim = metadata.integer(f"{name}.rope.dimension_count", head_dim)
    if rotary_dim != head_dim and not family.partial_rotary:
        raise UnsupportedModelError(
            f"{metadata.where}: {name}.rope.dimension_count={rotary_dim} is not supported for "
            f"{family.architecture}; supported: the head size, {head_dim}"
        )
    rope = RopeConfig(
        theta=metadata.number(f"{name}.rope.freq_base", 10000.0, above=1.0),
        original_max_position_embeddings=max_positions,
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
    )
    if _LONG_FACTORS in gguf.tensors:
        return _longrope(gguf, metadata, name, rope, rotary_dim)
    scaling = f"{name}.rope.scaling"
    scaling_type = metadata.string(f"{scaling}.type", "none")
    factor = metadata.number(f"{scaling}.factor", metadata.number(f"{name}.rope.scale_linear", 1.0, above=0.0))
    if f"{name}.rope.scale_linear" in metadata.values and scaling_type == "none" and factor != 1.0:
        scaling_type = "linear"
    if scaling_type not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(
            f"{metadata.where}: {scaling}.type={scaling_type!r} is not supported; supported: none, linear, yarn"
        )
    if _LLAMA3_DIVISORS in gguf.tensors:
        if scaling_type != "none":
            raise UnsupportedModelError(
                f"{metadata.where}: tensor {_LLAMA3_DIVISORS} and {scaling}.type={scaling_type!r} contradict each other"
            )
        return _llama3_rope(gguf, rope, head_dim)
    if scaling_type == "none":
        return rope
    if factor <= 0.0:
        raise metadata.error(f"{scaling}.factor", "a number > 0")
    if scaling_type == "linear":
        return dataclasses.replace(rope, type="linear", factor=factor)
    return _yarn_rope(metadata, scaling, rope, factor)


def _yarn_rope(metadata: Fields, scaling: str, rope: RopeConfig, factor: float) -> RopeConfig:
    for key, neutral in (("attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        value = metadata.number(f"{scaling}.{key}", neutral)
        if value != neutral:
            raise UnsupportedModelError(
                f"{metadata.where}: {scaling}.{key}={value:g} is not supported; supported: {neutral:g}"
            )
    return dataclasses.replace(
        rope,
        type="yarn",
        factor=factor,
        original_max_position_embeddings=metadata.integer(
            f"{scaling}.original_context_length", rope.original_max_position_embeddings, low=1
        ),
        beta_fast=metadata.number(f"{scaling}.yarn_beta_fast", 32.0, above=0.0),
        beta_slow=metadata.number(f"{scaling}.yarn_beta_slow", 1.0, above=0.0),
    )


def _longrope(gguf: GgufFile, metadata: Fields, name: str, rope: RopeConfig, rotary_dim: int) -> RopeConfig:
    max_positions = rope.original_max_position_embeddings
    original = metadata.integer(f"{name}.rope.scaling.original_context_length", max_positions, low=1)
    return dataclasses.replace(
        rope,
        type="longrope",
        factor=max_positions / original,
        original_max_position_embeddings=original,
        attention_factor=metadata.optional_number(f"{name}.rope.scaling.attn_factor", above=0.0),
        short_factor=_read_vector(gguf, _SHORT_FACTORS, rotary_dim // 2),
        long_factor=_read_vector(gguf, _LONG_FACTORS, rotary_dim // 2),
    )


def _read_vector(gguf: GgufFile, name: str, count: int) -> tuple[float, ...]:
    """The `count` positive numbers of the vector `name`."""
    tensor = gguf.tensors.get(name)
    if tensor is None:
        raise CorruptFileError(f"{gguf.path}: tensor {name!r} is missing")
    if tensor.shape != (count,) or tensor.type != "F32":
        raise CorruptFileError(f"{gguf.path}: tensor {name!r} is {tensor.type} {tensor.shape}, expected F32 ({count},)")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.size_bytes)
    if len(raw) != tensor.size_bytes:
        raise CorruptFileError(f"{gguf.path}: tensor {name!r} is truncated")
    values = struct.unpack(f"<{count}f", raw)
    if not all(math.isfinite(value) and value > 0.0 for value in values):
        raise CorruptFileError(f"{gguf.path}: tensor {name!r} contains values that are not finite numbers > 0")
    return values


def _llama3_rope(gguf: GgufFile, rope: RopeConfig, head_dim: int) -> RopeConfig:
    """The llama3 scaling that gives the frequency divisors in the file.

    The converter stores the divisors, not the parameters from which it computed them. The largest divisor is the
    factor. The other parameters are assumed to be those that Llama 3.1, 3.2 and 3.3 share; a file whose divisors differ
    from theirs is rejected.
    """
    divisors = _read_vector(gguf, _LLAMA3_DIVISORS, head_dim // 2)
    llama3 = dataclasses.replace(
        rope,
        type="llama3",
        factor=max(divisors),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    if any(
        not math.isclose(value, _llama3_divisor(llama3, 2 * index / head_dim), rel_tol=1e-4)
        for index, value in enumerate(divisors)
    ):
        raise UnsupportedModelError(
            f"{gguf.path}: tensor {_LLAMA3_DIVISORS!r} is not supported; supported: Llama 3's scaling "
            "(low_freq_factor 1, high_freq_factor 4, original context 8192)"
        )
    return llama3


def _llama3_divisor(rope: RopeConfig, exponent: float) -> float:
    """Divisor that llama3 scaling applies to the frequency theta ** -exponent."""
    wavelength = 2 * math.pi * rope.theta**exponent
    context = rope.original_max_position_embeddings
    if wavelength < context / rope.high_freq_factor:
        return 1.0
    if wavelength > context / rope.low_freq_factor:
        return rope.factor
    smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return float(1.0 / ((1.0 - smooth) / rope.factor + smooth))
