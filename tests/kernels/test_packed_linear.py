"""Packed quantized weights: what they are packed from comes back, and products with them equal their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.gemm_config import LinearConfig, Operation, PackedConfig
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.kernels.packed_linear import PackedProducts, gather_packed_rows
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4

EPS = 1e-5
ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if ON_GPU else [torch.float16, torch.float32]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
FORMATS: list[WeightFormat] = [
    *(Int4Groups(size, zero_points) for size in (16, 32, 64, 128, -1) for zero_points in (False, True)),
    Int4Groups(64, scale_dtype="float32"),
    Int4Groups(128, scale_dtype="bfloat16"),
    Int4Groups(32, input_order=True, input_scale=True),
    INT8,
    Int8Groups(32),
    Int8Groups(128, zero_points=False),
    Int8Groups(-1, input_order=True),
    Fp8("channel", "none"),
    Fp8("tensor", "none"),
    Fp8("block", "none"),
    Mxfp4(),
    Nvfp4(),
    Nvfp4("channel"),
    Bnb4Bit("nf4"),
    Bnb4Bit("nf4", 32),
    Bnb4Bit("fp4", 4096),
    Bnb4Bit("fp4", 128),
]
USUAL: list[WeightFormat] = [Int4Groups(32), Int4Groups(64, zero_points=False), INT8]
"""Formats that are multiplied in every way; the others in one."""

CONFIGS: list[LinearConfig] = [
    PackedConfig(16, 64, num_warps=4, num_stages=3),
    PackedConfig(8, 128, num_warps=8, num_stages=3, split_k=2),
    CublasConfig(),
]
LARGE_CONFIGS: list[LinearConfig] = [
    *(PackedConfig(8, 64, 4, stages, split) for stages in (4, 6) for split in (1, 4)),
    PackedConfig(16, 128, 8, 4, 2),
    PackedConfig(32, 64, 4, 3),
    PackedConfig(64, 64, 4, 3, 2),
    PackedConfig(64, 128, 8, 3),
    PackedConfig(128, 128, 8, 2),
    CublasConfig(),
]


def names(value: object) -> str:
    return str(value).removeprefix("torch.")


def random_tensors(weight_format: WeightFormat, weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a weight on the CPU, with an order and factors of columns that are not trivial."""
    tensors = weight_format.quantize(weight)
    columns = weight.shape[1]
    if "input_order" in tensors:
        tensors["input_order"] = torch.randperm(columns, dtype=torch.int32)
    if "input_scale" in tensors:
        tensors["input_scale"] = torch.rand(columns) + 0.5
    return tensors


class Case:
    """A packed matrix and random operands of up to `num_rows` rows."""

    def __init__(
        self, device: str, weight_format: WeightFormat, num_rows: int, n: int, k: int, dtype: torch.dtype, gated: bool
    ) -> None:
        torch.manual_seed(num_rows * 7919 + n * 31 + k)
        shape = (2 * n if gated else n, k)
        stored = random_tensors(weight_format, torch.randn(shape) * k**-0.5)
        layout = PackedLayout.of(weight_format, shape, dtype)
        assert layout is not None
        self.matrix = PackedMatrix(weight_format, layout, device)
        self.matrix.fill({name: tensor.to(device) for name, tensor in stored.items()})
        self.weight = weight_format.dequantize(stored).to(device)
        self.products = PackedProducts(LinearKernels(device), self.matrix)
        self.x = (torch.randn(num_rows, k, device=device) * 3).to(dtype)
        self.norm_weight = torch.rand(k, device=device).to(dtype)
        self.bias = torch.randn(shape[0], device=device).to(dtype)
        self.residual = torch.randn(num_rows, n, device=device).to(dtype)

    def check(
        self,
        operation: Operation,
        config: LinearConfig,
        bias: bool,
        out_dtype: torch.dtype,
        num_rows: int | None = None,
    ) -> None:
        x, residual = self.x[:num_rows], self.residual[:num_rows]
        used_bias = self.bias if bias else None
        norm_weight = None if operation == "linear_add" else self.norm_weight
        added = residual if operation == "linear_add" else None
        expected = linear_reference(operation, x, norm_weight, EPS, self.weight, used_bias, added)
        out = torch.full_like(residual, torch.nan, dtype=out_dtype)
        if operation == "linear_add":
            out = residual.clone()
            self.products.linear_add(x, used_bias, out, config)
        elif operation == "norm_linear":
            self.products.norm_linear(x, norm_weight, EPS, used_bias, out, config)
        else:
            self.products.norm_linear_silu(x, self.norm_weight, EPS, used_bias, out, config)
        atol = TOLERANCE[self.x.dtype] * float(expected.abs().max())
        torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("weight_format", FORMATS, ids=names)
