"""Quantized matrices in the native library: products against `WeightFormat.dequantize`, and what comes back of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.cpu.linear import W8A8Linear
from llmengine.backends.cpu.native import NativeLinear, looks_up, multiplies
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY, NativeLibrary, load_native_library
from llmengine.backends.cpu.native_packing import packing_of
from llmengine.config import QuantConfig
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS, GgufBlocks
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.stacked import Stacked
from tests.backends.cpu.test_native import (
    ALL_LOGPROBS,
    SHAPES,
    lesser_library,
    native_directory,
    own_name,
    prompt,
    run_mixed_steps,
)
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, save_tiny

__all__ = ["lesser_library", "native_directory"]

FLAT_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"]
SUPER_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ2_0"]
FACTORS = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ2_0": (64,),
    "MXFP4": (),
}
"""Where blocks have float16 numbers; others have one at 0."""

SIZES = ((48, 64), (37, 82), (5, 2), (33, 568))
GROUPS: list[WeightFormat] = [
    Mxfp4(),
    *(Int4Groups(size, zero_points) for size in (16, 32, 64, 128, -1) for zero_points in (False, True)),
    *(Int4Groups(size, zero_points, scale_dtype="bfloat16") for size, zero_points in ((32, True), (128, False))),
    *(Int8Groups(size, zero_points) for size in (32, 128, -1) for zero_points in (False, True)),
    *(Int8Groups(64, zero_points, scale_dtype="float32") for zero_points in (False, True)),
]


def random_blocks(blocks: GgufBlocks, rows: int, columns: int) -> Matrix:
    """Any codes and steps, with factors that are numbers."""
    generator = torch.Generator().manual_seed(rows * columns)
    shape = (rows, columns // blocks.block_size, blocks.block_bytes)
    weight = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    for place in FACTORS.get(blocks.type_name, (0,)):
        factors = (torch.randn(*shape[:2], 1, generator=generator) * 0.02).half()
        weight[:, :, place : place + 2] = factors.view(torch.uint8)
    if blocks.type_name == "MXFP4":
        weight[:, :, 0] = weight[:, :, 0] % 12 + 116
    return Matrix(blocks, (rows, columns), {"weight": weight})


def random_matrices() -> Iterator[Matrix]:
    for name in FLAT_TYPES:
        for rows, columns in ((48, 64), (5, 32), (33, 544)):
            yield random_blocks(GGUF_BLOCKS[name], rows, columns)
    for name in SUPER_TYPES:
        for rows, columns in ((16, 256), (37, 768)):
            yield random_blocks(GGUF_BLOCKS[name], rows, columns)
    for groups in GROUPS:
        for rows, columns in SIZES:
            weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
            yield Matrix.dense(weight).quantized(groups)


MATRICES = [pytest.param(matrix, id=f"{matrix.format}-{matrix.shape}") for matrix in random_matrices()]


def rounded(x: Tensor, is_fused: bool) -> Tensor:
    """Activations [num_tokens, columns] as the library rounds them, exact: bytes with a scale for 32 columns.

    `is_fused`: whether the processor rounds a product and a sum once.
    """
    groups = F.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    limit = groups.abs().amax(2, keepdim=True).clamp(min=1e-30)
    factor = torch.tensor(127.0) / limit
    # The product of two floats is exact in double precision; ties go to even.
    products = groups.double() * factor.double() if is_fused else (groups * factor).double()
    return (products.round() * (limit / 127).double()).flatten(1)[:, : x.shape[1]]


def tokens_of_all_magnitudes(num_tokens: int, columns: int) -> Tensor:
    """Activations of tokens of very different magnitudes, one of them zeros."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, columns, generator=generator) * torch.logspace(-9, 9, num_tokens)[:, None]
    x[num_tokens // 2] = 0.0
    return x


def check_product(linear: NativeLinear, matrix: Matrix, num_tokens: int, is_fused: bool) -> None:
    """Compare with double precision, and tokens with the same ones alone."""
    weight = matrix.dequantized().double()
    # The products of a code and of its zero point may cancel.
    tolerance = 3e-5 if getattr(matrix.format, "zero_points", False) else 4e-6
    x = tokens_of_all_magnitudes(num_tokens, matrix.shape[1])
    values, bias = rounded(x, is_fused), torch.zeros(1) if linear.bias is None else linear.bias
    found = linear(x)
    bound = tolerance * (values.abs() @ weight.abs().T + bias.abs()) + 1e-30
    assert bool(((found - (values @ weight.T + bias)).abs() <= bound).all())
    residual = torch.randn(found.shape)
    assert torch.equal(linear(x, residual.clone()), found + residual)
    for token in range(0, num_tokens, 7):
        assert torch.equal(linear(x[token : token + 1])[0], found[token])


@pytest.mark.parametrize("matrix", MATRICES)
def test_product(native_directory: Path, matrix: Matrix) -> None:
    bias = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(1))
    library = load_native_library(native_directory)
    linear = NativeLinear(library, matrix, bias)
    for num_tokens in (1, 3, 16, 65, 200):
        check_product(linear, matrix, num_tokens, "generic" not in (library.variant, native_directory.name))


