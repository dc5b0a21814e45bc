"""Triton kernels for products of 8-bit weights with 8-bit activations: FP8 (e4m3) and W8A8.

`quantize_rows_kernel` rounds activations, after a norm where there is one, and `scaled_kernel` multiplies. It reads the
weights once for each `BLOCK_M` rows of x, as the left operand of the tensor cores' products, like `packed_kernel`.
`look_up_kernel` reads rows of an embedding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmengine.kernels.linear import prefetch_rows


@triton.jit
def quantize_rows_kernel(
    x,
    norm_weight,
    factors,
    values,
    scales,
    static_scale,
    eps,
    columns,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    FACTORS: tl.constexpr,
    STATIC: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    """Write a row of x, normalized and times `factors`, as values with scales; one program a row.

    GATED: a row of x is gate and up, and silu(gate) * up is written.

    GROUP columns, all of a row or 128, share a scale, which makes the largest of them LARGEST. With STATIC,
    `static_scale` is the scale of all, and values beyond saturate.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < columns
    if NORM:
        weight = tl.load(norm_weight + k, mask=mask, other=0.0).to(tl.float32)
    if FACTORS:
        factor = tl.load(factors + k, mask=mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_row = x + row * columns * (2 if GATED else 1)
    exact = tl.load(x_row + k, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(x_row + columns + k, mask=mask, other=0.0).to(tl.float32)
        exact = exact * _sigmoid(exact, ON_GPU) * up
    if NORM:
        exact *= tl.rsqrt(tl.sum(exact * exact, 0) / columns + eps) * weight
    if FACTORS:
        exact *= factor
    NUM_GROUPS: tl.constexpr = BLOCK // GROUP
    groups = tl.reshape(exact, (NUM_GROUPS, GROUP))
    if STATIC:
        scale = tl.load(static_scale) + tl.zeros((NUM_GROUPS,), dtype=tl.float32)
    else:
        # As integers, magnitudes are in the same order, with infinity and NaN above all: a group that is not finite
        # has a scale that is not finite, and with it every result.
        magnitudes = groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.max(magnitudes, 1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, tl.full((NUM_GROUPS,), LARGEST, tl.float32))
        scale = tl.maximum(scale, 1e-30, propagate_nan=tl.PropagateNan.ALL)
        group = tl.arange(0, NUM_GROUPS)
        tl.store(scales + row * ((columns + GROUP - 1) // GROUP) + group, scale, mask=group * GROUP < columns)
    ratio = tl.reshape(quotients(groups, scale, LARGEST, STATIC), (BLOCK,))
    if values.dtype.element_ty == tl.int8:
        if STATIC:
            ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
        # The sum's last bit is 1, and its lowest byte the integer.
        rounded = (ratio + 1.5 * 2**23).to(tl.int32, bitcast=True)
    elif ON_GPU:
        rounded = ratio  # The conversion to e4m3 rounds to the nearest, ties to even, and saturates.
    else:
        # The interpreter's cuts bits off. The last bit of this sum is an eighth of the power of two below, like e4m3's.
        ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
        power = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        rounder = tl.maximum(power, 2**-6) * (1.5 * 2**20)
        rounded = (ratio + rounder) - rounder
    tl.store(values + row * columns + k, rounded.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _sigmoid(x, ON_GPU: tl.constexpr):
    if ON_GPU:
        # Flushing subnormal numbers to zero, which tl.exp and the division take six more instructions to keep.
        result = tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        result = tl.sigmoid(x)
    return result


@triton.jit
def quotients(x, scale, LARGEST: tl.constexpr, SATURATE: tl.constexpr):
    """x [groups, columns] / scale [groups], correctly rounded, in three instructions and with one division a group.

    The product with the reciprocal is off by 1.5 units in the last place at most; what it leaves of x is exact, and
    the share of that in the quotient corrects it (P. Markstein: Computation of elementary functions on the IBM RISC
    System/6000 processor, 1990). Where x is below 2^-100, what is left may lose bits, and results their last one; where
    a quotient overflows, it may be NaN. With SATURATE, quotients beyond LARGEST become LARGEST or more, never NaN.
    """
    reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    shared = tl.broadcast_to(reciprocal[:, None], x.shape)
    ratio = x * shared
    if SATURATE:  # Infinity would leave NaN.
        ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
    rest = tl.fma(ratio, tl.broadcast_to(-scale[:, None], x.shape), x)
    return tl.fma(rest, shared, ratio)


@triton.jit(do_not_specialize=["num_rows"])
def scaled_kernel(
    x,
    x_scales,
    weight,
    scales,
    bias,
    out,
    partials,
    counters,
    num_rows,
    N,
    out_stride,
    K: tl.constexpr,
    X_MODE: tl.constexpr,
    W_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write x [num_rows, K] @ weight [N, K].T + bias to `out`, or add it; both operands times their scales.

    X_MODE: "tensor" (one scale), "token" or "block" (for each 128 columns of a token). W_MODE: "tensor", "channel" or
    "block" (128 x 128). Grid: (blocks of rows, SPLIT_K, tiles of outputs).
    """
    IS_INT: tl.constexpr = x.dtype.element_ty == tl.int8
    SUM: tl.constexpr = tl.int32 if IS_INT else tl.float32
    BLOCKED: tl.constexpr = X_MODE == "block" or W_MODE == "block"
    NUM_TURNS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TURNS: tl.constexpr = (NUM_TURNS + SPLIT_K - 1) // SPLIT_K
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    split = tl.program_id(1)
    tile = tl.program_id(2)
    r = tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    num_rows = (num_rows - first_row).to(tl.int32)
    columns = tile * BLOCK_N + r
    begin = split * TURNS
    turns = tl.minimum(TURNS, NUM_TURNS - begin)
    # Rows beyond the last read that one.
    weight_rows = weight + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K
    if PDL:
        if K % 16 == 0:  # bytes, of which a prefetch takes whole ones
            prefetch_rows(weight_rows, begin * BLOCK_K, tl.minimum((begin + turns) * BLOCK_K, K), 2)
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    weight_ptr = weight_rows + begin * BLOCK_K + e[None, :]
    x_ptr = x + first_row * K + begin * BLOCK_K + m[:, None] * K + e[None, :]
    row_mask = m[:, None] < num_rows
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
    for turn in tl.range(0, turns, num_stages=NUM_STAGES):
        if K % BLOCK_K == 0:
            weight_tile = tl.load(weight_ptr, eviction_policy="evict_first")
            x_tile = tl.load(x_ptr, mask=row_mask, other=0.0)
        else:
            in_range = ((begin + turn) * BLOCK_K + e < K)[None, :]
            weight_tile = tl.load(weight_ptr, mask=in_range, other=0.0, eviction_policy="evict_first")
            x_tile = tl.load(x_ptr, mask=row_mask & in_range, other=0.0)
        if IS_INT:
            acc = tl.dot(weight_tile, tl.trans(x_tile), acc, out_dtype=tl.int32)
        elif BLOCKED:
            # A turn is a block of columns.
            part = tl.dot(weight_tile, tl.trans(x_tile))
            block = begin + turn
            if W_MODE == "block":
                part *= tl.load(scales + (tile * BLOCK_N // 128) * NUM_TURNS + block)
            if X_MODE == "block":
                x_scale = tl.load(x_scales + (first_row + m) * NUM_TURNS + block, mask=m < num_rows, other=0.0)
                part *= x_scale[None, :]
            acc += part
        else:
            # The tensor cores add up with fewer bits; each turn's sum is added in float32.
            acc += tl.dot(weight_tile, tl.trans(x_tile))
        weight_ptr += BLOCK_K
        x_ptr += BLOCK_K

    if SPLIT_K > 1:
        # The last program of a tile to arrive adds all shares up, always in the same order.
        SIZE: tl.constexpr = BLOCK_M * BLOCK_N
        spot = tile * tl.num_programs(0) + tl.program_id(0)
        shares = partials + tl.cast(spot, tl.int64) * (SPLIT_K * SIZE) + r[:, None] * BLOCK_M + m[None, :]
        share_mask = (m < num_rows)[None, :]
        tl.store(shares + split * SIZE, acc, mask=share_mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + spot, 1, sem="acq_rel")
        if arrived != SPLIT_K - 1:
            return
        tl.store(counters + spot, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
        for other in tl.range(0, SPLIT_K, num_stages=1):
            acc += tl.load(shares + other * SIZE, mask=share_mask, other=0, cache_modifier=".cg")
    result = acc.to(tl.float32)
    in_outputs = columns < N
    if W_MODE == "channel":
        result *= tl.load(scales + columns, mask=in_outputs, other=0.0)[:, None]
    elif W_MODE == "tensor":
        result *= tl.load(scales)
    if X_MODE == "token":
        result *= tl.load(x_scales + first_row + m, mask=m < num_rows, other=0.0)[None, :]
    elif X_MODE == "tensor":
        result *= tl.load(x_scales)
    if BIAS:
        result += tl.load(bias + columns, mask=in_outputs, other=0.0).to(tl.float32)[:, None]
    target = out + first_row * out_stride + m[None, :] * out_stride + columns[:, None]
    mask = in_outputs[:, None] & (m < num_rows)[None, :]
    if ADD:
        result += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def look_up_kernel(
    ids,
    weight,
    scales,
    factors,
    out,
    K: tl.constexpr,
    MODE: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rows of weight [N, K] that `ids` names to `out`, times their scales and the factors of columns.

    MODE: as W_MODE of `scaled_kernel`. Grid: (rows, blocks of BLOCK columns).
    """
    target = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + target).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < K
    number = tl.load(weight + row * K + columns, mask=mask, other=0.0).to(tl.float32)
    if MODE == "block":
        number *= tl.load(scales + row // 128 * ((K + 127) // 128) + columns // 128, mask=mask, other=0.0)
    elif MODE == "channel":
        number *= tl.load(scales + row)
    else:
        number *= tl.load(scales)
    if FACTORS:
        number *= tl.load(factors + columns, mask=mask, other=0.0)
    tl.store(out + target * K + columns, number.to(out.dtype.element_ty), mask=mask)
