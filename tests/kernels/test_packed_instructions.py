"""The assembly that makes numbers of packed words: run instruction by instruction, and assembled."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmengine.kernels.packed_instructions import instructions
from llmengine.kernels.packings import PLANES, VALUES, Kind
from llmengine.quantization.bnb4 import TABLES
from llmengine.quantization.mxfp4 import E2M1_NUMBERS
from tests.kernels.ptx import assemble, halves, run_ptx

DTYPES = [torch.float16, torch.bfloat16]
UNEVEN = tuple(float(number) for number in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
CODES: dict[str, tuple[Kind, tuple[float, ...]]] = {
    "int2": ("int2", ()),
    "int4": ("int4", ()),
    "int8": ("int8", ()),
    "e4m3": ("e4m3", ()),
    "e2m1": ("e2m1", ()),
    "nf4": ("table", TABLES["nf4"]),
    "fp4": ("table", TABLES["fp4"]),
    "uneven": ("table", UNEVEN),
}


def names(value: object) -> str:
    return str(value).removeprefix("torch.")


def numbers_of(kind: Kind, table: tuple[float, ...]) -> Tensor:
    """The number of every code of a kind, float32."""
    if kind in PLANES:
        return torch.arange(float(1 << sum(PLANES[kind]))) - middle_of(kind)
    if kind == "int8":
        return torch.arange(256, dtype=torch.uint8).view(torch.int8).float()
    if kind == "e4m3":
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return torch.where(numbers.isnan(), torch.tensor([480.0, -480.0]).repeat_interleave(128), numbers)
    return torch.tensor(E2M1_NUMBERS if kind == "e2m1" else table)


def middle_of(kind: Kind) -> int:
    return 1 << sum(PLANES[kind]) >> 1 if kind in PLANES else 0


def words() -> Tensor:
    """Registers of two words, in which every word is once the first and once the second."""
    torch.manual_seed(0)
    return torch.arange(1 << 16) | torch.randperm(1 << 16) << 16


def codes_of(registers: Tensor, kind: Kind, index: int) -> Tensor:
    """Value `index` of both words, [..., 2]."""
    width = PLANES[kind][0] if kind in PLANES else 16 // VALUES[kind]
    return torch.stack((registers, registers >> 16), dim=-1) >> width * index & (1 << width) - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("name", CODES)
def test_every_word_becomes_its_numbers(name: str, dtype: torch.dtype) -> None:
    kind, table = CODES[name]
    registers, numbers = words(), numbers_of(kind, table)
    for index in range(VALUES[kind]):
        code = instructions(kind, index, dtype, table=table, middle=middle_of(kind))
        for shift in (0, 8) if kind == "int2" else (0,):
            found = halves(run_ptx(code, _1=registers, _2=torch.tensor(shift))).view(dtype)
            codes = codes_of(registers >> shift, kind, index)
            assert torch.equal(found, numbers[codes].to(dtype)), (index, shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("kind", ["int3", "int5", "int6"])
@pytest.mark.parametrize("has_minima", [False, True])
def test_high_bits_come_from_words_of_their_own(kind: Kind, has_minima: bool, dtype: torch.dtype) -> None:
    low_bits, high_bits = PLANES[kind]
    low, high = words(), words().flip(0)
    middle = 0 if has_minima else middle_of(kind)
    shifts = [(0, 0), (0, 12)] if high_bits == 1 else [(0, 0), (0, 8)]
    shifts += [(8, 4)] if low_bits == 2 else []
    for index, (shift, high_shift) in itertools.product(range(VALUES[kind]), shifts):
        code = instructions(kind, index, dtype, middle=middle)
        amounts = {"_3": torch.tensor(high_shift), "_5": torch.tensor(shift)}
        found = halves(run_ptx(code, _1=low, _2=high, **amounts)).view(dtype)
        both = [torch.stack((plane, plane >> 16), dim=-1) for plane in (low, high)]
        values = both[0] >> shift + low_bits * index & (1 << low_bits) - 1
        values |= (both[1] >> high_shift + high_bits * index & (1 << high_bits) - 1) << low_bits
        assert torch.equal(found, (values - middle).to(dtype)), (index, shift, high_shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_zero_points_are_subtracted(kind: Kind, is_wide: bool, dtype: torch.dtype) -> None:
    registers = words()[::7]  # every code in every place; that every word is taken apart is tested above
    offset = 0 if kind == "int8" else {torch.float16: 1024, torch.bfloat16: 128}[dtype]
    zeros = [-3, 5, 11, 16] if is_wide else [-3, 5]
    stored = torch.tensor([-(zero + offset) for zero in zeros]).to(dtype).view(torch.int16)
    packed = sum((int(bits) & 0xFFFF) << 16 * place for place, bits in enumerate(stored.tolist()))
    packed -= 1 << 64 if packed >= 1 << 63 else 0
    for index in range(VALUES[kind]):
        for group, zero in enumerate(zeros):
            code = instructions(kind, index, dtype, group, is_wide)
            found = halves(run_ptx(code, _1=registers, _2=torch.tensor(packed))).view(dtype)
            values = codes_of(registers, kind, index)
            if kind == "int8":
                values = values.to(torch.uint8).view(torch.int8)
            assert torch.equal(found, (values.float() - zero).to(dtype)), (index, zero)


@pytest.mark.parametrize("capability", ["sm_80", "sm_90a"])
def test_the_assembler_takes_every_block(tmp_path: Path, capability: str) -> None:
    ptxas = _ptxas()
    if ptxas is None:
        pytest.skip("there is no ptxas")
    for kind, table in CODES.values():
        for dtype in DTYPES:
            for index in range(VALUES[kind]):
                assert assemble(instructions(kind, index, dtype, table=table), "rr", capability, ptxas, tmp_path) == ""
    for kind in ("int3", "int5", "int6"):
        for index in range(VALUES[kind]):
            code = instructions(kind, index, torch.float16, middle=middle_of(kind))
            assert assemble(code, "rrrrrr", capability, ptxas, tmp_path) == ""
    for kind in ("int4", "int8"):
        for is_wide in (False, True):
            code = instructions(kind, 1, torch.bfloat16, 1, is_wide)
            assert assemble(code, "rl" if is_wide else "rr", capability, ptxas, tmp_path) == ""


def _ptxas() -> Path | None:
    """Triton's own assembler, or one of a CUDA installation."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    found = shutil.which("ptxas")
    return own if own.is_file() else None if found is None else Path(found)
