"""The one dense decoder: what happens to a step's tokens, with every device-specific part passed in.

All requests of a step are concatenated along the token dimension; only attention knows which token belongs to whom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Norm = Callable[[Tensor], Tensor]
"""RMSNorm with its weight bound: [num_tokens, hidden] -> the same shape."""

Attend = Callable[[int, Tensor], Tensor]
"""(layer index, qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]) -> [num_tokens, num_heads * head_dim].

Rotates q and k, writes k and v to the layer's KV blocks and attends over each request's context. May overwrite qkv.
"""


class Linear(Protocol):
    """A weight matrix in whatever format its device runs best."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return x @ weight.T + bias + residual, [num_tokens, out_features]; `residual` may be overwritten."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights, bound to the functions that apply them."""

    input_norm: Norm
    qkv: Linear
    o: Linear
    post_attention_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model ready to run.

    Attributes:
        embed: token ids int64 [num_tokens] -> a new tensor [num_tokens, hidden].
        silu_and_mul: [num_tokens, 2 * intermediate], gate then up -> silu(gate) * up.
        lm_head: gives fp32 logits.
    """

    embed: Callable[[Tensor], Tensor]
    layers: Sequence[DecoderLayer]
    final_norm: Norm
    lm_head: Linear
    silu_and_mul: Callable[[Tensor], Tensor]

    def forward(self, token_ids: Tensor, attend: Attend, logit_tokens: Tensor | None) -> Tensor | None:
        """Return fp32 logits [num_logit_tokens, vocab] and write the KV of all tokens.

        `logit_tokens` (int64, indices into the tokens) are the tokens whose logits are wanted, None for all; with none
        of them the result is None. The last layer computes only those after its attention.
        """
        x = self.embed(token_ids)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            attended = attend(index, layer.qkv(layer.input_norm(x)))
            if index == last and logit_tokens is not None:
                if not len(logit_tokens):
                    return None
                x, attended = x[logit_tokens], attended[logit_tokens]
            x = layer.o(attended, x)
            x = layer.down(self.silu_and_mul(layer.gate_up(layer.post_attention_norm(x))), x)
        return self.lm_head(self.final_norm(x))
