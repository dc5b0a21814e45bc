"""Numbers by which GPUs tell each other, in memory that they map, how far they are.

Each has one writer, so plain stores and loads do, with release and acquire semantics over the system. GPUs that are
joined by PCIe have no atomic operations on each other's memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of a program's warps, each of which has all of up to 32 elements, the first one acts.
_BEGIN = """
    .reg .pred acts, goes_on;
    .reg .b32 value, behind;
    mov.u32 value, %tid.x;
    setp.lt.u32 acts, value, 32;
    setp.ne.and.s32 acts, $3, 0, acts;
"""

_TELL = tl.constexpr(f"""
{{
    {_BEGIN}
    @acts st.release.sys.global.u32 [$1], $2;
    mov.u32 $0, 0;
}}
""")


def _await(checks_release: str) -> tl.constexpr:
    return tl.constexpr(f"""
{{
    {_BEGIN}
    @!acts bra done;
    look:
    {checks_release}
    ld.acquire.sys.global.u32 value, [$1];
    sub.s32 behind, value, $2;
    setp.lt.s32 goes_on, behind, 0;
    @goes_on bra look;
    done:
    mov.u32 $0, 0;
}}
""")


_AWAIT = _await("")
_AWAIT_OR_RELEASE = _await("""
    ld.relaxed.sys.global.u32 value, [$4];
    setp.ne.s32 goes_on, value, 0;
    @goes_on bra done;
""")


@triton.jit
def tell_number(words, number, mask, ASSEMBLY: tl.constexpr):
    """Write a number to words in the memory of other GPUs, after all that the program has written before.

    Args:
        words: int32 pointers [up to 32].
        number: a scalar.
        ASSEMBLY: false in Triton's interpreter.
    """
    numbers = tl.zeros_like(words.to(tl.int64)).to(tl.int32) + number
    tl.debug_barrier()  # all threads have written
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            _TELL,
            "=r,l,r,r",
            [words.to(tl.int64), numbers, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.atomic_xchg(words, numbers, mask=mask, sem="release", scope="sys")


@triton.jit
def await_number(words, number, mask, ASSEMBLY: tl.constexpr):
    """Wait until each of the words, in this GPU's memory, is the number or a later one; numbers may wrap around.

    What their writers wrote before can be read then. The arguments are those of `tell_number`.
    """
    numbers = tl.zeros_like(words.to(tl.int64)).to(tl.int32) + number
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            _AWAIT,
            "=r,l,r,r",
            [words.to(tl.int64), numbers, mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        behind = -1
        while behind < 0:
            found = tl.atomic_add(words, tl.zeros_like(numbers), mask=mask, sem="acquire", scope="sys")
            behind = tl.min(tl.where(mask, found - numbers, 0))
    tl.debug_barrier()  # no thread reads before


@triton.jit
def await_number_or_release(word, number, released, ASSEMBLY: tl.constexpr):
    """`await_number` of one word, until the word `released` is not 0."""
    one = tl.zeros([1], tl.int32)
    if ASSEMBLY:
        tl.inline_asm_elementwise(
            _AWAIT_OR_RELEASE,
            "=r,l,r,r,l",
            [(word + one).to(tl.int64), one + number, one + 1, (released + one).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        behind = -1
        while behind < 0:
            behind = tl.atomic_add(word, 0, sem="acquire", scope="sys") - number
            is_released = tl.atomic_add(released, 0, sem="relaxed", scope="sys") != 0
            behind = tl.where(is_released, 0, behind)
    tl.debug_barrier()
