"""Paged attention of one layer for CUDA: decodes, rotation with the KV write, and chunks of prompts.

A layer's pool is `kv` [num_blocks, 2, num_kv_heads, block_size, head_dim], keys at index 0 and values at 1, so one
block's keys of one head are contiguous. `qkv` is [max_tokens, (num_heads + 2 * num_kv_heads) * head_dim]: q, k, v.
Both have one dtype: bf16, fp16 or fp32. The rope table is fp32 [max_positions, head_dim], see `models.rope`.

Decodes take one launch for all of it: norm, rotation, KV write and attention. The new token's key and value come from
registers, so that nothing is read which the launch writes. A long context is cut into splits, one program each (Dao et
al., Flash-Decoding, 2023); the last program to arrive for a row and head combines them, which is cheaper than a second
kernel where a context turns out too short to be split. Chunks of prompts take two launches, since their queries attend
to keys that other programs write: `rope_and_write`, then `prefill_attention` (Dao, FlashAttention-2, 2023).

Grids are fixed by the shapes of the tensors alone; every program reads from `DeviceStep` what it has to do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.step import NUM_DECODES, NUM_QUERY_BLOCKS, NUM_TOKENS, DeviceStep

_NUM_TOKENS = tl.constexpr(NUM_TOKENS)
_NUM_DECODES = tl.constexpr(NUM_DECODES)
_NUM_QUERY_BLOCKS = tl.constexpr(NUM_QUERY_BLOCKS)
_LOG2_E = tl.constexpr(1.4426950408889634)

_MAX_SPLITS = 32
_PROGRAMS_PER_SM = 4
"""Decode programs that an SM holds at once: contexts are split until there are as many."""


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """What the layers of a model share.

    Attributes:
        num_heads: query heads, a multiple of num_kv_heads; heads [h * group, (h + 1) * group) share KV head h.
        num_kv_heads: key and value heads.
        head_dim: a multiple of 16.
        block_size: tokens a KV block, a power of two, at least 16.
        scale: what scores are multiplied by; 0 stands for head_dim ** -0.5.
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
        assert self.head_dim % 16 == 0, self.head_dim
        assert self.block_size >= 16, self.block_size
        assert self.block_size & (self.block_size - 1) == 0, self.block_size
        if self.scale == 0.0:
            object.__setattr__(self, "scale", self.head_dim**-0.5)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """How the decode kernel is compiled.

    Attributes:
        tile: cached tokens that a program loads at once.
        min_split_tokens: a split has at least this many tokens, in whole tiles.
        num_warps: warps a program.
        num_stages: 1: tiles go through registers; 3, 5, 7: 1, 2, 3 of them are in flight through shared memory (block
            ids take as many stages as the tiles that they lead to).
        vector: plain arithmetic, one query head at a time; else tensor cores, the group padded to 16 rows.
    """

    tile: int
    min_split_tokens: int
    num_warps: int
    num_stages: int
    vector: bool


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """How the prefill kernel is compiled: query rows (tokens x heads of a group) and key tile of a program."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int


def decode_launch(config: AttentionConfig, dtype: torch.dtype) -> DecodeLaunch:
    """Return the parameters that serve `config` on an H100: small programs, of which an SM holds many."""
    row_bytes = triton.next_power_of_2(config.head_dim) * dtype.itemsize
    if config.group == 1:
        tile = max(16, min(128, 4096 // row_bytes))
        return DecodeLaunch(tile=tile, min_split_tokens=64, num_warps=2, num_stages=1, vector=True)
    tile = max(16, min(32, 8192 // row_bytes))
    warps = 1 if row_bytes <= 256 else 2
    return DecodeLaunch(tile=tile, min_split_tokens=64, num_warps=warps, num_stages=3, vector=False)


def prefill_launch(config: AttentionConfig, dtype: torch.dtype) -> PrefillLaunch:
    """Return the parameters that serve `config` on an H100."""
    row_bytes = triton.next_power_of_2(config.head_dim) * dtype.itemsize
    tile = max(16, min(64, 16384 // row_bytes))
    rows = max(128 if row_bytes <= 256 else 64, triton.next_power_of_2(config.group))
    return PrefillLaunch(rows=rows, tile=tile, num_warps=rows // 16, num_stages=5)


def query_block_size(config: AttentionConfig, dtype: torch.dtype) -> int:
    """Return the tokens of a query block: block i of a row starts this many tokens after block i - 1."""
    return prefill_launch(config, dtype).rows // int(triton.next_power_of_2(config.group))


@dataclass(frozen=True, slots=True)
class AttentionWorkspace:
    """Results of splits until they are combined; one serves all layers of all graphs that never run at once.

    Attributes:
        partial_out: fp32 [num_programs, group, head_dim].
        partial_lse: fp32 [num_programs, group], log2 of the splits' sums of exponentials.
        arrivals: int32 [num_programs], splits that are done, for each (row, KV head); zero between launches.
    """

    partial_out: Tensor
    partial_lse: Tensor
    arrivals: Tensor


def attention_workspace(config: AttentionConfig, num_sms: int, device: torch.device | str) -> AttentionWorkspace:
    """Allocate for any number of rows; `num_sms` also decides how far contexts are split."""
    programs = _PROGRAMS_PER_SM * num_sms
    return AttentionWorkspace(
        partial_out=torch.empty(programs, config.group, config.head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(programs, config.group, dtype=torch.float32, device=device),
        arrivals=torch.zeros(programs, dtype=torch.int32, device=device),
    )


def decode_attention(
    step: DeviceStep,
    qkv: Tensor,
    kv: Tensor,
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
        qkv: not yet rotated; unchanged.
        kv: the layer's pool.
        rope_table: cos and sin.
        config: the model's.
        out: [max_tokens, num_heads * head_dim]; row r is token r, others are left alone.
        workspace: where splits meet.
        q_norm: [head_dim], weights of an RMS norm of each query head before the rotation, given together with k_norm.
        k_norm: likewise for keys.
        eps: of the norms.
        pdl: see `linear.LinearKernels`.
        launch: other parameters than those of `decode_launch`.
    """
    max_rows = min(qkv.shape[0], step.row_slots.shape[0])
    launch = launch or decode_launch(config, qkv.dtype)
    assert config.group == 1 or not launch.vector, config.group
    programs = max_rows * config.num_kv_heads
    splits = min(_MAX_SPLITS, max(1, workspace.arrivals.shape[0] // programs))
    _decode_kernel[(config.num_kv_heads, max_rows, splits)](
        step.counts,
        step.row_slots,
        step.context_lens,
        step.block_tables,
        qkv,
        kv,
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
        PDL=pdl,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        launch_pdl=pdl,
    )


def rope_and_write(
    step: DeviceStep,
    qkv: Tensor,
    kv: Tensor,
    rope_table: Tensor,
    config: AttentionConfig,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    pdl: bool = False,
    decode_q: Tensor | None = None,
) -> None:
    """Rotate q of the tokens [NUM_DECODES, NUM_TOKENS) in `qkv`; write their rotated k, and v, to `kv`.

    The arguments are those of `decode_attention`. k in `qkv` is left as it was. With `decode_q`, contiguous
    [max_rows, num_heads * head_dim], the decodes' k and v are written as well, and their rotated q goes there.
    """
    _rope_and_write_kernel[(qkv.shape[0],)](
        step.counts,
        step.positions,
        step.token_slots,
        step.block_tables,
        qkv,
        kv,
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
    kv: Tensor,
    config: AttentionConfig,
    out: Tensor,
    pdl: bool = False,
    launch: PrefillLaunch | None = None,
) -> None:
    """Attend for the tokens in the query blocks, causally over all of their rows' contexts, and write to `out`.

    Args:
        step: the rows; query blocks have `query_block_size` tokens.
        qkv: q rotated, as `rope_and_write` leaves it; k and v are not read.
        kv: the layer's pool, in which the chunks' own keys and values are written.
        config: the model's.
        out: [max_tokens, num_heads * head_dim]; tokens outside of the query blocks are left alone.
        pdl: see `linear.LinearKernels`.
        launch: other parameters than those of `prefill_launch`.
    """
    launch = launch or prefill_launch(config, qkv.dtype)
    _prefill_kernel[(config.num_kv_heads, step.query_block_rows.shape[0])](
        step.counts,
        step.query_block_rows,
        step.query_block_starts,
        step.row_starts,
        step.row_slots,
        step.context_lens,
        step.block_tables,
        qkv,
        kv,
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
        PDL=pdl,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
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
    PDL: tl.constexpr,
):
    """Program (KV head, row, split): the split's part of the row's context for the heads of one group.

    Heads come first, so that programs that run at once read whole blocks: their pages are more than the TLBs hold.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The head of a chain of dependent loads: all three before the first is looked at (a slot is never negative, but
    # its load would else sink below the branch).
    num_decodes = tl.load(counts_ptr + _NUM_DECODES)
    context_len = tl.load(context_lens_ptr + row)
    slot = tl.load(row_slots_ptr + row)
    last = context_len - 1
    first = tl.maximum(context_len - WINDOW, 0) if WINDOW else 0
    num_tiles = tl.cdiv(last - first, TILE)
    split_tiles = tl.maximum(tl.cdiv(num_tiles, tl.num_programs(2)), MIN_TILES)
    num_splits = tl.maximum(tl.cdiv(num_tiles, split_tiles), 1)
    # The step's rows and block tables were there before the layer's first kernel; qkv is of the kernel before. Also a
    # program without work waits, or the next kernel would not wait for that one.
    if PDL:
        tl.extra.cuda.gdc_wait()
    if (row >= num_decodes) | (split >= num_splits) | (slot < 0):
        return
    begin = first + split * split_tiles * TILE
    end = tl.minimum(begin + split_tiles * TILE, last)

    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    LANES: tl.constexpr = TILE if VECTOR else GROUP_PAD
    dims, in_head = _dims(HEAD_DIM, HALF_PAD)
    members = tl.arange(0, GROUP_PAD)
    heads, in_group = kv_head * GROUP + members, members < GROUP
    token_ptr = qkv_ptr + row.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    table_ptr = block_tables_ptr + slot.to(tl.int64) * MAX_BLOCKS
    keys_ptr = kv_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    values_ptr = keys_ptr + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
    dtype = kv_ptr.dtype.element_ty
    q = _rotated(token_ptr, heads, in_group, last, rope_ptr, q_norm_ptr, HEAD_DIM, HALF_PAD, EPS).to(dtype)
    new_head = NUM_HEADS + kv_head + tl.arange(0, 1)
    k_new = _rotated(token_ptr, new_head, new_head >= 0, last, rope_ptr, k_norm_ptr, HEAD_DIM, HALF_PAD, EPS).to(dtype)
    v_ptrs = token_ptr + (new_head + NUM_KV_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    v_new = tl.load(v_ptrs, mask=in_head[None, :], other=0.0).to(dtype)
    if split == 0:
        cell = _cells(table_ptr, last, last >= 0, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        tl.store(keys_ptr + cell + dims[None, :], k_new, mask=in_head[None, :])
        tl.store(values_ptr + cell + dims[None, :], v_new, mask=in_head[None, :])

    # The first split starts from the new token (with VECTOR in lane 0), the others from nothing.
    lanes = tl.arange(0, LANES)
    has_new = (split == 0) & (lanes == 0) if VECTOR else (split == 0) & (lanes >= 0)
    new_score = _capped(tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1), SCALE, SOFT_CAP)
    maximum = tl.where(has_new, new_score, float("-inf"))
    total = tl.where(has_new, 1.0, 0.0)
    acc = tl.where(has_new[:, None], v_new.to(tl.float32), 0.0)
    tokens = begin + tl.arange(0, TILE)
    cells = _cells(table_ptr, tokens, tokens < end, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = start + tl.arange(0, TILE)
        valid = tokens < end
        if not VECTOR:  # the compiler loads these ahead, since it pipelines
            cells = _cells(table_ptr, tokens, valid, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        offsets, loaded = cells[:, None] + dims[None, :], valid[:, None] & in_head[None, :]
        k = tl.load(keys_ptr + offsets, mask=loaded, other=0.0, eviction_policy="evict_first")
        v = tl.load(values_ptr + offsets, mask=loaded, other=0.0, eviction_policy="evict_first")
        if VECTOR:
            tl.debug_barrier()  # or else the compiler spreads the loads over the arithmetic, and few are in flight
            tokens += TILE
            cells = _cells(table_ptr, tokens, tokens < end, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
            maximum, total, acc = _fold_vector(q, k, v, valid, maximum, total, acc, SCALE, SOFT_CAP)
        else:
            maximum, total, acc = _fold_dot(q, k, v, valid[None, :], maximum, total, acc, SCALE, SOFT_CAP)
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
        tl.debug_barrier()  # the arrival is one thread's, and releases what all of them stored
        arrived = tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel")
        if arrived == num_splits - 1:
            tl.store(arrivals_ptr + pair, 0)
            out_ptrs_of_split = partial_out_ptr + partials[:, None] * HEAD_DIM + dims[None, :]
            combined = _combined(
                out_ptrs_of_split, partial_lse_ptr + partials, num_splits, in_group, stored, GROUP, HEAD_DIM
            )
            tl.store(out_ptrs, combined, mask=stored)


@triton.jit
def _rope_and_write_kernel(
    counts_ptr,
    positions_ptr,
    token_slots_ptr,
    block_tables_ptr,
    qkv_ptr,
    kv_ptr,
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
    dims, in_head = _dims(HEAD_DIM, HALF_PAD)
    token_ptr = qkv_ptr + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    table_ptr = block_tables_ptr + slot.to(tl.int64) * MAX_BLOCKS
    cell = _cells(table_ptr, position, position >= 0, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    dtype = kv_ptr.dtype.element_ty

    kv_heads = tl.arange(0, KV_HEADS_PAD)
    is_kv_head = kv_heads < NUM_KV_HEADS
    k_heads = NUM_HEADS + kv_heads
    k = _rotated(token_ptr, k_heads, is_kv_head, position, rope_ptr, k_norm_ptr, HEAD_DIM, HALF_PAD, EPS)
    stored = is_kv_head[:, None] & in_head[None, :]
    v_ptrs = token_ptr + (k_heads + NUM_KV_HEADS)[:, None] * HEAD_DIM + dims[None, :]
    v = tl.load(v_ptrs, mask=stored, other=0.0)
    k_ptrs = kv_ptr + cell + kv_heads[:, None] * (BLOCK_SIZE * HEAD_DIM) + dims[None, :]
    tl.store(k_ptrs, k.to(dtype), mask=stored)
    tl.store(k_ptrs + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, v.to(dtype), mask=stored)

    heads = tl.arange(0, HEADS_PAD)
    q = _rotated(token_ptr, heads, heads < NUM_HEADS, position, rope_ptr, q_norm_ptr, HEAD_DIM, HALF_PAD, EPS)
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
    PDL: tl.constexpr,
):
    """Program (KV head, query block): its tokens for all heads of the group, token by token."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    # The last query blocks of a long prompt have most to do: they come first.
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
    # Tiles begin at multiples of TILE, so that a token's keys are added up in the same order however its row is cut.
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
        cells = _cells(table_ptr, keys, valid, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)[:, None] + dims[None, :]
        k = tl.load(keys_ptr + cells, mask=valid[:, None] & in_head[None, :], other=0.0)
        v = tl.load(values_ptr + cells, mask=valid[:, None] & in_head[None, :], other=0.0)
        attended = valid[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW:
            attended &= keys[None, :] > positions[:, None] - WINDOW
        maximum, total, acc = _fold_dot(q, k, v, attended, maximum, total, acc, SCALE, SOFT_CAP)
    out_offsets = (tokens.to(tl.int64) * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    # Rows beyond the last token may have nothing in their windows.
    tl.store(out_ptr + out_offsets, acc / tl.where(total > 0.0, total, 1.0)[:, None], mask=is_query)


@triton.jit
def _dims(HEAD_DIM: tl.constexpr, HALF_PAD: tl.constexpr):
    """Return a head's dimensions, each half padded to a power of two, and which of them exist."""
    padded = tl.arange(0, 2 * HALF_PAD)
    within = padded % HALF_PAD
    return padded // HALF_PAD * (HEAD_DIM // 2) + within, within < HEAD_DIM // 2


@triton.jit
def _rotated(
    token_ptr,
    heads,
    is_head,
    position,
    rope_ptr,
    norm_ptr,
    HEAD_DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    EPS: tl.constexpr,
):
    """Return fp32 [heads, padded dims] of a token, normalized if there are weights, rotated; zeros as padding.

    Every element is loaded again for its partner in the other half: cheaper than an exchange between threads.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    padded = tl.arange(0, 2 * HALF_PAD)
    half, within = padded // HALF_PAD, padded % HALF_PAD
    exists = within < HALF
    dims, partners = half * HALF + within, (1 - half) * HALF + within
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
def _cells(
    table_ptr,
    positions,
    valid,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Return where in the pool, int64, the tokens' keys of head 0 begin."""
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return blocks * (2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + positions % BLOCK_SIZE * HEAD_DIM


@triton.jit
def _capped(products, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Return the scores of q . k times log2(e), so that exp2 serves for exp."""
    if SOFT_CAP != 0.0:
        scaled = products * (SCALE / SOFT_CAP)
        decay = tl.exp2(tl.abs(scaled) * (-2.0 * _LOG2_E))
        magnitude = (1.0 - decay) / (1.0 + decay) * (SOFT_CAP * _LOG2_E)
        return tl.where(scaled < 0, -magnitude, magnitude)
    else:  # noqa: RET505 - a constexpr condition: without the else, both are compiled
        return products * (SCALE * _LOG2_E)


@triton.jit
def _fold_dot(
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
    """Return the online softmax [rows], [rows], [rows, dims] after one more tile [tile, dims] of k and v."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(attended, _capped(products, SCALE, SOFT_CAP), float("-inf"))
    raised = tl.maximum(maximum, tl.max(scores, axis=1))
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite[:, None])
    decay = tl.exp2(maximum - finite)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return raised, total * decay + tl.sum(weights, axis=1), acc


@triton.jit
def _fold_vector(q, k, v, valid, maximum, total, acc, SCALE: tl.constexpr, SOFT_CAP: tl.constexpr):
    """Return the online softmax [tile], [tile], [tile, dims] after one more tile of k and v, for the one q [1, dims].

    Each lane of the tile keeps a softmax of its own, so that warps need not meet within the loop.
    """
    products = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)
    scores = tl.where(valid, _capped(products, SCALE, SOFT_CAP), float("-inf"))
    raised = tl.maximum(maximum, scores)
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite)
    decay = tl.exp2(maximum - finite)
    acc = acc * decay[:, None] + v.to(tl.float32) * weights[:, None]
    return raised, total * decay + weights, acc


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
    """Return [group, dims] of all splits; read from the L2 cache, where the other programs' results are."""
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
