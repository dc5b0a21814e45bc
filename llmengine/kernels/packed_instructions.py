"""PTX that makes numbers of packed words: two at once, with what each kind of value needs for it."""

from __future__ import annotations

import functools

import torch

from llmengine.kernels.packed_weights import PackedLayout
from llmengine.kernels.packings import PLANES, Kind

_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
_MINUS_ZERO = 0x8000


def layout_instructions(layout: PackedLayout) -> list[str]:
    """`instructions` for each value at a place of a layout's words; its activations have 16 bits."""
    count = layout.num_values
    return [
        instructions(
            layout.kind,
            index,
            layout.dtype,
            index * layout.num_groups // count if layout.has_zeros else None,
            layout.num_groups == 4,
            layout.table,
            layout.middle,
        )
        for index in range(count)
    ]


@functools.cache
def instructions(
    kind: Kind,
    index: int,
    dtype: torch.dtype,
    zero_group: int | None = None,
    is_wide: bool = False,
    table: tuple[float, ...] = (),
    middle: int = 0,
) -> str:
    """PTX that makes value `index` of two words $1 two numbers $0 of `dtype`, bfloat16 or float16.

    High bits are in $2, and in $3 is where those of the block begin there; in the last but one operand, where its bits
    begin in $1, if blocks share words. Needs compute capability 8.0.

    Args:
        zero_group: where the value's zero point is in the integer $2 of its block, see `PackedLayout`; None: nowhere.
        is_wide: that integer has 64 bits.
        table: the numbers of the codes of "table", which has no zero points.
        middle: what is subtracted from unsigned integers without zero points.
    """
    if kind == "table":
        assert zero_group is None
        return (
            f"{{ .reg .b32 t, p, q, s, m, a, b, low, high; {' '.join(_look_up(table, index, dtype))} mov.b32 $0, t; }}"
        )
    suffix = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    if kind in PLANES:
        lines = _unpack_unsigned(*PLANES[kind], index, dtype == torch.bfloat16)
        if zero_group is None:
            lines += [f"mov.b32 c, {_twice((0xC300 if dtype == torch.bfloat16 else 0xE400) + middle)};"]
            lines += [f"fma.rn.{suffix} t, t, one, c;"]
    else:
        lines = _unpack(kind, index, dtype == torch.bfloat16, suffix)
    if zero_group is not None:
        assert kind in ("int4", "int8"), kind
        # Both words are of one row, so the second one's integer, $3, is the same.
        source, halves = "high" if zero_group >= 2 else "low", "0x3232" if zero_group % 2 else "0x1010"
        lines = [
            "mov.b64 {low, high}, $2;" if is_wide else "mov.b32 low, $2;",
            f"prmt.b32 point, {source}, {source}, {halves};",
            *lines,
            f"fma.rn.{suffix} t, t, one, point;",
        ]
    constants = f"mov.b32 one, {_twice(_ONE[dtype])}; mov.b32 zero, {_twice(_MINUS_ZERO)};"
    return f"{{ .reg .b32 t, c, one, zero, low, high, point; {constants} {' '.join(lines)} mov.b32 $0, t; }}"


def _unpack_unsigned(low_bits: int, high_bits: int, index: int, is_bf16: bool) -> list[str]:
    """Instructions that leave 128 + q (bfloat16) or 1024 + q in t."""
    words = "$1" if low_bits == 4 else "low"
    lines = [] if low_bits == 4 else [f"shr.u32 low, $1, {'$5' if high_bits else '$2'};"]
    lines += [
        f"shr.u32 t, {words}, {low_bits * index};",
        f"lop3.b32 t, t, {_twice((1 << low_bits) - 1)}, {_twice(0x4300 if is_bf16 else 0x6400)}, 0xea;",
    ]
    if high_bits > 0:
        shift = high_bits * index - low_bits
        lines += [
            "shr.u32 high, $2, $3;",
            f"shr.u32 c, high, {shift};" if shift >= 0 else f"shl.b32 c, high, {-shift};",
            f"lop3.b32 t, c, {_twice((1 << high_bits) - 1 << low_bits)}, t, 0xea;",
        ]
    return lines


