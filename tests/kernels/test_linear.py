"""Fused matrix products against their references, on ragged sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, Operation, SkinnyConfig
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.kernels.linear_ops import LinearOps
from llmengine.quantization.matrix import Matrix

EPS = 1e-5
ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
GEMV = SkinnyConfig(block_m=1, block_n=8, block_k=32, num_warps=4, num_stages=1)
DOT = SkinnyConfig(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=3)
CONFIGS = [CublasConfig(), GEMV, DOT, replace(DOT, block_m=32, fuse_norm=False)]
SPLIT_CONFIGS = [CublasConfig(), GEMV, DOT, replace(DOT, split_k=3), replace(GEMV, split_k=2)]
SIZES = [(40, 64), (21, 104), (16, 8)]
"""(N, K): whole blocks of K, the last partial blocks of both, and less than one block of K."""


class Case:
    """Random operands of one product; `run` returns the result of an operation."""

    def __init__(self, device: str, num_rows: int, n: int, k: int, dtype: torch.dtype, gated: bool = False) -> None:
        generator = torch.Generator(device).manual_seed(num_rows * 7919 + n * 31 + k)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        self.kernels = LinearKernels(device)
        self.n = n
        self.x = draw(num_rows, k, scale=3.0)
        self.norm_weight = draw(k)
        self.weight = draw(2 * n if gated else n, k, scale=k**-0.5)
        self.bias = draw(len(self.weight))
        self.residual = draw(num_rows, n)

    def run(
        self, operation: Operation, config: LinearConfig, x: Tensor, norm: bool, bias: Tensor | None, out: Tensor
    ) -> Tensor:
        if operation == "linear_add":
            self.kernels.linear_add(x, self.weight, bias, out, config)
        elif operation == "norm_linear":
            norm_weight = self.norm_weight if norm else None
            self.kernels.norm_linear(x, norm_weight, EPS, self.weight, bias, out, config)
        else:
            self.kernels.norm_linear_silu(x, self.norm_weight, EPS, self.weight, bias, out, config)
        return out

    def check(self, operation: Operation, config: LinearConfig, norm: bool, bias: bool, out: Tensor) -> None:
        """Run and compare; an operation that adds its residual writes to `out`."""
        used_bias = self.bias if bias else None
        expected = linear_reference(
            operation,
            self.x,
            self.norm_weight if norm else None,
            EPS,
            self.weight,
            used_bias,
            out if operation == "linear_add" else None,
        )
        actual = self.run(operation, config, self.x, norm, used_bias, out)
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual.float(), expected, rtol=0.0, atol=TOLERANCE[self.x.dtype] * scale)


def rows_of(config: LinearConfig) -> int:
    """Return a number of rows that does not fill a block of `config`."""
    return 1 if isinstance(config, SkinnyConfig) and config.block_m == 1 else 5


def names(config: object) -> str:
    return str(config).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_norm_linear(device: str, config: LinearConfig, n: int, k: int, dtype: torch.dtype) -> None:
    case = Case(device, rows_of(config), n, k, dtype)
    for norm, bias, out_dtype in ((True, False, dtype), (True, True, torch.float32), (False, True, dtype)):
        out = torch.full_like(case.residual, torch.nan, dtype=out_dtype)
        case.check("norm_linear", config, norm, bias, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("config", SPLIT_CONFIGS, ids=names)
def test_linear_add(device: str, config: LinearConfig, n: int, k: int, dtype: torch.dtype) -> None:
    case = Case(device, rows_of(config), n, k, dtype)
    # Twice: a split must leave its counters as it found them.
    for bias in (False, True):
        case.check("linear_add", config, False, bias, case.residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_norm_linear_silu(device: str, config: LinearConfig, n: int, k: int, dtype: torch.dtype) -> None:
    case = Case(device, rows_of(config), n, k, dtype, gated=True)
    for bias in (False, True):
        case.check("norm_linear_silu", config, True, bias, torch.full_like(case.residual, torch.nan))


@pytest.mark.parametrize("config", SPLIT_CONFIGS, ids=names)
def test_rows_as_they_are(device: str, config: LinearConfig) -> None:
    """The products of a shard: nothing is added, and nothing normalized."""
    case = Case(device, rows_of(config), 24, 72, torch.float16)
    for _ in range(2):
        out = torch.full_like(case.residual, torch.nan)
        LinearOps(case.kernels, lambda _: config).linear(Matrix.dense(case.weight), case.bias)(case.x, out)
        expected = linear_reference("norm_linear", case.x, None, EPS, case.weight, case.bias)
        torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=2e-3 * float(expected.abs().max()))
    if isinstance(config, SkinnyConfig) and config.split_k > 1:
        return
    gated = Case(device, rows_of(config), 24, 72, torch.float16, gated=True)
    out = torch.full_like(gated.residual, torch.nan)
    LinearOps(gated.kernels, lambda _: config).norm_linear_silu(None, EPS, Matrix.dense(gated.weight))(gated.x, out)
    expected = linear_reference("norm_linear_silu", gated.x, None, EPS, gated.weight, None)
    torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("operation", ["norm_linear", "linear_add", "norm_linear_silu"])
def test_a_row_does_not_depend_on_the_others(device: str, operation: Operation) -> None:
    case = Case(device, 6, 24, 72, torch.float32, gated=operation == "norm_linear_silu")
    config = replace(DOT, split_k=2) if operation == "linear_add" else DOT
    whole = case.run(operation, config, case.x, True, None, case.residual.clone())
    others = case.x.clone()
    others[:4] = 1e15
    others[5] = 0.0
    changed = case.run(operation, config, others, True, None, case.residual.clone())
    assert torch.equal(whole[4], changed[4])


def test_ops_ask_for_each_number_of_rows(device: str) -> None:
    asked: list[GemmShape] = []

    def choose(shape: GemmShape) -> LinearConfig:
        asked.append(shape)
        return GEMV if shape.num_rows == 1 else CublasConfig()

    dtype = torch.float16
    case = Case(device, 3, 8, 16, dtype, gated=True)
    ops = LinearOps(case.kernels, choose)
    logits = torch.empty(1, 16, device=device)
    matrix = Matrix.dense(case.weight)
    ops.norm_linear(case.norm_weight, EPS, matrix)(case.x[:1], logits)
    ops.linear_add(Matrix.dense(case.weight[:8]))(case.x, case.residual)
    ops.norm_linear_silu(case.norm_weight, EPS, matrix)(case.x, torch.empty_like(case.residual))
    assert asked == [
        GemmShape("norm_linear", 1, 16, 16, dtype, torch.float32),
        GemmShape("linear_add", 3, 8, 16, dtype, dtype),
        GemmShape("norm_linear_silu", 3, 8, 16, dtype, dtype),
    ]
    expected = linear_reference("norm_linear", case.x[:1], case.norm_weight, EPS, case.weight, None)
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-2)
