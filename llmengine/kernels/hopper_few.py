"""The product of packed quantized weights with a few rows of activations, on Hopper: `hopper_few.cu`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.kernels.cuda_program import (
    CudaFunction,
    Launch,
    compile_cubin,
    defines,
    max_program_bytes,
    program_text,
)
from llmengine.kernels.hopper_packed import side_bytes, word_macros
from llmengine.kernels.packed_weights import TILE_ROWS, PackedLayout, PackedMatrix

STRIP = 16
"""Outputs of a strip."""

ROWS = (1, 8, 16, 32)
"""Rows of x that a program has, at most."""

CHUNKS = (1, 2, 3, 4)
"""Strips that a warp can have at a time."""

WARPS = (8, 16)
"""Of a program."""

_SHARED_KIB = {1: 226, 2: 112}
"""Of a program, by programs that share a multiprocessor; the others may be the next kernel's."""

_MOST_SLOTS = 8
_ZEROS_BYTES = 16
_SUM_PAD = 4


class _Arguments(ctypes.Structure):
    """`Arguments` of hopper_few.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("strips", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("adds", ctypes.c_int32),
        ("is_wide", ctypes.c_int32),
        ("is_even", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut up.

    Attributes:
        rows: of x, at most; one of `ROWS`.
        strips: of 16 outputs, of a program; of a gated pair half of them are of each.
        chunk: strips that a warp has at a time, one of `CHUNKS`, which divides them.
        warps: of a program, one of `WARPS`; each has other blocks of columns.
        programs: that share a multiprocessor, 1 or 2: two hide each other's waits, one has more copies under way.
    """

    rows: int
    strips: int
    chunk: int
    warps: int
    programs: int

    def __post_init__(self) -> None:
        divides = self.chunk in CHUNKS and self.strips % self.chunk == 0
        if self.rows not in ROWS or not divides or self.warps not in WARPS or self.programs not in _SHARED_KIB:
            raise ValueError(f"{self} is none of the kernel's")

    @property
    def streams(self) -> bool:
        """Whether x is copied with the words: no other chunk needs the same columns."""
        return self.strips == self.chunk

    def num_slots(self, layout: PackedLayout) -> int:
        """Copies of a warp that can be under way; none if the program does not fit."""
        turns = -(-layout.num_blocks // self.warps) * (self.strips // self.chunk)
        room = (_SHARED_KIB[self.programs] << 10) - self._fixed_bytes(layout, self.rows)
        return min(room // (self.warps * self._slot_bytes(layout)), turns, _MOST_SLOTS)

    def shared_bytes(self, layout: PackedLayout, num_rows: int) -> int:
        """The shared memory of a program that has so many rows of x."""
        return self._fixed_bytes(layout, num_rows) + self.warps * self.num_slots(layout) * self._slot_bytes(layout)

    def _fixed_bytes(self, layout: PackedLayout, num_rows: int) -> int:
        """Of sums, zeros that stand for rows that there are none of, and x if it is there as a whole."""
        sums = self.warps * num_rows * (self.strips * STRIP + _SUM_PAD) * 4
        blocks = 0 if self.streams else -(-layout.num_blocks // self.warps) * self.warps
        return sums + _ZEROS_BYTES + blocks * num_rows * _x_pitch(layout)

    def _slot_bytes(self, layout: PackedLayout) -> int:
        of_strip = STRIP * layout.slice_columns * 2 + sum(side_bytes(layout)) * STRIP // TILE_ROWS
        return self.chunk * of_strip + (self.rows * _x_pitch(layout) if self.streams else 0)


def _x_pitch(layout: PackedLayout) -> int:
    """Bytes from one row of a block's columns of x to the next."""
    return layout.block_columns * 2 + 16


def compile_product(layout: PackedLayout, cut: Cut) -> None:
    """Compile the kernel for a layout, and load it on the current device; safe on several threads at once."""
    _function(_macros(layout, cut), torch.cuda.current_device())


def multiply(
    x: Tensor,
    matrix: PackedMatrix,
    bias: Tensor | None,
    out: Tensor,
    cut: Cut,
    gated: bool = False,
    add: bool = False,
    pdl: bool = False,
) -> None:
    """Write x [num_rows, in_features] @ matrix.T + bias to `out`, or add it.

    Args:
        bias: in x's dtype, the layout's.
        out: [num_rows, out_features], whose rows may lie apart; in x's dtype, or float32.
        cut: for at least num_rows.
        gated: write silu of the first half of the outputs times the other half.
    """
    layout, tensors = matrix.layout, matrix.tensors
    num_rows, num_outputs = out.shape
    assert x.shape == (num_rows, layout.shape[1])
    assert x.dtype == layout.dtype
    assert bias is None or bias.dtype == layout.dtype, f"a bias of {bias.dtype} would be read as {layout.dtype}"
    assert x.is_contiguous()
    assert num_rows <= cut.rows, (num_rows, cut)
    assert cut.num_slots(layout) > 0, (layout, cut)
    assert layout.shape[0] == (2 * num_outputs if gated else num_outputs)
    assert not gated or (num_outputs % TILE_ROWS == 0 and cut.strips % 2 == 0), (num_outputs, cut)

    def address(name: str) -> int | None:
        return tensors[name].data_ptr() if name in tensors else None

    alignment = out.data_ptr() | out.stride(0) * out.dtype.itemsize | num_outputs * out.dtype.itemsize
    arguments = _Arguments(
        x.data_ptr(),
        address("words"),
        address("scales"),
        address("row_scales"),
        address("zeros"),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_rows,
        num_outputs,
        layout.num_blocks,
        layout.num_tiles,
        cut.strips,
        gated,
        add,
        out.dtype == torch.float32,
        alignment % (4 * out.dtype.itemsize) == 0,
    )
    outputs = STRIP * (cut.strips // 2 if gated else cut.strips)
    grid = (-(-num_outputs // outputs), 1, 1)
    launch = Launch(grid, 32 * cut.warps, cut.shared_bytes(layout, num_rows), pdl=pdl)
    _function(_macros(layout, cut), x.device.index).launch(launch, [ctypes.addressof(arguments)])


@functools.lru_cache(maxsize=256)
def _macros(layout: PackedLayout, cut: Cut) -> tuple[tuple[str, int | str], ...]:
    own = {
        "ROWS": cut.rows,
        "WARPS": cut.warps,
        "PROGRAMS": cut.programs,
        "CHUNK": cut.chunk,
        "NUM_SLOTS": cut.num_slots(layout),
        "STREAMS": int(cut.streams),
    }
    return (*own.items(), *word_macros(layout).items())


@functools.cache
def _function(macros: tuple[tuple[str, int | str], ...], device: int) -> CudaFunction:
    cubin = compile_cubin(source(dict(macros)), ["-arch=sm_90a", "--std=c++17", "-default-device"])
    with torch.cuda.device(device):
        return CudaFunction(cubin, "hopper_few", max_program_bytes())


def source(macros: Mapping[str, int | str]) -> str:
    """The CUDA C++ for a format."""
    return defines(macros) + program_text("hopper.cuh", "packed_words.cuh", "hopper_few.cu")