def _unpack(kind: Kind, index: int, is_bf16: bool, suffix: str) -> list[str]:
    """Instructions that leave the numbers of a kind that is not unsigned in t."""
    if kind == "int8" and is_bf16:
        # 128 + the low seven bits, less 128, or 256 where the sign is set.
        return [
            f"shr.u32 t, $1, {8 * index};",
            "lop3.b32 c, t, 0x00800080, 0xc300c300, 0xea;",
            "lop3.b32 t, t, 0x007f007f, 0x43004300, 0xea;",
            f"fma.rn.{suffix} t, t, one, c;",
        ]
    if kind == "int8":
        # 1024 + 128 + the value, less 1152.
        return [
            f"shr.u32 t, $1, {8 * index};",
            "lop3.b32 t, t, 0x00ff00ff, 0x64806480, 0x6a;",
            "mov.b32 c, 0xe480e480;",
            f"fma.rn.{suffix} t, t, one, c;",
        ]
    # Sign, exponent and mantissa moved to their places, times the power of two by which the biases differ.
    width = 8 if kind == "e4m3" else 4
    shift, mask, power = {
        ("e4m3", True): (4, 0x07F0, 0x7B80),  # 2 ** 120
        ("e4m3", False): (1, 0x3F80, 0x5C00),  # 2 ** 8
        ("e2m1", True): (6, 0x01C0, 0x7E80),  # 2 ** 126
        ("e2m1", False): (3, 0x0E00, 0x7400),  # 2 ** 14
    }[kind, is_bf16]
    return [
        f"shl.b32 t, $1, {16 - width * (index + 1)};",
        f"shr.u32 c, t, {shift};",
        f"and.b32 c, c, {_twice(mask)};",
        "lop3.b32 t, t, 0x80008000, c, 0xea;",
        f"mov.b32 c, {_twice(power)};",
        f"fma.rn.{suffix} t, t, c, zero;",
    ]


def _look_up(table: tuple[float, ...], index: int, dtype: torch.dtype) -> list[str]:
    """Instructions that leave the numbers of a table of 16 in t.

    A byte permutation looks up four codes of 3 bits at once, so the low and the high bytes of four numbers take four,
    two for each half of the table. Of the eight codes of the two words, values 0 and 2 are looked up together, and
    values 1 and 3; the assembler computes once what the instructions of two values have in common.
    """
    assert len(table) == 16, table
    bits = torch.tensor(table, dtype=torch.float32).to(dtype).view(torch.int16).tolist()
    lines = [
        f"shr.u32 p, $1, {4 * (index % 2)};",
        "shr.u32 q, p, 12;",
        # Of the first word, then of the second one, in turns.
        "lop3.b32 p, p, q, 0x0f0f, 0xe4;",
        "and.b32 s, p, 0x7777;",
        # Bytes of ones where the highest bit of a code is set.
        "shl.b32 q, p, 4;",
        "prmt.b32 m, q, p, 0xd9c8;",
    ]
    for name, shift in (("low", 0), ("high", 8)):
        quarters = [_four_bytes(bits[begin : begin + 4], shift) for begin in range(0, 16, 4)]
        lines += [
            f"prmt.b32 a, {quarters[0]}, {quarters[1]}, s;",
            f"prmt.b32 b, {quarters[2]}, {quarters[3]}, s;",
            f"lop3.b32 {name}, b, a, m, 0xe4;",
        ]
    return [*lines, f"prmt.b32 t, low, high, {'0x7362' if index >= 2 else '0x5140'};"]


def _four_bytes(numbers: list[int], shift: int) -> str:
    return f"0x{sum((number >> shift & 0xFF) << 8 * place for place, number in enumerate(numbers)):08x}"


def _twice(bits: int) -> str:
    return f"0x{bits:04x}{bits:04x}"
