"""Products with activations of 8 bits, against the same values multiplied in float32."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.gemm_candidates import candidates
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, Operation, PackedConfig
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.kernels.linear_ops import LinearOps
from llmengine.kernels.norm import rms_norm_reference
from llmengine.kernels.scaled_kernels import quotients
from llmengine.kernels.scaled_linear import ScaledProducts, gather_scaled_rows
from llmengine.kernels.scaled_weights import ScaledMatrix, has_scaled_products
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8

EPS = 1e-5
NUM_SMS = 132
ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float16
FORMATS: list[WeightFormat] = [
    Fp8("channel", "token"),
    Fp8("tensor", "token"),
    Fp8("tensor", "tensor"),
    Fp8("channel", "tensor"),
    Fp8("block", "block"),
    Fp8("block", "token"),
    Int8W8A8("channel", "token"),
    Int8W8A8("tensor", "tensor", input_scale=True),
]
CONFIGS: list[LinearConfig] = [
    PackedConfig(8, 64, num_warps=4, num_stages=3),
    PackedConfig(16, 128, num_warps=8, num_stages=3, split_k=2),
    CublasConfig(),
]
LARGE_CONFIGS: list[LinearConfig] = [
    *(PackedConfig(block_m, 64, 4, 6, split) for block_m in (8, 16, 32) for split in (1, 4)),
    PackedConfig(64, 64, 4, 5),
    PackedConfig(64, 128, 8, 4, 2),
    PackedConfig(128, 128, 8, 4),
    CublasConfig(),
]
ROUNDS_PRODUCTS_OF_FMA = not ON_GPU and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
"""Triton's interpreter did, and with that, corrected quotients are not exact."""
SIZES = [(1088, 4096), (576, 1003)] if ON_GPU else [(70, 144), (144, 203)]