def test_lesser_variants(lesser_library: NativeLibrary) -> None:
    for matrix in random_matrices():
        linear = NativeLinear(lesser_library, matrix, None)
        for num_tokens in (1, 9):
            check_product(linear, matrix, num_tokens, is_fused=True)


@pytest.mark.parametrize("matrix", MATRICES)
def test_matrix_and_rows_come_back_bit_for_bit(native_directory: Path, matrix: Matrix) -> None:
    linear = NativeLinear(load_native_library(native_directory), matrix, None)
    again = linear.matrix
    assert (again.format, again.shape, list(again.tensors)) == (matrix.format, matrix.shape, list(matrix.tensors))
    for suffix, tensor in matrix.tensors.items():
        assert torch.equal(again.tensors[suffix].view(torch.uint8), tensor.view(torch.uint8)), suffix
    indices = torch.tensor([matrix.shape[0] - 1, 0, matrix.shape[0] // 2, 0])
    assert torch.equal(linear.rows(indices), matrix.dequantized()[indices])


W8A8 = [
    Int8W8A8(scales, activations, input_scale)  # type: ignore[arg-type]
    for scales in ("channel", "tensor")
    for activations in ("token", "tensor")
    for input_scale in (False, True)
]


def random_w8a8(format: Int8W8A8, rows: int, columns: int) -> Matrix:
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, columns)
    tensors = {
        "weight": torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator),
        "weight_scale": torch.rand(rows if format.scales == "channel" else 1, generator=generator) * 0.01 + 0.001,
        "activation_scale": torch.tensor([0.021]),
        "input_scale": torch.rand(columns, generator=generator) + 0.5,
    }
    return Matrix(format, shape, {suffix: tensors[suffix] for suffix in format.tensors(shape, "float32")})


@pytest.mark.parametrize("format", W8A8, ids=str)
@pytest.mark.parametrize("shape", [(37, 83), (48, 568)])
def test_w8a8_equals_torch_in_every_bit(native_directory: Path, format: Int8W8A8, shape: tuple[int, int]) -> None:
    matrix = random_w8a8(format, *shape)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
    linear, expected = NativeLinear(load_native_library(native_directory), matrix, bias), W8A8Linear(matrix, bias)
    for num_tokens in (1, 3, 16, 65, 200):
        x = tokens_of_all_magnitudes(num_tokens, shape[1])
        x[0] = torch.arange(shape[1]) * 0.021 / 2  # ties, and values that saturate
        found = linear(x)
        assert torch.equal(found, expected(x))
        residual = torch.randn(num_tokens, shape[0])
        assert torch.equal(linear(x, residual.clone()), expected(x, residual.clone()))
        for token in range(0, num_tokens, 7):
            assert torch.equal(linear(x[token : token + 1])[0], found[token])
    for suffix, tensor in linear.matrix.tensors.items():
        assert torch.equal(tensor, matrix.tensors[suffix]), suffix


def test_w8a8_of_lesser_variants(lesser_library: NativeLibrary) -> None:
    matrix, x = random_w8a8(Int8W8A8(), 48, 568), tokens_of_all_magnitudes(9, 568)
    assert torch.equal(NativeLinear(lesser_library, matrix, None)(x), W8A8Linear(matrix, None)(x))


@pytest.mark.parametrize(("input_order", "input_scale"), [(True, False), (False, True), (True, True)])
def test_activations_are_arranged(native_directory: Path, input_order: bool, input_scale: bool) -> None:
    groups = Int4Groups(32, input_order=input_order, input_scale=input_scale)
    matrix = Matrix.dense(torch.randn(37, 82)).quantized(groups)
    tensors = dict(matrix.tensors)
    if "input_order" in tensors:
        tensors["input_order"] = torch.randperm(82, dtype=torch.int32)
    if "input_scale" in tensors:
        tensors["input_scale"] = torch.rand(82) + 0.5
    matrix = Matrix(groups, matrix.shape, tensors)
    linear = NativeLinear(load_native_library(native_directory), matrix, None)
    x = torch.randn(5, 82)
    expected = x @ matrix.dequantized().T
    assert float((linear(x) - expected).std() / expected.std()) < 0.02
    assert torch.equal(linear(x[2:3])[0], linear(x)[2])
    for suffix, tensor in linear.matrix.tensors.items():
        assert torch.equal(tensor, tensors[suffix]), suffix


