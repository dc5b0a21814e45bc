"""Matrices of e4m3 and bfloat16 numbers in the native library: products in float32, and what comes back of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmengine.backends.cpu.native import NativeLinear
from llmengine.backends.cpu.native_library import NativeLibrary, load_native_library
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.matrix import Matrix
from tests.backends.cpu.test_native import lesser_library, native_directory
from tests.backends.cpu.test_native_formats import tokens_of_all_magnitudes

__all__ = ["lesser_library", "native_directory"]

FP8 = [
    Fp8(scales, activations)  # type: ignore[arg-type]
    for scales in ("tensor", "channel", "block")
    for activations in ("none", "token", "block", "tensor")
]


def random_fp8(format: Fp8, rows: int, columns: int) -> Matrix:
    """Any e4m3 numbers, subnormal ones included."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8, generator=generator)
    signs = torch.randint(0, 2, (rows, columns), dtype=torch.uint8, generator=generator) * 128
    spec = format.tensors((rows, columns), "float32")["weight_scale"]
    tensors = {
        "weight": (codes + signs).view(torch.float8_e4m3fn),
        "weight_scale": torch.rand(spec.shape, generator=generator) * 0.01 + 0.001,
    }
    if format.activations == "tensor":
        tensors["activation_scale"] = torch.tensor([0.021])
    return Matrix(format, (rows, columns), tensors)


FLOATS = [random_fp8(format, 133, 321) for format in FP8]
FLOATS += [random_fp8(Fp8("channel", "none"), *shape) for shape in ((48, 64), (37, 83), (5, 1))]
FLOATS += [Matrix.dense(torch.randn(shape).bfloat16()) for shape in ((48, 64), (5, 1), (133, 321))]


def check_product(linear: NativeLinear, matrix: Matrix, num_tokens: int) -> None:
    """Compare with double precision, and tokens with the same ones alone."""
    weight, columns = matrix.dequantized().double(), matrix.shape[1]
    x = tokens_of_all_magnitudes(num_tokens, columns)
    values, bias = matrix.format.rounded_activations(x, matrix.tensors).double(), linear.bias
    assert bias is not None
    found = linear(x)
    bound = 2e-6 * columns**0.5 * (values.abs() @ weight.abs().T + bias.abs()) + 1e-30
    assert bool(((found - (values @ weight.T + bias)).abs() <= bound).all())
    residual = torch.randn(found.shape)
    assert torch.equal(linear(x, residual.clone()), found + residual)
    for token in range(0, num_tokens, 7):
        assert torch.equal(linear(x[token : token + 1])[0], found[token])


@pytest.mark.parametrize("matrix", [pytest.param(item, id=f"{item.format}-{item.shape}") for item in FLOATS])
def test_product(native_directory: Path, matrix: Matrix) -> None:
    bias = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(1))
    linear = NativeLinear(load_native_library(native_directory), matrix, bias)
    for num_tokens in (1, 3, 16, 65, 200):
        check_product(linear, matrix, num_tokens)
    again = linear.matrix
    assert list(again.tensors) == list(matrix.tensors)
    for suffix, tensor in matrix.tensors.items():
        assert torch.equal(again.tensors[suffix].view(torch.uint8), tensor.view(torch.uint8)), suffix


def test_lesser_variants(lesser_library: NativeLibrary) -> None:
    for matrix in FLOATS:
        linear = NativeLinear(lesser_library, matrix, torch.ones(matrix.shape[0]))
        for num_tokens in (1, 9):
            check_product(linear, matrix, num_tokens)


@pytest.mark.parametrize("format", FP8, ids=str)
def test_e4m3_activations_round_as_the_reference_does(native_directory: Path, format: Fp8) -> None:
    # Weights that pick one activation each: the results are the rounded activations.
    specs = format.tensors((150, 150), "float32")
    tensors = {
        "weight": torch.eye(150).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(specs["weight_scale"].shape),
        "activation_scale": torch.tensor([0.021]),
    }
    matrix = Matrix(format, (150, 150), {suffix: tensors[suffix] for suffix in specs})
    linear = NativeLinear(load_native_library(native_directory), matrix, None)
    x = torch.cat([tokens_of_all_magnitudes(9, 150), torch.linspace(-20.0, 20.0, 150)[None]])
    ties = torch.arange(150) * 0.021 / 2**10
    x = torch.cat([x, ties[None], ties[None] * 448 / 75 * 2**10])
    rounded = format.rounded_activations(x, matrix.tensors)
    assert torch.equal(linear(x), rounded)


@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
def test_nan_in_e4m3_weights_stays_with_its_row(native_directory: Path, scales: str) -> None:
    matrix = random_fp8(Fp8(scales, "none"), 133, 321)  # type: ignore[arg-type]
    library, x = load_native_library(native_directory), torch.randn(9, 321)
    expected = NativeLinear(library, matrix, None)(x)
    matrix.weight.view(torch.uint8)[(5, 70), (200, 3)] = torch.tensor([127, 255], dtype=torch.uint8)
    linear = NativeLinear(library, matrix, None)
    found = linear(x)
    others = [row for row in range(133) if row not in (5, 70)]
    assert torch.equal(found[:, others], expected[:, others])
    assert bool(found[:, [5, 70]].isnan().all())
    again = linear.matrix
    assert torch.equal(again.weight.view(torch.uint8), matrix.weight.view(torch.uint8))
    assert torch.equal(again.tensors["weight_scale"], matrix.tensors["weight_scale"])


def test_rows_of_bfloat16(native_directory: Path) -> None:
    weight = torch.randn(37, 83).bfloat16()
    linear = NativeLinear(load_native_library(native_directory), Matrix.dense(weight), None)
    indices = torch.tensor([36, 0, 17, 0])
    assert torch.equal(linear.rows(indices), weight.float()[indices])
