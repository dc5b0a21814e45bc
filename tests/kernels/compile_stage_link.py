"""Compiles the kernels of `stage_link` for a GPU of compute capability 9.0, without one.

python -m tests.kernels.compile_stage_link: prints a line for each, its name and its instructions that order memory.
Without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmengine.kernels import stage_link

_TYPES = {"at": "*i64", "x": "*bf16"}
_INTEGERS = ("num_ids", "most_lag", "numel", "hidden_at", "place", "last_place")
_CONSTANTS = {"IDS_LAG": 7, "IDS_AT": 64, "RELEASED_AT": 32, "NUM_SAMPLES": 4, "BLOCK": 256, "SENDS": True}


def print_kernel(kernel: Any) -> None:
    """Compile a kernel for tensors and places of hidden states at multiples of 16 bytes, and print what it does."""
    names = list(kernel.arg_names)
    places, signature, constants = {}, {}, {}
    for place, name in enumerate(names):
        if name in _CONSTANTS:
            signature[name], constants[place,] = "constexpr", _CONSTANTS[name]
            continue
        signature[name] = "i32" if name in _INTEGERS else _TYPES.get(name, "*i32")
        if name not in ("most_lag", "last_place", "num_ids"):
            places[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    words = [word for line in compiled.asm["ptx"].splitlines() for word in line.split()]
    orders = (word for word in words if re.match(r"(ld|st|atom|red)\.", word) and re.search("sys|volatile|v4", word))
    print(kernel.__name__, *dict.fromkeys(orders))


if __name__ == "__main__":
    print_kernel(stage_link._await_hidden)
    print_kernel(stage_link._copy_hidden)
    print_kernel(stage_link._tell_number)
    print_kernel(stage_link._take_ids)
    print_kernel(stage_link._send_ids)
