"""The product of 8-bit weights and activations, both with scales, on Hopper: `hopper_scaled.cu`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

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
from llmengine.kernels.scaled_weights import ScaledMatrix
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import Int8W8A8

OUTPUTS = {64: (32, 64, 96, 128, 224, 256), 128: (64, 96, 112, 128, 192, 224, 256), 256: (64, 96, 112, 128)}
"""Outputs of a program, by its rows of x."""

SPLITS = (1, 2, 4, 8)
"""Programs that can share the columns: as many as a cluster holds on any GPU."""

_SHORT = (torch.bfloat16, torch.float16)
"""What biases can be, and results that are not float32."""

_BLOCK_K = 128
_THREADS = 384
_SHARED_KIB = 226
_MOST_STAGES = 24


def has_hopper_scaled(weight_format: WeightFormat, columns: int, rows: int, outputs: int) -> bool:
    """Whether the kernel multiplies by a matrix of so many columns, with `rows` of x and `outputs` to a program.

    A program's outputs must lie in one block that has a scale. In e4m3, sums are added up twice, which takes registers.
    """
    if columns % 16 or not isinstance(weight_format, Fp8 | Int8W8A8):
        return False
    if isinstance(weight_format, Fp8) and rows == 128 and outputs > 128:
        return False
    in_blocks = "block" in (weight_format.scales, weight_format.activations)
    return not in_blocks or (rows < 256 and outputs in (64, 128))


class _Arguments(ctypes.Structure):
    """`Arguments` of hopper_scaled.cu."""

    _fields_ = (
        ("x_scales", ctypes.c_void_p),
        ("weight_scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int32),
        ("num_outputs", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("split_blocks", ctypes.c_int32),
        ("num_splits", ctypes.c_int32),
        ("row_tiles", ctypes.c_int32),
        ("num_tiles", ctypes.c_int32),
        ("x_box_bytes", ctypes.c_int32),
        ("x_scale_stride", ctypes.c_int32),
        ("weight_scale_stride", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("adds", ctypes.c_int32),
        ("is_wide", ctypes.c_int32),
        ("is_even", ctypes.c_int32),
    )


def compile_product(matrix: ScaledMatrix, dtype: torch.dtype, rows: int, outputs: int) -> None:
    """Compile the kernel for a matrix, and load it on the current device; safe on several threads at once.

    Args:
        dtype: of 16-bit results and of biases; bfloat16 or float16.
    """
    assert dtype in _SHORT, dtype
    _function(_macros(_kind(matrix), dtype, rows, outputs), torch.cuda.current_device())


def multiply(
    x: Tensor,
    x_scales: Tensor,
    matrix: ScaledMatrix,
    bias: Tensor | None,
    out: Tensor,
    rows: int,
    outputs: int,
    split_k: int = 1,
    gated: bool = False,
    add: bool = False,
    pdl: bool = False,
) -> None:
    """Write x [num_rows, in_features] @ matrix.T + bias to `out`, both operands times their scales, or add it.

    Args:
        x: int8 or e4m3, as the matrix.
        x_scales: float32, one for all, [num_rows], or [num_rows, blocks of 128 columns].
        bias: [out_features], in `out`'s dtype; if that is float32, in bfloat16 or float16.
        out: [num_rows, out_features], whose rows may lie apart; bfloat16, float16 or float32.
        rows: of x for a program, of `OUTPUTS`.
        outputs: of a program, one of `OUTPUTS[rows]`.
        split_k: programs that share the columns, at most; one of `SPLITS`.
        gated: write silu of the first half of the outputs times the other half.
    """
    num_rows, num_outputs = out.shape
    columns = x.shape[1]
    assert x.shape == (num_rows, columns)
    assert matrix.shape == (2 * num_outputs if gated else num_outputs, columns)
    assert has_hopper_scaled(matrix.format, columns, rows, outputs)
    number = bias.dtype if bias is not None else torch.bfloat16 if out.dtype == torch.float32 else out.dtype
    assert number in _SHORT, f"a bias of {number} would be read as numbers of 16 bits"
    assert out.dtype in (number, torch.float32), (out.dtype, number)
    weight_scales, together = matrix.tensors["weight_scale"], 2 if split_k == 1 else 4
    box_rows = _box_rows(num_rows, rows)
    maps = _maps(x, matrix.tensors["weight"], box_rows, rows, outputs, gated)
    num_blocks, row_tiles = -(-columns // _BLOCK_K), -(-num_rows // rows)
    num_tiles = row_tiles * -(-num_outputs // (outputs // (2 if gated else 1)))
    arguments = _Arguments(
        x_scales.data_ptr(),
        weight_scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        num_rows,
        num_outputs,
        num_blocks,
        -(-num_blocks // split_k),
        split_k,
        row_tiles,
        num_tiles,
        box_rows * _BLOCK_K,
        int(x_scales.numel() > 1),
        int(weight_scales.numel() > 1),
        gated,
        add,
        out.dtype == torch.float32,
        _can_write(out, together),
    )
    programs = split_k * num_tiles if split_k > 1 else min(num_tiles, _num_sms(x.device))
    launch = Launch((programs, 1, 1), _THREADS, shared_bytes(rows, outputs), cluster=split_k, pdl=pdl)
    pointers = [*(int(one.getPtr()) for one in maps), ctypes.addressof(arguments)]
    _function(_macros(_kind(matrix), number, rows, outputs), x.device.index).launch(launch, pointers)


def _box_rows(num_rows: int, rows: int) -> int:
    """Rows of x that are copied at once: no more than there are, but eight at least."""
    return min(rows, max(8, 1 << (num_rows - 1).bit_length()))


def _maps(x: Tensor, weight: Tensor, box_rows: int, rows: int, outputs: int, gated: bool) -> tuple[Any, Any]:
    """Of x and of the weights; of a gated product, a box has half of the outputs of a warpgroup."""
    weight_rows = outputs if not gated else outputs // 4 if rows == 64 else outputs // 2
    return box_map(x, box_rows, _BLOCK_K), box_map(weight, weight_rows, _BLOCK_K)


def _can_write(out: Tensor, together: int) -> bool:
    """Whether so many results beside each other can be written at once."""
    alignment = out.data_ptr() | (out.stride(0) | out.shape[1]) * out.dtype.itemsize
    return alignment % (together * out.dtype.itemsize) == 0


def shared_bytes(rows: int, outputs: int) -> int:
    """The shared memory of a program."""
    return _stages(rows, outputs) * ((rows + outputs) * _BLOCK_K + 16)


def _stages(rows: int, outputs: int) -> int:
    return min(_MOST_STAGES, (_SHARED_KIB << 10) // ((rows + outputs) * _BLOCK_K + 16))


def _kind(matrix: ScaledMatrix) -> tuple[bool, bool, bool]:
    """Whether values are integers, and whether x and the weights have scales of blocks."""
    is_int = matrix.values_dtype == torch.int8
    return is_int, matrix.activation_scales == "block", matrix.weight_scales == "block"


@functools.lru_cache(maxsize=256)
def _macros(
    kind: tuple[bool, bool, bool], dtype: torch.dtype, rows: int, outputs: int
) -> tuple[tuple[str, int | str], ...]:
    is_int, x_blocks, weight_blocks = kind
    macros: dict[str, int | str] = {
        "ROWS": rows,
        "OUTPUTS": outputs,
        "IS_INT": int(is_int),
        "BF16": int(dtype != torch.float16),
        "X_BLOCKS": int(x_blocks),
        "WEIGHT_BLOCKS": int(weight_blocks),
        "STAGES": _stages(rows, outputs),
    }
    return tuple(macros.items())


@functools.cache
def _function(macros: tuple[tuple[str, int | str], ...], device: int) -> CudaFunction:
    cubin = compile_cubin(source(dict(macros)), ["-arch=sm_90a", "--std=c++17", "-default-device"])
    with torch.cuda.device(device):
        return CudaFunction(cubin, "hopper_scaled", max_program_bytes())


def source(macros: Mapping[str, int | str]) -> str:
    """The CUDA C++ for a kind of product."""
    rows, outputs = int(macros["ROWS"]), int(macros["OUTPUTS"])
    products = _tensor_core_products(outputs // 2 if rows == 64 else outputs, bool(macros["IS_INT"]))
    return defines(macros) + program_text("hopper.cuh", "hopper_scaled.cu").replace("WGMMA\n", products)


def _tensor_core_products(width: int, is_int: bool) -> str:
    """Functions that multiply 64 rows of x by the weights of `width` outputs, 32 columns, and add or write the sums."""
    count = width // 2
    letter, types = ("r", "s32.s8.s8") if is_int else ("f", "f32.e4m3.e4m3")
    outputs = ", ".join(f"%{index}" for index in range(count))

    def function(name: str, constraint: str, adds: int) -> str:
        sums = ", ".join(f'"{constraint}{letter}"(sums[{index}])' for index in range(count))
        return f"""
static __device__ __forceinline__ void {name}(Sum (&sums)[NUM_SUMS], u64 x, u64 weights) {{
  asm volatile("{{.reg .pred adds;\\n"
               "setp.ne.b32 adds, {adds}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{width}k32.{types} "
               "{{{outputs}}}, %{count}, %{count + 1}, adds{"" if is_int else ", 1, 1"};}}"
               : {sums}
               : "l"(x), "l"(weights));
}}
"""

    return function("multiply", "+", 1) + ("" if is_int else function("multiply_first", "=", 0))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
