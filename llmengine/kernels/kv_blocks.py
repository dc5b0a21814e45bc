"""KV blocks on CUDA: the tensors of a layer, and numbers of 8 bits, int8 or e4m3.

Attention sees each token as the blocks hold it, also in the step that writes it, so how a prompt is cut into steps does
not matter.

Decodes multiply vectors of 8 bits as they are stored: a key's scale multiplies its score, and a value's scale its
weight. Tensor cores need numbers of 16 bits. fp16 holds every number of 8 bits, and is what they become the quickest;
queries are scaled so that it holds them too. A weight times a scale can be smaller than what fp16 holds, so these
products are divided by the largest scale so far. Chunks of prompts multiply a tile for many queries, so they dequantize
it first, to the dtype of q.

With ASSEMBLY, a few instructions convert four numbers at once (compute capability 8.9 for e4m3). Triton's interpreter,
and models of float32, take plain arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_SCALED = tl.constexpr(1e-30)
"""Vectors whose elements are all smaller are stored as if their largest were this."""

# With 128 added, the bytes are the low bits of fp16's 1024 + 128 + x; 1152 is subtracted.
_FROM_INT8 = """{{
.reg .b32 t, high, bias;
xor.b32 t, $2, 0x80808080;
mov.b32 high, 0x64646464;
mov.b32 bias, 0x64806480;
prmt.b32 $0, t, high, {0};
prmt.b32 $1, t, high, {1};
sub.rn.f16x2 $0, $0, bias;
sub.rn.f16x2 $1, $1, bias;
}}"""
_INT8 = tl.constexpr(_FROM_INT8.format("0x4140", "0x4342"))
_INT8_PAIRS = tl.constexpr(_FROM_INT8.format("0x4240", "0x4341"))
# Bytes 0 and 2, then 1 and 3: a conversion takes two bytes that lie together.
_E4M3_PAIRS = tl.constexpr("""{
.reg .b32 t;
.reg .b16 even, odd;
prmt.b32 t, $2, 0, 0x3120;
mov.b32 {even, odd}, t;
cvt.rn.f16x2.e4m3x2 $0, even;
cvt.rn.f16x2.e4m3x2 $1, odd;
}""")


@dataclass(frozen=True, slots=True)
class KvBlocks:
    """Keys and values of one layer; those of all layers have one more dimension in front.

    Attributes:
        numbers: [num_blocks, 2, num_kv_heads, block_size, head_dim], keys at index 0 and values at 1, so that one
            block's keys of one head are contiguous. The dtype is that of q, or int8 or float8_e4m3fn.
        scales: fp32 [num_blocks, 2, num_kv_heads, block_size], what the vectors of 8 bits are multiplied by; None for
            other dtypes.
    """

    numbers: Tensor
    scales: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.scales is not None) == (self.numbers.dtype.itemsize == 1), self.numbers.dtype

    def layer(self, index: int) -> KvBlocks:
        """The blocks of one of all layers."""
        return KvBlocks(self.numbers[index], None if self.scales is None else self.scales[index])

    @property
    def device(self) -> torch.device:
        """Device of both tensors."""
        return self.numbers.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the numbers."""
        return self.numbers.dtype

    def has_assembly(self, qkv: Tensor) -> bool:
        """Whether kernels convert numbers by instructions of their own; not in the interpreter or for float32."""
        return self.scales is not None and self.device.type == "cuda" and qkv.dtype != torch.float32


@triton.jit
def cells_of(table_ptr, positions, valid, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Places, int64, of the tokens' keys of head 0 among all vectors of a layer's blocks."""
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return blocks * (2 * NUM_KV_HEADS * BLOCK_SIZE) + positions % BLOCK_SIZE


@triton.jit
def quantized(x, dtype: tl.constexpr):
    """Numbers [vectors, dims], fp32 but exact in `dtype`, and scales [vectors], of vectors x, fp32 [vectors, dims].

    A vector that is not finite has a scale that is not finite, and with it what attends to it.
    """
    MOST: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), _LEAST_SCALED)
    scaled = x * tl.div_rn(tl.full([1], MOST, tl.float32), largest)[:, None]
    # An addition rounds to the last bit of this: 1, or an eighth of the power of two below, where e4m3 has its last.
    if dtype == tl.int8:
        rounder = tl.full([1, 1], 1.5 * 2**23, tl.float32)
    else:
        power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        rounder = tl.maximum(power, 2**-6) * (1.5 * 2**20)
    return (scaled + rounder) - rounder, tl.div_rn(largest, tl.full([1], MOST, tl.float32)) + tl.sum(x * 0.0, axis=1)


@triton.jit
def fitted(q):
    """q [rows, dims] over its largest magnitude, in fp16 or fp32, and that, fp32."""
    dtype: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
    q = q.to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(q), axis=1), axis=0), _LEAST_SCALED)
    return (q * (1.0 / largest)).to(dtype), largest


@triton.jit
def key_products(q, largest, k, scales, ASSEMBLY: tl.constexpr):
    """Products [rows, tile] of `fitted` queries and a tile of keys with their scales."""
    products = tl.dot(q, tl.trans(halves(k, ASSEMBLY).to(q.dtype)), input_precision="ieee")
    return products * (scales * largest)[None, :]


@triton.jit
def halves(stored, ASSEMBLY: tl.constexpr):
    """Numbers of 8 bits in fp16."""
    if ASSEMBLY and stored.dtype == tl.int8:
        return tl.inline_asm_elementwise(_INT8, "=&r,=&r,r", [stored], dtype=tl.float16, is_pure=True, pack=4)
    else:  # noqa: RET505 - a constexpr condition: without the else, both are compiled
        return stored.to(tl.float16)


@triton.jit
def dequantized(stored, scales, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A tile of vectors [tile, dims] in `dtype`, of numbers of 8 bits and their scales [tile]."""
    return (halves(stored, ASSEMBLY).to(tl.float32) * scales[:, None]).to(dtype)


@triton.jit
def unpaired(pairs, number: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Numbers of the even and of the odd dimensions, fp16, of int16 that hold two neighbours of dtype `number`."""
    if ASSEMBLY:
        CODE: tl.constexpr = _INT8_PAIRS if number == tl.int8 else _E4M3_PAIRS
        return tl.inline_asm_elementwise(
            CODE, "=&r,=&r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:  # noqa: RET505 - a constexpr condition: without the else, both are compiled
        even = pairs.to(tl.int8).to(number, bitcast=True).to(tl.float16)
        odd = (pairs >> 8).to(tl.int8).to(number, bitcast=True).to(tl.float16)
        return even, odd
