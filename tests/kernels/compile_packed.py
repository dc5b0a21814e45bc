"""Compiles the kernels of packed products for a GPU of compute capability 9.0, without one.

python -m tests.kernels.compile_packed FORMAT:DTYPE...: prints each that compiled. Without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmengine.kernels.packed_kernels import dequantize_kernel, packed_kernel
from llmengine.kernels.packed_linear import layout_constants
from llmengine.kernels.packed_weights import PackedLayout
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.int4 import Int4Groups

FORMATS: dict[str, WeightFormat] = {**GGUF_BLOCKS, "INT4": Int4Groups(64, zero_points=False)}

_TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {
    **{torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"},
    **{torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"},
}


def compile_kernel(kernel: Any, arguments: dict[str, Tensor | int], constants: dict[str, Any], num_warps: int) -> None:
    """Compile `kernel` for tensors whose places are multiples of 16 bytes, and integers.

    Raises `AssertionError` for sums of 16-bit integers in pairs: see `packed_numbers`.
    """
    names = list(kernel.arg_names)
    types = {name: "i32" if isinstance(value, int) else _TYPES[value.dtype] for name, value in arguments.items()}
    signature = {name: types.get(name, "constexpr") for name in names}
    places = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind != "i32"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=places)
    compiled = triton.compile(source, target=_TARGET, options={"num_warps": num_warps})
    assert "add.s16x2" not in compiled.asm["ptx"], (kernel, constants)


def compile_format(weight_format: WeightFormat, dtype: torch.dtype) -> None:
    """Compile a product, one with a gate, and both ways to dequantize, of a matrix in a format."""
    layout = PackedLayout.of(weight_format, (1024, 2048), dtype)
    assert layout is not None
    tensors = layout.empty("meta")
    names = ("high", "scales", "row_scales", "zeros", "units" if layout.has_steps else "minima", "shifts")
    factors = {name: tensors.get(name, tensors["words"]) for name in names}
    factors["extras"] = factors.pop(names[4])
    x, constants = torch.empty(16, dtype=dtype, device="meta"), layout_constants(layout, on_gpu=True)
    partials, integers = torch.empty(16, device="meta"), torch.empty(16, dtype=torch.int32, device="meta")
    shared: dict[str, Tensor | int] = {"words": tensors["words"], **factors, "out": x, "num_rows": 3}
    product = {**shared, "x": x, "bias": x, "partials": partials, "counters": integers, "N": 512, "out_stride": 512}
    for gated in (False, True):
        flags = {"PDL": False, "BIAS": True, "GATED": gated, "ADD": not gated}
        sizes = {"NUM_TILES": 8, "BLOCK_M": 8, "BLOCK_N": 64, "SPLIT_K": 2, "NUM_STAGES": 4}
        compile_kernel(packed_kernel, product, {**constants, **flags, **sizes}, num_warps=4)
    for gathers in (False, True):
        rows = {"ROWS": 16 if gathers else 64, "GATHER": gathers}
        compile_kernel(
            dequantize_kernel, {**shared, "ids": integers, "first_row": 0}, {**constants, **rows}, num_warps=1
        )


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, dtype_name = argument.split(":")
        compile_format(FORMATS[name], getattr(torch, dtype_name))
        print(argument, flush=True)
