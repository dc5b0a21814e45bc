"""The product of packed weights and a few rows for Hopper: how it is cut up, what its threads hold, its results."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.kernels import hopper_few
from llmengine.kernels.gemm_candidates import candidates
from llmengine.kernels.gemm_config import GemmShape, HopperFewConfig, Operation, PackedConfig, parse_config
from llmengine.kernels.hopper_few import STRIP, Cut
from llmengine.kernels.hopper_packed import has_hopper_product
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.int4 import Int4Groups, pack_nibbles
from llmengine.quantization.int8 import INT8
from tests.kernels.hopper_cases import FORMATS, LAYOUTS, MAX_SHARED, SHORT_LAYOUTS, ExactCase, needs_hopper
from tests.kernels.test_packed_linear import Case, names

CUTS = [
    *(Cut(rows, 2, 2, 8, 1) for rows in (1, 8)),
    *(Cut(rows, 4, 1, 8, 2) for rows in (1, 8)),
    *(Cut(rows, 6, 3, 8, 1) for rows in (1, 8)),
    *(Cut(rows, 14, 2, 16, 1) for rows in (1, 8)),
    *(Cut(8, strips, 1, 8, 1) for strips in (1, 14)),
    *(Cut(16, 2, chunk, 8, 1) for chunk in (1, 2)),
    Cut(1, 16, 4, 8, 1),
]
SHAPES: list[tuple[Operation, int, int]] = [
    ("norm_linear", 6144, 4096),
    ("linear_add", 4096, 4096),
    ("norm_linear_silu", 14336, 4096),
    ("linear_add", 4096, 14336),
    ("norm_linear", 128256, 4096),
    ("linear_add", 8192, 14336),
    ("norm_linear_silu", 8192, 2048),
    ("linear_add", 576, 1536),
    ("norm_linear_silu", 1536, 576),
]


@pytest.mark.parametrize("weight_format", [Int4Groups(128), Int4Groups(32), INT8], ids=names)
@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_candidates_fit_and_give_each_multiprocessor_work(weight_format: WeightFormat, num_rows: int) -> None:
    for operation, n, k in SHAPES:
        shape = GemmShape(operation, num_rows, n, k, torch.bfloat16, torch.bfloat16, weight_format)
        layout = shape.layout
        assert layout is not None
        tried = candidates(shape, MAX_SHARED, 132, compiles_cuda=True)
        few = [config for config in tried if isinstance(config, HopperFewConfig)]
        assert bool(few) == has_hopper_product(layout)
        assert any(isinstance(config, PackedConfig) for config in tried)
        for config in few:
            assert parse_config(str(config)) == config
            cut = config.cut
            assert cut.rows >= num_rows
            assert cut.num_slots(layout) >= 1
            programs = -(-shape.matrix_shape[0] // (STRIP * cut.strips))
            assert programs <= 2 * 132 or cut.strips == 16
        for elsewhere in (candidates(shape, MAX_SHARED, 0, True), candidates(shape, MAX_SHARED, 132, False)):
            assert not any(isinstance(config, HopperFewConfig) for config in elsewhere)


def test_more_rows_have_other_kernels() -> None:
    shape = GemmShape("norm_linear", 9, 6144, 4096, torch.bfloat16, torch.bfloat16, Int4Groups(128))
    assert not any(isinstance(config, HopperFewConfig) for config in candidates(shape, MAX_SHARED, 132, True))


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, astuple(cut))))
def test_programs_fit_on_a_multiprocessor(cut: Cut) -> None:
    for layout in [*LAYOUTS, *SHORT_LAYOUTS]:
        if cut.num_slots(layout) > 0:
            # 228 KiB, of which 1 KiB for each program is the system's.
            assert cut.programs * (cut.shared_bytes(layout, cut.rows) + 1024) <= 228 << 10


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("weight_format", [Int4Groups(128), Int4Groups(32, zero_points=False), INT8], ids=names)
def test_threads_hold_what_the_tensor_cores_multiply(weight_format: WeightFormat, num_rows: int) -> None:
    """A warp's product of one strip and one block, from what its lanes find at the kernel's addresses.

    The layouts of `ldmatrix` and of the operands and sums of `mma.m16n8k16` are those of the PTX ISA.
    """
    torch.manual_seed(num_rows)
    layout = PackedLayout.of(weight_format, (64, 512), torch.bfloat16)
    assert layout is not None
    codes = torch.randint(0, 16, (64, 512), dtype=torch.uint8)
    tensors = weight_format.quantize(torch.zeros(64, 512))
    tensors["weight"] = codes.view(torch.int8) if weight_format == INT8 else pack_nibbles(codes)
    matrix = PackedMatrix(weight_format, layout, "cpu")
    matrix.fill(tensors)
    x = torch.randint(-4, 5, (num_rows, 512)).float()
    for block in range(layout.num_blocks):
        columns = slice(block * layout.block_columns, (block + 1) * layout.block_columns)
        for quarter in range(4):
            words = matrix.tensors["words"][0, block, quarter * STRIP : (quarter + 1) * STRIP]
            sums = _warp_product(layout, words, x[:, columns])
            rows = slice(quarter * STRIP, (quarter + 1) * STRIP)
            expected = codes[rows, columns].float() @ x[:, columns].T
            assert torch.equal(sums[:, :num_rows], expected)
            assert not sums[:, num_rows:].any()


def _warp_product(layout: PackedLayout, words: Tensor, x: Tensor) -> Tensor:
    """Sums [16 outputs, 8 rows] of the codes in `words` [16, slice], as the lanes of a warp compute them."""
    chunks = layout.slice_columns // 8
    bits = 16 // layout.num_values
    shared = torch.empty(STRIP * chunks, 8, dtype=torch.int16)  # where 16 bytes of each copy go
    for piece in range(STRIP * chunks):
        row, chunk = piece // chunks, piece % chunks
        shared[_swizzled(row, chunk, chunks)] = words[row, chunk * 8 : chunk * 8 + 8]
    x_shared = torch.zeros(8, layout.block_columns)
    x_shared[: len(x)] = x
    sums = torch.zeros(STRIP, 8)
    at = 0  # the first of the 32 columns of x that four matrices hold
    for index in range(layout.num_values):
        for pair in range(layout.slice_columns // 32):
            of_x = [_matrix([x_shared[row, at + 8 * i : at + 8 * i + 8] for row in range(8)]) for i in range(4)]
            at += 32
            for half in range(2):
                step = 2 * pair + half
                places = [_swizzled(lane % 16, 2 * step + lane // 16, chunks) for lane in range(32)]
                held = [_matrix([shared[places[8 * i + row]] for row in range(8)]) for i in range(4)]
                numbers = [(one.int() >> bits * index & (1 << bits) - 1).float() for one in held]
                left = torch.zeros(16, 16)
                right = torch.zeros(16, 8)
                for lane in range(32):
                    group, part = lane // 4, lane % 4 * 2
                    for register in range(4):
                        row, column = group + register % 2 * 8, part + register // 2 * 8
                        left[row, column : column + 2] = numbers[register][lane]
                    for register in range(2):
                        right[part + 8 * register : part + 8 * register + 2, group] = of_x[2 * half + register][lane]
                sums += left @ right
    return sums


def _swizzled(row: int, chunk: int, chunks: int) -> int:
    """`swizzled` of packed_words.cuh, in 16 bytes."""
    return row * chunks + (chunk ^ (row & 7) if chunks == 8 else chunk ^ (row >> 1 & 3))


def _matrix(rows: list[Tensor]) -> Tensor:
    """What each lane gets of a matrix of eight rows: two numbers, [32, 2]."""
    return torch.stack(rows).view(32, 2)


@pytest.mark.skipif(
    shutil.which("nvcc") is None or shutil.which("cuobjdump") is None, reason="needs nvcc and cuobjdump"
)
@pytest.mark.parametrize(
    "layout",
    [
        *(LAYOUTS[0], SHORT_LAYOUTS[0]),
        *(pytest.param(layout, marks=pytest.mark.slow) for layout in [*LAYOUTS[8::8], *SHORT_LAYOUTS[3::3]]),
    ],
    ids=lambda layout: f"{layout.kind}-{layout.slice_columns}-{layout.block_columns}-{layout.dtype}",
)
def test_the_source_compiles_with_few_spills(layout: PackedLayout, tmp_path: Path) -> None:
    for cut in CUTS[::3]:
        if cut.num_slots(layout) < 1:
            continue
        file = tmp_path / "program.cu"
        file.write_text(hopper_few.source(dict(hopper_few._macros(layout, cut))))
        command = ["nvcc", "-arch=sm_90a", "--cubin", "--resource-usage", "-o", str(tmp_path / "cubin"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        spilled = done.stderr.split(" bytes spill stores")[0].split()[-1]
        assert int(spilled) <= 64, done.stderr


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("weight_format", FORMATS, ids=names)
def test_every_operation_on_hopper(device: str, weight_format: WeightFormat, dtype: torch.dtype) -> None:
    for n, k in ((576, 1536), (320, 1152), (960, 576), (1024, 4096)):
        plain = Case(device, weight_format, 16, n, k, dtype, gated=False)
        if not has_hopper_product(plain.matrix.layout):
            continue
        gated = Case(device, weight_format, 16, n, k, dtype, gated=True)
        for cut in CUTS:
            if cut.num_slots(plain.matrix.layout) < 1:
                continue
            config = HopperFewConfig(cut)
            for num_rows in {1, min(cut.rows, 3), cut.rows}:
                plain.check("norm_linear", config, bias=True, out_dtype=torch.float32, num_rows=num_rows)
                plain.check("linear_add", config, bias=False, out_dtype=dtype, num_rows=num_rows)
                gated.check("norm_linear_silu", config, bias=True, out_dtype=dtype, num_rows=num_rows)


@needs_hopper
@pytest.mark.parametrize("weight_format", [INT8, Int4Groups(128)], ids=names)
def test_no_copy_overtakes_what_is_read(device: str, weight_format: WeightFormat) -> None:
    case = ExactCase(device, weight_format, 32, 4096, 14336)
    for cut in CUTS:
        if cut.num_slots(case.matrix.layout) > 0:
            assert case.num_wrong(multiply(case, cut), repeats=50, num_rows=min(cut.rows, 8)) == 0, cut


def multiply(case: ExactCase, cut: Cut) -> Callable[[Tensor, Tensor], None]:
    return lambda x, out: hopper_few.multiply(x, case.matrix, None, out, cut, pdl=True)
