"""The differences between dense decoders as data: sizes, options, position encoding, weight shapes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from llmengine.errors import CorruptFileError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)

Activation = Literal["silu", "gelu_tanh"]
NormPlacement = Literal["pre", "post", "both"]
QkNorm = Literal["none", "head", "projection"]
LayerRope = Literal["global", "local", "none"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position encoding; names and meanings are those of transformers' `ROPE_INIT_FUNCTIONS`.

    Attributes:
        theta: base period.
        type: how the frequencies are derived; fields that a type does not use keep their defaults.
        factor: context extension (linear, dynamic, llama3, yarn, longrope).
        original_max_position_embeddings: context length of the pretraining; for default, linear and dynamic it is
            `max_position_embeddings`.
        low_freq_factor: llama3.
        high_freq_factor: llama3.
        attention_factor: yarn and longrope, factor on cos and sin; None: derived from `factor` and, for yarn, from
            `mscale` and `mscale_all_dim`, for longrope from `original_max_position_embeddings`.
        beta_fast: yarn.
        beta_slow: yarn.
        mscale: yarn.
        mscale_all_dim: yarn.
        truncate: yarn, whether to round the correction range to whole dimensions.
        short_factor: longrope, [rotary_dim / 2], divisors of the frequencies for contexts up to the original length.
        long_factor: longrope, [rotary_dim / 2], divisors for longer contexts.
        rotary_dim: dimensions of a head that rotate, even; None for all. The others stay as they are.
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
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotary_dim: int | None = None


@dataclass(frozen=True, slots=True)
class LayerArch:
    """Options that may differ from layer to layer.

    Attributes:
        sliding_window: number of tokens, itself included, to which a token attends; None: all tokens before it.
        rope: which of the model's rotary encodings applies to q and k; "none": they are not rotated (NoPE).
    """

    sliding_window: int | None = None
    rope: LayerRope = "global"


@dataclass(frozen=True, slots=True)
class ModelArch:
    """A dense decoder: RMSNorm, rotary grouped-query attention, gated MLP. The defaults are Llama's.

    Attributes:
        rms_norm_eps: epsilon of all norms.
        hidden_act: activation of the MLP's gate; "gelu_tanh" is GELU in its tanh approximation.
        attention_bias: whether q, k and v have biases.
        attention_out_bias: whether the attention's output projection has a bias.
        tie_word_embeddings: whether the output projection is the embedding.
        rope: rotary encoding of layers with rope "global".
        local_rope: rotary encoding of layers with rope "local".
        layers: options of each layer; if empty, every layer is `LayerArch()`. Use `layer(index)`.
        norm_placement: "pre": a norm precedes attention and MLP. "post": a norm follows them, before their results are
            added to the residual. "both": one precedes and one follows.
        qk_norm: norms of q and k before their rotation. "head": over each head, weights [head_dim]. "projection": over
            all of q and all of k, weights [num_heads * head_dim] and [num_kv_heads * head_dim].
        attention_scale: factor of the attention scores; None for head_dim ** -0.5.
        attention_soft_cap: cap of the scores, which become cap * tanh(score / cap) after scaling; None for no cap.
        embedding_scale: factor of the embeddings.
        logit_scale: factor of the logits.
        logit_soft_cap: cap of the logits, which become cap * tanh(logit / cap) after scaling; None for no cap.
        float32_norms: whether the weights of norms stay float32 regardless of the other weights' dtype; weights of the
            form 1 + w would lose too much precision.
        has_embedding: whether the model begins with token ids; else it is a later stage of one (`models/stages.py`),
            and begins with hidden states.
        has_head: whether the model ends with logits; else it is an earlier stage, and ends with hidden states.
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
    hidden_act: Activation
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    rope: RopeConfig
    local_rope: RopeConfig | None = None
    layers: tuple[LayerArch, ...] = ()
    norm_placement: NormPlacement = "pre"
    qk_norm: QkNorm = "none"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    float32_norms: bool = False
    has_embedding: bool = True
    has_head: bool = True

    def layer(self, index: int) -> LayerArch:
        """Options of layer `index`."""
        return self.layers[index] if self.layers else LayerArch()

    def layer_rope(self, index: int) -> RopeConfig | None:
        """Rotary encoding of layer `index`, None if it has none."""
        return {"global": self.rope, "local": self.local_rope, "none": None}[self.layer(index).rope]

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def has_llama_segments(self) -> bool:
        """Whether the computation between two attentions is Llama's: norm first, residual added after, SiLU."""
        return self.norm_placement == "pre" and self.hidden_act == "silu"

    def is_llama(self, context: int) -> bool:
        """Whether all of the computation is Llama's for contexts of up to this many tokens.

        Llama has biases, any head size, and any rotary encoding that all layers share.
        """
        layers = (self.layer(index) for index in range(self.num_layers))
        return (
            self.has_llama_segments
            and all(layer.rope == "global" and (layer.sliding_window or context) >= context for layer in layers)
            and self.qk_norm == "none"
            and self.attention_scale is None
            and self.attention_soft_cap is None
            and self.embedding_scale == 1.0
            and self.logit_scale == 1.0
            and self.logit_soft_cap is None
        )


