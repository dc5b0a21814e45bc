"""A layer's matrix products with what stands around them: RMSNorm before, residual or gated activation after.

A decode step has few rows, and then a product costs what reading its weight costs. `_skinny_kernel` reads it once at
the memory's speed and does the rest on the way: a program owns `block_n` outputs (of a gated pair the same columns of
gate and up), walks K, sums the squares of x while it multiplies, and scales by the inverse RMS at the end. For many
rows a product is bound by arithmetic: cuBLAS and small kernels around it.

Each operation takes a `SkinnyConfig`, a `CublasConfig` or a `TileConfig`; `gemm_choice` knows which is faster.
Weights here are dense; `packed_linear` has the operations for quantized ones.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.activation import silu_and_mul, silu_and_mul_reference
from llmengine.kernels.cublaslt import CublasConfig, CublasLt, Product, TileConfig
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, Operation, SkinnyConfig
from llmengine.kernels.norm import rms_norm, rms_norm_reference

MAX_SPLIT_TILES = 4096
"""Bounds N / block_n where K is split."""

_PREFETCH_BYTES = tl.constexpr(128)
"""What one thread asks the L2 for while the kernel before still runs: more of it crowds out what others asked for."""


class LinearKernels:
    """The three operations on one device and one stream.

    Matrices are [rows, columns], contiguous; in_features is a multiple of 8. A row's result does not depend on what
    the other rows hold. Scratch tensors come from torch's allocator, so a graph capture keeps them in its pool.

    Args:
        device: where all tensors are.
        pdl: launch with programmatic dependent launch (needs compute capability 9.0): a kernel starts while the one
            before it still runs, fetches weights into the L2, and waits for that one before it reads what may depend
            on it. Every kernel launched so must wait, since the one after relies on it.
    """

    def __init__(self, device: torch.device | str, pdl: bool = False) -> None:
        self.pdl = pdl
        self.counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
        self._cublas = _load_cublas(self.counters.device)

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: LinearConfig,
    ) -> None:
        """Write rms_norm(x) @ weight.T + bias to `out`.

        Args:
            x: [num_rows, k].
            norm_weight: [k] in x's dtype, or None: x is not normalized.
            weight: [n, k] in x's dtype.
            bias: [n] or None.
            out: [num_rows, n] in x's dtype or fp32.
        """
        if norm_weight is not None and not _fuses_norm(config):
            x, norm_weight = self.normed(x, norm_weight, eps), None
        if isinstance(config, SkinnyConfig):
            self._launch(x, norm_weight, eps, weight, bias, out, config)
        else:
            self.multiply(x, weight, bias, out, config)

    def linear_add(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        config: LinearConfig,
        accumulate: bool = True,
    ) -> None:
        """Add x [num_rows, k] @ weight [n, k].T + bias to `residual` [num_rows, n], rounding once.

        Args:
            accumulate: False: overwrite `residual` instead.
        """
        if isinstance(config, SkinnyConfig):
            self._launch(x, None, 0.0, weight, bias, residual, config, add=accumulate)
        else:
            self.multiply(x, weight, bias, residual, config, accumulate)

    def norm_linear_silu(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: LinearConfig,
    ) -> None:
        """Write silu(gate) * up to `out` [num_rows, n], where gate and up are the halves of the product.

        Args:
            x: [num_rows, k].
            norm_weight: [k] in x's dtype, or None: x is not normalized.
            weight: [2 * n, k], gate then up.
            bias: [2 * n] or None.
        """
        if norm_weight is not None and not _fuses_norm(config):
            x, norm_weight = self.normed(x, norm_weight, eps), None
        if isinstance(config, SkinnyConfig):
            self._launch(x, norm_weight, eps, weight, bias, out, config, gated=True)
            return
        gate_up = x.new_empty(x.shape[0], weight.shape[0])
        self.multiply(x, weight, bias, gate_up, config)
        silu_and_mul(gate_up, out, self.pdl)

    def compile(self, shape: GemmShape, config: SkinnyConfig) -> None:
        """Compile the kernel that `shape` and `config` run, without running it; safe on several threads at once."""
        gated = shape.is_gated
        x = torch.empty(shape.num_rows, shape.k, dtype=shape.dtype, device="meta")
        weight = x.new_empty(2 * shape.n if gated else shape.n, shape.k)
        out = x.new_empty(shape.num_rows, shape.n, dtype=shape.out_dtype)
        norm_weight = x[0] if shape.has_norm and config.fuse_norm else None
        self._launch(x, norm_weight, 0.0, weight, None, out, config, gated, shape.adds, compile_only=True)

    def multiply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: LinearConfig,
        accumulate: bool = False,
    ) -> None:
        """Write x @ weight.T + bias to `out`, or add it; rows of `out` may lie apart."""
        assert isinstance(config, CublasConfig | TileConfig), config
        if self._cublas is None:
            _torch_mm(x, weight, bias, out, accumulate)
            return
        # The library adds no bias of another type than the result's.
        fused_bias = bias if out.dtype == x.dtype else None
        bias_dtype = None if fused_bias is None else fused_bias.dtype
        product = Product(
            *(x.shape[0], weight.shape[0], x.shape[1], x.dtype, out.dtype, accumulate, bias_dtype), out.stride(0)
        )
        self._cublas.run(product, x, weight, fused_bias, out, config)
        if bias is not None and fused_bias is None:
            out += bias

    def multiply_fp8(
        self,
        x: Tensor,
        x_scales: Tensor,
        weight: Tensor,
        weight_scales: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: LinearConfig,
        accumulate: bool = False,
    ) -> bool:
        """`multiply` of operands in e4m3 times their scales; return False if cuBLASLt cannot, and nothing was done.

        Args:
            x_scales: float32, of each row of x or one for all, and likewise `weight_scales`.
            bias: in `out`'s dtype, or if that is float32 in bfloat16 or float16; with a float32 bias, cuBLASLt cannot.
        """
        assert isinstance(config, CublasConfig | TileConfig), config
        if self._cublas is None:
            return False
        one_scale = x_scales.numel() == weight_scales.numel() == 1
        bias_dtype = None if bias is None else bias.dtype
        product = Product(
            *(x.shape[0], weight.shape[0], x.shape[1], x.dtype, out.dtype, accumulate, bias_dtype),
            *(out.stride(0), one_scale),
        )
        if not self._cublas.num_algorithms(product):
            return False
        scales = (x_scales, weight_scales)
        if not one_scale:
            scales = (x_scales.expand(len(x)).contiguous(), weight_scales.expand(len(weight)).contiguous())
        self._cublas.run(product, x, weight, bias, out, config, scales)
        return True

    def normed(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
        normed = torch.empty_like(x)
        rms_norm(x, norm_weight, eps, normed, self.pdl)
        return normed

    def _launch(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: SkinnyConfig,
        gated: bool = False,
        add: bool = False,
        compile_only: bool = False,
    ) -> None:
        num_rows, k = x.shape
        n = out.shape[1]
        assert config.any_rows or num_rows <= config.block_m, f"{num_rows} rows, {config} takes {config.block_m}"
        assert out.shape[0] == num_rows
        assert weight.shape == (2 * n if gated else n, k)
        assert k % 8 == 0
        assert x.is_contiguous()
        assert weight.is_contiguous()
        assert out.is_contiguous()
        num_tiles = triton.cdiv(n, config.block_n)
        partials = x
        if config.split_k > 1:
            assert norm_weight is None, "only linear_add splits K"
            assert not gated, "only linear_add splits K"
            assert not config.any_rows, "a tile's programs meet at one counter"
            assert num_tiles <= MAX_SPLIT_TILES
            partials = x.new_empty(config.split_k * num_tiles * config.block_m * config.block_n, dtype=torch.float32)
        grid = (triton.cdiv(num_rows, config.block_m), num_tiles) if config.any_rows else (num_tiles, config.split_k)
        launch = partial(_skinny_kernel.warmup, grid=grid) if compile_only else _skinny_kernel[grid]
        launch(
            x,
            weight if norm_weight is None else norm_weight,
            weight,
            weight if bias is None else bias,
            out,
            partials,
            self.counters,
            eps,
            num_rows,
            n,
            K=k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            NUM_STAGES=config.num_stages,
            SPLIT_K=config.split_k,
            PREFETCH_CHUNKS=max(config.num_warps * 32 // config.block_n, 1) if self.pdl else 0,
            NORM=norm_weight is not None,
            BIAS=bias is not None,
            GATED=gated,
            ADD=add,
            ANY_ROWS=config.any_rows,
            num_warps=config.num_warps,
            launch_pdl=self.pdl,
        )


def linear_reference(
    operation: Operation,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """The operation's result, computed in float32."""
    normed = x.float() if norm_weight is None else rms_norm_reference(x, norm_weight, eps)
    y = F.linear(normed, weight.float(), None if bias is None else bias.float())
    if operation == "norm_linear_silu":
        return silu_and_mul_reference(y)
    return y if residual is None else y + residual.float()


