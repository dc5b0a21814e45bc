"""What distinguishes one dense decoder from another, as data: sizes, options, position encoding, weight shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.fields import Fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)

_MAX_LAYERS = 10_000
_MAX_SIZE = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One supported architecture.

    Attributes:
        architecture: its name in config.json's `architectures`.
        model_type: its name in config.json's `model_type`.
        gguf_architecture: its name in GGUF's `general.architecture`.
        gguf_interleaves_qk: the GGUF converter reorders the rows of q and k for interleaved rotation.
    """

    architecture: str
    model_type: str
    gguf_architecture: str
    gguf_interleaves_qk: bool


FAMILIES = (
    ModelFamily(
        architecture="LlamaForCausalLM", model_type="llama", gguf_architecture="llama", gguf_interleaves_qk=True
    ),
)
"""Every architecture that can be loaded."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position encoding, with the names and the meaning that transformers' `ROPE_INIT_FUNCTIONS` give them.

    Attributes:
        theta: base period.
        type: how the frequencies are derived; what a type does not use keeps its default.
        factor: context extension (linear, dynamic, llama3, yarn).
        original_max_position_embeddings: context length of the pretraining; always set: `max_position_embeddings` for
            default, linear and dynamic.
        low_freq_factor: llama3.
        high_freq_factor: llama3.
        attention_factor: yarn, factor on cos and sin; None: derived from `factor`, `mscale` and `mscale_all_dim`.
        beta_fast: yarn.
        beta_slow: yarn.
        mscale: yarn.
        mscale_all_dim: yarn.
        truncate: yarn, round the correction range to whole dimensions.
    """

    theta: float
    original_max_position_embeddings: int
    type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelArch:
    """A dense decoder: pre-norm RMSNorm, rotary grouped-query attention, gated MLP.

    Attributes:
        attention_bias: q, k and v have biases.
        attention_out_bias: the attention's output projection has one.
        tie_word_embeddings: the output projection is the embedding.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: Literal["silu"]
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    rope: RopeConfig


def family_of(arch: ModelArch) -> ModelFamily:
    """Return the row of `FAMILIES` that `arch` belongs to."""
    return next(family for family in FAMILIES if family.architecture == arch.architecture)


def fused_parts(arch: ModelArch) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Return, in stream order, each canonical weight's parts: name and shape of what is stacked along dimension 0.

    A weight that is not fused has one part of its own name.
    """
    hidden, q_size, kv_size = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    layer: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {}
    layer["input_norm.weight"] = (("input_norm.weight", (hidden,)),)
    layer["qkv.weight"] = (
        ("q.weight", (q_size, hidden)),
        ("k.weight", (kv_size, hidden)),
        ("v.weight", (kv_size, hidden)),
    )
    if arch.attention_bias:
        layer["qkv.bias"] = (("q.bias", (q_size,)), ("k.bias", (kv_size,)), ("v.bias", (kv_size,)))
    layer["o.weight"] = (("o.weight", (hidden, q_size)),)
    if arch.attention_out_bias:
        layer["o.bias"] = (("o.bias", (hidden,)),)
    inner = arch.intermediate_size
    layer["post_attention_norm.weight"] = (("post_attention_norm.weight", (hidden,)),)
    layer["gate_up.weight"] = (("gate.weight", (inner, hidden)), ("up.weight", (inner, hidden)))
    if arch.mlp_bias:
        layer["gate_up.bias"] = (("gate.bias", (inner,)), ("up.bias", (inner,)))
    layer["down.weight"] = (("down.weight", (hidden, inner)),)
    if arch.mlp_bias:
        layer["down.bias"] = (("down.bias", (hidden,)),)

    embedding = (arch.vocab_size, hidden)
    result: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
        "embed_tokens.weight": (("embed_tokens.weight", embedding),)
    }
    for index in range(arch.num_layers):
        prefix = f"layers.{index}."
        for name, parts in layer.items():
            result[prefix + name] = tuple((prefix + part, shape) for part, shape in parts)
    result["final_norm.weight"] = (("final_norm.weight", (hidden,)),)
    if not arch.tie_word_embeddings:
        result["lm_head.weight"] = (("lm_head.weight", embedding),)
    return result


