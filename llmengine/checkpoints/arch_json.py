"""Conversion of `ModelArch` to and from the JSON of a saved engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from llmengine.checkpoints.metadata_fields import MAX_SIZE, Fields
from llmengine.models.arch import (
    ROPE_TYPES,
    Activation,
    LayerArch,
    LayerRope,
    ModelArch,
    NormPlacement,
    QkNorm,
    RopeConfig,
    check_arch,
)
from llmengine.models.families import FAMILIES, unsupported_architecture

_MAX_LAYERS = 10_000
SAVED_FIELDS = frozenset(item.name for item in dataclasses.fields(ModelArch)) - {"has_embedding", "has_head"}
"""The fields that files have: models are saved whole, and not a stage alone."""


def arch_to_dict(arch: ModelArch) -> dict[str, Any]:
    """JSON-ready form of `arch`, from which `arch_from_dict` restores an equal one."""
    return {name: value for name, value in dataclasses.asdict(arch).items() if name in SAVED_FIELDS}


def arch_from_dict(values: Mapping[str, Any], where: str) -> ModelArch:
    """The architecture that `arch_to_dict` wrote; `where` names the file in errors.

    Raises `CorruptFileError` for a missing, unknown or mistyped key and for values that contradict each other,
    `UnsupportedModelError` for an architecture that this version does not know.
    """
    fields = Fields(values, where)
    fields.require_only(set(SAVED_FIELDS))
    architecture = fields.string("architecture")
    if architecture not in [family.architecture for family in FAMILIES]:
        raise unsupported_architecture(where, architecture)
    arch = ModelArch(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", low=1, high=MAX_SIZE),
        hidden_size=fields.integer("hidden_size", low=1, high=MAX_SIZE),
        intermediate_size=fields.integer("intermediate_size", low=1, high=MAX_SIZE),
        num_layers=fields.integer("num_layers", low=1, high=_MAX_LAYERS),
        num_heads=fields.integer("num_heads", low=1, high=MAX_SIZE),
        num_kv_heads=fields.integer("num_kv_heads", low=1, high=MAX_SIZE),
        head_dim=fields.integer("head_dim", low=1, high=MAX_SIZE),
        max_position_embeddings=fields.integer("max_position_embeddings", low=1, high=MAX_SIZE),
        rms_norm_eps=fields.number("rms_norm_eps", above=0.0),
        hidden_act=fields.choice("hidden_act", get_args(Activation)),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        attention_bias=fields.boolean("attention_bias"),
        attention_out_bias=fields.boolean("attention_out_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
        rope=_rope_from_fields(fields.fields("rope")),
        local_rope=_rope_from_fields(fields.fields("local_rope")) if fields.has("local_rope") else None,
        layers=tuple(_layer_from_fields(layer) for layer in fields.objects("layers")),
        norm_placement=fields.choice("norm_placement", get_args(NormPlacement)),
        qk_norm=fields.choice("qk_norm", get_args(QkNorm)),
        attention_scale=fields.optional_number("attention_scale", above=0.0),
        attention_soft_cap=fields.optional_number("attention_soft_cap", above=0.0),
        embedding_scale=fields.number("embedding_scale", above=0.0),
        logit_scale=fields.number("logit_scale", above=0.0),
        logit_soft_cap=fields.optional_number("logit_soft_cap", above=0.0),
        float32_norms=fields.boolean("float32_norms"),
    )
    check_arch(arch, where)
    return arch


def _layer_from_fields(fields: Fields) -> LayerArch:
    fields.require_only({item.name for item in dataclasses.fields(LayerArch)})
    return LayerArch(
        sliding_window=fields.optional_integer("sliding_window", low=1, high=MAX_SIZE),
        rope=fields.choice("rope", get_args(LayerRope)),
    )


def _rope_from_fields(fields: Fields) -> RopeConfig:
    fields.require_only({item.name for item in dataclasses.fields(RopeConfig)})
    return RopeConfig(
        theta=fields.number("theta", above=1.0),
        type=fields.choice("type", ROPE_TYPES),
        factor=fields.number("factor", above=0.0),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings", low=1, high=MAX_SIZE),
        low_freq_factor=fields.number("low_freq_factor", above=0.0),
        high_freq_factor=fields.number("high_freq_factor", above=0.0),
        attention_factor=fields.optional_number("attention_factor", above=0.0),
        beta_fast=fields.number("beta_fast", above=0.0),
        beta_slow=fields.number("beta_slow", above=0.0),
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=fields.boolean("truncate"),
        short_factor=fields.numbers("short_factor", above=0.0),
        long_factor=fields.numbers("long_factor", above=0.0),
        rotary_dim=fields.optional_integer("rotary_dim", low=2, high=MAX_SIZE),
    )
