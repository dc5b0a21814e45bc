"""The product of packed weights for Hopper: where its threads find the weights, and its results on such a GPU."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.kernels import hopper_packed
from llmengine.kernels.gemm_candidates import candidates
from llmengine.kernels.gemm_config import (
    GemmShape,
    HopperConfig,
    LinearConfig,
    Operation,
    PackedConfig,
    parse_config,
)
from llmengine.kernels.hopper_packed import EVENLY, PROGRAMS, SPLITS, has_hopper_product, shared_bytes
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.int4 import Int4Groups, pack_nibbles
from llmengine.quantization.int8 import INT8
from llmengine.quantization.nvfp4 import Nvfp4
from tests.kernels.hopper_cases import FORMATS, LAYOUTS, MAX_SHARED, SHORT_LAYOUTS, ExactCase, needs_hopper
from tests.kernels.sass import overwritten_operands
from tests.kernels.test_packed_linear import Case, names

CUTS = [(rows, programs) for rows, all_programs in PROGRAMS.items() for programs in all_programs]


def test_formats_and_shapes_that_the_kernel_reads() -> None:
    def has(weight_format: WeightFormat, columns: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        layout = PackedLayout.of(weight_format, (512, columns), dtype)
        assert layout is not None
        return has_hopper_product(layout)

    assert all(has(weight_format, 4096) for weight_format in FORMATS)
    assert has(Int4Groups(32), 576 * 2)
    assert not has(Nvfp4(), 4096), "groups of 16"
    assert not has(INT8, 4096, torch.float32)
    assert not has(Int4Groups(64, scale_dtype="float32"), 4096, torch.float16), "scales that fp16 may not hold"
    assert not has(INT8, 4096 + 4), "rows of x that do not begin at 16 bytes"


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_programs_fit_on_a_multiprocessor(cut: tuple[int, int]) -> None:
    rows, programs = cut
    for layout in LAYOUTS:
        assert shared_bytes(layout, rows, programs) <= MAX_SHARED
        # 228 KiB, of which 1 KiB for each program is the system's.
        assert programs * (shared_bytes(layout, rows, programs) + 1024) <= 228 << 10
        # A copy of x is given back when the product after it has begun.
        macros = dict(hopper_packed._macros(layout, rows, programs))
        assert int(macros["X_SLOTS"]) >= 2
        assert int(macros["WORD_SLOTS"]) >= 2


@pytest.mark.parametrize(
    "weight_format", [Int4Groups(128, zero_points=False), Int4Groups(32, zero_points=False), INT8], ids=names
)
def test_threads_hold_the_weights_that_the_tensor_cores_take_from_them(weight_format: WeightFormat) -> None:
    """The kernel's addresses, by plain arithmetic: copy with a swizzle, `ldmatrix`, value of a word, operand's place.

    The layouts of `ldmatrix` and of `wgmma`'s left operand are those of the PTX ISA.
    """
    layout = PackedLayout.of(weight_format, (64, 512), torch.bfloat16)
    assert layout is not None
    matrix = PackedMatrix(weight_format, layout, "cpu")
    codes = torch.randint(0, 16, (64, 512), dtype=torch.uint8)
    tensors = weight_format.quantize(torch.zeros(64, 512))
    tensors["weight"] = codes.view(torch.int8) if weight_format == INT8 else pack_nibbles(codes)
    matrix.fill(tensors)
    slice_columns, chunks = layout.slice_columns, layout.slice_columns // 8
    bits = 16 // layout.num_values
    for block in range(layout.num_blocks):
        # What a copy with the swizzle leaves: 16 bytes of row r at chunk c move to c ^ (address bits 7 to 9).
        tile = matrix.tensors["words"][0, block].view(64, chunks, 8)
        shared = torch.empty(64 * chunks, 8, dtype=torch.int16)
        for row in range(64):
            for chunk in range(chunks):
                place = row * chunks + chunk
                shared[place ^ (place * 16 >> 7) & (chunks - 1)] = tile[row, chunk]

        def swizzled(row: int, chunk: int, shared: torch.Tensor = shared) -> torch.Tensor:
            moved = chunk ^ (row & 7 if slice_columns == 64 else row >> 1 & 3)
            return shared[row * chunks + moved]

        for column in range(0, layout.block_columns, 16):
            index, step = column // slice_columns, column % slice_columns // 16
            for warp in range(4):
                matrices = [
                    torch.stack(
                        [swizzled(warp * 16 + lane % 16, 2 * step + lane // 16) for lane in range(i * 8, i * 8 + 8)]
                    )
                    for i in range(4)
                ]
                for lane in range(32):
                    for register in range(4):
                        pair = matrices[register][lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
                        row = warp * 16 + lane // 4 + 8 * (register & 1)
                        first = block * layout.block_columns + column + lane % 4 * 2 + 8 * (register >> 1)
                        found = (pair.int() >> bits * index) & ((1 << bits) - 1)
                        assert found.tolist() == codes[row, first : first + 2].tolist()


def test_candidates_for_hopper_only_where_it_is_hopper() -> None:
    shape = GemmShape("norm_linear", 64, 6144, 4096, torch.bfloat16, torch.bfloat16, Int4Groups(128))
    tried = candidates(shape, MAX_SHARED, 132, compiles_cuda=True)
    assert isinstance(tried[0], HopperConfig)
    assert any(isinstance(config, PackedConfig) for config in tried)
    for config in tried:
        assert parse_config(str(config)) == config
    for elsewhere in (candidates(shape, MAX_SHARED, 0, True), candidates(shape, MAX_SHARED, 132, False)):
        assert elsewhere
        assert not any(isinstance(config, HopperConfig) for config in elsewhere)


@pytest.mark.parametrize(
    ("operation", "n", "k", "fastest"),
    [
        ("norm_linear", 6144, 4096, {64: "m64p1x2", 128: "m128p1x2", 512: "m256p1"}),
        ("linear_add", 4096, 4096, {64: "m32p1x2", 128: "m64p1x2", 256: "m128p1x2", 512: "m256p1x2"}),
        ("norm_linear_silu", 14336, 4096, {64: "m64p2e", 128: "m128p1e", 256: "m256p1e", 512: "m256p1"}),
        ("linear_add", 4096, 14336, {64: "m64p1e", 128: "m64p1x2", 256: "m128p1x2", 512: "m256p1x2"}),
    ],
)
def test_what_was_fast_on_an_h200_comes_first_there(
    operation: Operation, n: int, k: int, fastest: Mapping[int, str]
) -> None:
    for weight_format in (INT8, Int4Groups(128)):
        for num_rows, name in fastest.items():
            shape = GemmShape(operation, num_rows, n, k, torch.bfloat16, torch.bfloat16, weight_format)
            assert str(candidates(shape, MAX_SHARED, 132, compiles_cuda=True)[0]) == f"hopper-{name}"


@pytest.mark.parametrize("num_rows", [32, 64, 128, 256, 512, 2048])
def test_split_programs_run_at_once(num_rows: int) -> None:
    for operation, n, k in (("norm_linear_silu", 14336, 4096), ("linear_add", 4096, 14336), ("norm_linear", 576, 1536)):
        shape = GemmShape(operation, num_rows, n, k, torch.bfloat16, torch.bfloat16, Int4Groups(128))  # type: ignore[arg-type]
        for config in candidates(shape, MAX_SHARED, 132, compiles_cuda=True):
            if isinstance(config, HopperConfig) and config.split_k > 1:
                assert config.split_k in SPLITS
                tiles = -(-n // 128) * -(-num_rows // config.block_m)
                assert tiles * config.split_k <= 132 * config.programs


PARTS = """
#include <algorithm>
#include <cstdio>
#include <cstdlib>
using std::max; using std::min;
#define __device__
#define __forceinline__ inline
struct { int x; } blockIdx, gridDim;
constexpr int ROWS = 64;
SOURCE
int main(int, char** words) {
  Arguments arguments{};
  gridDim.x = atoi(words[1]), arguments.num_blocks = atoi(words[2]), arguments.split_blocks = atoi(words[3]);
  arguments.num_splits = atoi(words[4]), arguments.total_blocks = atoi(words[5]), arguments.row_tiles = atoi(words[6]);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (Parts parts(arguments);; ++parts.tile) {
      printf("%d %d %d %d %d ", blockIdx.x, parts.tile, parts.first_block(), parts.end_block(), parts.writes_results());
      printf("%d %d %d %d\\n", parts.program(), parts.last_program(), parts.row(), parts.column());
      if (!parts.has_next()) break;
    }
}
"""


@pytest.fixture(scope="module")
def list_parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[list[int]]]:
    """The kernel's own code that says what a program computes, compiled for the host."""
    directory = tmp_path_factory.mktemp("parts")
    text = Path(hopper_packed.__file__).with_name("hopper_packed.cu").read_text()
    source = text[text.index("struct Arguments {") : text.index("struct Pipe {")]
    (directory / "parts.cpp").write_text(PARTS.replace("SOURCE", source))
    subprocess.run(["c++", "-std=c++17", "-o", directory / "parts", directory / "parts.cpp"], check=True)

    def run(*sizes: int) -> list[list[int]]:
        done = subprocess.run([directory / "parts", *map(str, sizes)], capture_output=True, text=True, check=True)
        return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]

    return run


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("tiles", "num_blocks", "split_blocks"),
    [(224, 16, 14), (224, 16, 28), (32, 56, 14), (48, 16, 6), (1, 3, 1), (7, 5, 5), (7, 5, 1), (130, 9, 70), (3, 7, 8)],
)
def test_programs_share_all_blocks(
    list_parts: Callable[..., list[list[int]]], tiles: int, num_blocks: int, split_blocks: int
) -> None:
    total = tiles * num_blocks
    num_programs = -(-total // split_blocks)
    parts = list_parts(num_programs, num_blocks, split_blocks, 1, total, 2)
    done = [(tile, block) for _, tile, first, end, *_ in parts for block in range(first, end)]
    assert sorted(done) == [(tile, block) for tile in range(tiles) for block in range(num_blocks)]
    writers = {tile: (index, program, last) for index, tile, _, _, writes, program, last, *_ in parts if writes}
    assert sorted(writers) == list(range(tiles))
    givers = [(tile, program, index) for index, tile, _, _, writes, program, *_ in parts if not writes]
    for tile, (index, program, last) in writers.items():
        assert [one for owner, one, _ in sorted(givers) if owner == tile] == list(range(program + 1, last + 1))
        assert all(other < index for owner, _, other in givers if owner == tile), "waits for one that begins later"
    for index in range(num_programs):
        own = [part[4] for part in parts if part[0] == index]
        assert all(own[1:]), "only what a program begins with is another's"
    assert {(row, column) for *_, row, column in parts} == {(tile % 2 * 64, tile // 2) for tile in range(tiles)}


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("split_k", SPLITS)
def test_products_are_divided_among_programs(list_parts: Callable[..., list[list[int]]], split_k: int) -> None:
    """Two on a multiprocessor have parts of two tiles at most, and one where blocks are a box."""
    for weight_format, shape in ((Int4Groups(128), (4096, 14336)), (INT8, (960, 576))):
        layout = PackedLayout.of(weight_format, shape, torch.bfloat16)
        assert layout is not None
        for tiles in (1, 32, 224, 700):
            for programs in (1, 2):
                cut = hopper_packed.divide(layout, tiles, programs, split_k, 132)
                sizes = (cut.split_blocks, cut.num_splits, cut.total_blocks, 1)
                parts = list_parts(cut.num_programs, layout.num_blocks, *sizes)
                done = sorted((tile, block) for _, tile, first, end, *_ in parts for block in range(first, end))
                assert done == [(tile, block) for tile in range(tiles) for block in range(layout.num_blocks)]
                most = max(Counter(index for index, *_ in parts).values())
                assert programs == 1 or most <= (2 if layout.block_columns > 64 else 1)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_programs_of_a_cluster_share_a_tile(list_parts: Callable[..., list[list[int]]]) -> None:
    parts = list_parts(5 * 4, 9, 3, 4, 0, 1)
    blocks = [(tile, min(first, end), end) for _, tile, first, end, *_ in parts]
    assert blocks == [(tile, *part) for tile in range(5) for part in ((0, 3), (3, 6), (6, 9), (9, 9))]
    assert all(writes for _, _, _, _, writes, *_ in parts)


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
def test_the_source_compiles_without_spilling_the_products(layout: PackedLayout, tmp_path: Path) -> None:
    for rows, programs in CUTS:
        file = tmp_path / "program.cu"
        cubin = str(file.with_suffix(".cubin"))
        file.write_text(hopper_packed.source(dict(hopper_packed._macros(layout, rows, programs))))
        command = ["nvcc", "-arch=sm_90a", "--cubin", "-Xptxas", "-v", "-o", cubin, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "C75" not in done.stderr, "products are serialized"
        sass = subprocess.run(["cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
        assert not overwritten_operands(sass), "numbers must stay where they are until their product is done"


def test_an_operand_that_is_overwritten_too_early_is_found() -> None:
    def code(*lines: str) -> str:
        return "\n".join(f"  /*{16 * index:04x}*/   {line} ;  /* 0x0 */" for index, line in enumerate(lines))

    product = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR12], R24, gsb0"
    again = "@!P0 BRA 0x0000"
    wait, wait_for_all = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    early = code("LOP3.LUT R41, R12, 0x7f007f, R59, 0xea, !PT", product, wait, again)
    assert [one.name for one in overwritten_operands(early)] == ["LOP3.LUT"]
    assert not overwritten_operands(code("LOP3.LUT R41, R12, 0x7f007f, R59, 0xea, !PT", product, wait_for_all, again))
    assert not overwritten_operands(code("LOP3.LUT R44, R12, 0x7f007f, R59, 0xea, !PT", product, wait, again))
    assert overwritten_operands(code("LDSM.16.M88.4 R38, [R8]", product, wait, again))


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("weight_format", FORMATS, ids=names)
def test_every_operation_on_hopper(device: str, weight_format: WeightFormat, dtype: torch.dtype) -> None:
    for n, k in ((576, 1536), (320, 1152), (960, 576), (1024, 4096)):
        plain = Case(device, weight_format, 300, n, k, dtype, gated=False)
        if not has_hopper_product(plain.matrix.layout):
            continue
        gated = Case(device, weight_format, 300, n, k, dtype, gated=True)
        configs: list[LinearConfig] = [HopperConfig(*cut, split) for cut in CUTS for split in SPLITS]
        for config in configs:
            for num_rows in (5, 33, 128, 300):
                plain.check("norm_linear", config, bias=True, out_dtype=torch.float32, num_rows=num_rows)
                plain.check("linear_add", config, bias=False, out_dtype=dtype, num_rows=num_rows)
                gated.check("norm_linear_silu", config, bias=True, out_dtype=dtype, num_rows=num_rows)


def multiply(
    case: ExactCase, cut: tuple[int, int], split_k: int, pdl: bool = False
) -> Callable[[Tensor, Tensor], None]:
    flags = torch.zeros(4096, dtype=torch.int32, device=case.x.device)
    return lambda x, out: hopper_packed.multiply(x, case.matrix, None, out, *cut, split_k, flags, pdl=pdl)


@needs_hopper
@pytest.mark.parametrize(("weight_format", "k"), [(INT8, 4096), (INT8, 4096 + 64), (Int4Groups(128), 4096)], ids=names)
def test_no_copy_overtakes_what_is_read(device: str, weight_format: WeightFormat, k: int) -> None:
    """Words of many rows come from the L2; where programs share all tiles, each has many."""
    case = ExactCase(device, weight_format, 4096, 4096, k)
    for cut in CUTS:
        for split_k in (1, EVENLY):
            assert case.num_wrong(multiply(case, cut, split_k), repeats=5) == 0, (cut, split_k)


@needs_hopper
@pytest.mark.parametrize("num_rows", [40, 300, 1000])
@pytest.mark.parametrize(("weight_format", "k"), [(INT8, 4096), (INT8, 4096 + 64), (Int4Groups(128), 4096)], ids=names)
def test_products_that_begin_early_are_exact(device: str, weight_format: WeightFormat, k: int, num_rows: int) -> None:
    """Words are copied while the kernel before may still run; the last of 65 tiles has a program of its own."""
    case = ExactCase(device, weight_format, num_rows, 4096 + 64, k)
    for cut in CUTS:
        for split_k in SPLITS:
            assert case.num_wrong(multiply(case, cut, split_k, pdl=True), repeats=200) == 0, (cut, split_k)
