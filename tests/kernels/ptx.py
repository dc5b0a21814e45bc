"""Runs the few PTX instructions of `packed_instructions` on tensors, and assembles them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_LANES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
_ONES = (1 << 32) - 1

_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & _ONES,
    "and.b32": lambda a, b: a & b,
}


def run_ptx(code: str, **inputs: Tensor) -> Tensor:
    """What a block of assembly leaves in $0; int64 tensors hold the bits of registers.

    Args:
        inputs: the operands `_1`, `_2` and so on, for $1, $2.
    """
    registers = {f"${name[1:]}": value for name, value in inputs.items()}

    def value(operand: str) -> Tensor:
        return torch.tensor(int(operand, 0)) if operand[0].isdigit() else registers[operand]

    for statement in filter(None, (part.strip() for part in code.strip("{} ").split(";"))):
        name, _, rest = statement.partition(" ")
        operands = re.findall(r"\{[^}]*\}|[^\s,]+", rest)
        if name == ".reg":
            continue
        if name == "mov.b64" and operands[0].startswith("{"):
            low, high = operands[0].strip("{}").split(", ")
            registers[low], registers[high] = value(operands[1]) & _ONES, value(operands[1]) >> 32 & _ONES
            continue
        registers[operands[0]] = _result(name, [value(operand) for operand in operands[1:]])
    return registers["$0"]


def _result(name: str, values: list[Tensor]) -> Tensor:
    if name == "mov.b32":
        return values[0] & _ONES
    if name in _BINARY:
        return _BINARY[name](*values)
    if name == "lop3.b32":
        return _lop3(*values[:3], int(values[3]))
    if name == "prmt.b32":
        return _prmt(*values)
    if name.startswith("fma.rn."):
        return _fma(*values, _LANES[name.removeprefix("fma.rn.")])
    raise NotImplementedError(name)


def _lop3(a: Tensor, b: Tensor, c: Tensor, table: int) -> Tensor:
    """Bits by a truth table whose entry 4 a + 2 b + c is the result."""
    result = torch.zeros_like(a + b + c)
    for entry in (entry for entry in range(8) if table >> entry & 1):
        bits = [value if entry >> place & 1 else ~value for value, place in ((a, 2), (b, 1), (c, 0))]
        result |= bits[0] & bits[1] & bits[2]
    return result & _ONES


def _prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """Four of the eight bytes of b and a; with the highest bit of its selector, eight copies of a byte's sign."""
    both = a | b << 32
    result = torch.zeros_like(both + selector)
    for place in range(4):
        chosen = selector >> 4 * place & 15
        byte = both >> 8 * (chosen & 7) & 0xFF
        result = result | torch.where(chosen >= 8, (byte >> 7) * 0xFF, byte) << 8 * place
    return result


def _fma(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """a * b + c of both halves, rounded once: float64 holds what such small numbers give exactly."""
    product = _numbers(a, dtype) * _numbers(b, dtype) + _numbers(c, dtype)
    bits = product.to(dtype).view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def _numbers(registers: Tensor, dtype: torch.dtype) -> Tensor:
    return halves(registers).view(dtype).double()


def halves(registers: Tensor) -> Tensor:
    """The low and the high 16 bits of each register, int16 [..., 2]."""
    return torch.stack((registers & 0xFFFF, registers >> 16 & 0xFFFF), dim=-1).to(torch.int16)


def assemble(code: str, input_kinds: str, capability: str, ptxas: Path, directory: Path) -> str:
    """What the assembler says of a kernel with this block of assembly; empty if it takes it.

    Args:
        input_kinds: of $1, $2 and so on: r for 32 bits, l for 64.
    """
    declared = "".join(
        f".reg .b{64 if kind == 'l' else 32} _{number};" for number, kind in enumerate("r" + input_kinds)
    )
    loads = "".join(
        f"ld.global.b{64 if kind == 'l' else 32} _{number}, [p+{8 * number}];"
        for number, kind in enumerate(input_kinds, 1)
    )
    source = directory / "kernel.ptx"
    body = code.replace("$", "_")
    source.write_text(
        f".version 8.0\n.target {capability}\n.address_size 64\n"
        f".visible .entry kernel(.param .u64 address)\n{{ .reg .b64 p; {declared} ld.param.u64 p, [address]; {loads}\n"
        f"{body}\nst.global.b32 [p], _0; ret; }}\n"
    )
    command = [str(ptxas), f"-arch={capability}", str(source), "-o", str(directory / "kernel.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr
