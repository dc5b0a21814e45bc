"""Compiles the kernels of `peer_sum` and `stage_link` for a GPU of compute capability 9.0, without one.

python -m tests.kernels.compile_peer_kernels: prints a line for each, its name and its instructions that order memory,
that move words of 16 bytes, or that are atomic. Without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmengine.kernels import peer_sum, stage_link

_TYPES = {
    **dict.fromkeys(("at", "data", "flags"), "*i64"),
    **dict.fromkeys(("part", "x", "norm_weight", "normed"), "*bf16"),
    "logits": "*fp32",
    "eps": "fp32",
    **dict.fromkeys(("num_ids", "most_lag", "numel", "hidden_at", "place", "last_place"), "i32"),
    **dict.fromkeys(("num_turns", "capacity", "num_rows", "vocab", "start"), "i32"),
}
_LINK = {"IDS_LAG": 7, "IDS_AT": 64, "RELEASED_AT": 32, "NUM_SAMPLES": 4, "BLOCK": 256, "SENDS": True, "ON_GPU": True}
_SUM = {"COLUMNS": 4096, "BLOCK": 4096, "SHARE": 512, "SHARE_BLOCK": 512, "EVEN": True, "ADD": True, "NORM": True}
_PEERS = {**_LINK, **_SUM, "MAX_PROGRAMS": 256, "PDL": True}


def print_kernel(kernel: Any, num_warps: int, constants: dict[str, Any]) -> None:
    """Compile a kernel for tensors and places of hidden states at multiples of 16 bytes, and print what it does."""
    places, signature, values = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[place,] = "constexpr", constants[name]
            continue
        signature[name] = _TYPES.get(name, "*i32")
        if name not in ("most_lag", "last_place", "num_ids", "eps", "num_turns"):
            places[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    words = [word for line in compiled.asm["ptx"].splitlines() for word in line.split()]
    kinds = (word for word in words if re.match(r"(ld|st|atom|red)\.", word))
    telling = (word for word in kinds if re.search("sys|volatile|v4|^atom|^red", word))
    print(kernel.__name__, *dict.fromkeys(telling))


if __name__ == "__main__":
    for link_kernel in (stage_link._await_hidden, stage_link._copy_hidden, stage_link._tell_next):
        print_kernel(link_kernel, 1, _LINK)
    for link_kernel in (stage_link._take_ids, stage_link._send_ids):
        print_kernel(link_kernel, 4, _LINK)
    for size, shots in ((2, 1), (8, 2)):
        print_kernel(peer_sum._sum_over_peers, 8, {**_PEERS, "RANK": 1, "SIZE": size, "SHOTS": shots})
    print_kernel(peer_sum._choose_over_peers, 4, {**_PEERS, "RANK": 1, "SIZE": 8})
