"""GGUF block formats to float32. Layouts: ggml's `block_q*` structs.

The common formats are converted here, 2 to 3 times faster than by the gguf package, which converts the others. The
code uses numpy because torch would wake all of its threads for each of these small operations, which costs far more
than it gains while other work occupies the cores.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmengine.errors import UnsupportedModelError
from llmengine.quantization.gguf_blocks import BLOCK_SIZES

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_PIECE_ELEMENTS = 1 << 18
"""Weights converted at a time: few enough for several passes over them to stay in the processor's cache."""


def dequantize(raw: Bytes, type_name: str, out: Floats) -> None:
    """Write the weights of `raw` ([rows, row_bytes]) to `out` ([rows, columns]); both contiguous.

    Scales that are not finite produce weights that are not finite.
    """
    if type_name not in _CONVERTERS:
        _dequantize_with_gguf(raw, type_name, out)
        return
    block_size, block_bytes = BLOCK_SIZES[type_name]
    convert, step = _CONVERTERS[type_name], _PIECE_ELEMENTS // block_size
    blocks, weights = raw.reshape(-1, block_bytes), out.reshape(-1, block_size)
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            convert(blocks[start : start + step], weights[start : start + step])


def _from_f32(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f4")


def _from_f16(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view("<f2")


def _from_bf16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def _from_q8_0(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _halves(blocks[:, :2])


def _from_q4_0(blocks: Bytes, out: Floats) -> None:
    out[...] = _nibbles(blocks[:, 2:], 16)
    out -= np.float32(8.0)
    out *= _halves(blocks[:, :2])


def _from_q4_1(blocks: Bytes, out: Floats) -> None:
    scale_and_min = _halves(blocks[:, :4])
    out[...] = _nibbles(blocks[:, 4:], 16)
    out *= scale_and_min[:, :1]
    out += scale_and_min[:, 1:]


def _from_q5_0(blocks: Bytes, out: Floats) -> None:
    out[...] = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    out -= np.float32(16.0)
    out *= _halves(blocks[:, :2])


def _from_q5_1(blocks: Bytes, out: Floats) -> None:
    scale_and_min = _halves(blocks[:, :4])
    out[...] = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    out *= scale_and_min[:, :1]
    out += scale_and_min[:, 1:]


def _from_q4_k(blocks: Bytes, out: Floats) -> None:
    out[...] = _nibbles(blocks[:, 16:], 32)
    _scale_k(blocks[:, :16], out)


def _from_q5_k(blocks: Bytes, out: Floats) -> None:
    # Bit k of a byte belongs to the k-th of the block's eight runs of 32 weights.
    high = _words(blocks[:, 16:48])[:, None, :] >> np.arange(8, dtype=np.uint32)[:, None]
    high = (high & np.uint32(0x01010101)) << np.uint32(4)
    out[...] = _nibbles(blocks[:, 48:], 32) | high.view(np.uint8).reshape(out.shape)
    _scale_k(blocks[:, :16], out)


def _from_q6_k(blocks: Bytes, out: Floats) -> None:
    # Two bits of a byte belong to each of the four runs of 32 weights in half a block.
    high = _words(blocks[:, 128:192]).reshape(-1, 2, 1, 8) >> np.arange(0, 8, 2, dtype=np.uint32)[:, None]
    high = (high & np.uint32(0x03030303)) << np.uint32(4)
    out[...] = _nibbles(blocks[:, :128], 64) | high.view(np.uint8).reshape(out.shape)
    out -= np.float32(32.0)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8) * _halves(blocks[:, 208:])
    runs = out.reshape(-1, 16, 16)
    runs *= scales[:, :, None]


_CONVERTERS = {
    "F32": _from_f32,
    "F16": _from_f16,
    "BF16": _from_bf16,
    "Q8_0": _from_q8_0,
    "Q4_0": _from_q4_0,
    "Q4_1": _from_q4_1,
    "Q5_0": _from_q5_0,
    "Q5_1": _from_q5_1,
    "Q4_K": _from_q4_k,
    "Q5_K": _from_q5_k,
    "Q6_K": _from_q6_k,
}


def _halves(raw: Bytes) -> Floats:
    """The float16 numbers in bytes [n, 2 * k], as float32 [n, k]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _words(raw: Bytes) -> npt.NDArray[np.uint32]:
    """Bytes [n, 4 * k] as [n, k], so that operations on bits take four of them at a time."""
    return np.ascontiguousarray(raw).view(np.uint32)


def _nibbles(raw: Bytes, run: int) -> Bytes:
    """The 4-bit numbers in bytes [n, k], as [n, 2 * k]: of each `run` bytes the low halves, then the high halves."""
    words = _words(raw).reshape(len(raw), -1, run // 4)
    low, high = words & np.uint32(0x0F0F0F0F), (words >> np.uint32(4)) & np.uint32(0x0F0F0F0F)
    return np.concatenate((low, high), axis=2).view(np.uint8).reshape(len(raw), -1)


def _fifth_bits(raw: Bytes) -> Bytes:
    """The bits in bytes [n, 4], lowest first, as numbers 0 or 16 [n, 32]."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little") << np.uint8(4)


def _scale_k(head: Bytes, out: Floats) -> None:
    """Apply the scales and minima of Q4_K and Q5_K to integers `out` [n, 256].

    `head` [n, 16] has two float16 factors and eight pairs of scale and minimum in 6 bits each: the low 6 bits of bytes
    0 to 3 and 4 to 7 are the first four scales and minima; the others have 4 bits in bytes 8 to 11, and above those of
    the first four the 2 that are missing.
    """
    factors, first, second, rest = _halves(head[:, :4]), head[:, 4:8], head[:, 8:12], head[:, 12:]
    scales = np.concatenate((first & 63, (rest & 15) | ((first >> 2) & 48)), axis=1)
    minima = np.concatenate((second & 63, (rest >> 4) | ((second >> 2) & 48)), axis=1)
    runs = out.reshape(-1, 8, 32)
    runs *= (factors[:, :1] * scales)[:, :, None]
    runs -= (factors[:, 1:] * minima)[:, :, None]


def _dequantize_with_gguf(raw: Bytes, type_name: str, out: Floats) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as reference

    if type_name not in GGMLQuantizationType.__members__:
        raise UnsupportedModelError(f"tensors of type {type_name} require a newer gguf package: pip install -U gguf")
    out[...] = reference(raw, GGMLQuantizationType[type_name])
