"""The product of 8-bit operands for Hopper: what its programs are told to compute, and its results on such a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.kernels import hopper_few, hopper_packed, hopper_scaled
from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.cuda_program import Launch
from llmengine.kernels.gemm_candidates import candidates
from llmengine.kernels.gemm_config import GemmShape, HopperScaledConfig, PackedConfig, parse_config
from llmengine.kernels.hopper_scaled import OUTPUTS, SPLITS, has_hopper_scaled, shared_bytes
from llmengine.kernels.scaled_weights import ScaledMatrix
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import Int8W8A8
from tests.kernels.hopper_cases import needs_hopper
from tests.kernels.test_scaled_linear import FORMATS, Case, stored

MAX_SHARED = 227 << 10
NUM_SMS = 132
CUTS = [(rows, outputs) for rows, all_outputs in OUTPUTS.items() for outputs in all_outputs]
CONFIGS = [HopperScaledConfig(*cut, split) for cut in CUTS for split in SPLITS]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_programs_fit_on_a_multiprocessor(cut: tuple[int, int]) -> None:
    rows, outputs = cut
    assert shared_bytes(rows, outputs) <= MAX_SHARED
    # Sums lie where the boxes were, before the barriers.
    macros = dict(hopper_scaled._macros((True, False, False), torch.bfloat16, rows, outputs))
    assert int(macros["STAGES"]) >= 3
    assert rows * (outputs + 4) * 4 <= int(macros["STAGES"]) * (rows + outputs) * 128
    width = outputs // 2 if rows == 64 else outputs
    # PTX ISA, wgmma: the N of products of integers; an operand's rows begin where the swizzle does.
    assert width in (8, 16, 24, 32, *range(48, 257, 16))
    assert width % 8 == 0


def test_candidates_for_hopper_only_where_it_is_hopper() -> None:
    shape = GemmShape("norm_linear", 256, 6144, 4096, torch.bfloat16, torch.bfloat16, Fp8())
    tried = candidates(shape, MAX_SHARED, NUM_SMS, compiles_cuda=True)
    assert any(isinstance(config, HopperScaledConfig) for config in tried)
    assert isinstance(tried[0], CublasConfig), "which was the fastest from 256 rows on"
    for config in [*tried, *CONFIGS]:
        assert parse_config(str(config)) == config
    for elsewhere in (candidates(shape, MAX_SHARED, 0, True), candidates(shape, MAX_SHARED, NUM_SMS, False)):
        assert any(isinstance(config, PackedConfig) for config in elsewhere)
        assert not any(isinstance(config, HopperScaledConfig) for config in elsewhere)


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("num_rows", [1, 64, 300, 8192])
def test_a_float32_model_has_no_candidate_that_reads_biases_of_16_bits(
    weight_format: WeightFormat, num_rows: int
) -> None:
    shape = GemmShape("norm_linear", num_rows, 6144, 4096, torch.float32, torch.float32, weight_format)
    for found in (candidates(shape, MAX_SHARED, NUM_SMS, compiles_cuda=True), candidates(shape, MAX_SHARED)):
        assert found
        assert all(isinstance(config, PackedConfig) for config in found)
    # Logits are float32 in a model whose biases have 16 bits, too.
    logits = replace(shape, dtype=torch.bfloat16)
    assert any(isinstance(one, HopperScaledConfig) for one in candidates(logits, MAX_SHARED, NUM_SMS, True))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_would_be_misread_is_refused(out_dtype: torch.dtype) -> None:
    matrix = ScaledMatrix(Fp8(), (64, 128), "cpu")
    x, out = torch.zeros(3, 128).to(torch.float8_e4m3fn), torch.empty(3, 64, dtype=out_dtype)
    for dtype in {torch.float32, torch.float16} if out_dtype == torch.bfloat16 else {torch.float32}:
        with pytest.raises(AssertionError, match=r"float32 would be read|float16"):
            hopper_scaled.multiply(x, torch.ones(3), matrix, torch.ones(64, dtype=dtype), out, 64, 64)


@pytest.mark.parametrize("weight_format", [Fp8(), Fp8("block", "block"), Int8W8A8("channel", "token")], ids=str)
@pytest.mark.parametrize("num_rows", [1, 16, 64, 128, 300, 2048])
def test_candidates_can_be_run(weight_format: WeightFormat, num_rows: int) -> None:
    for n, k in ((6144, 4096), (576, 1536), (4096, 14336)):
        shape = GemmShape("linear_add", num_rows, n, k, torch.bfloat16, torch.bfloat16, weight_format)
        found = candidates(shape, MAX_SHARED, NUM_SMS, compiles_cuda=True)
        tried = [config for config in found if isinstance(config, HopperScaledConfig)]
        assert tried
        for config in tried:
            assert config in CONFIGS
            assert has_hopper_scaled(weight_format, k, config.block_m, config.block_n)
    odd = GemmShape("linear_add", num_rows, 64, 1003, torch.bfloat16, torch.bfloat16, weight_format)
    assert not any(isinstance(one, HopperScaledConfig) for one in candidates(odd, MAX_SHARED, NUM_SMS, True))


class _Map:
    """In place of a tensor's map: boxes of it, with zeros beyond."""

    def __init__(self, tensor: Tensor, box_rows: int, box_columns: int) -> None:
        assert box_rows <= 256
        self.box = (box_rows, box_columns)
        rows, columns = tensor.shape
        self._padded = torch.zeros(rows + 2048, columns + box_columns)
        self._padded[:rows, :columns] = tensor.float()

    def getPtr(self) -> int:
        return 0

    def at(self, column: int, row: int) -> Tensor:
        return self._padded[row : row + self.box[0], column : column + self.box[1]]


