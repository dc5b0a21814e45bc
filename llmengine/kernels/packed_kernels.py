"""Triton kernels for packed quantized weights: products with activations of 16 bits, and dequantization.

`packed_kernel` reads the weights once for each `BLOCK_M` rows of x. They are the left operand of the tensor cores'
products, made from words in registers; x's rows are the columns, of which eight are enough. The programs of a tile that
share K add up in whichever comes last.

Numbers are made by instructions for two of them at once (`packed_instructions`): the bits of a value are moved into
those of a number of the activations' dtype whose exponent is fixed, and one multiply-add removes what is too much.
Triton's interpreter, and activations of float32, take plain arithmetic instead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.kernels.packed_numbers import group_minimum, group_scale, numbers_of_words


@triton.jit(do_not_specialize=["num_rows"])
def packed_kernel(
    x,
    words,
    high,
    scales,
    row_scales,
    zeros,
    extras,
    shifts,
    bias,
    out,
    partials,
    counters,
    num_rows,
    N,
    out_stride,
    K: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    SLICE: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    MINIMA: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    BF16_ZEROS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    CODE_0: tl.constexpr,
    CODE_1: tl.constexpr,
    CODE_2: tl.constexpr,
    CODE_3: tl.constexpr,
):
    """Write x [num_rows, K] @ weights.T + bias to `out`, or add it; gated: silu of the first N outputs times the rest.

    Grid: (blocks of rows, SPLIT_K, tiles of outputs).
    """
    VALUES: tl.constexpr = 2 if KIND == "int8" or KIND == "e4m3" else 4
    COLUMNS: tl.constexpr = SLICE * VALUES
    SIZE: tl.constexpr = 64 * SLICE
    TURNS: tl.constexpr = (NUM_BLOCKS + SPLIT_K - 1) // SPLIT_K
    WORD_TURNS: tl.constexpr = 2 if LOW_BITS == 2 else 1
    WORD_BLOCKS: tl.constexpr = (NUM_BLOCKS + WORD_TURNS - 1) // WORD_TURNS
    HIGH_TURNS: tl.constexpr = 4 // (HIGH_BITS if HIGH_BITS > 0 else 4)
    HIGH_BLOCKS: tl.constexpr = (NUM_BLOCKS + HIGH_TURNS - 1) // HIGH_TURNS
    HAS_UNITS: tl.constexpr = SCALES == "steps" or SCALES == "pairs"
    EXTRAS: tl.constexpr = MINIMA or HAS_UNITS
    EXTRA_TURNS: tl.constexpr = 256 // COLUMNS if HAS_UNITS else 1
    EXTRA_BLOCKS: tl.constexpr = (NUM_BLOCKS + EXTRA_TURNS - 1) // EXTRA_TURNS
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    split = tl.program_id(1)
    tile = tl.program_id(2)
    r = tl.arange(0, BLOCK_N)
    e = tl.arange(0, SLICE)
    m = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + r
    num_rows = (num_rows - first_row).to(tl.int32)
    begin = split * TURNS
    turns = tl.minimum(TURNS, NUM_BLOCKS - begin)
    first_tile = tile * (BLOCK_N // 64)
    first_place = tl.cast(first_tile, tl.int64) * NUM_BLOCKS + begin
    first_word = tl.cast(first_tile, tl.int64) * WORD_BLOCKS
    up_offset = tl.cast(N // 64, tl.int64) * NUM_BLOCKS
    up_words = tl.cast(N // 64, tl.int64) * (WORD_BLOCKS * SIZE)
    up_high = tl.cast(N // 64, tl.int64) * (HIGH_BLOCKS * SIZE)
    up_extras = tl.cast(N // 64, tl.int64) * (EXTRA_BLOCKS * 64)
    # Rows beyond the last tile read that one.
    tiles = tl.minimum(r // 64, NUM_TILES - 1 - first_tile)
    if PDL:
        for part in tl.static_range(BLOCK_N // 64):
            skipped = tl.minimum(part, NUM_TILES - 1 - first_tile) * WORD_BLOCKS
            prefetched = words + (first_word + skipped + begin // WORD_TURNS) * SIZE
            _prefetch(prefetched, turns // WORD_TURNS * SIZE)
            if GATED:
                _prefetch(prefetched + up_words, turns // WORD_TURNS * SIZE)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    in_tile = ((r % 64) * SLICE)[:, None] + e[None, :]
    word_ptr = words + first_word * SIZE + (tiles * (WORD_BLOCKS * SIZE))[:, None] + in_tile
    high_ptr = high + tl.cast(first_tile, tl.int64) * (HIGH_BLOCKS * SIZE)
    high_ptr += (tiles * (HIGH_BLOCKS * SIZE))[:, None] + in_tile
    x_ptr = x + first_row * K + begin * COLUMNS + m[:, None] * K + e[None, :]
    row_mask = m[:, None] < num_rows
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Scales come two turns ahead, since a load that feeds no product does not go through shared memory.
    scale_ptr = scales + first_place * 64 + tiles * (NUM_BLOCKS * 64) + r % 64
    zero_ptr = zeros + first_place * 64 + tiles * (NUM_BLOCKS * 64) + r % 64
    extra_ptr = extras + tl.cast(first_tile, tl.int64) * (EXTRA_BLOCKS * 64) + tiles * (EXTRA_BLOCKS * 64) + r % 64
    shift_ptr = shifts + r * 0
    following = tl.minimum(1, turns - 1)
    scale = _load_if(scale_ptr, GROUPS > 0)
    scale_next = _load_if(scale_ptr + following * 64, GROUPS > 0)
    up_scale = _load_if(scale_ptr + up_offset * 64, GROUPS > 0 and GATED)
    up_scale_next = _load_if(scale_ptr + up_offset * 64 + following * 64, GROUPS > 0 and GATED)
    extra_place = begin // EXTRA_TURNS * 64
    following = (begin + following) // EXTRA_TURNS * 64
    extra = _load_if(extra_ptr + extra_place, EXTRAS)
    extra_next = _load_if(extra_ptr + following, EXTRAS)
    up_extra = _load_if(extra_ptr + up_extras + extra_place, EXTRAS and GATED)
    up_extra_next = _load_if(extra_ptr + up_extras + following, EXTRAS and GATED)
    for turn in tl.range(0, turns, num_stages=NUM_STAGES):
        block = begin + turn
        word = _load_plane(word_ptr, block, SIZE, WORD_TURNS)
        shift = _load_shift(shift_ptr, block, WORD_TURNS)
        top_shift = _load_shift(shift_ptr, block, HIGH_TURNS)
        top = word
        if HIGH_BITS > 0:
            top = _load_plane(high_ptr, block, SIZE, HIGH_TURNS)
        if GATED:
            up_word = _load_plane(word_ptr + up_words, block, SIZE, WORD_TURNS)
            up_top = up_word
            if HIGH_BITS > 0:
                up_top = _load_plane(high_ptr + up_high, block, SIZE, HIGH_TURNS)
        k = (begin + turn) * COLUMNS + e
        x0 = _load_slice(x_ptr, row_mask, k, K, NUM_BLOCKS * COLUMNS)
        x1 = _load_slice(x_ptr + SLICE, row_mask, k + SLICE, K, NUM_BLOCKS * COLUMNS)
        x2 = x0
        x3 = x1
        if VALUES == 4:
            x2 = _load_slice(x_ptr + 2 * SLICE, row_mask, k + 2 * SLICE, K, NUM_BLOCKS * COLUMNS)
            x3 = _load_slice(x_ptr + 3 * SLICE, row_mask, k + 3 * SLICE, K, NUM_BLOCKS * COLUMNS)
        ahead = tl.minimum(turn + 2, turns - 1)
        scale_now = scale
        up_scale_now = up_scale
        if GROUPS > 0:
            scale = _move(scale_next, CODE_0)
            scale_next = tl.load(scale_ptr + ahead * 64)
            if GATED:
                up_scale = _move(up_scale_next, CODE_0)
                up_scale_next = tl.load(scale_ptr + up_offset * 64 + ahead * 64)
        extra_now = extra
        up_extra_now = up_extra
        if EXTRAS:
            ahead = (begin + ahead) // EXTRA_TURNS * 64
            extra = _move(extra_next, CODE_0)
            extra_next = tl.load(extra_ptr + ahead)
            if GATED:
                up_extra = _move(up_extra_next, CODE_0)
                up_extra_next = tl.load(extra_ptr + up_extras + ahead)
        zero = _load_if(zero_ptr + turn * 64, ZEROS)
        up_zero = _load_if(zero_ptr + up_offset * 64 + turn * 64, ZEROS and GATED)
        acc = _add_block(
            acc, word, top, shift, top_shift, x0, x1, x2, x3, scale_now, zero, extra_now,
            KIND, TABLE, LOW_BITS, HIGH_BITS, MIDDLE, GROUPS, SCALES, MINIMA, ZEROS, ZERO_OFFSET, BF16_ZEROS,
            CODE_0, CODE_1, CODE_2, CODE_3,
        )  # fmt: skip
        if GATED:
            up_acc = _add_block(
                up_acc, up_word, up_top, shift, top_shift, x0, x1, x2, x3, up_scale_now, up_zero, up_extra_now,
                KIND, TABLE, LOW_BITS, HIGH_BITS, MIDDLE, GROUPS, SCALES, MINIMA, ZEROS, ZERO_OFFSET, BF16_ZEROS,
                CODE_0, CODE_1, CODE_2, CODE_3,
            )  # fmt: skip
        x_ptr += COLUMNS

    if SPLIT_K > 1:
        # The last program of a tile to arrive adds all shares up, always in the same order.
        SHARE: tl.constexpr = BLOCK_M * BLOCK_N
        WHOLE: tl.constexpr = SHARE * (2 if GATED else 1)
        spot = tile * tl.num_programs(0) + tl.program_id(0)
        shares = partials + tl.cast(spot, tl.int64) * (SPLIT_K * WHOLE) + r[:, None] * BLOCK_M + m[None, :]
        share_mask = (m < num_rows)[None, :]
        tl.store(shares + split * WHOLE, acc, mask=share_mask)
        if GATED:
            tl.store(shares + split * WHOLE + SHARE, up_acc, mask=share_mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + spot, 1, sem="acq_rel")
        if arrived != SPLIT_K - 1:
            return
        tl.store(counters + spot, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for other in tl.range(0, SPLIT_K, num_stages=1):
            acc += tl.load(shares + other * WHOLE, mask=share_mask, other=0.0, cache_modifier=".cg")
            if GATED:
                up_acc += tl.load(shares + other * WHOLE + SHARE, mask=share_mask, other=0.0, cache_modifier=".cg")
    in_range = columns < N
    if ROW_SCALES:
        acc *= tl.load(row_scales + columns, mask=in_range, other=0.0)[:, None]
        if GATED:
            up_acc *= tl.load(row_scales + N + columns, mask=in_range, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + columns, mask=in_range, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_acc += tl.load(bias + N + columns, mask=in_range, other=0.0).to(tl.float32)[:, None]
    if GATED:
        acc = acc * tl.sigmoid(acc) * up_acc
    target = out + first_row * out_stride + m[None, :] * out_stride + columns[:, None]
    mask = in_range[:, None] & (m < num_rows)[None, :]
    if ADD:
        acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def dequantize_kernel(
    words,
    high,
    scales,
    row_scales,
    zeros,
    extras,
    shifts,
    ids,
    out,
    first_row,
    num_rows,
    K: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    KIND: tl.constexpr,
    TABLE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    SLICE: tl.constexpr,
    GROUPS: tl.constexpr,
    SCALES: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    MINIMA: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    BF16_ZEROS: tl.constexpr,
    CODE_0: tl.constexpr,
    CODE_1: tl.constexpr,
    CODE_2: tl.constexpr,
    CODE_3: tl.constexpr,
    ROWS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Write weights to `out` [num_rows, K]; a program ROWS rows of a block.

    They are the rows from `first_row` on, in whole tiles, or with GATHER those that `ids` [num_rows] names.
    """
    VALUES: tl.constexpr = 2 if KIND == "int8" or KIND == "e4m3" else 4
    PER: tl.constexpr = VALUES // (GROUPS if GROUPS > 0 else 1)
    block = tl.program_id(0)
    targets = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, SLICE)
    in_rows = targets < num_rows
    rows = first_row + targets
    if GATHER:
        rows = tl.load(ids + targets, mask=in_rows, other=0)
    tiles = (rows // 64).to(tl.int64)
    places = (tiles * NUM_BLOCKS + block) * 64 + rows % 64
    SIZE: tl.constexpr = 64 * SLICE
    WORD_TURNS: tl.constexpr = 2 if LOW_BITS == 2 else 1
    WORD_BLOCKS: tl.constexpr = (NUM_BLOCKS + WORD_TURNS - 1) // WORD_TURNS
    HIGH_TURNS: tl.constexpr = 4 // (HIGH_BITS if HIGH_BITS > 0 else 4)
    HIGH_BLOCKS: tl.constexpr = (NUM_BLOCKS + HIGH_TURNS - 1) // HIGH_TURNS
    HAS_UNITS: tl.constexpr = SCALES == "steps" or SCALES == "pairs"
    EXTRA_TURNS: tl.constexpr = 256 // (SLICE * VALUES) if HAS_UNITS else 1
    EXTRA_BLOCKS: tl.constexpr = (NUM_BLOCKS + EXTRA_TURNS - 1) // EXTRA_TURNS
    in_tile = (rows % 64)[:, None] * SLICE + e[None, :]
    word = _load_plane(words + (tiles * (WORD_BLOCKS * SIZE))[:, None] + in_tile, block, SIZE, WORD_TURNS)
    shift = _load_shift(shifts + tl.zeros_like(rows), block, WORD_TURNS)
    top_shift = _load_shift(shifts + tl.zeros_like(rows), block, HIGH_TURNS)
    top = word
    if HIGH_BITS > 0:
        top = _load_plane(high + (tiles * (HIGH_BLOCKS * SIZE))[:, None] + in_tile, block, SIZE, HIGH_TURNS)
    scale = _load_if(scales + places, GROUPS > 0)
    extra_places = (tiles * EXTRA_BLOCKS + block // EXTRA_TURNS) * 64 + rows % 64
    extra = _load_if(extras + extra_places, MINIMA or HAS_UNITS)
    zero = _load_if(zeros + places, ZEROS)
    row_scale = tl.full((ROWS,), 1.0, dtype=tl.float32)
    if ROW_SCALES:
        row_scale = tl.load(row_scales + rows)
    for i in tl.static_range(VALUES):
        number = numbers_of_words(
            word, top, shift, top_shift, zero, i, i // PER,
            KIND, TABLE, LOW_BITS, HIGH_BITS, MIDDLE, ZEROS, ZERO_OFFSET, BF16_ZEROS,
            out.dtype.element_ty,
            CODE_0 if i == 0 else (CODE_1 if i == 1 else (CODE_2 if i == 2 else CODE_3)),
        )  # fmt: skip
        factor = row_scale
        if GROUPS > 0:
            factor *= group_scale(scale, extra, i // PER, SCALES)
        exact = number.to(tl.float32) * factor[:, None]
        if MINIMA:
            exact += group_minimum(scale, extra, i // PER, GROUPS, SCALES)[:, None]
        number = exact.to(out.dtype.element_ty)
        columns = ((block * VALUES + i) * SLICE + e)[None, :]
        tl.store(out + targets.to(tl.int64)[:, None] * K + columns, number, mask=in_rows[:, None] & (columns < K))


@triton.jit
def _load_if(pointers, WANTED: tl.constexpr):
    """What the pointers lead to, or zeros."""
    if WANTED:
        values = tl.load(pointers)
    else:
        values = tl.zeros(pointers.shape, dtype=tl.int32)
    return values


@triton.jit
def _load_plane(pointers, block, SIZE: tl.constexpr, TURNS: tl.constexpr):
    """The words of a block, which TURNS blocks share."""
    if TURNS == 1:
        words = tl.load(pointers + block * SIZE, eviction_policy="evict_first")
    else:
        words = tl.load(pointers + block // TURNS * SIZE)
    return words


@triton.jit
def _load_shift(pointers, block, TURNS: tl.constexpr):
    """Where a block's bits begin in words that TURNS blocks share: 0, 4, 8 or 12, which the pointers lead to.

    Loops whose operands come from anything but loads are not pipelined.
    """
    if TURNS == 1:
        shift = tl.zeros(pointers.shape, dtype=tl.int32)
    else:
        shift = tl.load(pointers + block % TURNS * (4 // TURNS))
    return shift


@triton.jit
def _load_slice(pointers, row_mask, columns, K: tl.constexpr, PADDED_K: tl.constexpr):
    """Columns of x; beyond K there are zeros."""
    mask = row_mask
    if K != PADDED_K:
        mask = row_mask & (columns < K)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _add_block(
    acc, word, top, shift, top_shift, x0, x1, x2, x3, scale, zero, extra,
    KIND: tl.constexpr, TABLE: tl.constexpr,
    LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, MIDDLE: tl.constexpr,
    GROUPS: tl.constexpr, SCALES: tl.constexpr, MINIMA: tl.constexpr,
    ZEROS: tl.constexpr, ZERO_OFFSET: tl.constexpr, BF16_ZEROS: tl.constexpr,
    CODE_0: tl.constexpr, CODE_1: tl.constexpr, CODE_2: tl.constexpr, CODE_3: tl.constexpr,
):  # fmt: skip
    """Add the product of a block of weights and of x's slices; the sums of groups are multiplied by their scales.

    Minima are multiplied by the sums of x: the product with ones, which are all that tensor cores add up exactly.
    """
    VALUES: tl.constexpr = 2 if KIND == "int8" or KIND == "e4m3" else 4
    PER: tl.constexpr = VALUES // (GROUPS if GROUPS > 0 else 1)
    for i in tl.static_range(VALUES):
        number = numbers_of_words(
            word, top, shift, top_shift, zero, i, i // PER,
            KIND, TABLE, LOW_BITS, HIGH_BITS, MIDDLE, ZEROS, ZERO_OFFSET, BF16_ZEROS,
            x0.dtype,
            CODE_0 if i == 0 else (CODE_1 if i == 1 else (CODE_2 if i == 2 else CODE_3)),
        )  # fmt: skip
        if i == 0:
            right = x0
        elif i == 1:
            right = x1
        elif i == 2:
            right = x2
        else:
            right = x3
        if GROUPS == 0:
            acc = tl.dot(number, tl.trans(right), acc, input_precision="ieee")
        else:
            if i % PER == 0:
                part = tl.dot(number, tl.trans(right), input_precision="ieee")
            else:
                part = tl.dot(number, tl.trans(right), part, input_precision="ieee")
            if MINIMA:
                ones = tl.full(word.shape, 1.0, dtype=x0.dtype)
                if i % PER == 0:
                    sums = tl.dot(ones, tl.trans(right), input_precision="ieee")
                else:
                    sums = tl.dot(ones, tl.trans(right), sums, input_precision="ieee")
            if i % PER == PER - 1:
                acc += part * group_scale(scale, extra, i // PER, SCALES)[:, None]
                if MINIMA:
                    acc += sums * group_minimum(scale, extra, i // PER, GROUPS, SCALES)[:, None]
    return acc


@triton.jit
def _move(value, CODE: tl.constexpr):
    """The value itself; through an instruction, since loops whose turns only pass values on are not pipelined."""
    if CODE != "":
        if value.dtype == tl.int64:
            value = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [value], dtype=tl.int64, is_pure=True, pack=1)
        elif value.dtype == tl.int32:
            value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)
        else:
            value = tl.inline_asm_elementwise("mov.b16 $0, $1;", "=h,h", [value], dtype=tl.int16, is_pure=True, pack=1)
    return value


@triton.jit
def _prefetch(first, num_words):
    """Ask the L2 for the first 16 KiB of `num_words` words."""
    offsets = tl.arange(0, 128) * 64
    offsets = tl.where(offsets < num_words, offsets, 0)
    addresses = (first + offsets).to(tl.int64)
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], 128; mov.u32 $0, 0; }",
        "=r,l",
        [addresses],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
