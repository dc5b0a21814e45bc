"""Paged attention of one layer on CUDA: the parts that its kernels share.

`qkv` is [max_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v, in bf16, fp16 or fp32. `KvBlocks` are a
layer's keys and values, in the same dtype or in 8 bits. The rope table is fp32 [max_positions, head_dim], see
`models.rope`.

Decodes take a single launch (`attention_decode`). Chunks of prompts take two (`attention_prefill`), since their
queries attend to keys that other programs write.

The shapes of the tensors alone fix the grids; every program reads its work from `DeviceStep`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Sizes and factors of a layer's attention.

    Attributes:
        num_heads: query heads, a multiple of num_kv_heads; heads [h * group, (h + 1) * group) share KV head h.
        num_kv_heads: key and value heads.
        head_dim: an even number.
        block_size: tokens per KV block, a power of two.
        scale: factor of the scores; 0 stands for head_dim ** -0.5.
        sliding_window: a token attends to this many tokens, itself included; 0 for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 for none.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    scale: float = 0.0
    sliding_window: int = 0
    soft_cap: float = 0.0

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert self.head_dim % 2 == 0, self.head_dim
        assert self.block_size & (self.block_size - 1) == 0, self.block_size
        if self.scale == 0.0:
            object.__setattr__(self, "scale", self.head_dim**-0.5)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


@triton.jit
def head_dims(HEAD_DIM: tl.constexpr, HALF_PAD: tl.constexpr, IN_ORDER: tl.constexpr):
    """A head's dimensions, padded to 2 * HALF_PAD, and a mask of those that exist.

    The padding comes last if they are IN_ORDER, and otherwise after each half.
    """
    padded = tl.arange(0, 2 * HALF_PAD)
    if IN_ORDER:
        return padded, padded < HEAD_DIM
    else:  # noqa: RET505 - a constexpr condition: without the else, both are compiled
        within = padded % HALF_PAD
        return padded // HALF_PAD * (HEAD_DIM // 2) + within, within < HEAD_DIM // 2


@triton.jit
def rotated(
    token_ptr,
    heads,
    is_head,
    position,
    rope_ptr,
    norm_ptr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    IN_ORDER: tl.constexpr,
    EPS: tl.constexpr,
):
    """Load a token's heads, fp32 [heads, padded dims], normalized if there are weights, rotated; padding is zero.

    Every element is loaded again for its partner in the other half: cheaper than an exchange between threads.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    PERIOD: tl.constexpr = HALF if IN_ORDER else HALF_PAD
    dims, exists = head_dims(HEAD_DIM, HALF_PAD, IN_ORDER)
    padded = tl.arange(0, 2 * HALF_PAD)
    half, within = padded // PERIOD, padded % PERIOD
    partners = (1 - half) * HALF + within
    mask = is_head[:, None] & exists[None, :]
    x = tl.load(token_ptr + heads[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(token_ptr + heads[:, None] * HEAD_DIM + partners[None, :], mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + EPS)[:, None]
        x *= inverse * tl.load(norm_ptr + dims, mask=exists, other=0.0).to(tl.float32)[None, :]
        partner *= inverse * tl.load(norm_ptr + partners, mask=exists, other=0.0).to(tl.float32)[None, :]
    angle_ptr = rope_ptr + position.to(tl.int64) * HEAD_DIM + within
    cos = tl.load(angle_ptr, mask=exists, other=0.0)
    sin = tl.load(angle_ptr + HALF, mask=exists, other=0.0)
    return x * cos[None, :] + partner * tl.where(half == 0, -sin, sin)[None, :]


@triton.jit
def capped(products, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Scores of the products q . k, times log2(e), so that exp2 can stand for exp."""
    if SOFT_CAP != 0.0:
        scaled = products * (SCALE / SOFT_CAP)
        decay = tl.exp2(tl.abs(scaled) * (-2.0 * _LOG2_E))
        magnitude = (1.0 - decay) / (1.0 + decay) * (SOFT_CAP * _LOG2_E)
        return tl.where(scaled < 0, -magnitude, magnitude)
    else:  # noqa: RET505 - a constexpr condition: without the else, both are compiled
        return products * (SCALE * _LOG2_E)


@triton.jit
def fold_scores(products, attended, maximum, total, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """One more tile of products in the online softmax [rows], [rows]: its weights [rows, tile] and the decay [rows]."""
    scores = tl.where(attended, capped(products, SCALE, SOFT_CAP), float("-inf"))
    raised = tl.maximum(maximum, tl.max(scores, axis=1))
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(maximum - finite)
    return weights, decay, raised, total * decay + tl.sum(weights, axis=1)


@triton.jit
def fold_dot(
    q,
    k,
    v,
    attended,
    maximum,
    total,
    acc,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """The online softmax [rows], [rows], [rows, dims] after one more tile [tile, dims] of k and v."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    weights, decay, maximum, total = fold_scores(products, attended, maximum, total, SCALE, SOFT_CAP)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return maximum, total, acc
