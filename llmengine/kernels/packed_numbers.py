"""Device functions that make numbers and factors of what a packed layout holds: see `packed_weights`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def numbers_of_words(
    word, top, shift, top_shift, zero, INDEX: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, TABLE: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, ZERO_OFFSET: tl.constexpr, BF16_ZEROS: tl.constexpr,
    DTYPE: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Value INDEX of each word, as a number of DTYPE, less its zero point.

    Args:
        top: words of the high bits, if there are any.
        shift: where the block's bits begin in its words, and `top_shift` in `top`.
    """
    if CODE != "":
        # Both words of a register are of one row, so operands of rows are the same for the second one.
        if LOW_BITS == 2 and HIGH_BITS > 0:
            bits = tl.inline_asm_elementwise(
                CODE,
                "=r,r,r,r,r,r,r",
                [word, top, top_shift[:, None], shift[:, None]],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif LOW_BITS == 2:
            bits = tl.inline_asm_elementwise(
                CODE, "=r,r,r,r", [word, shift[:, None]], dtype=tl.int16, is_pure=True, pack=2
            )
        elif HIGH_BITS > 0:
            bits = tl.inline_asm_elementwise(
                CODE, "=r,r,r,r,r", [word, top, top_shift[:, None]], dtype=tl.int16, is_pure=True, pack=2
            )
        elif not ZEROS:
            bits = tl.inline_asm_elementwise(CODE, "=r,r", [word], dtype=tl.int16, is_pure=True, pack=2)
        elif zero.dtype == tl.int64:
            bits = tl.inline_asm_elementwise(
                CODE, "=r,r,l,l", [word, zero[:, None]], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            bits = tl.inline_asm_elementwise(
                CODE, "=r,r,r,r", [word, zero[:, None]], dtype=tl.int16, is_pure=True, pack=2
            )
        number = bits.to(DTYPE, bitcast=True)
    else:
        exact = _plain_numbers(word, top, shift, top_shift, INDEX, KIND, TABLE, LOW_BITS, HIGH_BITS, MIDDLE)
        if ZEROS:
            exact += ZERO_OFFSET + _half(zero >> (16 * GROUP), BF16_ZEROS)[:, None]
        number = exact.to(DTYPE)
    return number


@triton.jit
def _plain_numbers(
    word, top, shift, top_shift, INDEX: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """Value INDEX of each word as float32, by plain arithmetic; integers less MIDDLE."""
    bits = word.to(tl.int32)
    if LOW_BITS > 0:
        code = (bits >> (shift[:, None] + LOW_BITS * INDEX)) & ((1 << LOW_BITS) - 1)
        if HIGH_BITS > 0:
            high = (top.to(tl.int32) >> (top_shift[:, None] + HIGH_BITS * INDEX)) & ((1 << HIGH_BITS) - 1)
            code |= high << LOW_BITS
        # The bits of 2 ** 23 + code. LLVM would subtract before it converts, 16-bit integers in pairs, and ptxas (12.8
        # and 13.0) subtracts nothing where it computes such a pair twice.
        exact = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + MIDDLE)
    elif KIND == "int8":
        exact = ((bits << (24 - 8 * INDEX)) >> 24).to(tl.float32)
    elif KIND == "e4m3":
        exact = _e4m3(bits >> (8 * INDEX))
    elif KIND == "table":
        code = (bits >> (4 * INDEX)) & 15
        exact = tl.zeros(code.shape, dtype=tl.float32)
        for entry in tl.static_range(16):
            exact = tl.where(code == entry, TABLE[entry], exact)
    else:
        shifted = bits << (28 - 4 * INDEX)
        moved = (shifted & -2147483648) | ((shifted >> 6) & 0x01C00000)
        exact = moved.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126
    return exact


@triton.jit
def group_scale(scale, extra, GROUP: tl.constexpr, SCALES: tl.constexpr):
    """The scale of a group, float32, out of the integer that has those of a block; steps times what `extra` has."""
    if SCALES == "steps":
        value = _step(scale, GROUP) * _half(extra, False)
    elif SCALES == "pairs":
        value = ((scale >> (8 * GROUP)).to(tl.int32) & 15).to(tl.float32) * _half(extra, False)
    elif SCALES == "float32":
        value = (scale >> (32 * GROUP)).to(tl.int32).to(tl.float32, bitcast=True)
    elif SCALES == "e4m3":
        value = _e4m3((scale >> (8 * GROUP)).to(tl.int32))
    else:
        value = _half(scale >> (16 * GROUP), SCALES == "bfloat16")
    return value


@triton.jit
def group_minimum(scale, extra, GROUP: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr):
    """The minimum of a group, float32: in `extra`, or a step behind those of scales or above one, times its unit."""
    if SCALES == "steps":
        value = _step(scale, GROUPS + GROUP) * _half(extra >> 16, False)
    elif SCALES == "pairs":
        value = ((scale >> (8 * GROUP + 4)).to(tl.int32) & 15).to(tl.float32) * _half(extra >> 16, False)
    else:
        value = _half(extra >> (16 * GROUP), False)
    return value


@triton.jit
def _step(steps, PLACE: tl.constexpr):
    """A signed byte of an integer, as float32."""
    return (((steps >> (8 * PLACE)).to(tl.int32) << 24) >> 24).to(tl.float32)


@triton.jit
def _e4m3(bits):
    """The low 8 bits, e4m3, as float32."""
    shifted = bits << 24
    moved = (shifted & -2147483648) | ((shifted >> 4) & 0x07F00000)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def _half(bits, IS_BF16: tl.constexpr):
    """The low 16 bits, float16 or bfloat16, as float32."""
    if IS_BF16:
        value = ((bits.to(tl.int32) & 0xFFFF) << 16).to(tl.float32, bitcast=True)
    else:
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value
