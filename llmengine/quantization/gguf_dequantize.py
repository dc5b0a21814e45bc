"""GGUF block formats to float32. Layouts: ggml's `block_q*` structs.

The common formats are converted here, about 10 times faster than by the gguf package, which converts the others. The
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
    out[...] = _nibbles(blocks[:, 2:])
    out -= np.float32(8.0)
    out *= _halves(blocks[:, :2])


def _from_q4_1(blocks: Bytes, out: Floats) -> None:
    scale_and_min = _halves(blocks[:, :4])
    out[...] = _nibbles(blocks[:, 4:])
    out *= scale_and_min[:, :1]
    out += scale_and_min[:, 1:]


_CONVERTERS = {
    "F32": _from_f32,
    "F16": _from_f16,
    "BF16": _from_bf16,
    "Q8_0": _from_q8_0,
    "Q4_0": _from_q4_0,
    "Q4_1": _from_q4_1,
}


def _halves(raw: Bytes) -> Floats:
    """The float16 numbers in bytes [n, 2 * k], as float32 [n, k]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _nibbles(raw: Bytes) -> Bytes:
    """The 4-bit numbers in bytes [n, 16], as [n, 32]: low halves, then high halves; computed four bytes at a time."""
    words = np.ascontiguousarray(raw).view(np.uint32)
    low, high = words & np.uint32(0x0F0F0F0F), (words >> np.uint32(4)) & np.uint32(0x0F0F0F0F)
    return np.concatenate((low, high), axis=1).view(np.uint8)


def _dequantize_with_gguf(raw: Bytes, type_name: str, out: Floats) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as reference

    if type_name not in GGMLQuantizationType.__members__:
        raise UnsupportedModelError(f"tensors of type {type_name} require a newer gguf package: pip install -U gguf")
    out[...] = reference(raw, GGMLQuantizationType[type_name])