def fused_parts(arch: ModelArch) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Canonical weight -> name and shape of the parts stacked along its dimension 0, in stream order.

    A weight that is not fused has one part, which has its name.
    """
    embedding = (arch.vocab_size, arch.hidden_size)
    is_output = arch.has_head and arch.tie_word_embeddings
    result = _unfused("embed_tokens.weight", embedding) if arch.has_embedding or is_output else {}
    layer = {**_attention_parts(arch), **_mlp_parts(arch)}
    for index in range(arch.num_layers):
        prefix = f"layers.{index}."
        for name, parts in layer.items():
            result[prefix + name] = tuple((prefix + part, shape) for part, shape in parts)
    if arch.has_head:
        result |= _unfused("final_norm.weight", (arch.hidden_size,))
    if arch.has_head and not arch.tie_word_embeddings:
        result |= _unfused("lm_head.weight", embedding)
    return result


_Parts = dict[str, tuple[tuple[str, tuple[int, ...]], ...]]


def _unfused(name: str, shape: tuple[int, ...]) -> _Parts:
    return {name: ((name, shape),)}


def _attention_parts(arch: ModelArch) -> _Parts:
    hidden, q_size, kv_size = arch.hidden_size, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    rows = {"q": q_size, "k": kv_size, "v": kv_size}
    parts: _Parts = {}
    if arch.norm_placement != "post":
        parts |= _unfused("input_norm.weight", (hidden,))
    parts["qkv.weight"] = tuple((f"{name}.weight", (size, hidden)) for name, size in rows.items())
    if arch.attention_bias:
        parts["qkv.bias"] = tuple((f"{name}.bias", (size,)) for name, size in rows.items())
    if arch.qk_norm != "none":
        per_head = arch.qk_norm == "head"
        for name in ("q", "k"):
            parts |= _unfused(f"{name}_norm.weight", (arch.head_dim if per_head else rows[name],))
    parts |= _unfused("o.weight", (hidden, q_size))
    if arch.attention_out_bias:
        parts |= _unfused("o.bias", (hidden,))
    if arch.norm_placement != "pre":
        parts |= _unfused("attention_out_norm.weight", (hidden,))
    return parts


def _mlp_parts(arch: ModelArch) -> _Parts:
    hidden, inner = arch.hidden_size, arch.intermediate_size
    parts: _Parts = {}
    if arch.norm_placement != "post":
        parts |= _unfused("post_attention_norm.weight", (hidden,))
    parts["gate_up.weight"] = (("gate.weight", (inner, hidden)), ("up.weight", (inner, hidden)))
    if arch.mlp_bias:
        parts["gate_up.bias"] = (("gate.bias", (inner,)), ("up.bias", (inner,)))
    parts |= _unfused("down.weight", (hidden, inner))
    if arch.mlp_bias:
        parts |= _unfused("down.bias", (hidden,))
    if arch.norm_placement != "pre":
        parts |= _unfused("mlp_out_norm.weight", (hidden,))
    return parts


def canonical_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Canonical weight -> shape, in stream order.

    ::

        embed_tokens.weight                    [vocab, hidden]
        layers.{i}.input_norm.weight           [hidden], unless norm_placement is "post"
        layers.{i}.qkv.weight                  [(num_heads + 2 * num_kv_heads) * head_dim, hidden], q then k then v
        layers.{i}.qkv.bias                    only with attention_bias
        layers.{i}.q_norm.weight               [head_dim] or [num_heads * head_dim], only with qk_norm
        layers.{i}.k_norm.weight               [head_dim] or [num_kv_heads * head_dim], only with qk_norm
        layers.{i}.o.weight                    [hidden, num_heads * head_dim]
        layers.{i}.o.bias                      only with attention_out_bias
        layers.{i}.attention_out_norm.weight   [hidden], unless norm_placement is "pre"
        layers.{i}.post_attention_norm.weight  [hidden], before the MLP, unless norm_placement is "post"
        layers.{i}.gate_up.weight              [2 * intermediate, hidden], gate then up
        layers.{i}.gate_up.bias                only with mlp_bias
        layers.{i}.down.weight                 [hidden, intermediate]
        layers.{i}.down.bias                   only with mlp_bias
        layers.{i}.mlp_out_norm.weight         [hidden], unless norm_placement is "pre"
        final_norm.weight                      [hidden]
        lm_head.weight                         [vocab, hidden], only without tie_word_embeddings

    The stages of a model have those of their layers only, counted from 0; the last one has `embed_tokens.weight` too
    where that is the output matrix.

    Within each head of q and k (weights, biases and norms), dimension j rotates together with j + head_dim / 2. If only
    `rotary_dim` of them rotate, readers bring the rows into `head_order`.
    """
    return {name: (sum(shape[0] for _, shape in parts), *parts[0][1][1:]) for name, parts in fused_parts(arch).items()}


