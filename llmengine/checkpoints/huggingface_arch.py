"""`ModelArch` from a Hugging Face config.json, with transformers' defaults and precedence of keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmengine.checkpoints.metadata_fields import MAX_SIZE, Fields
from llmengine.errors import UnsupportedModelError
from llmengine.models.arch import (
    ROPE_TYPES,
    Activation,
    LayerArch,
    ModelArch,
    RopeConfig,
    check_arch,
    fold_residual_scale,
)
from llmengine.models.families import FAMILIES, ModelFamily, family_layers, unsupported_architecture

_MAX_LAYERS = 10_000
_ACTIVATIONS: dict[Activation, tuple[str, ...]] = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}
_LAYER_TYPES = ("full_attention", "sliding_attention")


def arch_from_hf_config(config: Mapping[str, Any], where: str) -> ModelArch:
    """The architecture that a Hugging Face config.json describes; `where` names the file in errors.

    Reads both the old form (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`). Raises
    `CorruptFileError` naming the key and what was expected for a missing, mistyped or inconsistent key,
    `UnsupportedModelError` for an unsupported architecture or option.
    """
    family = _hf_family(Fields(config, where))
    fields = Fields({**family.config_defaults, **config}, where)
    _reject_unsupported(fields, family)
    hidden_size = fields.integer("hidden_size", low=1, high=MAX_SIZE)
    num_heads = fields.integer("num_attention_heads", low=1, high=MAX_SIZE)
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error(
            "hidden_size", f"a multiple of num_attention_heads={num_heads} as long as head_dim is absent"
        )
    head_dim = fields.integer("head_dim", hidden_size // num_heads, low=1, high=MAX_SIZE)
    num_layers = fields.integer("num_hidden_layers", low=1, high=_MAX_LAYERS)
    max_positions = fields.integer("max_position_embeddings", 2048, low=1, high=MAX_SIZE)
    attention_bias = fields.boolean("attention_bias", False)
    rope, local_rope = _ropes(fields, family, max_positions, head_dim)
    arch = ModelArch(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size", low=1, high=MAX_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", low=1, high=MAX_SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads, low=1, high=num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0),
        hidden_act=family.hidden_act,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias or family.qkv_bias,
        attention_out_bias=attention_bias and not family.qkv_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        rope=rope,
        local_rope=local_rope,
        layers=_layers(fields, family, num_layers),
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm,
        attention_scale=_attention_scale(fields, family, head_dim),
        attention_soft_cap=_family_number(fields, family, "attn_logit_softcapping"),
        embedding_scale=hidden_size**0.5
        if family.scaled_embedding
        else _family_number(fields, family, "embedding_multiplier") or 1.0,
        logit_scale=1.0 / (_family_number(fields, family, "logits_scaling") or 1.0),
        logit_soft_cap=_family_number(fields, family, "final_logit_softcapping"),
        float32_norms=family.norms_plus_one,
    )
    check_arch(arch, where)
    return fold_residual_scale(arch, _family_number(fields, family, "residual_multiplier") or 1.0)


def _hf_family(fields: Fields) -> ModelFamily:
    if fields.values.get("architectures"):
        is_text = isinstance(fields.values["architectures"], str)
        found = [fields.string("architectures")] if is_text else fields.strings("architectures")
        for family in FAMILIES:
            if family.architecture in found:
                return family
        raise unsupported_architecture(fields.where, ", ".join(found))
    if fields.has("architectures") and not fields.has("model_type"):
        raise unsupported_architecture(fields.where, "(none)")
    model_type = fields.string("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise unsupported_architecture(fields.where, f"of model_type {model_type!r}")


def _reject_unsupported(fields: Fields, family: ModelFamily) -> None:
    where, supported = fields.where, _ACTIVATIONS[family.hidden_act]
    key = "hidden_act" if family.hidden_act == "silu" else "hidden_activation"
    activation = fields.string(key, supported[0])
    if activation not in supported:
        raise UnsupportedModelError(f"{where}: {key}={activation!r} is not supported; supported: {supported[0]}")
    if fields.boolean("use_bidirectional_attention", False):
        raise UnsupportedModelError(f"{where}: use_bidirectional_attention=true is not supported")


def _family_number(fields: Fields, family: ModelFamily, key: str) -> float | None:
    """The number > 0 under `key`; None if it is absent or null, or if the family has no such key."""
    return fields.optional_number(key, above=0.0) if key in family.config_defaults else None


def _attention_scale(fields: Fields, family: ModelFamily, head_dim: int) -> float | None:
    """Factor of the attention scores, None for head_dim ** -0.5."""
    scalar = _family_number(fields, family, "query_pre_attn_scalar")
    scale = _family_number(fields, family, "attention_multiplier") if scalar is None else scalar**-0.5
    return None if scale == head_dim**-0.5 else scale


def _layers(fields: Fields, family: ModelFamily, num_layers: int) -> tuple[LayerArch, ...]:
    """`ModelArch.layers`."""
    pattern = family.layer_pattern
    window = fields.optional_integer("sliding_window", low=1, high=MAX_SIZE) if pattern != "full" else None
    if pattern in ("upper_sliding", "nope") and not fields.boolean("use_sliding_window", False):
        window = None
    rotates = _rotating_layers(fields, num_layers) if pattern == "nope" else [True] * num_layers
    return family_layers(family, window, _sliding_layers(fields, family, rotates), rotates)


def _sliding_layers(fields: Fields, family: ModelFamily, rotates: list[bool]) -> list[bool]:
    """Whether each layer has a sliding window."""
    pattern, num_layers = family.layer_pattern, len(rotates)
    if pattern in ("full", "all_sliding"):
        return [pattern == "all_sliding"] * num_layers
    if fields.has("layer_types"):
        types = fields.strings("layer_types")
        if len(types) != num_layers:
            raise fields.error("layer_types", f"{num_layers} strings")
        unknown = sorted(set(types) - set(_LAYER_TYPES))
        if unknown:
            raise UnsupportedModelError(
                f"{fields.where}: layer_types {', '.join(unknown)} are not supported; supported: "
                + ", ".join(_LAYER_TYPES)
            )
        return [name == "sliding_attention" for name in types]
    if pattern == "upper_sliding":
        first = fields.integer("max_window_layers", 28)
        return [index >= first for index in range(num_layers)]
    if pattern == "nope":
        return [not rotating for rotating in rotates]
    period = fields.integer("sliding_window_pattern", low=1)
    return [(index + 1) % period != 0 for index in range(num_layers)]


def _rotating_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Whether each layer of a model with NoPE layers rotates."""
    if fields.values.get("no_rope_layers"):
        given = fields.sizes("no_rope_layers")
        if len(given) < num_layers:
            raise fields.error("no_rope_layers", f"at least {num_layers} numbers")
        return [bool(value) for value in given[:num_layers]]
    interval = fields.integer("no_rope_layer_interval", 4, low=1)
    return [(index + 1) % interval != 0 for index in range(num_layers)]


def _ropes(
    fields: Fields, family: ModelFamily, max_positions: int, head_dim: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotary encoding in a config.json, and that of the sliding layers if they have their own.

    `rope_scaling`, which people add to a config.json, takes precedence over `rope_parameters`, which may already be
    there.
    """
    scaling, parameters = _optional_fields(fields, "rope_scaling"), _optional_fields(fields, "rope_parameters")
    theta = fields.number("rope_theta", family.config_defaults.get("rope_theta", 10000.0), above=1.0)
    sliding = Fields({}, parameters.where)
    if any(parameters.has(name) for name in _LAYER_TYPES):
        if family.local_theta is None:
            raise UnsupportedModelError(
                f"{parameters.where}: separate parameters for each layer type are not supported for "
                f"{family.architecture}"
            )
        full, sliding = (_optional_fields(parameters, name) for name in _LAYER_TYPES)
        parameters = Fields({**full.values, **scaling.values}, full.where)
    elif scaling.values:
        parameters = scaling
    rope = _rope(fields, parameters, family, theta, max_positions, head_dim)
    if family.local_theta is None:
        return rope, None
    local_theta = fields.number("rope_local_base_freq", family.local_theta, above=1.0)
    return rope, _rope(fields, sliding, family, local_theta, max_positions, head_dim)


def _optional_fields(fields: Fields, key: str) -> Fields:
    """The nested object under `key`; an empty one if the key is absent."""
    return fields.fields(key) if fields.has(key) else Fields({}, f"{fields.where}: {key}")


def _rope(
    fields: Fields, parameters: Fields, family: ModelFamily, theta: float, max_positions: int, head_dim: int
) -> RopeConfig:
    """The rotary encoding in `parameters`, a few of whose keys transformers looks up in the enclosing `fields`."""
    rope_type = parameters.string("rope_type", parameters.string("type", "default"))
    if rope_type == "su" or (family.architecture == "Phi3ForCausalLM" and rope_type == "yarn"):
        rope_type = "longrope"
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{parameters.where}: rope_type={rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    original = max_positions
    if rope_type in ("llama3", "yarn", "longrope"):
        own = parameters.integer("original_max_position_embeddings", max_positions, low=1, high=MAX_SIZE)
        original = fields.integer("original_max_position_embeddings", own, low=1, high=MAX_SIZE)
    rope = RopeConfig(
        theta=parameters.number("rope_theta", theta, above=1.0),
        original_max_position_embeddings=original,
        type=rope_type,
        rotary_dim=_rotary_dim(fields, parameters, family, head_dim),
    )
    if rope_type == "default":
        return rope
    default_factor = max_positions / original if rope_type in ("yarn", "longrope") else None
    rope = dataclasses.replace(rope, factor=parameters.number("factor", default_factor, above=0.0))
    if rope_type == "llama3":
        return dataclasses.replace(
            rope,
            low_freq_factor=parameters.number("low_freq_factor", above=0.0),
            high_freq_factor=parameters.number("high_freq_factor", above=0.0),
        )
    if rope_type == "longrope":
        return dataclasses.replace(
            rope,
            attention_factor=parameters.optional_number("attention_factor", above=0.0),
            short_factor=parameters.numbers("short_factor", above=0.0),
            long_factor=parameters.numbers("long_factor", above=0.0),
        )
    return _with_yarn(rope, parameters) if rope_type == "yarn" else rope


def _rotary_dim(fields: Fields, parameters: Fields, family: ModelFamily, head_dim: int) -> int | None:
    factor = parameters.number(
        "partial_rotary_factor", fields.number("partial_rotary_factor", 1.0, above=0.0), above=0.0
    )
    if factor == 1.0:
        return None
    if not family.partial_rotary:
        raise UnsupportedModelError(
            f"{fields.where}: partial_rotary_factor={factor:g} is not supported for {family.architecture}"
        )
    rotary_dim = int(head_dim * factor)
    return None if rotary_dim == head_dim else rotary_dim


def _with_yarn(rope: RopeConfig, parameters: Fields) -> RopeConfig:
    return dataclasses.replace(
        rope,
        attention_factor=parameters.optional_number("attention_factor", above=0.0),
        beta_fast=parameters.number("beta_fast", 32.0, above=0.0),
        beta_slow=parameters.number("beta_slow", 1.0, above=0.0),
        mscale=parameters.optional_number("mscale"),
        mscale_all_dim=parameters.optional_number("mscale_all_dim"),
        truncate=parameters.boolean("truncate", True),
    )