def stored(weight_format: WeightFormat, weight: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a weight; a scale for all activations is that of values up to 8."""
    if isinstance(weight_format, Fp8):
        tensors = Fp8(weight_format.scales, "token").quantize(weight)
    else:
        assert isinstance(weight_format, Int8W8A8)
        tensors = Int8W8A8(weight_format.scales, "token").quantize(weight)
        if weight_format.input_scale:
            tensors["input_scale"] = torch.rand(weight.shape[1]) + 0.5
    if weight_format.activations == "tensor":
        tensors["activation_scale"] = torch.tensor([8.0 / (448 if isinstance(weight_format, Fp8) else 127)])
    order = weight_format.tensors((weight.shape[0], weight.shape[1]), "float32")
    return {name: tensors[name] for name in order}


class Case:
    """A scaled matrix and random operands; `dtype` is that of activations and biases."""

    def __init__(
        self,
        device: str,
        weight_format: WeightFormat,
        num_rows: int,
        n: int,
        k: int,
        gated: bool,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        torch.manual_seed(num_rows * 7919 + n * 31 + k)
        shape = (2 * n if gated else n, k)
        self.format = weight_format
        self.stored = stored(weight_format, torch.randn(shape) * k**-0.5)
        self.matrix = ScaledMatrix(weight_format, shape, device)
        for begin in range(0, shape[0], 128):
            part = weight_format.cut(self.stored, shape, "out", begin, min(begin + 128, shape[0]))
            self.matrix.fill({name: tensor.to(device) for name, tensor in part.items()}, begin)
        self.products = ScaledProducts(LinearKernels(device), self.matrix)
        self.on_device = {name: tensor.to(device) for name, tensor in self.stored.items()}
        self.weight = weight_format.dequantize(self.on_device)
        self.x = (torch.randn(num_rows, k, device=device) * 3).to(dtype)
        self.norm_weight = torch.rand(k, device=device).to(dtype)
        self.bias = torch.randn(shape[0], device=device).to(dtype)
        self.residual = torch.randn(num_rows, n, device=device).to(dtype)

    def check(self, operation: Operation, config: LinearConfig, bias: bool, num_rows: int | None = None) -> None:
        x, residual = self.x[:num_rows], self.residual[:num_rows]
        used_bias = self.bias if bias else None
        added = residual if operation == "linear_add" else None
        normed = x.float() if operation == "linear_add" else rms_norm_reference(x, self.norm_weight, EPS)
        rounded = self.format.rounded_activations(normed, self.on_device)
        gate_up = linear_reference("norm_linear", rounded, None, EPS, self.weight, used_bias, added)
        if operation == "norm_linear_silu":
            gate, up = gate_up.chunk(2, dim=-1)
            expected = torch.nn.functional.silu(gate) * up
            out = torch.full_like(residual, torch.nan)
            self.products.norm_linear_silu(x, self.norm_weight, EPS, used_bias, out, config)
        elif operation == "linear_add":
            expected, out = gate_up, residual.clone()
            self.products.linear_add(x, used_bias, out, config)
        else:
            expected, out = gate_up, torch.full_like(residual, torch.nan, dtype=torch.float32)
            self.products.norm_linear(x, self.norm_weight, EPS, used_bias, out, config)
        # Of a norm computed another way, some values are rounded to the number beside.
        atol = 0.02 * float(expected.abs().max())
        torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=atol)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_activations_are_rounded_as_the_format_says(device: str, weight_format: WeightFormat, norm: bool) -> None:
    case = Case(device, weight_format, 5, 64, 208, gated=False)
    values, scales = case.products.quantize(case.x, case.norm_weight if norm else None, EPS)
    # On the CPU: on a GPU, torch multiplies by the reciprocal of what it should divide by.
    x, norm_weight = case.x.cpu(), case.norm_weight.cpu()
    normed = rms_norm_reference(x, norm_weight, EPS) if norm else x.float()
    if isinstance(weight_format, Int8W8A8) and weight_format.input_scale:
        normed = normed * case.stored["input_scale"]
        weight_format = Int8W8A8(weight_format.scales, weight_format.activations)
    expected = weight_format.rounded_activations(normed, case.stored).to(device)
    spread = scales.view(-1, 1) if scales.dim() == 1 else scales.repeat_interleave(128, dim=1)[:, :208]
    actual = values.float() * spread
    # A norm computed another way differs in its last bits, by which a value on the edge falls to the other side.
    same = actual.isclose(expected, rtol=1e-5) if norm else actual == expected
    assert float(same.float().mean()) > 0.98
    torch.testing.assert_close(actual, expected, rtol=0.13, atol=0.05)


@triton.jit
def _divide_kernel(x, scales, out, GROUP: tl.constexpr, SATURATE: tl.constexpr):
    group = tl.program_id(0) * 2 + tl.arange(0, 2)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out + at, quotients(tl.load(x + at), tl.load(scales + group), 448.0, SATURATE))


@pytest.mark.skipif(ROUNDS_PRODUCTS_OF_FMA, reason="an interpreter without fused products")
@pytest.mark.parametrize("saturate", [False, True])
def test_quotients_are_those_of_a_division(device: str, saturate: bool) -> None:
    """Of random numbers, of those beside where e4m3 and integers change, and of scales with few bits or all."""
    torch.manual_seed(5)
    scales = torch.rand(1024) + 1.0
    scales[:5] = torch.tensor([1.0, 1.0 + 2**-23, 2.0 - 2**-23, 2.0 - 2**-22, 1.5])
    scales[5:261] = torch.arange(128, 384).float() / 448  # of maxima in bfloat16
    exponents = torch.arange(1024) % 10 * 20 - 99  # 2^-99, the smallest scale that activations get, to 2^81
    exponents[-1] = 117
    scales = torch.ldexp(scales, exponents)
    ratios = torch.rand(1024, 512) * 448
    ratios[:, 256:384] = torch.arange(128) + 0.5
    odd, powers = torch.arange(17.0, 33.0, 2.0).repeat(16), torch.arange(-5, 11).repeat_interleave(8)
    ratios[:, 384:] = odd.ldexp(powers).clamp(max=448.0)
    x = ratios * scales[:, None] * torch.where(torch.rand(1024, 512) < 0.5, -1, 1)
    x = torch.where(torch.rand(1024, 512) < 0.3, x.nextafter(torch.tensor(torch.inf)), x)
    x[:, 0] = 0.0
    out = torch.empty_like(x, device=device)
    _divide_kernel[(512,)](x.to(device), scales.to(device), out, GROUP=512, SATURATE=saturate)
    expected = x / scales[:, None]
    if saturate:
        expected = expected.clamp(-448.0, 448.0)
        out = out.clamp(-448.0, 448.0)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.skipif(ROUNDS_PRODUCTS_OF_FMA, reason="an interpreter without fused products")
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("weight_format", [*FORMATS[:-1], Int8W8A8("channel", "tensor")], ids=str)
def test_activations_that_are_not_normed_are_rounded_exactly(device: str, weight_format: WeightFormat) -> None:
    """Also those of extreme rows, and rows that are not finite have scales that are not."""
    case = Case(device, weight_format, 1, 64, 208, gated=False)
    x = torch.randn(16, 208) * 3
    x[:8] = x[:8].bfloat16().float()  # of which many lie in the middle between two values
    x[2] *= 1e-25
    x[3] *= 1e36
    x[9] = 0.0
    x[10, 100:] *= 1e-5
    x[11:14, 7] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    values, scales = case.products.quantize(x.to(device), None, EPS)
    values, scales = values.cpu(), scales.cpu()
    expected = weight_format.rounded_activations(x, case.stored)
    if len(scales) == 1:
        assert torch.equal((values.float() * scales)[:13], expected[:13]), "infinite activations saturate"
        return
    spread = scales.view(16, -1).repeat_interleave(208 if scales.dim() == 1 else 128, dim=1)[:, :208]
    finite = torch.ones(16, dtype=torch.bool)
    finite[11:14] = False
    assert torch.equal((values.float() * spread)[finite], expected[finite])
    assert not spread[11:14, 7].isfinite().any()
    assert spread[finite].isfinite().all()


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_operation(device: str, weight_format: WeightFormat, config: LinearConfig) -> None:
    for n, k in SIZES:
        plain = Case(device, weight_format, 5, n, k, gated=False)
        plain.check("norm_linear", config, bias=False)
        # Twice: a split must leave its counters as it found them.
        plain.check("linear_add", config, bias=True)
        plain.check("linear_add", config, bias=False)
    Case(device, weight_format, 5, *SIZES[0], gated=True).check("norm_linear_silu", config, bias=True)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_a_float32_model_has_float32_biases(device: str, weight_format: WeightFormat) -> None:
    """With what is chosen first, and where cuBLASLt is asked: on a GPU it leaves such biases to our kernel."""
    n, k = SIZES[0]
    operations: tuple[Operation, ...] = ("norm_linear", "linear_add", "norm_linear_silu")
    for operation in operations:
        gated = operation == "norm_linear_silu"
        case = Case(device, weight_format, 5, n, k, gated, torch.float32)
        shape = GemmShape.of(operation, 5, case.matrix, torch.float32, torch.float32)
        for config in (*candidates(shape, 227 << 10, NUM_SMS, compiles_cuda=True)[:1], CublasConfig()):
            case.check(operation, config, bias=True)


@pytest.mark.parametrize("weight_format", [Fp8(), Fp8("block", "block"), Int8W8A8("tensor", "tensor", True)], ids=str)
def test_mlp_rounds_its_activation_where_it_is_computed(device: str, weight_format: WeightFormat) -> None:
    first = Case(device, weight_format, 5, 144, 64, gated=True)
    second = Case(device, weight_format, 5, 64, 144, gated=False)
    config = PackedConfig(8, 64, num_warps=4, num_stages=3)
    mlp = LinearOps(LinearKernels(device), lambda _: config).mlp(
        first.norm_weight, EPS, first.matrix, second.matrix, first.bias, second.bias
    )
    normed = first.format.rounded_activations(rms_norm_reference(first.x, first.norm_weight, EPS), first.on_device)
    gate, up = linear_reference("norm_linear", normed, None, EPS, first.weight, first.bias).chunk(2, dim=-1)
    inner = second.format.rounded_activations(torch.nn.functional.silu(gate) * up, second.on_device)
    expected = linear_reference("linear_add", inner, None, EPS, second.weight, second.bias, first.x)
    inner_scratch, overwritten = torch.empty(5, 144, dtype=DTYPE, device=device), torch.full_like(first.x, torch.nan)
    atol = 0.02 * float(expected.abs().max())
    LinearOps(LinearKernels(device), lambda _: config).mlp(
        first.norm_weight, EPS, first.matrix, second.matrix, first.bias, second.bias, accumulate=False
    )(first.x, inner_scratch, overwritten)
    torch.testing.assert_close(overwritten.float(), expected - first.x.float(), rtol=0.0, atol=atol)
    mlp(first.x, inner_scratch, first.x)
    torch.testing.assert_close(first.x.float(), expected, rtol=0.0, atol=atol)


@pytest.mark.skipif(not ON_GPU, reason="large")
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_large_products(device: str, weight_format: WeightFormat) -> None:
    for n, k in SIZES:
        plain = Case(device, weight_format, 300, n, k, gated=False)
        for config in LARGE_CONFIGS:
            for rows in (1, 8, 70, 300):
                plain.check("linear_add", config, bias=True, num_rows=rows)
                plain.check("norm_linear", config, bias=False, num_rows=rows)


def test_a_row_does_not_depend_on_the_others(device: str) -> None:
    case = Case(device, Fp8(), 12, 70, 144, gated=False)
    config = PackedConfig(8, 64, num_warps=4, num_stages=3, split_k=2)

    def product(x: Tensor) -> Tensor:
        out = torch.empty_like(case.residual[: len(x)])
        case.products.norm_linear(x, None, 0.0, None, out, config)
        return out

    others = case.x.clone()
    others[:9] = 1e4
    others[10:] = 0.0
    assert torch.equal(product(others)[9], product(case.x)[9])


def test_formats_without_rounded_activations_are_none_of_these() -> None:
    for weight_format in (DENSE, INT8, Int4Groups(), Fp8("channel", "none")):
        assert not has_scaled_products(weight_format)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_rows_are_looked_up(device: str, weight_format: WeightFormat) -> None:
    shape, ids = (300, 336), torch.tensor([3, 299, 128, 3, 0, 256], dtype=torch.int32)
    tensors = stored(weight_format, torch.randn(shape))
    matrix = ScaledMatrix(weight_format, shape, device)
    matrix.fill({name: tensor.to(device) for name, tensor in tensors.items()})
    expected = weight_format.dequantize(tensors)[ids.long()]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out = torch.full((len(ids), shape[1]), torch.nan, dtype=dtype, device=device)
        gather_scaled_rows(matrix, ids.to(device), out)
        torch.testing.assert_close(out.float().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