def head_order(arch: ModelArch) -> tuple[int, ...] | None:
    """Row in checkpoints of each canonical row of a head of q or k; None if the order is the same.

    In checkpoints the dimensions that rotate come first. In canonical order each half of a head ends with dimensions
    that do not rotate (their cos is 1, their sin 0), so that every model rotates whole heads, half against half.
    """
    if arch.rope.rotary_dim in (None, arch.head_dim):
        return None
    rotated, half = arch.rope.rotary_dim // 2, arch.head_dim // 2
    second = 2 * rotated + half - rotated
    return (*range(rotated), *range(2 * rotated, second), *range(rotated, 2 * rotated), *range(second, arch.head_dim))


def fold_residual_scale(arch: ModelArch, scale: float) -> ModelArch:
    """`arch` for a model that multiplies each result of attention and MLP by `scale` before adding it to the residual.

    If all hidden states are divided by `scale`, nothing needs to be multiplied: the embedding's factor does the
    division, and norms compute the same as before once their eps is divided by scale ** 2.
    """
    assert arch.norm_placement == "pre" or scale == 1.0
    return dataclasses.replace(
        arch, embedding_scale=arch.embedding_scale / scale, rms_norm_eps=arch.rms_norm_eps / scale**2
    )


def check_arch(arch: ModelArch, where: str) -> None:
    """Raise `CorruptFileError` if the sizes of `arch` contradict each other."""
    if arch.num_heads % arch.num_kv_heads:
        raise CorruptFileError(
            f"{where}: the number of attention heads must be a multiple of the number of key-value heads, "
            f"{arch.num_kv_heads}, not {arch.num_heads}"
        )
    if arch.head_dim % 2:
        raise CorruptFileError(f"{where}: head_dim must be even for rotary encoding, not {arch.head_dim}")
    if len(arch.layers) not in (0, arch.num_layers):
        raise CorruptFileError(f"{where}: {len(arch.layers)} layers are described, expected {arch.num_layers}")
    if arch.local_rope is None and any(layer.rope == "local" for layer in arch.layers):
        raise CorruptFileError(f"{where}: some layers use a local rope, but the model has none")
    if arch.local_rope is not None and arch.local_rope.rotary_dim != arch.rope.rotary_dim:
        raise CorruptFileError(
            f"{where}: rope and local_rope must rotate the same number of dimensions of a head, not "
            f"{arch.rope.rotary_dim or arch.head_dim} and {arch.local_rope.rotary_dim or arch.head_dim}"
        )
    for rope in filter(None, (arch.rope, arch.local_rope)):
        _check_rope(rope, arch.head_dim, where)


def _check_rope(rope: RopeConfig, head_dim: int, where: str) -> None:
    if rope.theta <= 1.0:
        raise CorruptFileError(f"{where}: rope theta must be > 1, not {rope.theta:g}")
    rotary_dim = head_dim if rope.rotary_dim is None else rope.rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise CorruptFileError(
            f"{where}: the number of dimensions of a head that rotate must be even and in [2, {head_dim}], not "
            f"{rotary_dim}"
        )
    if rope.type == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise CorruptFileError(
            f"{where}: rope low_freq_factor={rope.low_freq_factor:g} must be less than "
            f"high_freq_factor={rope.high_freq_factor:g}"
        )
    if rope.type == "longrope":
        for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
            if len(factors) != rotary_dim // 2:
                raise CorruptFileError(
                    f"{where}: rope {name} has {len(factors)} numbers, expected {rotary_dim // 2}, one for each pair "
                    "of dimensions"
                )
