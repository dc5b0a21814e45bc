"""Paged attention for decodes: norm, rotation, KV write and attention in one launch.

The new token's key and value come from registers, so the launch reads nothing that it writes. A long context is cut
into splits, one program each (Dao et al., Flash-Decoding, 2023). The last program to arrive for a row and head combines
them, which is cheaper than a second kernel when a context turns out too short to be split.

`kernels.attention` describes the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.attention import AttentionConfig, capped, fold_dot, fold_scores, head_dims, rotated
from llmengine.kernels.kv_blocks import KvBlocks, cells_of, fitted, key_products, quantized, unpaired
from llmengine.kernels.step import NUM_DECODES, DeviceStep

_NUM_DECODES = tl.constexpr(NUM_DECODES)

_MAX_SPLITS = 32
_MAX_PROGRAMS_PER_SM = 16


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """Parameters that the decode kernel is compiled with.

    Attributes:
        tile: cached tokens that a program loads at once.
        min_split_tokens: a split has at least this many tokens, in whole tiles.
        num_warps: warps per program.
        num_stages: with 1, tiles go through registers; with 3, 5 or 7, there are 1, 2 or 3 of them in flight through
            shared memory (block ids take as many stages as the tiles that they lead to).
        vector: plain arithmetic, one query head at a time; otherwise tensor cores, with the group padded to 16 rows.
        programs_per_sm: contexts are split until each SM has as many programs, at most 16.
    """

    tile: int
    min_split_tokens: int
    num_warps: int
    num_stages: int
    vector: bool
    programs_per_sm: int = 4


def decode_launch(config: AttentionConfig, dtype: torch.dtype) -> DecodeLaunch:
    """Parameters that suit an H100: small programs, many of which fit on an SM.

    Args:
        dtype: of the numbers in the KV blocks.
    """
    row_bytes = triton.next_power_of_2(config.head_dim) * dtype.itemsize
    has_bytes = dtype.itemsize == 1
    if config.group == 1:
        # With larger tiles of 8 bits, scales would pass through shared memory, where warps have to meet.
        tile = max(16, min(128, (2048 if has_bytes else 4096) // row_bytes))
        return DecodeLaunch(tile=tile, min_split_tokens=64, num_warps=2, num_stages=1, vector=True)
    tile = max(16, min(32, 8192 // row_bytes))
    warps = 1 if row_bytes <= (128 if has_bytes else 256) else 2
    # Numbers of 8 bits take as much arithmetic for half of the bytes, so more programs have to share an SM.
    programs = 8 if has_bytes else 4
    return DecodeLaunch(
        tile=tile, min_split_tokens=64, num_warps=warps, num_stages=3, vector=False, programs_per_sm=programs
    )


@dataclass(frozen=True, slots=True)
class AttentionWorkspace:
    """Results of splits until they are combined; graphs that never run at once share one, for all their layers.

    Attributes:
        partial_out: fp32 [num_programs, group, head_dim].
        partial_lse: fp32 [num_programs, group], log2 of the splits' sums of exponentials.
        arrivals: int32 [num_programs], number of finished splits for each (row, KV head); zero between launches.
        num_sms: multiprocessors of the device; decides how far contexts are split.
    """

    partial_out: Tensor
    partial_lse: Tensor
    arrivals: Tensor
    num_sms: int


def attention_workspace(config: AttentionConfig, num_sms: int, device: torch.device | str) -> AttentionWorkspace:
    """Allocate for any number of rows and any `DecodeLaunch`."""
    programs = _MAX_PROGRAMS_PER_SM * num_sms
    return AttentionWorkspace(
        partial_out=torch.empty(programs, config.group, config.head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(programs, config.group, dtype=torch.float32, device=device),
        arrivals=torch.zeros(programs, dtype=torch.int32, device=device),
        num_sms=num_sms,
    )


def decode_attention(
    step: DeviceStep,
    qkv: Tensor,
    kv: KvBlocks,
    rope_table: Tensor,
    config: AttentionConfig,
    out: Tensor,
    workspace: AttentionWorkspace,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
    launch: DecodeLaunch | None = None,
) -> None:
    """Attend for rows [0, NUM_DECODES), one token each: write their k and v to `kv` and the result to `out`.

    Args:
        step: the rows.
        qkv: before the rotation; unchanged.
        kv: the layer's blocks.
        rope_table: cos and sin.
        config: the layer's attention.
        out: [max_tokens, num_heads * head_dim]; row r is token r, and other rows are left alone.
        workspace: results of splits.
        q_norm: [head_dim], weights of an RMS norm of each query head before the rotation, given together with k_norm.
        k_norm: likewise for keys.
        eps: epsilon of the norms.
        pdl: see `linear.LinearKernels`.
        launch: parameters in place of those of `decode_launch`.
    """
    max_rows = min(qkv.shape[0], step.row_slots.shape[0])
    launch = launch or decode_launch(config, kv.dtype)
    assert config.group == 1 or not launch.vector, config.group
    assert launch.programs_per_sm <= _MAX_PROGRAMS_PER_SM, launch
    programs = launch.programs_per_sm * workspace.num_sms
    splits = min(_MAX_SPLITS, max(1, programs // (max_rows * config.num_kv_heads)))
    _decode_kernel[(config.num_kv_heads, max_rows, splits)](
        step.counts,
        step.row_slots,
        step.context_lens,
        step.block_tables,
        qkv,
        kv.numbers,
        kv.scales,
        rope_table,
        q_norm,
        k_norm,
        out,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.arrivals,
        MAX_BLOCKS=step.block_tables.shape[1],
        NUM_HEADS=config.num_heads,
        NUM_KV_HEADS=config.num_kv_heads,
        HEAD_DIM=config.head_dim,
        HALF_PAD=triton.next_power_of_2(config.head_dim // 2),
        GROUP_PAD=1 if launch.vector else max(16, triton.next_power_of_2(config.group)),
        BLOCK_SIZE=config.block_size,
        SCALE=config.scale,
        SOFT_CAP=config.soft_cap,
        WINDOW=config.sliding_window,
        EPS=eps,
        TILE=launch.tile,
        MIN_TILES=-(-launch.min_split_tokens // launch.tile),
        STAGES=launch.num_stages,
        VECTOR=launch.vector,
        ASSEMBLY=kv.has_assembly(qkv),
        PDL=pdl,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        # Threads that sum the same products must get the same sum. Products of fp32 are rounded. Fused with an
        # addition, a product would stay unrounded in one thread and not in the others.
        enable_fp_fusion=qkv.dtype != torch.float32,
        launch_pdl=pdl,
    )


@triton.jit
def _decode_kernel(
    counts_ptr,
    row_slots_ptr,
    context_lens_ptr,
    block_tables_ptr,
    qkv_ptr,
    kv_ptr,
    scales_ptr,
    rope_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    arrivals_ptr,
    MAX_BLOCKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (KV head, row, split): the split's part of the row's context for the heads of one group.

    Heads come first, so that programs that run at once read whole blocks: their pages are more than the TLBs hold.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # These three begin a chain of dependent loads, so all are issued before the first is looked at. (A slot is never
    # negative, but its load would otherwise sink below the branch.)
    num_decodes = tl.load(counts_ptr + _NUM_DECODES)
    context_len = tl.load(context_lens_ptr + row)
    slot = tl.load(row_slots_ptr + row)
    last = context_len - 1
    first = tl.maximum(context_len - WINDOW, 0) if WINDOW else 0
    num_tiles = tl.cdiv(last - first, TILE)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, tl.num_programs(2)), MIN_TILES)
    num_splits = tl.maximum(tl.cdiv(num_tiles, split_tiles), 1)
    # The step's rows and block tables were there before the layer's first kernel, but qkv comes from the kernel before
    # this one. A program without work waits too; otherwise the next kernel would not wait for that one.
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (row >= num_decodes) | (split >= num_splits) | (slot < 0):
        return
    begin = first + split * split_tiles * TILE
    end = tl.minimum(begin + split_tiles * TILE, last)

    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    LANES: tl.constexpr = TILE if VECTOR else GROUP_PAD
    QUANTIZED: tl.constexpr = scales_ptr is not None
    # Numbers of 8 bits are loaded as pairs of neighbouring dimensions where tensor cores multiply values.
    PAIRED: tl.constexpr = QUANTIZED and not VECTOR
    dims, in_head = head_dims(HEAD_DIM, HALF_PAD, PAIRED)
    members = tl.arange(0, GROUP_PAD)
    heads, in_group = kv_head * GROUP + members, members < GROUP
    token_ptr = qkv_ptr + row.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    table_ptr = block_tables_ptr + slot.to(tl.int64) * MAX_BLOCKS
    keys_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    values_ptr = keys_ptr + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    k_scales_ptr = scales_ptr + kv_head * BLOCK_SIZE if QUANTIZED else None
    v_scales_ptr = k_scales_ptr + NUM_KV_HEADS * BLOCK_SIZE if QUANTIZED else None
    dtype = kv_ptr.dtype.element_ty
    q = rotated(token_ptr, heads, in_group, last, rope_ptr, q_norm_ptr, HEAD_DIM, HALF_PAD, PAIRED, EPS)
    q = q.to(qkv_ptr.dtype.element_ty)
    new_head = NUM_HEADS + kv_head + tl.arange(0, 1)
    is_head = new_head >= 0
    k_new = rotated(token_ptr, new_head, is_head, last, rope_ptr, k_norm_ptr, HEAD_DIM, HALF_PAD, PAIRED, EPS)
    v_ptrs = token_ptr + (new_head + NUM_KV_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    v_new = tl.load(v_ptrs, mask=in_head[None, :], other=0.0).to(tl.float32)
    if QUANTIZED:
        k_new, k_scale = quantized(k_new, dtype)
        v_new, v_scale = quantized(v_new, dtype)
    if split == 0:
        cell = cells_of(table_ptr, last, last >= 0, NUM_KV_HEADS, BLOCK_SIZE)
        offsets = cell * HEAD_DIM + dims[None, :]
        tl.store(keys_ptr + offsets, k_new.to(dtype), mask=in_head[None, :])
        tl.store(values_ptr + offsets, v_new.to(dtype), mask=in_head[None, :])
        if QUANTIZED:
            tl.store(k_scales_ptr + cell + tl.arange(0, 1), k_scale)
            tl.store(v_scales_ptr + cell + tl.arange(0, 1), v_scale)
    if QUANTIZED:
        k_new *= k_scale[:, None]
        v_new *= v_scale[:, None]
    else:
        k_new = k_new.to(dtype).to(tl.float32)

    # The first split starts from the new token (with VECTOR in lane 0), the others from nothing.
    lanes = tl.arange(0, LANES)
    has_new = (split == 0) & (lanes == 0) if VECTOR else (split == 0) & (lanes >= 0)
    new_score = capped(tl.sum(q.to(tl.float32) * k_new, axis=1), SCALE, SOFT_CAP)
    maximum = tl.where(has_new, new_score, float("-inf"))
    total = tl.where(has_new, 1.0, 0.0)
    acc = tl.where(has_new[:, None], v_new, 0.0)
    if PAIRED:
        q, largest = fitted(q)
        peak = tl.sum(v_scale, axis=0)
        acc *= 1.0 / peak
        pairs = tl.arange(0, HALF_PAD)
        is_pair = pairs < HEAD_DIM // 2
        pairs_ptr = values_ptr.to(tl.pointer_type(tl.int16))
        acc, odd_acc = tl.split(tl.reshape(acc, (LANES, HALF_PAD, 2)))
    tokens = begin + tl.arange(0, TILE)
    cells = cells_of(table_ptr, tokens, tokens < end, NUM_KV_HEADS, BLOCK_SIZE)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = start + tl.arange(0, TILE)
        valid = tokens < end
        if not VECTOR:  # the compiler pipelines, and so loads these ahead
            cells = cells_of(table_ptr, tokens, valid, NUM_KV_HEADS, BLOCK_SIZE)
        offsets, loaded = cells[:, None] * HEAD_DIM + dims[None, :], valid[:, None] & in_head[None, :]
        k = tl.load(keys_ptr + offsets, mask=loaded, other=0.0, eviction_policy="evict_first")
        if PAIRED:
            offsets, loaded = cells[:, None] * (HEAD_DIM // 2) + pairs[None, :], valid[:, None] & is_pair[None, :]
            v = tl.load(pairs_ptr + offsets, mask=loaded, other=0, eviction_policy="evict_first")
        else:
            v = tl.load(values_ptr + offsets, mask=loaded, other=0.0, eviction_policy="evict_first")
        if QUANTIZED:
            k_scales = tl.load(k_scales_ptr + cells, mask=valid, other=0.0)
            v_scales = tl.load(v_scales_ptr + cells, mask=valid, other=0.0)
        else:
            k_scales, v_scales = None, None
        if VECTOR:
            tl.debug_barrier()  # without it the compiler spreads the loads over the arithmetic, and few are in flight
            tokens += TILE
            cells = cells_of(table_ptr, tokens, tokens < end, NUM_KV_HEADS, BLOCK_SIZE)
            maximum, total, acc = _fold_vector(q, k, v, k_scales, v_scales, valid, maximum, total, acc, SCALE, SOFT_CAP)
        elif PAIRED:
            products = key_products(q, largest, k, k_scales, ASSEMBLY)
            weights, decay, maximum, total = fold_scores(products, valid[None, :], maximum, total, SCALE, SOFT_CAP)
            even, odd = unpaired(v, dtype, ASSEMBLY)
            peak, acc, odd_acc = _fold_pairs(weights, decay, even, odd, v_scales, peak, acc, odd_acc, q.dtype)
        else:
            maximum, total, acc = fold_dot(q, k, v, valid[None, :], maximum, total, acc, SCALE, SOFT_CAP)
    if PAIRED:
        acc = tl.reshape(tl.join(acc, odd_acc), (LANES, 2 * HALF_PAD)) * peak
    if VECTOR:
        lane_maximum = maximum
        maximum = tl.max(lane_maximum, axis=0, keep_dims=True)
        weights = tl.exp2(lane_maximum - maximum)
        total = tl.sum(total * weights, axis=0, keep_dims=True)
        acc = tl.sum(acc * weights[:, None], axis=0, keep_dims=True)

    result = acc / total[:, None]
    stored = in_group[:, None] & in_head[None, :]
    out_ptrs = out_ptr + (row.to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    if num_splits == 1:
        tl.store(out_ptrs, result, mask=stored)
    else:
        pair = row * NUM_KV_HEADS + kv_head
        partials = (pair * tl.num_programs(2)) * GROUP + members
        partial = partials + split * GROUP
        tl.store(partial_lse_ptr + partial, maximum + tl.log2(total), mask=in_group)
        tl.store(partial_out_ptr + partial[:, None] * HEAD_DIM + dims[None, :], result, mask=stored)
        tl.debug_barrier()  # one thread arrives, and thereby releases what all threads stored
        arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
        if arrived == num_splits - 1:
            tl.store(arrivals_ptr + pair, 0)
            out_ptrs_of_split = partial_out_ptr + partials[:, None] * HEAD_DIM + dims[None, :]
            combined = _combined(
                out_ptrs_of_split, partial_lse_ptr + partials, num_splits, in_group, stored, GROUP, HEAD_DIM
            )
            tl.store(out_ptrs, combined, mask=stored)


@triton.jit
def _fold_vector(q, k, v, k_scales, v_scales, valid, maximum, total, acc, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """The online softmax [tile], [tile], [tile, dims] after one more tile of k and v, for a single q [1, dims].

    Each lane of the tile keeps a softmax of its own, so that warps do not have to meet within the loop. The scales of k
    and v are fp32 [tile], or None where they have the dtype of q.
    """
    products = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
    if k_scales is not None:
        products *= k_scales
    scores = tl.where(valid, capped(products, SCALE, SOFT_CAP), float("-inf"))
    raised = tl.maximum(maximum, scores)
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite)
    decay = tl.exp2(maximum - finite)
    total = total * decay + weights
    if v_scales is not None:
        weights *= v_scales
    return raised, total, acc * decay[:, None] + v.to(tl.float32) * weights[:, None]


@triton.jit
def _fold_pairs(weights, decay, even, odd, scales, peak, acc, odd_acc, dtype: tl.constexpr):
    """The sums of values, in units of `peak`, after one more tile.

    Args:
        weights: fp32 [rows, tile].
        decay: fp32 [rows], of the sums so far.
        even: numbers of the even dimensions [tile, dims / 2]; `odd`: of the others.
        scales: fp32 [tile], of these values.
        peak: fp32, the largest scale so far.
        acc: fp32 [rows, dims / 2], the sums of the even dimensions; `odd_acc`: of the others.
        dtype: of the products.
    """
    raised = tl.maximum(peak, tl.max(scales, axis=0))
    weights = (weights * (scales / raised)[None, :]).to(dtype)
    decay *= peak / raised
    acc = tl.dot(weights, even.to(dtype), acc * decay[:, None], input_precision="ieee")
    odd_acc = tl.dot(weights, odd.to(dtype), odd_acc * decay[:, None], input_precision="ieee")
    return raised, acc, odd_acc


@triton.jit
def _combined(
    out_ptrs,
    lse_ptrs,
    num_splits,
    in_group,
    stored,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Combine all splits, [group, dims]; reads from the L2 cache, where the other programs' results are."""
    maximum = tl.load(lse_ptrs, mask=in_group, other=0.0, cache_modifier=".cg")
    acc = tl.load(out_ptrs, mask=stored, other=0.0, cache_modifier=".cg")
    total = tl.where(in_group, 1.0, 1.0)
    for split in tl.range(1, num_splits, loop_unroll_factor=4):
        lse = tl.load(lse_ptrs + split * GROUP, mask=in_group, other=0.0, cache_modifier=".cg")
        part = tl.load(out_ptrs + split * (GROUP * HEAD_DIM), mask=stored, other=0.0, cache_modifier=".cg")
        raised = tl.maximum(maximum, lse)
        decay, weight = tl.exp2(maximum - raised), tl.exp2(lse - raised)
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        maximum = raised
    return acc / total[:, None]