def test_what_is_stored_comes_back(device: str, weight_format: WeightFormat) -> None:
    for shape in ((70, 48), (256, 576), (130, 512)):
        stored = random_tensors(weight_format, torch.randn(shape))
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            layout = PackedLayout.of(weight_format, shape, dtype)
            assert layout is not None
            matrix = PackedMatrix(weight_format, layout, device)
            for begin in range(0, shape[0], 128):
                part = weight_format.cut(stored, shape, "out", begin, min(begin + 128, shape[0]))
                matrix.fill({name: tensor.to(device) for name, tensor in part.items()}, begin)
            back = matrix.stored()
            assert (back.format, back.shape, list(back.tensors)) == (weight_format, shape, list(stored))
            for name, tensor in stored.items():
                assert torch.equal(back.tensors[name].cpu().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_formats_of_quantized_activations_and_dense_ones_are_not_packed() -> None:
    for weight_format in (DENSE, Int8W8A8(), Fp8()):
        assert PackedLayout.of(weight_format, (64, 64), torch.float16) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("weight_format", USUAL, ids=names)
@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_every_operation(device: str, weight_format: WeightFormat, config: LinearConfig, dtype: torch.dtype) -> None:
    """Also where gate and up do not begin with a tile, and where the last tile and the last block are not full."""
    for n, k in ((40, 80), (64, 128)):
        plain = Case(device, weight_format, 5, n, k, dtype, gated=False)
        plain.check("norm_linear", config, bias=False, out_dtype=torch.float32)
        # Twice: a split must leave its counters as it found them.
        plain.check("linear_add", config, bias=True, out_dtype=dtype)
        plain.check("linear_add", config, bias=False, out_dtype=dtype)
        gated = Case(device, weight_format, 5, n, k, dtype, gated=True)
        gated.check("norm_linear_silu", config, bias=True, out_dtype=dtype)


@pytest.mark.parametrize("weight_format", FORMATS, ids=names)
@pytest.mark.parametrize("dtype", DTYPES[:2] if ON_GPU else DTYPES[:1], ids=names)
def test_every_format(device: str, weight_format: WeightFormat, dtype: torch.dtype) -> None:
    case = Case(device, weight_format, 3, 70, 256, dtype, gated=False)
    for config in (PackedConfig(8, 64, num_warps=4, num_stages=4, split_k=2), CublasConfig()):
        case.check("linear_add", config, bias=True, out_dtype=dtype)


@pytest.mark.skipif(not ON_GPU, reason="large")
@pytest.mark.parametrize("weight_format", FORMATS, ids=names)
def test_large_products(device: str, weight_format: WeightFormat) -> None:
    for k in (576, 4096):
        plain = Case(device, weight_format, 300, 1088, k, torch.bfloat16, gated=False)
        gated = Case(device, weight_format, 300, 1088, k, torch.bfloat16, gated=True)
        for config in LARGE_CONFIGS:
            for rows in (1, 8, 70, 300):
                plain.check("linear_add", config, bias=True, out_dtype=torch.bfloat16, num_rows=rows)
                gated.check("norm_linear_silu", config, bias=False, out_dtype=torch.bfloat16, num_rows=rows)


@pytest.mark.parametrize("weight_format", FORMATS, ids=names)
def test_rows_are_looked_up(device: str, weight_format: WeightFormat) -> None:
    shape, ids = (200, 336), torch.tensor([3, 199, 64, 3, *range(60, 75), 0, 128], dtype=torch.int32)
    stored = random_tensors(weight_format, torch.randn(shape))
    expected = weight_format.dequantize(stored)[ids.long()]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layout = PackedLayout.of(weight_format, shape, dtype)
        assert layout is not None
        matrix = PackedMatrix(weight_format, layout, device)
        matrix.fill({name: tensor.to(device) for name, tensor in stored.items()})
        # The interpreter takes long for a row, and where a row lies does not depend on the dtype.
        rows = len(ids) if dtype == torch.float16 or device != "cpu" else 4
        out = torch.full((rows, shape[1]), torch.nan, dtype=dtype, device=device)
        gather_packed_rows(matrix, ids[:rows].to(device), out)
        # Numbers of tables are rounded before and after they are scaled.
        torch.testing.assert_close(out.float().cpu(), expected[:rows], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    case = Case(device, Int4Groups(32), 12, 70, 128, torch.float16, gated=False)
    config = PackedConfig(8, 64, num_warps=4, num_stages=3, split_k=2)

    def product(x: Tensor) -> Tensor:
        out = torch.empty_like(case.residual[: len(x)])
        case.products.norm_linear(x, None, 0.0, None, out, config)
        return out

    others = case.x.clone()
    others[:9] = 1e4
    others[10:] = 0.0
    assert torch.equal(product(others)[9], product(case.x)[9])