def canonical_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Return every canonical weight's shape, in stream order.

    ::

        embed_tokens.weight                    [vocab, hidden]
        layers.{i}.input_norm.weight           [hidden]
        layers.{i}.qkv.weight                  [(num_heads + 2 * num_kv_heads) * head_dim, hidden], q then k then v
        layers.{i}.qkv.bias                    only with attention_bias
        layers.{i}.o.weight                    [hidden, num_heads * head_dim]
        layers.{i}.o.bias                      only with attention_out_bias
        layers.{i}.post_attention_norm.weight  [hidden]
        layers.{i}.gate_up.weight              [2 * intermediate, hidden], gate then up
        layers.{i}.gate_up.bias                only with mlp_bias
        layers.{i}.down.weight                 [hidden, intermediate]
        layers.{i}.down.bias                   only with mlp_bias
        final_norm.weight                      [hidden]
        lm_head.weight                         [vocab, hidden], only without tie_word_embeddings
    """
    return {name: (sum(shape[0] for _, shape in parts), *parts[0][1][1:]) for name, parts in fused_parts(arch).items()}


def arch_from_hf_config(config: Mapping[str, Any], where: str) -> ModelArch:
    """Return the architecture that a Hugging Face config.json describes; `where` names the file in errors.

    Reads both the old (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`) form. Raises `CorruptFileError`
    naming key and expectation for a missing, mistyped or inconsistent key, `UnsupportedModelError` for an
    architecture or option that is not supported.
    """
    fields = Fields(config, where)
    family = _hf_family(fields)
    _reject_unsupported(fields)
    hidden_size = fields.integer("hidden_size", low=1, high=_MAX_SIZE)
    num_heads = fields.integer("num_attention_heads", low=1, high=_MAX_SIZE)
    if not fields.has("head_dim") and hidden_size % num_heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads={num_heads} where head_dim is absent")
    max_positions = fields.integer("max_position_embeddings", 2048, low=1, high=_MAX_SIZE)
    attention_bias = fields.boolean("attention_bias", False)
    arch = ModelArch(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size", low=1, high=_MAX_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", low=1, high=_MAX_SIZE),
        num_layers=fields.integer("num_hidden_layers", low=1, high=_MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads, low=1, high=num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads, low=1, high=_MAX_SIZE),
        max_position_embeddings=max_positions,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, above=0.0),
        hidden_act="silu",
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        rope=_hf_rope(fields, max_positions),
    )
    check_arch(arch, where)
    return arch


def check_arch(arch: ModelArch, where: str) -> None:
    """Raise `CorruptFileError` if the sizes of `arch` contradict each other."""
    if arch.num_heads % arch.num_kv_heads:
        raise CorruptFileError(
            f"{where}: {arch.num_heads} attention heads are no multiple of {arch.num_kv_heads} key-value heads"
        )
    if arch.head_dim % 2:
        raise CorruptFileError(f"{where}: head_dim={arch.head_dim} is odd, rotary encoding needs pairs")
    if arch.rope.theta <= 1.0:
        raise CorruptFileError(f"{where}: rope theta {arch.rope.theta:g} is not > 1")
    if arch.rope.type == "llama3" and arch.rope.low_freq_factor >= arch.rope.high_freq_factor:
        raise CorruptFileError(
            f"{where}: rope low_freq_factor={arch.rope.low_freq_factor:g} is not below "
            f"high_freq_factor={arch.rope.high_freq_factor:g}"
        )


def unsupported_architecture(where: str, found: str) -> UnsupportedModelError:
    """Return the error for an unknown architecture; lists the supported ones."""
    supported = ", ".join(family.architecture for family in FAMILIES)
    return UnsupportedModelError(f"{where}: architecture {found} is not supported; supported are: {supported}")


def _hf_family(fields: Fields) -> ModelFamily:
    if fields.has("architectures"):
        found = fields.strings("architectures")
        for family in FAMILIES:
            if found == [family.architecture]:
                return family
        raise unsupported_architecture(fields.where, ", ".join(found) or "(none)")
    model_type = fields.string("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    raise unsupported_architecture(fields.where, f"of model_type {model_type!r}")


def _reject_unsupported(fields: Fields) -> None:
    where = fields.where
    activation = fields.string("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{where}: hidden_act={activation!r} is not supported; supported is: silu")
    pretraining_tp = fields.integer("pretraining_tp", 1)
    if pretraining_tp > 1:
        raise UnsupportedModelError(f"{where}: pretraining_tp={pretraining_tp} is not supported; supported is: 1")
    if fields.has("quantization_config"):
        method = fields.fields("quantization_config").values.get("quant_method")
        raise UnsupportedModelError(
            f"{where}: quantization_config (quant_method={method!r}): quantized Hugging Face checkpoints are not "
            "supported; load the unquantized one and set quant_config"
        )


def _hf_rope(fields: Fields, max_positions: int) -> RopeConfig:
    """Return the rotary encoding of a config.json; precedence of the keys is transformers'."""
    parameters = next(
        (fields.fields(key) for key in ("rope_parameters", "rope_scaling") if fields.has(key)),
        Fields({}, f"{fields.where}: rope_parameters"),
    )
    theta = parameters.number("rope_theta", fields.number("rope_theta", 10000.0, above=1.0), above=1.0)
    for place in (parameters, fields):
        if place.number("partial_rotary_factor", 1.0, above=0.0) != 1.0:
            raise UnsupportedModelError(f"{place.where}: partial_rotary_factor other than 1 is not supported")
    rope_type = parameters.string("rope_type", parameters.string("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{parameters.where}: rope type {rope_type!r} is not supported; supported are: {', '.join(ROPE_TYPES)}"
        )
    original = max_positions
    if rope_type in ("llama3", "yarn"):
        own = parameters.integer("original_max_position_embeddings", max_positions, low=1, high=_MAX_SIZE)
        original = fields.integer("original_max_position_embeddings", own, low=1, high=_MAX_SIZE)
    if rope_type == "default":
        return RopeConfig(theta=theta, original_max_position_embeddings=original)
    default_factor = max_positions / original if rope_type == "yarn" else None
    rope = RopeConfig(
        theta=theta,
        original_max_position_embeddings=original,
        type=cast(RopeType, rope_type),
        factor=parameters.number("factor", default_factor, above=0.0),
    )
    if rope_type == "llama3":
        return dataclasses.replace(
            rope,
            low_freq_factor=parameters.number("low_freq_factor", above=0.0),
            high_freq_factor=parameters.number("high_freq_factor", above=0.0),
        )
    return _with_yarn(rope, parameters) if rope_type == "yarn" else rope


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


def arch_to_dict(arch: ModelArch) -> dict[str, Any]:
    """Return a JSON-ready form of `arch` that `arch_from_dict` reads back equal."""
    return dataclasses.asdict(arch)


def arch_from_dict(values: Mapping[str, Any], where: str) -> ModelArch:
    """Return the architecture that `arch_to_dict` wrote.

    Raises `CorruptFileError` for a missing, unknown or mistyped key or a contradiction, `UnsupportedModelError` for an
    architecture that this version does not know.
    """
    fields = Fields(values, where)
    fields.require_only({item.name for item in dataclasses.fields(ModelArch)})
    architecture = fields.string("architecture")
    if architecture not in [family.architecture for family in FAMILIES]:
        raise unsupported_architecture(where, architecture)
    if fields.string("hidden_act") != "silu":
        raise UnsupportedModelError(f"{where}: hidden_act={fields.string('hidden_act')!r}; supported is: silu")
    arch = ModelArch(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", low=1, high=_MAX_SIZE),
        hidden_size=fields.integer("hidden_size", low=1, high=_MAX_SIZE),
        intermediate_size=fields.integer("intermediate_size", low=1, high=_MAX_SIZE),
        num_layers=fields.integer("num_layers", low=1, high=_MAX_LAYERS),
        num_heads=fields.integer("num_heads", low=1, high=_MAX_SIZE),
        num_kv_heads=fields.integer("num_kv_heads", low=1, high=_MAX_SIZE),
        head_dim=fields.integer("head_dim", low=1, high=_MAX_SIZE),
        max_position_embeddings=fields.integer("max_position_embeddings", low=1, high=_MAX_SIZE),
        rms_norm_eps=fields.number("rms_norm_eps", above=0.0),
        hidden_act="silu",
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        attention_bias=fields.boolean("attention_bias"),
        attention_out_bias=fields.boolean("attention_out_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
        rope=_rope_from_fields(fields.fields("rope")),
    )
    check_arch(arch, where)
    return arch


def _rope_from_fields(fields: Fields) -> RopeConfig:
    fields.require_only({item.name for item in dataclasses.fields(RopeConfig)})
    rope_type = fields.string("type")
    if rope_type not in ROPE_TYPES:
        raise fields.error("type", f"one of {', '.join(ROPE_TYPES)}")
    return RopeConfig(
        theta=fields.number("theta", above=1.0),
        type=rope_type,
        factor=fields.number("factor", above=0.0),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings", low=1, high=_MAX_SIZE),
        low_freq_factor=fields.number("low_freq_factor", above=0.0),
        high_freq_factor=fields.number("high_freq_factor", above=0.0),
        attention_factor=fields.optional_number("attention_factor", above=0.0),
        beta_fast=fields.number("beta_fast", above=0.0),
        beta_slow=fields.number("beta_slow", above=0.0),
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=fields.boolean("truncate"),
    )
