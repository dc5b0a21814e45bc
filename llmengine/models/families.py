"""The supported model families as data: what sets each one apart, and how its files name and store it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmengine.errors import UnsupportedModelError
from llmengine.models.arch import Activation, LayerArch, LayerRope, ModelArch, NormPlacement, QkNorm

LayerPattern = Literal["full", "all_sliding", "upper_sliding", "nope", "alternating"]


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One supported architecture. The defaults are Llama's.

    Attributes:
        title: names and generations of the models.
        architecture: its name in config.json's `architectures`.
        model_type: its name in config.json's `model_type`.
        gguf_architecture: its name in GGUF's `general.architecture`.
        gguf_interleaves_qk: the GGUF converter reorders the rows of q and k for interleaved rotation.
        hidden_act: see `ModelArch`.
        norm_placement: see `ModelArch`.
        qk_norm: see `ModelArch`.
        qkv_bias: q, k and v have biases and o has none; if False, config.json's `attention_bias` decides for all four.
        stored_fused: files contain q, k and v as one tensor, and gate and up as another.
        norms_plus_one: norms multiply by 1 + weight (GGUF files store the sum).
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        partial_rotary: only part of a head's dimensions may rotate.
        layer_pattern: which layers have a sliding window or do not rotate, unless config.json's `layer_types` says so.
            "full": no layer slides. "all_sliding": all do if there is a `sliding_window`. "upper_sliding": with
            `use_sliding_window`, layers from `max_window_layers` on. "nope": every `no_rope_layer_interval`-th layer
            does not rotate, and slides with `use_sliding_window`. "alternating": all layers slide except every
            `sliding_window_pattern`-th.
        local_theta: base of the sliding layers' own rotary encoding, unless the file names another; None if they use
            that of the other layers.
        wide_scale_layers: number of layers of the model whose scores are multiplied by (hidden_size / num_heads) **
            -0.5 instead of head_dim ** -0.5; GGUF files do not store that factor.
        config_defaults: transformers' defaults for keys that are absent in config.json. Scales and soft caps are read
            only if they have a default here.
    """

    title: str
    architecture: str
    model_type: str
    gguf_architecture: str
    gguf_interleaves_qk: bool = False
    hidden_act: Activation = "silu"
    norm_placement: NormPlacement = "pre"
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    stored_fused: bool = False
    norms_plus_one: bool = False
    scaled_embedding: bool = False
    partial_rotary: bool = False
    layer_pattern: LayerPattern = "full"
    local_theta: float | None = None
    wide_scale_layers: int | None = None
    config_defaults: Mapping[str, Any] = field(default_factory=dict)


_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

FAMILIES = (
    ModelFamily(
        title="Llama 1, 2, 3, SmolLM 1, 2 and other models of that architecture",
        architecture="LlamaForCausalLM",
        model_type="llama",
        gguf_architecture="llama",
        gguf_interleaves_qk=True,
    ),
    ModelFamily(
        title="Mistral 7B, Nemo, Small, Large (text)",
        architecture="MistralForCausalLM",
        model_type="mistral",
        gguf_architecture="llama",
        gguf_interleaves_qk=True,
        layer_pattern="all_sliding",
        config_defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
    ),
    ModelFamily(
        title="Qwen 2, Qwen 2.5",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        gguf_architecture="qwen2",
        qkv_bias=True,
        layer_pattern="upper_sliding",
        config_defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    ),
    ModelFamily(
        title="Qwen 3 (dense)",
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        gguf_architecture="qwen3",
        qk_norm="head",
        layer_pattern="upper_sliding",
        config_defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    ),
    ModelFamily(
        title="Phi-3, Phi-3.5, Phi-4, Phi-4-mini (text)",
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        gguf_architecture="phi3",
        stored_fused=True,
        partial_rotary=True,
        layer_pattern="all_sliding",
        config_defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    ModelFamily(
        title="Granite 3 (dense)",
        architecture="GraniteForCausalLM",
        model_type="granite",
        gguf_architecture="granite",
        gguf_interleaves_qk=True,
        config_defaults={
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    ModelFamily(
        title="SmolLM3",
        architecture="SmolLM3ForCausalLM",
        model_type="smollm3",
        gguf_architecture="smollm3",
        gguf_interleaves_qk=True,
        layer_pattern="nope",
        config_defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    ModelFamily(
        title="Gemma 2",
        architecture="Gemma2ForCausalLM",
        model_type="gemma2",
        gguf_architecture="gemma2",
        hidden_act="gelu_tanh",
        norm_placement="both",
        norms_plus_one=True,
        scaled_embedding=True,
        layer_pattern="alternating",
        wide_scale_layers=46,
        config_defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    ModelFamily(
        title="Gemma 3 (text)",
        architecture="Gemma3ForCausalLM",
        model_type="gemma3_text",
        gguf_architecture="gemma3",
        hidden_act="gelu_tanh",
        norm_placement="both",
        qk_norm="head",
        norms_plus_one=True,
        scaled_embedding=True,
        layer_pattern="alternating",
        local_theta=1e4,
        wide_scale_layers=62,
        config_defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
        },
    ),
    ModelFamily(
        title="OLMo 2",
        architecture="Olmo2ForCausalLM",
        model_type="olmo2",
        gguf_architecture="olmo2",
        norm_placement="post",
        qk_norm="projection",
        config_defaults={"rms_norm_eps": 1e-5},
    ),
)
"""Every architecture that can be loaded."""


def family_layers(
    family: ModelFamily, window: int | None, slides: Sequence[bool], rotates: Sequence[bool]
) -> tuple[LayerArch, ...]:
    """`ModelArch.layers`, where each layer may slide over `window` tokens (None: none does) and may rotate."""
    sliding_rope: LayerRope = "global" if family.local_theta is None else "local"
    ropes: list[LayerRope] = [
        "none" if not rotating else sliding_rope if slide else "global"
        for slide, rotating in zip(slides, rotates, strict=True)
    ]
    layers = tuple(LayerArch(window if slide else None, rope) for slide, rope in zip(slides, ropes, strict=True))
    return () if all(layer == LayerArch() for layer in layers) else layers


def family_of(arch: ModelArch) -> ModelFamily:
    """The row of `FAMILIES` to which `arch` belongs."""
    return next(family for family in FAMILIES if family.architecture == arch.architecture)


def unsupported_architecture(where: str, found: str) -> UnsupportedModelError:
    """The error for an unknown architecture; lists the supported ones."""
    supported = ", ".join(family.architecture for family in FAMILIES)
    return UnsupportedModelError(f"{where}: architecture {found} is not supported; supported: {supported}")
