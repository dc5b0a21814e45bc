"""The product of packed quantized weights with 32 rows of activations and more, on Hopper: `hopper_packed.cu`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llmengine.kernels.cuda_program import (
    CudaFunction,
    Launch,
    box_map,
    compile_cubin,
    defines,
    max_program_bytes,
    program_text,
)
from llmengine.kernels.limits import tiled_sms
from llmengine.kernels.packed_instructions import layout_instructions
from llmengine.kernels.packed_weights import TILE_ROWS, PackedLayout, PackedMatrix

PROGRAMS = {32: (1, 2), 64: (1, 2), 128: (1,), 256: (1,)}
"""Programs that can share a multiprocessor, by rows of x: two hide each other's waits, but have few registers."""

EVENLY = 0
SPLITS = (1, 2, 4, 8, EVENLY)
"""Programs that can share the inputs of a tile: as many as a cluster holds on any GPU. `EVENLY`: as many programs as
run at once have equally many blocks of all tiles."""

_X_BOXES = {32: 2, 64: 2, 128: 2, 256: 1}
"""Boxes of x, 64 columns each, that are copied together, by rows of x."""

_WORDS_KIB = {(32, 1): 128, (64, 1): 112, (128, 1): 96, (256, 1): 58, (32, 2): 72, (64, 2): 56}
_X_KIB = {(32, 1): 64, (64, 1): 80, (128, 1): 96, (256, 1): 160, (32, 2): 32, (64, 2): 48}
"""KiB of words with what belongs to them, and of x, that can be under way, by rows of x and programs."""

_PITCH = 132
_THREADS, _CONSUMERS = 384, 256
_SCALES = {
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
    torch.float8_e4m3fn: "E4M3",
}


