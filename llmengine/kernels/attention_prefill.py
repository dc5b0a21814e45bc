"""Paged attention for chunks of prompts: rotation with the KV write, then attention (Dao, FlashAttention-2, 2023).

`kernels.attention` describes the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.attention import AttentionConfig, fold_dot, head_dims, rotated
from llmengine.kernels.kv_blocks import KvBlocks, cells_of, dequantized, quantized
from llmengine.kernels.limits import max_shared_bytes
from llmengine.kernels.step import NUM_DECODES, NUM_QUERY_BLOCKS, NUM_TOKENS, DeviceStep

_NUM_TOKENS = tl.constexpr(NUM_TOKENS)
_NUM_DECODES = tl.constexpr(NUM_DECODES)
_NUM_QUERY_BLOCKS = tl.constexpr(NUM_QUERY_BLOCKS)


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """Compiled sizes of the prefill kernel: a program's query rows (tokens x heads of a group) and key tile."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


def prefill_launch(
    config: AttentionConfig, dtype: torch.dtype, kv_dtype: torch.dtype, max_shared: int
) -> PrefillLaunch:
    """Parameters that suit an H100, within a program's bytes of shared memory.

    Args:
        dtype: of q.
        kv_dtype: of the numbers in the KV blocks.
    """
    row_bytes = _row_bytes(config, dtype)
    tile, rows = max(16, min(64, 16384 // row_bytes)), _query_rows(config, dtype)
    # Two tiles of k and two of v are in flight. Those of 8 bits are there once more, in the dtype of q.
    tile_bytes = 4 * tile * _row_bytes(config, kv_dtype) + (2 * tile * row_bytes if kv_dtype.itemsize == 1 else 0)
    # With q, and what compiling for compute capability 8.9 showed on top of them.
    needed = rows * row_bytes + tile_bytes + (512 if row_bytes <= 256 else 4352)
    return PrefillLaunch(rows=rows, tile=tile, num_warps=rows // 16, num_stages=5 if needed <= max_shared else 3)


def query_block_size(config: AttentionConfig, dtype: torch.dtype) -> int:
    """Tokens of a query block: block i of a row starts this many tokens after block i - 1."""
    return _query_rows(config, dtype) // int(triton.next_power_of_2(config.group))


def _query_rows(config: AttentionConfig, dtype: torch.dtype) -> int:
    return max(128 if _row_bytes(config, dtype) <= 256 else 64, int(triton.next_power_of_2(config.group)))


def _row_bytes(config: AttentionConfig, dtype: torch.dtype) -> int:
    return int(triton.next_power_of_2(config.head_dim)) * dtype.itemsize


def rope_and_write(
    step: DeviceStep,
    qkv: Tensor,
    kv: KvBlocks,
    rope_table: Tensor,
    config: AttentionConfig,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
    decode_q: Tensor | None = None,
) -> None:
    """Rotate q of the tokens [NUM_DECODES, NUM_TOKENS) in `qkv`; write their rotated k, and v, to `kv`.

    The arguments are those of `decode_attention`. k in `qkv` stays as it is. If `decode_q` is given, contiguous
    [max_rows, num_heads * head_dim], the decodes' k and v are written as well, and their rotated q goes to it.
    """
    _rope_and_write_kernel[(qkv.shape[0],)](
        step.counts,
        step.positions,
        step.token_slots,
        step.block_tables,
        qkv,
        kv.numbers,
        kv.scales,
        rope_table,
        q_norm,
        k_norm,
        decode_q,
        MAX_BLOCKS=step.block_tables.shape[1],
        NUM_HEADS=config.num_heads,
        NUM_KV_HEADS=config.num_kv_heads,
        HEADS_PAD=triton.next_power_of_2(config.num_heads),
        KV_HEADS_PAD=triton.next_power_of_2(config.num_kv_heads),
        HEAD_DIM=config.head_dim,
        HALF_PAD=triton.next_power_of_2(config.head_dim // 2),
        BLOCK_SIZE=config.block_size,
        EPS=eps,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def prefill_attention(
    step: DeviceStep,
    qkv: Tensor,
    kv: KvBlocks,
    config: AttentionConfig,
    out: Tensor,
    pdl: bool = False,
    launch: PrefillLaunch | None = None,
) -> None:
    """Attend for the tokens in the query blocks, causally over all of their rows' contexts, and write to `out`.

    Args:
        step: the rows; query blocks have `query_block_size` tokens.
        qkv: with q rotated, as `rope_and_write` leaves it; k and v are not read.
        kv: the layer's blocks, which already hold the chunks' own keys and values.
        config: the layer's attention.
        out: [max_tokens, num_heads * head_dim]; tokens outside the query blocks are left alone.
        pdl: see `linear.LinearKernels`.
        launch: parameters in place of those of `prefill_launch`.
    """
    launch = launch or prefill_launch(config, qkv.dtype, kv.dtype, max_shared_bytes(qkv.device))
    _prefill_kernel[(config.num_kv_heads, step.query_block_rows.shape[0])](
        step.counts,
        step.query_block_rows,
        step.query_block_starts,
        step.row_starts,
        step.row_slots,
        step.context_lens,
        step.block_tables,
        qkv,
        kv.numbers,
        kv.scales,
        out,
        MAX_BLOCKS=step.block_tables.shape[1],
        NUM_HEADS=config.num_heads,
        NUM_KV_HEADS=config.num_kv_heads,
        HEAD_DIM=config.head_dim,
        DIM_PAD=triton.next_power_of_2(config.head_dim),
        GROUP_PAD=triton.next_power_of_2(config.group),
        BLOCK_SIZE=config.block_size,
        SCALE=config.scale,
        SOFT_CAP=config.soft_cap,
        WINDOW=config.sliding_window,
        ROWS=launch.rows,
        TILE=launch.tile,
        STAGES=launch.num_stages,
        ASSEMBLY=kv.has_assembly(qkv),
        PDL=pdl,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        launch_pdl=pdl,
    )


@triton.jit
def _rope_and_write_kernel(
    counts_ptr,
    positions_ptr,
    token_slots_ptr,
    block_tables_ptr,
    qkv_ptr,
    kv_ptr,
    scales_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    decode_q_ptr,
    MAX_BLOCKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token): all of its heads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    num_decodes = tl.load(counts_ptr + _NUM_DECODES)
    num_tokens = tl.load(counts_ptr + _NUM_TOKENS)
    position = tl.load(positions_ptr + token)
    slot = tl.load(token_slots_ptr + token)
    first = num_decodes if decode_q_ptr is None else 0
    if (token < first) | (token >= num_tokens):
        return
    dims, in_head = head_dims(HEAD_DIM, HALF_PAD, False)
    token_ptr = qkv_ptr + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    table_ptr = block_tables_ptr + slot.to(tl.int64) * MAX_BLOCKS
    cell = cells_of(table_ptr, position, position >= 0, NUM_KV_HEADS, BLOCK_SIZE)
    dtype = kv_ptr.dtype.element_ty

    kv_heads = tl.arange(0, KV_HEADS_PAD)
    is_kv_head = kv_heads < NUM_KV_HEADS
    k_heads = NUM_HEADS + kv_heads
    k = rotated(token_ptr, k_heads, is_kv_head, position, rope_ptr, k_norm_ptr, HEAD_DIM, HALF_PAD, False, EPS)
    stored = is_kv_head[:, None] & in_head[None, :]
    v_ptrs = token_ptr + (k_heads + NUM_KV_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    v = tl.load(v_ptrs, mask=stored, other=0.0)
    if scales_ptr is not None:
        k, k_scales = quantized(k, dtype)
        v, v_scales = quantized(v.to(tl.float32), dtype)
        scale_ptrs = scales_ptr + cell + kv_heads * BLOCK_SIZE
        tl.store(scale_ptrs, k_scales, mask=is_kv_head)
        tl.store(scale_ptrs + NUM_KV_HEADS * BLOCK_SIZE, v_scales, mask=is_kv_head)
    k_ptrs = kv_ptr + cell * HEAD_DIM + kv_heads[:, None] * (BLOCK_SIZE * HEAD_DIM) + dims[None, :]
    tl.store(k_ptrs, k.to(dtype), mask=stored)
    tl.store(k_ptrs + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, v.to(dtype), mask=stored)

    heads = tl.arange(0, HEADS_PAD)
    q = rotated(token_ptr, heads, heads < NUM_HEADS, position, rope_ptr, q_norm_ptr, HEAD_DIM, HALF_PAD, False, EPS)
    tl.debug_barrier()  # in place: every element is also read by the thread of its partner
    q_offsets = heads[:, None] * HEAD_DIM + dims[None, :]
    stored = (heads < NUM_HEADS)[:, None] & in_head[None, :]
    if token >= num_decodes:
        tl.store(token_ptr + q_offsets, q, mask=stored)
    elif decode_q_ptr is not None:
        tl.store(decode_q_ptr + token.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + q_offsets, q, mask=stored)


@triton.jit
def _prefill_kernel(
    counts_ptr,
    query_block_rows_ptr,
    query_block_starts_ptr,
    row_starts_ptr,
    row_slots_ptr,
    context_lens_ptr,
    block_tables_ptr,
    qkv_ptr,
    kv_ptr,
    scales_ptr,
    out_ptr,
    MAX_BLOCKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (KV head, query block): its tokens for all heads of the group, token by token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    # The last query blocks of a long prompt have the most work, so they come first.
    query_block = tl.load(counts_ptr + _NUM_QUERY_BLOCKS) - 1 - tl.program_id(1)
    if query_block < 0:
        return
    row = tl.load(query_block_rows_ptr + query_block)
    first_token = tl.load(query_block_starts_ptr + query_block)
    row_end = tl.load(row_starts_ptr + row + 1)
    context_len = tl.load(context_lens_ptr + row)
    table_ptr = block_tables_ptr + tl.load(row_slots_ptr + row).to(tl.int64) * MAX_BLOCKS
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    query_rows = tl.arange(0, ROWS)
    tokens = first_token + query_rows // GROUP_PAD
    member = query_rows % GROUP_PAD
    heads = kv_head * GROUP + member
    positions = context_len - row_end + tokens
    dims = tl.arange(0, DIM_PAD)
    in_head = dims < HEAD_DIM
    is_query = ((tokens < row_end) & (member < GROUP))[:, None] & in_head[None, :]
    q_offsets = (tokens.to(tl.int64) * (NUM_HEADS + 2 * NUM_KV_HEADS) + heads)[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(qkv_ptr + q_offsets, mask=is_query, other=0.0)

    first_position = context_len - row_end + first_token
    # Tiles begin at multiples of TILE, so that a token's keys are summed in the same order however its row is cut.
    begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE * TILE if WINDOW else 0
    end = tl.minimum(first_position + ROWS // GROUP_PAD, context_len)
    keys_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    values_ptr = keys_ptr + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        keys = start + tl.arange(0, TILE)
        valid = keys < end
        cells = cells_of(table_ptr, keys, valid, NUM_KV_HEADS, BLOCK_SIZE)
        offsets = cells[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(keys_ptr + offsets, mask=valid[:, None] & in_head[None, :], other=0.0)
        v = tl.load(values_ptr + offsets, mask=valid[:, None] & in_head[None, :], other=0.0)
        if scales_ptr is not None:
            k_scale_ptrs = scales_ptr + kv_head * BLOCK_SIZE + cells
            k_scales = tl.load(k_scale_ptrs, mask=valid, other=0.0)
            v_scales = tl.load(k_scale_ptrs + NUM_KV_HEADS * BLOCK_SIZE, mask=valid, other=0.0)
            k = dequantized(k, k_scales, q.dtype, ASSEMBLY)
            v = dequantized(v, v_scales, q.dtype, ASSEMBLY)
        attended = valid[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW:
            attended &= keys[None, :] > positions[:, None] - WINDOW
        maximum, total, acc = fold_dot(q, k, v, attended, maximum, total, acc, SCALE, SOFT_CAP)
    out_offsets = (tokens.to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    # The windows of rows beyond the last token may be empty.
    tl.store(out_ptr + out_offsets, acc / tl.where(total > 0.0, total, 1.0)[:, None], mask=is_query)
