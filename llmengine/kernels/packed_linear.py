"""Products with packed quantized weights, with what stands around them: see `linear` for the operations.

Few rows cost what reading the weights costs, so they are read packed, by `packed_kernel`, or by `hopper_few` on Hopper.
For many rows, weights are made numbers of the activations' dtype part by part, each as much as the L2 holds, and
multiplied by cuBLASLt. `gemm_choice` knows from where on. Norms are kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from llmengine.kernels import hopper_few, hopper_packed
from llmengine.kernels.activation import silu_and_mul
from llmengine.kernels.cublaslt import CublasConfig, TileConfig
from llmengine.kernels.gemm_config import HopperConfig, HopperFewConfig, LinearConfig, PackedConfig, fuses_gate
from llmengine.kernels.linear import MAX_SPLIT_TILES, LinearKernels
from llmengine.kernels.packed_instructions import layout_instructions
from llmengine.kernels.packed_kernels import dequantize_kernel, packed_kernel
from llmengine.kernels.packed_weights import TILE_ROWS, PackedLayout, PackedMatrix
from llmengine.kernels.packings import PLANES

_PART_BYTES = 64 << 20
"""Dequantized weights that exist at a time."""


_GATHERED_ROWS = 16
"""Rows of a program that looks rows up."""

_SCALES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float8_e4m3fn: "e4m3",
    torch.int8: "steps",
    torch.uint8: "pairs",
}
"""The kernels' names of the dtypes of scales."""


