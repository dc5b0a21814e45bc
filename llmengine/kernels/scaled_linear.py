"""Products with matrices whose activations are rounded to 8 bits too: see `linear` for the operations.

Activations are rounded by one kernel, together with the norm where there is one. Products are those of our kernels, one
in Triton and one for Hopper, or for FP8 cuBLASLt's, where that is configured and can.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from llmengine.kernels import hopper_scaled
from llmengine.kernels.activation import silu_and_mul
from llmengine.kernels.gemm_config import HopperScaledConfig, LinearConfig, PackedConfig
from llmengine.kernels.linear import MAX_SPLIT_TILES, LinearKernels
from llmengine.kernels.scaled_kernels import look_up_kernel, quantize_rows_kernel, scaled_kernel
from llmengine.kernels.scaled_weights import ScaledMatrix

BLOCK_K = 128
"""Columns of a turn, and of a block that shares a scale."""

_MANY_ROWS = PackedConfig(128, 128, num_warps=8, num_stages=4)
"""Where a library's product was chosen that cannot compute this one."""


class ScaledProducts:
    """`linear_ops.Products` with a scaled matrix.

    Args:
        kernels: of the device.
    """

    def __init__(self, kernels: LinearKernels, matrix: ScaledMatrix) -> None:
        self._kernels = kernels
        self._matrix = matrix

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        """See `LinearKernels.norm_linear`."""
        self._multiply(*self.quantize(x, norm_weight, eps), bias, out, config)

    def linear_add(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, config: LinearConfig, accumulate: bool = True
    ) -> None:
        """See `LinearKernels.linear_add`."""
        self._multiply(*self.quantize(x, None, 0.0), bias, residual, config, add=accumulate)

    def norm_linear_silu(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        """See `LinearKernels.norm_linear_silu`."""
        values, scales = self.quantize(x, norm_weight, eps)
        if self.fuses_gate(config):
            self._multiply(values, scales, bias, out, config, gated=True)
            return
        gate_up = x.new_empty(len(x), self._matrix.shape[0])
        self._multiply(values, scales, bias, gate_up, config)
        silu_and_mul(gate_up, out, self._kernels.pdl)

    def silu_linear_add(
        self, gate_up: Tensor, bias: Tensor | None, residual: Tensor, config: LinearConfig, accumulate: bool = True
    ) -> None:
        """Add the product of silu(gate) * up and the matrix to `residual`; gate_up: [num_rows, 2 * in_features]."""
        self._multiply(*self.quantize(gate_up, None, 0.0, gated=True), bias, residual, config, add=accumulate)

    def fuses_gate(self, config: LinearConfig) -> bool:
        """Whether one kernel computes the matrix's gates and what they multiply, which must begin with a block."""
        in_blocks = self._matrix.weight_scales == "block"
        return isinstance(config, HopperScaledConfig) and not (in_blocks and self._matrix.shape[0] % (2 * BLOCK_K))

    def compile(self, x: Tensor, out: Tensor, config: LinearConfig, gated: bool, add: bool) -> None:
        """Compile the kernels of a product of tensors like `x` and `out`, without running them."""
        num_rows, columns = x.shape
        rows = self._matrix.shape[0]
        if not gated:
            self.quantize(x, None, 0.0, compile_only=True)
        if not add:
            self.quantize(x, x[0], 0.0, compile_only=True)
        if gated:
            self.quantize(x.new_empty(num_rows, rows), None, 0.0, gated=True, compile_only=True)
        if isinstance(config, HopperScaledConfig):
            hopper_scaled.compile_product(self._matrix, x.dtype, config.block_m, config.block_n)
        elif isinstance(config, PackedConfig):
            values = x.new_empty(num_rows, columns, dtype=self._matrix.values_dtype)
            scales = x.new_empty(self._scales_shape(num_rows), dtype=torch.float32)
            product = x.new_empty(num_rows, rows) if gated else out
            self._launch(values, scales, None, product, config, add, compile_only=True)

    def quantize(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, gated: bool = False, compile_only: bool = False
    ) -> tuple[Tensor, Tensor]:
        """x [num_rows, in_features], normalized if there is a weight, as values of 8 bits and their float32 scales.

        With `gated`, x is gate and up, and silu(gate) * up is meant.
        """
        num_rows, columns = x.shape[0], x.shape[1] // (2 if gated else 1)
        assert x.is_contiguous()
        tensors, mode = self._matrix.tensors, self._matrix.activation_scales
        values = x.new_empty(num_rows, columns, dtype=self._matrix.values_dtype)
        static, factors = tensors.get("activation_scale"), tensors.get("input_scale")
        scales = x.new_empty(self._scales_shape(num_rows), dtype=torch.float32) if static is None else static
        block = max(BLOCK_K, triton.next_power_of_2(columns))
        kernel, grid = quantize_rows_kernel, (num_rows,)
        launch: Callable[..., Any] = partial(kernel.warmup, grid=grid) if compile_only else kernel[grid]
        launch(
            x,
            x if norm_weight is None else norm_weight,
            scales if factors is None else factors,
            values,
            scales,
            scales,
            eps,
            columns,
            BLOCK=block,
            LARGEST=127.0 if values.dtype == torch.int8 else 448.0,
            GROUP=BLOCK_K if mode == "block" else block,
            NORM=norm_weight is not None,
            FACTORS=factors is not None,
            STATIC=static is not None,
            GATED=gated,
            PDL=self._kernels.pdl,
            ON_GPU=self._kernels.counters.device.type == "cuda",
            num_warps=min(max(block // 512, 1), 16),
            launch_pdl=self._kernels.pdl,
        )
        return values, scales

    def _scales_shape(self, num_rows: int) -> tuple[int, ...]:
        mode = self._matrix.activation_scales
        if mode == "tensor":
            return (1,)
        return (num_rows, triton.cdiv(self._matrix.shape[1], BLOCK_K)) if mode == "block" else (num_rows,)

    def _multiply(
        self,
        x: Tensor,
        x_scales: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: LinearConfig,
        add: bool = False,
        gated: bool = False,
    ) -> None:
        if isinstance(config, PackedConfig):
            self._launch(x, x_scales, bias, out, config, add)
        elif isinstance(config, HopperScaledConfig):
            cut = (config.block_m, config.block_n, config.split_k)
            hopper_scaled.multiply(x, x_scales, self._matrix, bias, out, *cut, gated, add, self._kernels.pdl)
        elif not self._multiply_by_library(x, x_scales, bias, out, config, add):
            self._launch(x, x_scales, bias, out, _MANY_ROWS, add)

    def _multiply_by_library(
        self, x: Tensor, x_scales: Tensor, bias: Tensor | None, out: Tensor, config: LinearConfig, add: bool
    ) -> bool:
        """The product by cuBLASLt; False if it has none for such operands."""
        in_blocks = "block" in (self._matrix.weight_scales, self._matrix.activation_scales)
        if x.dtype != torch.float8_e4m3fn or in_blocks or any(size % 16 for size in self._matrix.shape):
            return False
        weight, scales = self._matrix.tensors["weight"], self._matrix.tensors["weight_scale"]
        return self._kernels.multiply_fp8(x, x_scales, weight, scales, bias, out, config, add)

    def _launch(
        self,
        x: Tensor,
        x_scales: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: PackedConfig,
        add: bool,
        compile_only: bool = False,
    ) -> None:
        num_rows, n = out.shape
        columns = x.shape[1]
        assert x.shape == (num_rows, columns)
        assert self._matrix.shape == (n, columns)
        row_blocks, tiles = triton.cdiv(num_rows, config.block_m), triton.cdiv(n, config.block_n)
        turns = triton.cdiv(columns, BLOCK_K)
        split_k = triton.cdiv(turns, triton.cdiv(turns, config.split_k))
        partials = x_scales
        if split_k > 1:
            assert row_blocks * tiles <= MAX_SPLIT_TILES, (config, out.shape)
            size = split_k * row_blocks * tiles * config.block_m * config.block_n
            partials = x.new_empty(size, dtype=torch.int32 if x.dtype == torch.int8 else torch.float32)
        grid = (row_blocks, split_k, tiles)
        launch: Callable[..., Any] = partial(scaled_kernel.warmup, grid=grid) if compile_only else scaled_kernel[grid]
        launch(
            x,
            x_scales,
            self._matrix.tensors["weight"],
            self._matrix.tensors["weight_scale"],
            out if bias is None else bias,
            out,
            partials,
            self._kernels.counters,
            num_rows,
            n,
            out.stride(0),
            K=columns,
            X_MODE=self._matrix.activation_scales,
            W_MODE=self._matrix.weight_scales,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=BLOCK_K,
            SPLIT_K=split_k,
            NUM_STAGES=config.num_stages,
            PDL=self._kernels.pdl,
            BIAS=bias is not None,
            ADD=add,
            num_warps=config.num_warps,
            launch_pdl=self._kernels.pdl,
        )


def gather_scaled_rows(matrix: ScaledMatrix, ids: Tensor, out: Tensor) -> None:
    """Write the weights of the rows that `ids` names, integers [num_rows], to `out` [num_rows, in_features].

    A row is what `WeightFormat.dequantize` makes of it.
    """
    columns = matrix.shape[1]
    assert out.is_contiguous()
    block = min(1024, triton.next_power_of_2(columns))
    factors = matrix.tensors.get("input_scale")
    look_up_kernel[len(out), triton.cdiv(columns, block)](
        ids,
        matrix.tensors["weight"],
        matrix.tensors["weight_scale"],
        matrix.tensors["weight_scale"] if factors is None else factors,
        out,
        K=columns,
        MODE=matrix.weight_scales,
        FACTORS=factors is not None,
        BLOCK=block,
        num_warps=4,
    )