def has_hopper_product(layout: PackedLayout) -> bool:
    """Whether the kernel reads a layout: blocks of whole boxes of x, and scales that are numbers of x's dtype."""
    is_plain = layout.planes == (16 // layout.num_values, 0) and not layout.has_minima
    is_exact = layout.dtype == torch.bfloat16 or layout.num_groups == 0 or layout.scale_dtype != torch.float32
    return (
        is_plain
        and layout.dtype in (torch.bfloat16, torch.float16)
        and layout.slice_columns in (32, 64)
        and layout.block_columns % 64 == 0
        and layout.shape[1] % 8 == 0
        and is_exact
        and not layout.has_steps
    )


def can_share_evenly(layout: PackedLayout, programs: int) -> bool:
    """Whether programs can have parts of tiles, so many sharing a multiprocessor; else each has a tile of its own."""
    return programs == 1 or layout.block_columns > 64


class Division(NamedTuple):
    """How programs divide a product among themselves; see `Arguments` of hopper_packed.cu."""

    num_programs: int
    num_splits: int
    split_blocks: int
    total_blocks: int


def divide(layout: PackedLayout, tiles: int, programs: int, split_k: int, num_sms: int) -> Division:
    """Divide `tiles` tiles of results; the other arguments are those of `multiply`, and the multiprocessors."""
    if split_k != EVENLY:
        return Division(split_k * tiles, split_k, -(-layout.num_blocks // split_k), 0)
    total_blocks = tiles * layout.num_blocks
    split_blocks = -(-total_blocks // (programs * num_sms))
    if not can_share_evenly(layout, programs):
        split_blocks = layout.num_blocks
    elif programs > 1:  # a program has parts of two tiles at most
        split_blocks = min(split_blocks, layout.num_blocks)
    return Division(-(-total_blocks // split_blocks), 1, split_blocks, total_blocks)


class _Arguments(ctypes.Structure):
    """`Arguments` of hopper_packed.cu."""

    _fields_ = (
        ("scales", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("partials", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("row_tiles", ctypes.c_int32),
        ("num_splits", ctypes.c_int32),
        ("split_blocks", ctypes.c_int32),
        ("total_blocks", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("adds", ctypes.c_int32),
        ("is_wide", ctypes.c_int32),
        ("is_even", ctypes.c_int32),
    )


def compile_product(layout: PackedLayout, rows: int, programs: int) -> None:
    """Compile the kernel for a layout, and load it on the current device; safe on several threads at once."""
    _function(_macros(layout, rows, programs), torch.cuda.current_device())


def multiply(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None,
    out: Tensor,
    rows: int,
    programs: int,
    split_k: int,
    flags: Tensor,
    gated: bool = False,
    add: bool = False,
    pdl: bool = False,
) -> None:
    """Write x [num_rows, in_features] @ matrix.T + bias to `out`, or add it.

    Args:
        bias: in x's dtype, the layout's.
        out: [num_rows, out_features], whose rows may lie apart; in x's dtype, or float32.
        rows: of x for a program.
        programs: that share a multiprocessor, one of `PROGRAMS[rows]`.
        split_k: programs that share the inputs of a tile, at most; one of `SPLITS`.
        flags: int32, one for each program that runs at once, zero before and after; of this stream alone.
        gated: write silu of the first half of the outputs times the other half.
    """
    layout, tensors = matrix.layout, matrix.tensors
    num_rows, num_outputs = out.shape
    assert x.shape == (num_rows, layout.shape[1])
    assert x.dtype == layout.dtype
    assert bias is None or bias.dtype == layout.dtype, f"a bias of {bias.dtype} would be read as {layout.dtype}"
    assert layout.shape[0] == (2 * num_outputs if gated else num_outputs)
    assert not gated or num_outputs % TILE_ROWS == 0, num_outputs
    macros = _macros(layout, rows, programs)
    words = tensors["words"].view(-1, layout.slice_columns)
    maps = (box_map(words, TILE_ROWS, layout.slice_columns), box_map(x, rows, 64))

    def address(name: str) -> int | None:
        return tensors[name].data_ptr() if name in tensors else None

    row_tiles = -(-num_rows // rows)
    tiles = row_tiles * -(-num_outputs // (TILE_ROWS if gated else 2 * TILE_ROWS))
    division = divide(layout, tiles, programs, split_k, tiled_sms(x.device))
    partials = x
    if split_k == EVENLY:
        assert division.num_programs <= len(flags), (division, len(flags))
        partials = x.new_empty(division.num_programs * _CONSUMERS * (rows // 2), dtype=torch.float32)
    alignment = out.data_ptr() | out.stride(0) * out.dtype.itemsize | num_outputs * out.dtype.itemsize
    arguments = _Arguments(
        address("scales"),
        address("row_scales"),
        address("zeros"),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        partials.data_ptr(),
        flags.data_ptr(),
        num_rows,
        num_outputs,
        layout.num_blocks,
        layout.num_tiles,
        row_tiles,
        division.num_splits,
        division.split_blocks,
        division.total_blocks,
        gated,
        add,
        out.dtype == torch.float32,
        alignment % (4 * out.dtype.itemsize) == 0,
    )
    shared = shared_bytes(layout, rows, programs)
    launch = Launch((division.num_programs, 1, 1), _THREADS, shared, cluster=division.num_splits, pdl=pdl)
    pointers = [*(int(one.getPtr()) for one in maps), ctypes.addressof(arguments)]
    _function(macros, x.device.index).launch(launch, pointers)


def shared_bytes(layout: PackedLayout, rows: int, programs: int) -> int:
    """The shared memory of a program."""
    word_slots, x_slots = _slots(layout, rows, programs)
    slot = 2 * (TILE_ROWS * layout.slice_columns * 2 + sum(side_bytes(layout)))
    pipe = x_slots * (_x_boxes(layout, rows) * rows * 128 + 16) + word_slots * (slot + 16) + 8
    return max(pipe, rows * _PITCH * 4)


def _slots(layout: PackedLayout, rows: int, programs: int) -> tuple[int, int]:
    slot = 2 * (TILE_ROWS * layout.slice_columns * 2 + sum(side_bytes(layout)))
    x_slot = _x_boxes(layout, rows) * rows * 128
    return (_WORDS_KIB[rows, programs] << 10) // slot, (_X_KIB[rows, programs] << 10) // x_slot


def _x_boxes(layout: PackedLayout, rows: int) -> int:
    return min(_X_BOXES[rows], layout.block_columns // 64)


def side_bytes(layout: PackedLayout) -> tuple[int, int]:
    """Bytes of a tile's scales, and of its zero points, in a block."""
    zeros = layout.num_groups * layout.num_zero_copies * layout.zero_dtype.itemsize if layout.has_zeros else 0
    return TILE_ROWS * layout.num_groups * layout.scale_dtype.itemsize, TILE_ROWS * zeros


def word_macros(layout: PackedLayout) -> dict[str, int | str]:
    """The macros of packed_words.cuh."""
    macros: dict[str, int | str] = {
        "SLICE": layout.slice_columns,
        "VALUES": layout.num_values,
        "GROUPS": layout.num_groups,
        "SCALE": _SCALES[layout.scale_dtype],
        "ZERO_BYTES": side_bytes(layout)[1] // TILE_ROWS,
        "BF16": int(layout.dtype == torch.bfloat16),
    }
    for index, code in enumerate(layout_instructions(layout)):
        macros[f"UNPACK_{index}"] = '"' + code.replace("$", "%") + '"'
    return macros


@functools.lru_cache(maxsize=256)
def _macros(layout: PackedLayout, rows: int, programs: int) -> tuple[tuple[str, int | str], ...]:
    word_slots, x_slots = _slots(layout, rows, programs)
    slots = {"X_BOXES": _x_boxes(layout, rows), "WORD_SLOTS": word_slots, "X_SLOTS": x_slots}
    return tuple({"ROWS": rows, "PROGRAMS": programs, **slots, **word_macros(layout)}.items())


@functools.cache
def _function(macros: tuple[tuple[str, int | str], ...], device: int) -> CudaFunction:
    cubin = compile_cubin(source(dict(macros)), ["-arch=sm_90a", "--std=c++17", "-default-device"])
    with torch.cuda.device(device):
        return CudaFunction(cubin, "hopper_packed", max_program_bytes())


def source(macros: Mapping[str, int | str]) -> str:
    """The CUDA C++ for a format."""
    text = program_text("hopper.cuh", "packed_words.cuh", "hopper_packed.cu")
    return defines(macros) + text.replace("WGMMA\n", _tensor_core_product(int(macros["ROWS"]), bool(macros["BF16"])))


def _tensor_core_product(rows: int, is_bf16: bool) -> str:
    """The function that multiplies 64 rows of 16 weights in registers by a box's columns."""
    count = rows // 2
    dtype = "bf16" if is_bf16 else "f16"
    outputs = ", ".join(f"%{index}" for index in range(count))
    operands = ", ".join(f"%{index}" for index in range(count, count + 4))
    sums = ", ".join(f'"+f"(sums[{index}])' for index in range(count))
    return f"""
static __device__ __forceinline__ void multiply(float (&sums)[NUM_SUMS], const u32 (&weights)[4], u64 box) {{
  asm volatile("wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{dtype}.{dtype} "
               "{{{outputs}}}, {{{operands}}}, %{count + 4}, 1, 1, 1, 0;"
               : {sums}
               : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(box));
}}
"""
