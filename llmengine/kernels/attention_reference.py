"""The attention of `kernels.attention` in plain torch: row after row, token after token, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.kv_blocks import KvBlocks
from llmengine.kernels.step import NUM_DECODES, NUM_ROWS, NUM_TOKENS, DeviceStep


def decode_attention_reference(
    step: DeviceStep,
    qkv: Tensor,
    kv: KvBlocks,
    rope_table: Tensor,
    config: AttentionConfig,
    out: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Write k and v of rows [0, NUM_DECODES) to `kv` and their attention to `out`."""
    for row in range(int(step.counts[NUM_DECODES])):
        position, slot = int(step.context_lens[row]) - 1, int(step.row_slots[row])
        q, k, v = _heads(qkv[row], config)
        _write(step, kv, slot, position, _rotate(k, rope_table[position], k_norm, eps), v)
        q = _rotate(q, rope_table[position], q_norm, eps).to(qkv.dtype)
        out[row] = _attend(step, kv, slot, position, q, config).flatten()


def rope_and_write_reference(
    step: DeviceStep,
    qkv: Tensor,
    kv: KvBlocks,
    rope_table: Tensor,
    config: AttentionConfig,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    decode_q: Tensor | None = None,
) -> None:
    """Rotate q of tokens [NUM_DECODES, NUM_TOKENS) in place; write their k and v to `kv`.

    If `decode_q` is given, does the same for the decodes, whose q goes to it.
    """
    num_decodes = int(step.counts[NUM_DECODES])
    for token in range(num_decodes if decode_q is None else 0, int(step.counts[NUM_TOKENS])):
        position, slot = int(step.positions[token]), int(step.token_slots[token])
        q, k, v = _heads(qkv[token], config)
        _write(step, kv, slot, position, _rotate(k, rope_table[position], k_norm, eps), v)
        rotated = _rotate(q, rope_table[position], q_norm, eps)
        if decode_q is not None and token < num_decodes:
            decode_q[token] = rotated.flatten()
        else:
            q.copy_(rotated)


def prefill_attention_reference(
    step: DeviceStep, qkv: Tensor, kv: KvBlocks, config: AttentionConfig, out: Tensor
) -> None:
    """Write the attention of all tokens of rows [NUM_DECODES, NUM_ROWS), whose q is rotated, to `out`."""
    for row in range(int(step.counts[NUM_DECODES]), int(step.counts[NUM_ROWS])):
        slot, end = int(step.row_slots[row]), int(step.row_starts[row + 1])
        for token in range(int(step.row_starts[row]), end):
            position = int(step.context_lens[row]) - (end - token)
            q = _heads(qkv[token], config)[0]
            out[token] = _attend(step, kv, slot, position, q, config).flatten()


def _heads(token: Tensor, config: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Views [heads, head_dim] of q, k and v."""
    heads = token.view(-1, config.head_dim)
    q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads))
    return q, k, v


def _rotate(heads: Tensor, cos_sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """Rotate heads, fp32 [heads, head_dim], after normalizing them if there are weights."""
    heads = heads.float()
    if norm is not None:
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * norm.float()
    cos, sin = cos_sin.chunk(2)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _write(step: DeviceStep, kv: KvBlocks, slot: int, position: int, k: Tensor, v: Tensor) -> None:
    block_size = kv.numbers.shape[3]
    block, offset = int(step.block_tables[slot, position // block_size]), position % block_size
    for index, vectors in enumerate((k, v)):
        if kv.scales is None:
            kv.numbers[block, index, :, offset] = vectors.to(kv.dtype)
        else:
            numbers, scales = quantized_reference(vectors.float(), kv.dtype)
            kv.numbers.view(torch.uint8)[block, index, :, offset] = numbers.view(torch.uint8)
            kv.scales[block, index, :, offset] = scales


def quantized_reference(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of 8 bits, and the scales [num_vectors], of vectors, fp32 [num_vectors, head_dim]."""
    most = 127.0 if dtype == torch.int8 else 448.0
    largest = vectors.abs().amax(dim=-1).clamp_min(1e-30)
    scaled = vectors * (most / largest)[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), largest / most


def _attend(step: DeviceStep, kv: KvBlocks, slot: int, position: int, q: Tensor, config: AttentionConfig) -> Tensor:
    """Attention of q [num_heads, head_dim] over the keys up to `position`, fp32 [num_heads, head_dim]."""
    begin = max(0, position + 1 - config.sliding_window) if config.sliding_window else 0
    blocks = step.block_tables[slot, : position // config.block_size + 1].long()
    cached = dequantized(KvBlocks(_at(kv.numbers, blocks), None if kv.scales is None else kv.scales[blocks]))
    # [2, num_kv_heads, tokens, head_dim]
    cached = cached.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, begin : position + 1]
    k, v = cached.repeat_interleave(config.group, dim=1)
    scores = torch.einsum("hd,htd->ht", q.float(), k) * config.scale
    if config.soft_cap:
        scores = config.soft_cap * torch.tanh(scores / config.soft_cap)
    return torch.einsum("ht,htd->hd", scores.softmax(-1), v)


def dequantized(kv: KvBlocks) -> Tensor:
    """Keys and values in fp32, [num_blocks, 2, num_kv_heads, block_size, head_dim]."""
    return kv.numbers.float() if kv.scales is None else kv.numbers.float() * kv.scales[..., None]


def _at(numbers: Tensor, blocks: Tensor) -> Tensor:
    """Some blocks; not every device can index FP8."""
    return numbers.view(torch.uint8)[blocks].view(numbers.dtype) if numbers.dtype.itemsize == 1 else numbers[blocks]