def test_nan_stays_with_its_token(native_directory: Path) -> None:
    library = load_native_library(native_directory)
    x = torch.randn(9, 64)
    matrices = [random_blocks(GGUF_BLOCKS[name], 20, 64) for name in ("Q4_1", "Q8_0")]
    matrices += [random_w8a8(Int8W8A8(activations=name), 20, 64) for name in ("token", "tensor")]  # type: ignore[arg-type]
    for matrix in matrices:
        linear = NativeLinear(library, matrix, None)
        expected = linear(x)
        # With a scale for all activations, infinity saturates.
        for value in (torch.nan,) if "activation_scale" in matrix.tensors else (torch.nan, torch.inf):
            spoiled = x.clone()
            spoiled[3, 40] = value
            found = linear(spoiled)
            assert bool(found[3].isnan().all())
            assert torch.equal(found[[0, 1, 2, 4, 5, 6, 7, 8]], expected[[0, 1, 2, 4, 5, 6, 7, 8]])


def test_large_matrices_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    own_name()
    library = load_native_library(NATIVE_DIRECTORY)
    for matrix in (random_blocks(GGUF_BLOCKS["Q5_1"], 70, 96), Matrix.dense(torch.randn(70, 83)).quantized(INT8)):
        whole = NativeLinear(library, matrix, None)
        with monkeypatch.context() as patch:
            patch.setattr("llmengine.backends.cpu.native_packing._MAX_WEIGHTS", 2 * 16 * matrix.shape[1])
            pieces = NativeLinear(library, matrix, None)
            x = torch.randn(3, matrix.shape[1])
            assert torch.equal(pieces(x), whole(x))
            assert torch.equal(pieces.matrix.weight, matrix.weight)


@pytest.mark.parametrize("shape", ["gqa", "biases", "tied"])
@pytest.mark.parametrize("config", [{"group_size": 32}, {"group_size": 16, "symmetric": True}, {"scales": "channel"}])
def test_a_model_computes_nearly_as_torch(
    tmp_path: Path, native_directory: Path, shape: str, config: dict[str, Any]
) -> None:
    quant = QuantConfig(weights="int4", method="rtn", **config)
    save_tiny(tmp_path, seed=1, **SHAPES[shape])
    native = load_tiny(tmp_path, quant=quant, native_directory=native_directory, num_threads=2)
    assert "steps in the native decoder" in native.info.description
    assert "slow" not in native.info.description
    expected = load_tiny(tmp_path, quant=quant, native_directory=NO_NATIVE)
    for (name, found), (_, stored) in zip(native.weights(), expected.weights(), strict=True):
        assert torch.equal(found, stored), name
    # Logits of a prompt, so that no choice in between can differ.
    for length in (1, 21, 100):
        logprobs = []
        for backend in (native, expected):
            driver = BackendDriver(backend)
            entry = driver.step((driver.add(0, prompt(length), ALL_LOGPROBS), length)).logprobs[0][0]
            logprobs.append(dict(zip(entry.top_ids, entry.top_logprobs, strict=True)))
        errors = [abs(value - logprobs[1][token]) for token, value in logprobs[0].items() if token in logprobs[1]]
        assert len(errors) > 10
        assert 0 < max(errors) < 0.2


def test_number_of_threads_and_neighbours_change_no_bit(tmp_path: Path) -> None:
    own_name()
    quant = QuantConfig(weights="int4", method="rtn", group_size=32)
    save_tiny(tmp_path, hidden_size=192, intermediate_size=640)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            backend = load_tiny(tmp_path, num_threads=num_threads, quant=quant)
            results.append(run_mixed_steps(backend))
            backend.close()
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_which_formats_there_are() -> None:
    types = {name for name, blocks in GGUF_BLOCKS.items() if packing_of(blocks) is not None}
    assert types == {*FLAT_TYPES, *SUPER_TYPES}
    assert multiplies(INT8)
    assert not looks_up(INT8)
    assert looks_up(GGUF_BLOCKS["Q6_K"])
    assert multiplies(Mxfp4())
    assert multiplies(Fp8())
    assert not looks_up(Fp8())
    q4, q6, q2 = (GGUF_BLOCKS[name] for name in ("Q4_K", "Q6_K", "IQ2_XS"))
    assert multiplies(Stacked.of_rows([(256, q4), (128, q4), (128, q6)]))
    assert not multiplies(Stacked.of_rows([(256, q4), (128, q2)]))
    assert not multiplies(Stacked.of_rows([(32, q4)] * 4))
    assert multiplies(Int8W8A8())
    assert not looks_up(Int8W8A8())
    assert multiplies(Int4Groups(input_order=True, input_scale=True))
    assert not looks_up(Int4Groups(input_order=True))
    assert not looks_up(Int4Groups(input_scale=True))
    assert not multiplies(Int4Groups(16, scale_dtype="bfloat16"))
