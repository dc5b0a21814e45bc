"""The one dense decoder: what happens to a step's tokens, with every device-specific part passed in.

All requests of a step are concatenated along the token dimension; only attention knows which token belongs to whom.
What lies between two attentions is a segment: torch's functions here, fused kernels on CUDA, or a TensorRT plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from llmengine.models.arch import Activation

Norm = Callable[[Tensor], Tensor]
"""RMSNorm with its weight bound: [num_tokens, hidden] -> the same shape."""

Attend = Callable[[int, Tensor], Tensor]
"""(layer index, qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]) -> [num_tokens, num_heads * head_dim].

Rotates q and k, writes k and v to the layer's KV blocks and attends over each request's context. May overwrite qkv.
"""


class Linear(Protocol):
    """A weight matrix in whatever format its device runs best."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias + residual, [num_tokens, out_features]; `residual` may be overwritten."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights, bound to the functions that apply them.

    Attributes:
        input_norm: before the attention, None without.
        attention_out_norm: of the attention's result, None without.
        post_attention_norm: before the MLP, None without.
        mlp_out_norm: of the MLP's result, None without.
    """

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear
    input_norm: Norm | None
    attention_out_norm: Norm | None
    post_attention_norm: Norm | None
    mlp_out_norm: Norm | None


class Segments(Protocol):
    """A decoder without its embedding and its attentions. What it returns is valid until it is called again."""

    @property
    def num_layers(self) -> int:
        """Attentions, one more than there are `mid` segments."""

    def first(self, x: Tensor) -> Tensor:
        """The qkv of layer 0, [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].

        Args:
            x: embeddings [num_tokens, hidden].
        """

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states after `layer` and the qkv of the next one; `x` may be overwritten.

        Args:
            attended: [num_tokens, num_heads * head_dim].
            x: [num_tokens, hidden], what went into `layer`.
        """

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        """Logits float32 [num_samples, vocab] after the last layer, see `forward`.

        In a stage that is not the last, the hidden states [num_tokens, hidden] after its last layer.
        """


def forward(segments: Segments, x: Tensor, attend: Attend, sample_tokens: Tensor | None) -> Tensor | None:
    """Write the KV of all tokens and return logits float32 [num_samples, vocab].

    Args:
        x: embeddings [num_tokens, hidden]; may be overwritten.
        sample_tokens: integer indices of the tokens whose logits are wanted, None for all. After the last attention
            only these are computed; with none of them the result is None.
    """
    attended, x = forward_to_last(segments, x, attend)
    if sample_tokens is not None and not len(sample_tokens):
        return None
    return segments.last(attended, x, sample_tokens)


def forward_to_last(segments: Segments, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """Write the KV of all tokens and return the arguments of `Segments.last` for all of them; see `forward`."""
    qkv = segments.first(x)
    last = segments.num_layers - 1
    for layer in range(last):
        x, qkv = segments.mid(layer, attend(layer, qkv), x)
    return attend(last, qkv), x


@dataclass(frozen=True, slots=True)
class TorchSegments:
    """`Segments` of functions that return new tensors.

    Attributes:
        act_and_mul: [num_tokens, 2 * intermediate], gate then up -> activation(gate) * up.
        lm_head: gives fp32 logits, which may be overwritten.
        logit_scale: see `ModelArch`.
        logit_soft_cap: see `ModelArch`.
    """

    layers: Sequence[DecoderLayer]
    final_norm: Norm
    lm_head: Linear
    act_and_mul: Callable[[Tensor], Tensor]
    logit_scale: float
    logit_soft_cap: float | None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def first(self, x: Tensor) -> Tensor:
        return _project(self.layers[0].qkv, self.layers[0].input_norm, x)

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._after_attention(self.layers[layer], attended, x)
        following = self.layers[layer + 1]
        return x, _project(following.qkv, following.input_norm, x)

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        if sample_tokens is not None:
            attended, x = attended[sample_tokens], x[sample_tokens]
        logits = self.lm_head(self.final_norm(self._after_attention(self.layers[-1], attended, x)))
        finish_logits(logits, self.logit_scale, self.logit_soft_cap)
        return logits

    def _after_attention(self, layer: DecoderLayer, attended: Tensor, x: Tensor) -> Tensor:
        x = _add(layer.o, layer.attention_out_norm, attended, x)
        gate_up = _project(layer.gate_up, layer.post_attention_norm, x)
        return _add(layer.down, layer.mlp_out_norm, self.act_and_mul(gate_up), x)


def finish_logits(logits: Tensor, scale: float, soft_cap: float | None) -> None:
    """Scale and cap `logits` in place, see `ModelArch`."""
    if soft_cap is not None:
        logits.mul_(scale / soft_cap).tanh_().mul_(soft_cap)
    elif scale != 1.0:
        logits.mul_(scale)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for [num_tokens, 2 * intermediate], gate then up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up for [num_tokens, 2 * intermediate], gate then up; GELU in its tanh approximation."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


ACT_AND_MUL: Mapping[Activation, Callable[[Tensor], Tensor]] = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


def _project(linear: Linear, norm: Norm | None, x: Tensor) -> Tensor:
    return linear(x if norm is None else norm(x))


def _add(linear: Linear, norm: Norm | None, inputs: Tensor, x: Tensor) -> Tensor:
    """x plus the linear's result, which is normalized if there is a norm; `x` may be overwritten."""
    return linear(inputs, x) if norm is None else norm(linear(inputs)).add_(x)
