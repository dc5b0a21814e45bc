"""GGUF's blocks in the packed layout: they come back to the last bit, and products with them equal their references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.gemm_config import HopperConfig, HopperFewConfig, LinearConfig, PackedConfig
from llmengine.kernels.hopper_few import Cut
from llmengine.kernels.hopper_packed import has_hopper_product
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.kernels.packed_linear import PackedProducts, gather_packed_rows
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.quantization.formats import Shape
from llmengine.quantization.gguf_blocks import BLOCK_SIZES, GGUF_BLOCKS
from tests import ROOT
from tests.kernels.hopper_cases import ON_HOPPER
from tests.kernels.test_packed_linear import DTYPES, ON_GPU, TOLERANCE, names
from tests.quantization.random_blocks import random_blocks

TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "TQ2_0", "MXFP4", "NVFP4"),
)
CONFIGS: list[LinearConfig] = [
    PackedConfig(8, 64, num_warps=4, num_stages=4, split_k=2),
    PackedConfig(16, 128, num_warps=8, num_stages=3),
    CublasConfig(),
]
HOPPER_CONFIGS: list[LinearConfig] = [HopperFewConfig(Cut(8, 2, 2, 8, 1)), HopperConfig(32, 2)]
"""Where the kernels for Hopper read a layout."""


def stored_blocks(type_name: str, shape: Shape) -> Tensor:
    return torch.from_numpy(random_blocks(type_name, *shape))


def packed(type_name: str, shape: Shape, stored: Tensor, dtype: torch.dtype, device: str) -> PackedMatrix:
    weight_format = GGUF_BLOCKS[type_name]
    layout = PackedLayout.of(weight_format, shape, dtype)
    assert layout is not None
    matrix = PackedMatrix(weight_format, layout, device)
    for begin in range(0, shape[0], 128):
        matrix.fill({"weight": stored[begin : begin + 128].to(device)}, begin)
    return matrix


@pytest.mark.parametrize("type_name", TYPES)
def test_blocks_come_back(device: str, type_name: str) -> None:
    for shape in ((70, 256), (256, 768), (130, 512)):
        stored = stored_blocks(type_name, shape)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            matrix = packed(type_name, shape, stored, dtype, device)
            back = matrix.stored()
            assert (back.format, back.shape, list(back.tensors)) == (GGUF_BLOCKS[type_name], shape, ["weight"])
            assert torch.equal(back.weight.cpu(), stored)


@pytest.mark.parametrize("type_name", TYPES)
def test_memory_is_that_of_the_file(type_name: str) -> None:
    shape = (1024, 2048)
    layout = PackedLayout.of(GGUF_BLOCKS[type_name], shape, torch.float16)
    assert layout is not None
    bits = 8 * sum(tensor.nbytes for tensor in layout.empty("meta").values()) / (shape[0] * shape[1])
    in_file = 8 * GGUF_BLOCKS[type_name].size_bytes(shape, "float32") / (shape[0] * shape[1])
    assert bits == pytest.approx(in_file + MORE_BITS.get(type_name, 0.0), abs=1e-3)


MORE_BITS = {
    **{"Q3_K": 0.125, "Q4_K": 0.125, "Q5_K": 0.125},
    **{"IQ4_XS": 0.0625, "TQ2_0": 0.0625, "MXFP4": 0.25},
}
"""Bits of a weight in memory that are not in the file."""


@pytest.mark.parametrize("type_name", [name for name in TYPES if BLOCK_SIZES[name][0] == 32])
def test_rows_that_do_not_fill_words(device: str, type_name: str) -> None:
    for columns in (32, 96, 288, 640):
        stored = stored_blocks(type_name, (70, columns))
        matrix = packed(type_name, (70, columns), stored, torch.float16, device)
        assert torch.equal(matrix.stored().weight.cpu(), stored)
        check_products(device, type_name, (70, columns), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("type_name", TYPES)
def test_products(device: str, type_name: str, dtype: torch.dtype) -> None:
    check_products(device, type_name, (70, 768), dtype)


def check_products(device: str, type_name: str, shape: Shape, dtype: torch.dtype) -> None:
    (n, k), num_rows = shape, 5
    torch.manual_seed(n)
    stored = stored_blocks(type_name, (n, k))
    matrix = packed(type_name, (n, k), stored, dtype, device)
    products = PackedProducts(LinearKernels(device), matrix)
    weight = GGUF_BLOCKS[type_name].dequantize({"weight": stored}).to(device)
    x = (torch.randn(num_rows, k, device=device) + 0.5).to(dtype)
    expected = linear_reference("norm_linear", x, None, 0.0, weight, None, None)
    on_hopper = ON_HOPPER and device == "cuda" and has_hopper_product(matrix.layout)
    for config in (*CONFIGS, *(HOPPER_CONFIGS if on_hopper else ())):
        out = torch.full((num_rows, n), torch.nan, dtype=torch.float32, device=device)
        products.norm_linear(x, None, 0.0, None, out, config)
        torch.testing.assert_close(out, expected, rtol=0.0, atol=TOLERANCE[dtype] * float(expected.abs().max()))
        if isinstance(config, PackedConfig | HopperFewConfig):  # whose weights are not rounded
            torch.testing.assert_close(out, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("type_name", TYPES)
def test_rows_are_looked_up(device: str, type_name: str) -> None:
    shape, ids = (200, 768), torch.tensor([3, 199, 64, 3, *range(60, 75), 0, 128], dtype=torch.int32)
    stored = stored_blocks(type_name, shape)
    expected = GGUF_BLOCKS[type_name].dequantize({"weight": stored})[ids.long()]
    for dtype in (torch.float16, torch.float32):
        # As in `test_packed_linear.py`.
        rows = len(ids) if dtype == torch.float16 or device != "cpu" else 4
        out = torch.full((rows, shape[1]), torch.nan, dtype=dtype, device=device)
        gather_packed_rows(packed(type_name, shape, stored, dtype, device), ids[:rows].to(device), out)
        torch.testing.assert_close(out.cpu(), expected[:rows].to(dtype), rtol=torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("type_name", TYPES)
def test_gated_products(device: str, type_name: str) -> None:
    n, k, num_rows, dtype = 64, 512, 3, torch.float16
    torch.manual_seed(n)
    stored = stored_blocks(type_name, (2 * n, k))
    products = PackedProducts(LinearKernels(device), packed(type_name, (2 * n, k), stored, dtype, device))
    weight = GGUF_BLOCKS[type_name].dequantize({"weight": stored}).to(device)
    x = torch.randn(num_rows, k, device=device).to(dtype)
    norm_weight = torch.rand(k, device=device).to(dtype)
    expected = linear_reference("norm_linear_silu", x, norm_weight, 1e-5, weight, None, None)
    out = torch.empty((num_rows, n), dtype=dtype, device=device)
    products.norm_linear_silu(x, norm_weight, 1e-5, None, out, CONFIGS[0])
    torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.skipif(not ON_GPU, reason="large")
@pytest.mark.parametrize("type_name", TYPES)
def test_large_products(device: str, type_name: str) -> None:
    dtype = torch.bfloat16
    for n, k in ((1088, 768), (4096, 4096)):
        stored = stored_blocks(type_name, (n, k))
        products = PackedProducts(LinearKernels(device), packed(type_name, (n, k), stored, dtype, device))
        weight = GGUF_BLOCKS[type_name].dequantize({"weight": stored}).to(device)
        for num_rows in (1, 8, 70, 300):
            x = torch.randn(num_rows, k, device=device).to(dtype)
            expected = linear_reference("norm_linear", x, None, 0.0, weight, None, None)
            for config in (*CONFIGS, PackedConfig(64, 128, 8, 3), PackedConfig(128, 128, 8, 2)):
                out = torch.empty((num_rows, n), dtype=dtype, device=device)
                products.norm_linear(x, None, 0.0, None, out, config)
                atol = TOLERANCE[dtype] * float(expected.abs().max())
                torch.testing.assert_close(out.float(), expected, rtol=0.0, atol=atol)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """With minima, pairs of steps, steps, and words that blocks share; and without tensor cores."""
    types = ["Q4_1:bfloat16", "Q2_K:bfloat16", "Q3_K:bfloat16", "INT4:float32"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_packed", *types]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == types, done.stderr
