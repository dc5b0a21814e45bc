"""A layer's matrix products with what stands around them: RMSNorm before, residual or gated activation after.

A decode step has few rows, and then a product costs what reading its weight costs. Two kernels read it once at the
memory's speed and do the rest on the way: a program owns `block_n` outputs (of a gated pair the same columns of gate
and up), walks K, sums the squares of x while it multiplies, and scales by the inverse RMS at the end.
`_few_rows_kernel`, for up to 8 rows, multiplies what it loads in registers; `_skinny_kernel` takes it through shared
memory to the tensor cores. For many rows a product is bound by arithmetic: cuBLAS and small kernels around it.

Each operation takes a `SkinnyConfig`, or None for cuBLAS; `gemm_choice` knows which is faster.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.activation import silu_and_mul, silu_and_mul_reference
from llmengine.kernels.norm import rms_norm, rms_norm_reference

Operation = Literal["norm_linear", "linear_add", "norm_linear_silu"]

BoundLinear = Callable[[Tensor, Tensor], None]
"""(x [num_rows, in_features], where the result goes); weights are bound."""

MAX_SPLIT_TILES = 4096
"""Bounds N / block_n where K is split."""

MAX_FEW_ROWS = 8
"""Up to here a product can do without tensor cores."""

_LOAD_BYTES = 16
"""The most that a thread loads at once."""

_PREFETCH_BYTES = tl.constexpr(512)
"""What one thread asks the L2 for while the kernel before still runs."""


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How a kernel cuts a product up.

    Attributes:
        block_m: rows of x, a power of two; up to 8 without tensor cores.
        block_n: outputs of a program, a power of two.
        block_k: inputs of one turn, a power of two.
        num_stages: turns whose loads are in flight at once, through shared memory; 1 loads into registers and is all
            there is without tensor cores.
        split_k: programs that share the K of one tile; only for `linear_add` with tensor cores.
        fuse_norm: normalize on the way, else by a kernel before; only where there is a norm.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    fuse_norm: bool = True

    def __str__(self) -> str:
        """A short name: m16n32k128w4s4, then x2 for split_k and -norm for a norm of its own."""
        name = f"m{self.block_m}n{self.block_n}k{self.block_k}w{self.num_warps}s{self.num_stages}"
        return name + (f"x{self.split_k}" if self.split_k > 1 else "") + ("" if self.fuse_norm else "-norm")

    @classmethod
    def parse(cls, name: str) -> SkinnyConfig:
        """Return the configuration of this name; raises ValueError."""
        match = re.fullmatch(r"m(\d+)n(\d+)k(\d+)w(\d+)s(\d+)(?:x(\d+))?(-norm)?", name)
        if match is None:
            raise ValueError(f"{name!r} is not like m16n32k128w4s4x2-norm")
        *sizes, split_k, own_norm = match.groups()
        block_m, block_n, block_k, num_warps, num_stages = map(int, sizes)
        return cls(block_m, block_n, block_k, num_warps, num_stages, int(split_k or 1), own_norm is None)


@dataclass(frozen=True, slots=True)
class GemmShape:
    """What a choice of implementation depends on; `n` are the outputs (norm_linear_silu's weight has 2 * n rows)."""

    operation: Operation
    num_rows: int
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype


Choose = Callable[[GemmShape], SkinnyConfig | None]


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
        self._counters = torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)

    def norm_linear(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: SkinnyConfig | None,
    ) -> None:
        """Write rms_norm(x) @ weight.T + bias to `out`.

        Args:
            x: [num_rows, k].
            norm_weight: [k] in x's dtype, or None: x is not normalized.
            weight: [n, k] in x's dtype.
            bias: [n] or None.
            out: [num_rows, n] in x's dtype or fp32.
        """
        if norm_weight is not None and not (config and config.fuse_norm):
            x, norm_weight = self._normed(x, norm_weight, eps), None
        if config is None:
            _mm(x, weight, bias, out)
        else:
            self._launch(x, norm_weight, eps, weight, bias, out, config)

    def linear_add(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, config: SkinnyConfig | None
    ) -> None:
        """Add x [num_rows, k] @ weight [n, k].T + bias to `residual` [num_rows, n], rounding once."""
        if config is not None:
            self._launch(x, None, 0.0, weight, bias, residual, config, add=True)
            return
        if bias is not None:
            residual.add_(bias)
        residual.addmm_(x, weight.t())

    def norm_linear_silu(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: SkinnyConfig | None,
    ) -> None:
        """Write silu(gate) * up to `out` [num_rows, n], where gate and up are the halves of the product.

        Args:
            x: [num_rows, k].
            norm_weight: [k] in x's dtype.
            weight: [2 * n, k], gate then up.
            bias: [2 * n] or None.
        """
        fused_norm: Tensor | None = norm_weight
        if config is None or not config.fuse_norm:
            x, fused_norm = self._normed(x, norm_weight, eps), None
        if config is not None:
            self._launch(x, fused_norm, eps, weight, bias, out, config, gated=True)
            return
        gate_up = x.new_empty(x.shape[0], weight.shape[0])
        _mm(x, weight, bias, gate_up)
        silu_and_mul(gate_up, out, self.pdl)

    def compile(self, shape: GemmShape, config: SkinnyConfig) -> None:
        """Compile the kernel that `shape` and `config` run, without running it; safe on several threads at once."""
        gated, add = shape.operation == "norm_linear_silu", shape.operation == "linear_add"
        x = torch.empty(shape.num_rows, shape.k, dtype=shape.dtype, device="meta")
        weight = x.new_empty(2 * shape.n if gated else shape.n, shape.k)
        out = x.new_empty(shape.num_rows, shape.n, dtype=shape.out_dtype)
        norm_weight = None if add or not config.fuse_norm else x[0]
        self._launch(x, norm_weight, 0.0, weight, None, out, config, gated, add, compile_only=True)

    def _normed(self, x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
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
        assert num_rows <= config.block_m, f"{num_rows} rows, {config} takes {config.block_m}"
        assert out.shape[0] == num_rows
        assert weight.shape == (2 * n if gated else n, k)
        assert k % 8 == 0
        assert x.is_contiguous()
        assert weight.is_contiguous()
        assert out.is_contiguous()
        common = (
            x,
            weight if norm_weight is None else norm_weight,
            weight,
            weight if bias is None else bias,
            out,
            eps,
            num_rows,
            n,
        )
        sizes = {"K": k, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
        flags = {"NORM": norm_weight is not None, "BIAS": bias is not None, "GATED": gated, "ADD": add}
        options = {
            "PREFETCH_CHUNKS": max(config.num_warps * 32 // config.block_n, 1) if self.pdl else 0,
            "num_warps": config.num_warps,
            "launch_pdl": self.pdl,
        }
        num_tiles = triton.cdiv(n, config.block_n)
        if config.block_m <= MAX_FEW_ROWS:
            assert config.num_stages == config.split_k == 1, f"{config} needs tensor cores"
            vector = _LOAD_BYTES // x.element_size()
            lanes = min(max(config.num_warps * 32 * vector // config.block_k, 1), config.block_n)
            launch = _launcher(_few_rows_kernel, (num_tiles,), compile_only)
            launch(*common, VECTOR=vector, LANES=lanes, **sizes, **flags, **options)
            return
        partials = x
        if config.split_k > 1:
            assert add, "only linear_add splits K"
            assert num_tiles <= MAX_SPLIT_TILES
            partials = x.new_empty(config.split_k * num_tiles * config.block_m * config.block_n, dtype=torch.float32)
        launch = _launcher(_skinny_kernel, (num_tiles, config.split_k), compile_only)
        launch(
            *common,
            partials,
            self._counters,
            NUM_STAGES=config.num_stages,
            SPLIT_K=config.split_k,
            **sizes,
            **flags,
            **options,
        )


class LinearOps:
    """`LinearKernels` with weights bound and `choose` asked for each number of rows."""

    def __init__(self, kernels: LinearKernels, choose: Choose) -> None:
        self._kernels = kernels
        self._choose = choose

    def norm_linear(
        self, norm_weight: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> BoundLinear:
        """Return (x, out) -> None; see `LinearKernels.norm_linear`."""
        n, k = weight.shape

        def apply(x: Tensor, out: Tensor) -> None:
            config = self._choose(GemmShape("norm_linear", x.shape[0], n, k, x.dtype, out.dtype))
            self._kernels.norm_linear(x, norm_weight, eps, weight, bias, out, config)

        return apply

    def linear_add(self, weight: Tensor, bias: Tensor | None = None) -> BoundLinear:
        """Return (x, residual) -> None; see `LinearKernels.linear_add`."""
        n, k = weight.shape

        def apply(x: Tensor, residual: Tensor) -> None:
            config = self._choose(GemmShape("linear_add", x.shape[0], n, k, x.dtype, residual.dtype))
            self._kernels.linear_add(x, weight, bias, residual, config)

        return apply

    def norm_linear_silu(
        self, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> BoundLinear:
        """Return (x, out) -> None; see `LinearKernels.norm_linear_silu`."""
        n, k = weight.shape[0] // 2, weight.shape[1]

        def apply(x: Tensor, out: Tensor) -> None:
            config = self._choose(GemmShape("norm_linear_silu", x.shape[0], n, k, x.dtype, out.dtype))
            self._kernels.norm_linear_silu(x, norm_weight, eps, weight, bias, out, config)

        return apply


def linear_reference(
    operation: Operation,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return what the operation writes, computed in fp32."""
    normed = x.float() if norm_weight is None else rms_norm_reference(x, norm_weight, eps)
    y = F.linear(normed, weight.float(), None if bias is None else bias.float())
    if operation == "norm_linear_silu":
        return silu_and_mul_reference(y)
    return y if residual is None else y + residual.float()


def _launcher(kernel: Any, grid: tuple[int, ...], compile_only: bool) -> Callable[..., Any]:
    return partial(kernel.warmup, grid=grid) if compile_only else kernel[grid]


def _mm(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x @ weight.T + bias to `out`."""
    if out.dtype == x.dtype:
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)
        return
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weight.to(out.dtype).t(), out=out)
    if bias is not None:
        out.add_(bias)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x,
    norm_weight,
    weight,
    bias,
    out,
    eps,
    num_rows,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    PREFETCH_CHUNKS: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
):
    """Tiles are [LANES, row of x, column of a lane, K]; the first and the last axis are spread over the threads.

    LANES * BLOCK_K are as many elements as all threads load at once, VECTOR each. The middle axes lie within a thread,
    and every lane loads x for itself: so all tiles are laid out alike, and the loop needs neither shared memory nor a
    barrier. Each thread sums its own share of K; shares are summed after the loop.
    """
    COLUMNS: tl.constexpr = BLOCK_N // LANES
    TURNS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    rows = tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    up_offset = tl.cast(N, tl.int64) * K
    # Columns beyond N read the last one's weights, so the loop needs no mask for them.
    weight_rows = weight + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K
    _prefetch_and_wait(weight_rows, weight_rows + up_offset, 0, K, PREFETCH_CHUNKS, GATED)
    addend = _load_addend(bias, out, rows, columns, num_rows, N, BIAS, ADD)
    up_addend = _load_addend(bias + N, out, rows, columns, num_rows, N, BIAS and GATED, False)

    # Shaped by their offsets, since indexing a tensor that was loaded would lose the layout.
    lane = tl.arange(0, LANES)[:, None, None, None]
    tile_rows = rows[None, :, None, None]
    tile_columns = tl.program_id(0) * BLOCK_N + lane * COLUMNS + tl.arange(0, COLUMNS)[None, None, :, None]
    k_offsets = tl.arange(0, BLOCK_K)[None, None, None, :]
    weight_tiles = weight + tl.minimum(tile_columns, N - 1).to(tl.int64) * K + k_offsets
    x_tiles = tl.broadcast_to(x + tile_rows * K + k_offsets, (LANES, BLOCK_M, 1, BLOCK_K))
    norm_tiles = tl.broadcast_to(norm_weight + k_offsets, (LANES, 1, 1, BLOCK_K))
    acc = tl.zeros((LANES, BLOCK_M, COLUMNS, BLOCK_K // VECTOR), dtype=tl.float32)
    up_acc = acc
    squares = tl.zeros((LANES, BLOCK_M, 1, BLOCK_K // VECTOR), dtype=tl.float32)
    for turn in tl.range(0, TURNS, num_stages=1):
        k = turn * BLOCK_K
        if K % BLOCK_K == 0:
            k_mask = tl.full((1, 1, 1, 1), True, tl.int1)
        else:
            k_mask = k + k_offsets < K
        weight_tile = tl.load(weight_tiles + k, mask=k_mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            up_tile = tl.load(weight_tiles + up_offset + k, mask=k_mask, other=0.0, eviction_policy="evict_first")
        x_tile = tl.load(x_tiles + k, mask=k_mask & (tile_rows < num_rows), other=0.0).to(tl.float32)
        if NORM:
            squares = _add_products(x_tile, x_tile, squares, VECTOR)
            x_tile *= tl.load(norm_tiles + k, mask=k_mask, other=0.0).to(tl.float32)
        acc = _add_products(x_tile, weight_tile.to(tl.float32), acc, VECTOR)
        if GATED:
            up_acc = _add_products(x_tile, up_tile.to(tl.float32), up_acc, VECTOR)
    acc = tl.sum(acc, 3)
    up_acc = tl.sum(up_acc, 3)
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares, 3) / K + eps)
        acc *= inverse
        up_acc *= inverse
    acc = tl.reshape(tl.permute(acc, (1, 0, 2)), (BLOCK_M, BLOCK_N))
    up_acc = tl.reshape(tl.permute(up_acc, (1, 0, 2)), (BLOCK_M, BLOCK_N))
    _finish(acc + addend, up_acc + up_addend, out, rows, columns, num_rows, N, GATED)


@triton.jit
def _add_products(x_tile, weight_tile, acc, VECTOR: tl.constexpr):
    """Add to acc [LANES, M, COLUMNS, K // VECTOR] the products, each thread's VECTOR summed."""
    products = tl.reshape(x_tile * weight_tile, (acc.shape[0], acc.shape[1], acc.shape[2], acc.shape[3], VECTOR))
    return acc + tl.sum(products, 4)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_kernel(
    x,
    norm_weight,
    weight,
    bias,
    out,
    eps,
    num_rows,
    N,
    partials,
    counters,
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
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offsets = tl.arange(0, BLOCK_K)
    # Columns beyond N read the last one's weights, so the loop needs no mask for them.
    weight_rows = weight + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K
    up_rows = weight_rows + tl.cast(N, tl.int64) * K
    TURNS: tl.constexpr = ((K + BLOCK_K - 1) // BLOCK_K + SPLIT_K - 1) // SPLIT_K
    EVEN_K: tl.constexpr = K == TURNS * BLOCK_K * SPLIT_K
    begin = split * (TURNS * BLOCK_K)
    _prefetch_and_wait(weight_rows, up_rows, begin, tl.minimum(begin + TURNS * BLOCK_K, K), PREFETCH_CHUNKS, GATED)
    addend = _load_addend(bias, out, rows, columns, num_rows, N, BIAS, ADD)
    up_addend = _load_addend(bias + N, out, rows, columns, num_rows, N, BIAS and GATED, False)

    row_mask = rows[:, None] < num_rows
    x_rows = x + rows[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Row sums of squares, as the diagonal of x @ x.T: elementwise work on an operand of a product would cost every
    # warp all of it.
    squares = tl.zeros((BLOCK_M, BLOCK_M), dtype=tl.float32)
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
            squares = tl.dot(x_tile, tl.trans(x_tile), squares, input_precision="ieee")
            x_tile = x_tile * scale[None, :]
        acc = tl.dot(x_tile, tl.trans(weight_tile), acc, input_precision="ieee")
        if GATED:
            if EVEN_K:
                up_tile = tl.load(up_rows + k[None, :], eviction_policy="evict_first")
            else:
                up_tile = tl.load(up_rows + k[None, :], mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
            up_acc = tl.dot(x_tile, tl.trans(up_tile), up_acc, input_precision="ieee")

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
        squares = tl.where(rows[:, None] == rows[None, :], squares, 0.0)
        inverse = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
        acc *= inverse
        up_acc *= inverse
    _finish(acc + addend, up_acc + up_addend, out, rows, columns, num_rows, N, GATED)


@triton.jit
def _load_addend(bias, out, rows, columns, num_rows, N, BIAS: tl.constexpr, ADD: tl.constexpr):
    """Return what is added to the products, [BLOCK_M, BLOCK_N] in fp32; before the loop, so that none waits for it."""
    addend = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    if BIAS:
        addend += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if ADD:
        mask = (rows[:, None] < num_rows) & (columns[None, :] < N)
        addend += tl.load(out + rows[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return addend


@triton.jit
def _finish(y, up, out, rows, columns, num_rows, N, GATED: tl.constexpr):
    """Write y [BLOCK_M, BLOCK_N], of a gated pair silu(y) * up."""
    if GATED:
        y = y * tl.sigmoid(y) * up
    mask = (rows[:, None] < num_rows) & (columns[None, :] < N)
    tl.store(out + rows[:, None] * N + columns[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _prefetch_and_wait(weight_rows, up_rows, begin, end, CHUNKS: tl.constexpr, GATED: tl.constexpr):
    """Let the next kernel start, and wait for the one before; with 0 CHUNKS that happens by itself."""
    if CHUNKS > 0:
        _prefetch(weight_rows, begin, end, CHUNKS)
        if GATED:
            _prefetch(up_rows, begin, end, CHUNKS)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _prefetch(weight_rows, begin, end, CHUNKS: tl.constexpr):
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