class _Program:
    """In place of the kernel: does in torch what its programs do with their arguments, cluster by cluster."""

    def __init__(self, rows: int, outputs: int, maps: list[_Map], out: Tensor, sides: tuple[Tensor, Tensor]) -> None:
        self._rows, self._outputs = rows, outputs
        self._maps = maps
        self._out = out
        self._x_scales, self._weight_scales = (side.reshape(-1).float() for side in sides)
        self.written = torch.zeros(out.shape, dtype=torch.int32)

    def launch(self, launch: Launch, pointers: Sequence[int]) -> None:
        arguments = hopper_scaled._Arguments.from_address(pointers[2])
        assert launch.cluster == arguments.num_splits
        assert launch.grid[0] % arguments.num_splits == 0
        num_clusters = launch.grid[0] // arguments.num_splits
        assert arguments.num_splits == 1 or num_clusters == arguments.num_tiles, "splits compute one tile each"
        assert arguments.num_splits > 1 or launch.grid[0] <= NUM_SMS
        assert arguments.x_box_bytes == self._maps[0].box[0] * 128
        for first in range(num_clusters):
            for tile in range(first, arguments.num_tiles, num_clusters):
                self._tile(arguments, tile)

    def _tile(self, arguments: Any, tile: int) -> None:
        x_map, weight_map = self._maps
        row = tile % arguments.row_tiles * self._rows
        results = self._outputs // (2 if arguments.is_gated else 1)
        output = tile // arguments.row_tiles * results
        sums = torch.zeros(self._rows, self._outputs)
        done = 0
        for split in range(arguments.num_splits):
            first = split * arguments.split_blocks
            for block in range(first, min(first + arguments.split_blocks, arguments.num_blocks)):
                x = x_map.at(block * 128, row)
                # Of a gated product, each warpgroup's gates and then what they multiply.
                boxes = range(self._outputs // weight_map.box[0])
                firsts = [
                    output + box // 2 * weight_map.box[0] + box % 2 * arguments.num_outputs
                    if arguments.is_gated
                    else output
                    for box in boxes
                ]
                weights = torch.cat([weight_map.at(block * 128, first) for first in firsts])
                sums[: len(x)] += x @ weights.T
                done += 1
        assert done == arguments.num_blocks
        rows = slice(row, min(row + self._rows, arguments.num_rows))
        columns = slice(output, min(output + results, arguments.num_outputs))
        if columns.start >= columns.stop:
            return
        x_scales = self._x_scales[torch.arange(rows.start, rows.stop) * arguments.x_scale_stride]

        def scaled(sums: Tensor, first: int) -> Tensor:
            outputs = torch.arange(columns.start, columns.stop) + first
            part = sums[: rows.stop - rows.start, : columns.stop - columns.start]
            return part * x_scales[:, None] * self._weight_scales[outputs * arguments.weight_scale_stride]

        if arguments.is_gated:
            halves = sums.view(self._rows, -1, 2, weight_map.box[0])
            gate, up = (halves[:, :, half].reshape(self._rows, -1) for half in range(2))
            result = torch.nn.functional.silu(scaled(gate, 0)) * scaled(up, arguments.num_outputs)
        else:
            result = scaled(sums, 0)
        self._out[rows, columns] = result + (self._out[rows, columns] if arguments.adds else 0.0)
        self.written[rows, columns] += 1


@pytest.mark.parametrize("weight_format", [Fp8(), Fp8("tensor", "tensor"), Int8W8A8("channel", "token")], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_rows", [1, 70, 300])
def test_every_result_is_computed_once_from_all_columns(
    monkeypatch: pytest.MonkeyPatch, weight_format: WeightFormat, num_rows: int, gated: bool
) -> None:
    torch.manual_seed(num_rows)
    n, k = (296 if gated else 592), 1040
    matrix = ScaledMatrix(weight_format, (592, k), "cpu")
    matrix.fill(stored(weight_format, torch.randn(592, k) * 0.1))
    x = (torch.randn(num_rows, k) * 20).to(matrix.values_dtype)
    x_scales = torch.rand(1 if weight_format.activations == "tensor" else num_rows)  # type: ignore[attr-defined]
    weight = matrix.tensors["weight"].float() * matrix.tensors["weight_scale"].view(-1, 1)
    expected = (x.float() * x_scales.view(-1, 1)) @ weight.T
    if gated:
        expected = torch.nn.functional.silu(expected[:, :n]) * expected[:, n:]
    monkeypatch.setattr(hopper_scaled, "_num_sms", lambda device: NUM_SMS)
    runnable = [one for one in CONFIGS if has_hopper_scaled(weight_format, k, one.block_m, one.block_n)]
    for config in runnable[num_rows % 7 :: 7]:
        out = torch.randn(num_rows, n)
        maps: list[_Map] = []

        def kept_map(tensor: Tensor, rows: int, columns: int, maps: list[_Map] = maps) -> _Map:
            maps.append(_Map(tensor, rows, columns))
            return maps[-1]

        program = _Program(config.block_m, config.block_n, maps, out, (x_scales, matrix.tensors["weight_scale"]))
        monkeypatch.setattr(hopper_scaled, "box_map", kept_map)
        monkeypatch.setattr(hopper_scaled, "_function", lambda macros, device, program=program: program)
        wanted = expected if gated else expected + out
        cut = (config.block_m, config.block_n, config.split_k)
        hopper_scaled.multiply(x, x_scales, matrix, None, out, *cut, gated=gated, add=not gated)
        assert bool((program.written == 1).all()), config
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("module", [hopper_few, hopper_packed, hopper_scaled], ids=lambda one: one.__name__)
def test_the_kernel_and_python_agree_on_the_arguments(module: Any) -> None:
    """Names and order of `Arguments` in the source."""
    text = module.program_text(f"{module.__name__.rpartition('.')[2]}.cu")
    body = text[text.index("struct Arguments {") : text.index("};", text.index("struct Arguments {"))]
    kinds = {ctypes.c_int32: "int", ctypes.c_int64: "long long", ctypes.c_void_p: "*"}
    lines = [line.split(";")[0] for line in body.splitlines() if ";" in line]
    assert len(lines) == len(module._Arguments._fields_)
    for line, (name, kind) in zip(lines, module._Arguments._fields_, strict=True):
        assert line.split()[-1] == name
        assert kinds[kind] in line


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        ((False, False, False), CUTS[::6]),
        *(pytest.param(kind, CUTS, marks=pytest.mark.slow) for kind in ((True, False, False), (False, True, True))),
        pytest.param((False, False, False), CUTS, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_source_compiles_without_spilling_the_products(
    kind: tuple[bool, bool, bool], cuts: Sequence[tuple[int, int]], tmp_path: Path
) -> None:
    for rows, outputs in cuts:
        weight_format = Int8W8A8("channel", "token") if kind[0] else Fp8("block", "block") if kind[2] else Fp8()
        if not has_hopper_scaled(weight_format, 4096, rows, outputs):
            continue
        file = tmp_path / "program.cu"
        file.write_text(hopper_scaled.source(dict(hopper_scaled._macros(kind, torch.bfloat16, rows, outputs))))
        command = ["nvcc", "-arch=sm_90a", "--cubin", "-Xptxas", "-v", "-o", str(file.with_suffix(".cubin")), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "C75" not in done.stderr, "products are serialized"


@needs_hopper
@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_operation_on_hopper(device: str, weight_format: WeightFormat, cut: tuple[int, int]) -> None:
    for n, k in ((576, 1536), (328, 1168), (1024, 4096)):
        if not has_hopper_scaled(weight_format, k, *cut):
            continue
        plain = Case(device, weight_format, 600, n, k, gated=False)
        gated = Case(device, weight_format, 600, n, k, gated=True)
        for split in SPLITS:
            config = HopperScaledConfig(*cut, split)
            for num_rows in (5, 33, 128, 600):
                plain.check("norm_linear", config, bias=True, num_rows=num_rows)
                plain.check("linear_add", config, bias=False, num_rows=num_rows)
            gated.check("norm_linear_silu", config, bias=True, num_rows=70)


@needs_hopper
@pytest.mark.parametrize("is_int", [False, True])
def test_results_are_the_same_in_every_run(device: str, is_int: bool) -> None:
    """Of as many tiles as a prompt has, on which copies and products meet in every way."""
    weight_format: WeightFormat = Int8W8A8("channel", "token") if is_int else Fp8()
    case = Case(device, weight_format, 2048, 4096, 4096, gated=False)
    for cut in CUTS:
        for split in SPLITS if has_hopper_scaled(weight_format, 4096, *cut) else ():
            first: Tensor | None = None
            for _ in range(5):
                out = torch.empty(2048, 4096, device=device, dtype=torch.float32)
                config = HopperScaledConfig(*cut, split)
                case.products.norm_linear(case.x, None, 0.0, None, out, config)
                first = out if first is None else first
                assert torch.equal(out, first), config