class PackedProducts:
    """`linear_ops.Products` with a packed matrix.

    Args:
        kernels: of the device; what is multiplied dequantized goes through them.
    """

    def __init__(self, kernels: LinearKernels, matrix: PackedMatrix) -> None:
        self._kernels = kernels
        self._matrix = matrix

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        """See `LinearKernels.norm_linear`."""
        self._multiply(self._prepared(x, norm_weight, eps), bias, out, config)

    def linear_add(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, config: LinearConfig, accumulate: bool = True
    ) -> None:
        """See `LinearKernels.linear_add`."""
        self._multiply(self._prepared(x, None, 0.0), bias, residual, config, add=accumulate)

    def norm_linear_silu(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        """See `LinearKernels.norm_linear_silu`."""
        x = self._prepared(x, norm_weight, eps)
        if fuses_gate(config, out.shape[1]):
            self._multiply(x, bias, out, config, gated=True)
            return
        gate_up = x.new_empty(len(x), self._matrix.shape[0])
        self._multiply(x, bias, gate_up, config)
        silu_and_mul(gate_up, out, self._kernels.pdl)

    def compile(self, x: Tensor, out: Tensor, config: LinearConfig, gated: bool, add: bool) -> None:
        """Compile the kernel of a product of tensors like `x` and `out`, without running it."""
        if isinstance(config, HopperConfig):
            hopper_packed.compile_product(self._matrix.layout, config.block_m, config.programs)
            return
        if isinstance(config, HopperFewConfig):
            hopper_few.compile_product(self._matrix.layout, config.cut)
            return
        if not isinstance(config, PackedConfig):
            part = x.new_empty(TILE_ROWS, x.shape[1])
            dequantize_rows(self._matrix, 0, part, compile_for=self._kernels.counters.device)
            return
        is_fused = gated and fuses_gate(config, out.shape[1])
        if gated and not is_fused:
            out = x.new_empty(len(x), self._matrix.shape[0])
        self._launch(x, None, out, config, is_fused, add, compile_only=True)

    def _prepared(self, x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
        """x normalized, its columns multiplied and in the order of the stored ones."""
        if norm_weight is not None:
            x = self._kernels.normed(x, norm_weight, eps)
        scale, order = (self._matrix.tensors.get(name) for name in ("input_scale", "input_order"))
        if scale is not None:
            x = torch.mul(x, scale).to(x.dtype)
        return x if order is None else x.index_select(1, order)

    def _multiply(
        self,
        x: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: LinearConfig,
        gated: bool = False,
        add: bool = False,
    ) -> None:
        if isinstance(config, PackedConfig):
            self._launch(x, bias, out, config, gated, add)
            return
        if isinstance(config, HopperConfig):
            cut = (config.block_m, config.programs, config.split_k)
            flags = self._kernels.counters
            hopper_packed.multiply(x, self._matrix, bias, out, *cut, flags, gated, add, pdl=self._kernels.pdl)
            return
        if isinstance(config, HopperFewConfig):
            hopper_few.multiply(x, self._matrix, bias, out, config.cut, gated, add, pdl=self._kernels.pdl)
            return
        assert isinstance(config, CublasConfig | TileConfig), config
        num_rows, columns = self._matrix.shape
        num_parts = triton.cdiv(num_rows * columns * x.dtype.itemsize, _PART_BYTES)
        size = triton.cdiv(triton.cdiv(num_rows, num_parts), TILE_ROWS) * TILE_ROWS
        weight = x.new_empty(min(size, num_rows), columns)
        for begin in range(0, num_rows, size):
            part = weight[: min(size, num_rows - begin)]
            dequantize_rows(self._matrix, begin, part)
            end = begin + len(part)
            part_bias = None if bias is None else bias[begin:end]
            self._kernels.multiply(x, part, part_bias, out[:, begin:end], config, add)

    def _launch(
        self,
        x: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: PackedConfig,
        gated: bool = False,
        add: bool = False,
        compile_only: bool = False,
    ) -> None:
        tensors, layout = self._matrix.tensors, self._matrix.layout
        num_rows, n = out.shape
        assert x.shape == (num_rows, layout.shape[1])
        assert x.is_contiguous()
        assert layout.shape[0] == (2 * n if gated else n)
        row_blocks, tiles = triton.cdiv(num_rows, config.block_m), triton.cdiv(n, config.block_n)
        split_k = triton.cdiv(layout.num_blocks, triton.cdiv(layout.num_blocks, config.split_k))
        partials = x
        if split_k > 1:
            assert row_blocks * tiles <= MAX_SPLIT_TILES, (config, out.shape)
            size = split_k * row_blocks * tiles * config.block_m * config.block_n * (2 if gated else 1)
            partials = x.new_empty(size, dtype=torch.float32)
        grid = (row_blocks, split_k, tiles)
        launch: Callable[..., Any] = partial(packed_kernel.warmup, grid=grid) if compile_only else packed_kernel[grid]
        launch(
            x,
            tensors["words"],
            *_factors(self._matrix),
            x if bias is None else bias,
            out,
            partials,
            self._kernels.counters,
            num_rows,
            n,
            out.stride(0),
            NUM_TILES=layout.num_tiles // 2 if gated else layout.num_tiles,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            SPLIT_K=split_k,
            NUM_STAGES=config.num_stages,
            PDL=self._kernels.pdl,
            BIAS=bias is not None,
            GATED=gated,
            ADD=add,
            **layout_constants(layout, on_gpu=self._kernels.counters.device.type == "cuda"),
            num_warps=config.num_warps,
            launch_pdl=self._kernels.pdl,
        )


def layout_constants(layout: PackedLayout, on_gpu: bool) -> dict[str, Any]:
    """The kernels' arguments that a layout decides."""
    codes = layout_instructions(layout) if on_gpu and layout.dtype != torch.float32 else []
    low_bits, high_bits = PLANES.get(layout.kind, (0, 0))
    return {
        "K": layout.shape[1],
        "NUM_BLOCKS": layout.num_blocks,
        "KIND": layout.kind,
        "TABLE": layout.table,
        "LOW_BITS": low_bits,
        "HIGH_BITS": high_bits,
        "MIDDLE": layout.middle,
        "SLICE": layout.slice_columns,
        "GROUPS": layout.num_groups,
        "SCALES": _SCALES[layout.scale_dtype],
        "ROW_SCALES": layout.has_row_scales,
        "MINIMA": layout.has_minima,
        "ZEROS": layout.has_zeros,
        "ZERO_OFFSET": layout.zero_offset,
        "BF16_ZEROS": layout.zero_dtype == torch.bfloat16,
        **{f"CODE_{index}": codes[index] if index < len(codes) else "" for index in range(4)},
    }


def dequantize_rows(matrix: PackedMatrix, first_row: int, out: Tensor, compile_for: torch.device | None = None) -> None:
    """Write the weights of the rows from `first_row` on, a multiple of 64, to `out` [rows, in_features].

    Columns are in the order of the stored ones, without factors for activations.

    Args:
        compile_for: compile the kernel for this device, without running it.
    """
    _dequantize(matrix, None, first_row, out, compile_for)


def gather_packed_rows(matrix: PackedMatrix, ids: Tensor, out: Tensor) -> None:
    """Write the weights of the rows that `ids` names, integers [num_rows], to `out` [num_rows, in_features].

    A row is what `WeightFormat.dequantize` makes of it.
    """
    order, factors = (matrix.tensors.get(name) for name in ("input_order", "input_scale"))
    if order is None:
        _dequantize(matrix, ids, 0, out)
    else:
        stored = torch.empty_like(out)
        _dequantize(matrix, ids, 0, stored)
        out.index_copy_(1, order.long(), stored)
    if factors is not None:
        out.copy_(out * factors)


def _dequantize(
    matrix: PackedMatrix, ids: Tensor | None, first_row: int, out: Tensor, compile_for: torch.device | None = None
) -> None:
    layout = matrix.layout
    rows = TILE_ROWS if ids is None else _GATHERED_ROWS
    grid = (layout.num_blocks, triton.cdiv(len(out), rows))
    kernel = dequantize_kernel
    launch: Callable[..., Any] = kernel[grid] if compile_for is None else partial(kernel.warmup, grid=grid)
    launch(
        matrix.tensors["words"],
        *_factors(matrix),
        matrix.tensors["words"] if ids is None else ids,
        out,
        first_row,
        len(out),
        **layout_constants(layout, on_gpu=(compile_for or out.device).type == "cuda"),
        ROWS=rows,
        GATHER=ids is not None,
        num_warps=4 if ids is None else 1,
    )


def _factors(matrix: PackedMatrix) -> Iterator[Tensor]:
    """The kernels' high bits and factors; what there is none of is not read."""
    extras = "units" if matrix.layout.has_steps else "minima"
    names = ("high", "scales", "row_scales", "zeros", extras, "shifts")
    return (matrix.tensors.get(name, matrix.tensors["words"]) for name in names)