def _load_cublas(device: torch.device) -> CublasLt | None:
    return CublasLt(device) if device.type == "cuda" else None


def _fuses_norm(config: LinearConfig) -> bool:
    return isinstance(config, SkinnyConfig) and config.fuse_norm


def _torch_mm(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> None:
    product = torch.mm(x.to(out.dtype), weight.to(out.dtype).t())
    if bias is not None:
        product.add_(bias)
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x,
    norm_weight,
    weight,
    bias,
    out,
    partials,
    counters,
    eps,
    num_rows,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH_CHUNKS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    ANY_ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    if ANY_ROWS:  # programs that follow each other read the same weights
        rows = rows.to(tl.int64) + tile * BLOCK_M  # many rows of many columns are more than 32 bits count
        tile = split
        split = 0
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offsets = tl.arange(0, BLOCK_K)
    # Columns beyond N read the last one's weights, so the loop needs no mask for them.
    weight_rows = weight + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K
    up_rows = weight_rows + tl.cast(N, tl.int64) * K
    TURNS: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K
    EVEN_K: tl.constexpr = K == TURNS * BLOCK_K * SPLIT_K
    begin = split * (TURNS * BLOCK_K)
    if PREFETCH_CHUNKS > 0:
        prefetch_rows(weight_rows, begin, tl.minimum(begin + TURNS * BLOCK_K, K), PREFETCH_CHUNKS)
        if GATED:
            prefetch_rows(up_rows, begin, tl.minimum(begin + TURNS * BLOCK_K, K), PREFETCH_CHUNKS)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    row_mask = rows[:, None] < num_rows
    x_rows = x + rows[:, None] * K
    # Without tensor cores each thread sums its own share of K, and shares are summed after the loop.
    ACC_SHAPE: tl.constexpr = (BLOCK_N, BLOCK_K) if BLOCK_M == 1 else (BLOCK_M, BLOCK_N)
    acc = tl.zeros(ACC_SHAPE, dtype=tl.float32)
    up_acc = tl.zeros(ACC_SHAPE, dtype=tl.float32)
    # Row sums of squares, as the diagonal of x @ x.T where there are tensor cores: elementwise work on an operand of
    # a product would cost every warp all of it.
    squares = tl.zeros((1, BLOCK_K) if BLOCK_M == 1 else (BLOCK_M, BLOCK_M), dtype=tl.float32)
    if NORM:
        next_scale = tl.load(norm_weight + begin + k_offsets, mask=begin + k_offsets < K, other=0.0)
    for turn in tl.range(0, TURNS, num_stages=NUM_STAGES):
        k = begin + turn * BLOCK_K + k_offsets
        if EVEN_K:
            x_tile = tl.load(x_rows + k[None, :], mask=row_mask, other=0.0)
            weight_tile = tl.load(weight_rows + k[None, :], eviction_policy="evict_first")
        else:
            k_mask = k[None, :] < K
            x_tile = tl.load(x_rows + k[None, :], mask=row_mask & k_mask, other=0.0)
            weight_tile = tl.load(weight_rows + k[None, :], mask=k_mask, other=0.0, eviction_policy="evict_first")
        if NORM:
            # One turn ahead, since so small a load does not go through shared memory.
            scale = next_scale
            next_scale = tl.load(norm_weight + k + BLOCK_K, mask=k + BLOCK_K < K, other=0.0)
            squares = _multiply(x_tile, x_tile, squares, BLOCK_M)
            x_tile = x_tile * scale[None, :]
        acc = _multiply(x_tile, weight_tile, acc, BLOCK_M)
        if GATED:
            if EVEN_K:
                up_tile = tl.load(up_rows + k[None, :], eviction_policy="evict_first")
            else:
                up_tile = tl.load(up_rows + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
            up_acc = _multiply(x_tile, up_tile, up_acc, BLOCK_M)
    if BLOCK_M == 1:
        acc = tl.sum(acc, 1)[None, :]
        up_acc = tl.sum(up_acc, 1)[None, :]

    mask = row_mask & (columns[None, :] < N)
    if SPLIT_K > 1:
        # The last program of a tile to arrive adds all shares up, always in the same order.
        share = rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        SHARE_SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        tile_partials = partials + tile * SPLIT_K * SHARE_SIZE + share
        tl.store(tile_partials + split * SHARE_SIZE, acc, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived != SPLIT_K - 1:
            return
        tl.store(counters + tile, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for other in tl.static_range(SPLIT_K):
            acc += tl.load(tile_partials + other * SHARE_SIZE, mask=mask, other=0.0, cache_modifier=".cg")
    if NORM:
        if BLOCK_M > 1:
            squares = tl.where(rows[:, None] == rows[None, :], squares, 0.0)
        inverse = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        acc *= inverse
        up_acc *= inverse
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_acc += tl.load(bias + N + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc * tl.sigmoid(acc) * up_acc
    target = out + rows[:, None] * N + columns[None, :]
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _multiply(x_tile, weight_tile, acc, BLOCK_M: tl.constexpr):
    """Add x_tile [BLOCK_M, BLOCK_K] times weight_tile [BLOCK_N, BLOCK_K], of one row without its sum over K."""
    if BLOCK_M == 1:
        acc += weight_tile.to(tl.float32) * x_tile.to(tl.float32)
    else:
        acc = tl.dot(x_tile, tl.trans(weight_tile), acc, input_precision="ieee")
    return acc


@triton.jit
def prefetch_rows(weight_rows, begin, end, CHUNKS: tl.constexpr):
    """Ask the L2 for the first CHUNKS * _PREFETCH_BYTES bytes of [begin, end) of each weight row [BLOCK_N, 1]."""
    SIZE: tl.constexpr = weight_rows.dtype.element_ty.primitive_bitwidth // 8
    CHUNK: tl.constexpr = _PREFETCH_BYTES // SIZE
    k = begin + tl.arange(0, CHUNKS)[None, :] * CHUNK
    num_bytes = tl.minimum(tl.maximum(end - k, 0), CHUNK) * SIZE
    addresses = (weight_rows + k).to(tl.int64)
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred wanted;
            setp.gt.s32 wanted, $2, 0;
            @wanted cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [addresses, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
