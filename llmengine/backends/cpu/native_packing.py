"""Quantized matrices as the native library has them, and back, without losing a bit.

16 rows are a panel. A panel's integers, the codes, lie so that one vector has four columns of each row; codes of fewer
than 8 bits are packed. Floating-point numbers lie so that it has two columns. Scales of a panel's rows are neighbours.
`native_products.h` (int8), `native_floats.h` (bf16, e4m3) and `native_codes.h` (all others) describe the layouts,
`native_inputs.h` what becomes of activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.dtypes import torch_dtype
from llmengine.quantization.formats import DENSE, Shape, WeightFormat
from llmengine.quantization.fp8 import BLOCK, Fp8
from llmengine.quantization.gguf_blocks import GgufBlocks
from llmengine.quantization.gguf_codes import Factors, as_bytes, from_blocks, to_blocks
from llmengine.quantization.int4 import Int4Groups, pack_nibbles, unpack_nibbles
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.mxfp4 import Mxfp4

PANEL_ROWS = 16
_GROUP_COLUMNS = 32
_MAX_WEIGHTS = 4 << 20
"""Weights that are packed at a time."""

_WHOLE_ROW = 40
"""Logarithm of a number of columns that no row has."""


class InputKind(IntEnum):
    """What activations become before a product; `enum InputKind` of native_products.h."""

    EXACT = 0
    E4M3 = 1
    SHORTS = 2
    BYTES = 3
    GROUP_BYTES = 4


@dataclass(frozen=True, slots=True)
class Packing:
    """How the library has matrices of one weight format.

    Attributes:
        number: of the format, an `enum Format` of native_products.h.
        bits: of a code.
        group_shift: logarithm of the columns that share a scale.
        minima: "" for none, "stored" for a float16 beside each scale, "zero point" for a byte.
        scale_dtype: of the scales in the library.
        supers: scales are bytes times a float16 for each 256 columns (GGUF's K formats).
        input_kind: what activations become.
        layout: "codes" with scales of groups, "bytes" with one of each row, or "floats".
    """

    number: int
    bits: int
    group_shift: int = 5
    minima: str = ""
    scale_dtype: torch.dtype = torch.float16
    supers: bool = False
    input_kind: InputKind = InputKind.GROUP_BYTES
    layout: Literal["codes", "bytes", "floats"] = "codes"


_GGUF: Mapping[str, Packing] = {
    "Q8_0": Packing(4, 8),
    "Q4_0": Packing(5, 4),
    "Q4_1": Packing(6, 4, minima="stored"),
    "Q5_0": Packing(8, 5),
    "Q5_1": Packing(9, 5, minima="stored"),
    "Q4_K": Packing(10, 4, minima="stored", supers=True),
    "Q5_K": Packing(11, 5, minima="stored", supers=True),
    "Q6_K": Packing(12, 6, group_shift=4, supers=True),
    "MXFP4": Packing(20, 4, scale_dtype=torch.uint8),
    "TQ2_0": Packing(21, 2, group_shift=8),
    "Q2_K": Packing(22, 2, group_shift=4, minima="stored", supers=True),
    "Q3_K": Packing(23, 3, group_shift=4, supers=True),
    "IQ4_NL": Packing(24, 4),
    "IQ4_XS": Packing(25, 4, supers=True),
}

_GROUPS: Mapping[tuple[int, bool, str], int] = {
    (4, False, ""): 5,
    (4, True, ""): 7,
    (4, False, "strips"): 13,
    (4, True, "strips"): 14,
    (4, False, "wide"): 15,
    (4, True, "wide"): 16,
    (8, False, ""): 4,
    (8, True, ""): 17,
    (8, False, "wide"): 18,
    (8, True, "wide"): 19,
}
"""Bits of a code, whether there are zero points, and what scales are for ("strips": 16 columns) or in -> number."""

_INT8_ROWS = Packing(3, 8, _WHOLE_ROW, scale_dtype=torch.float32, input_kind=InputKind.SHORTS, layout="bytes")
_W8A8 = replace(_INT8_ROWS, input_kind=InputKind.BYTES)
_MXFP4 = _GGUF["MXFP4"]
_BF16 = Packing(32, 16, input_kind=InputKind.EXACT, layout="floats")
_FP8 = Packing(33, 8, _WHOLE_ROW, scale_dtype=torch.float32, input_kind=InputKind.E4M3, layout="floats")
_FP8_BLOCKS = replace(_FP8, number=34, group_shift=7)


def packing_of(weight_format: WeightFormat, dtype: torch.dtype | None = None) -> Packing | None:
    """How the library has matrices of a format in panels, None if it has not; `dtype` is of dense ones."""
    if weight_format == DENSE:
        return _BF16 if dtype == torch.bfloat16 else None
    if isinstance(weight_format, Fp8):
        packing = _FP8_BLOCKS if weight_format.scales == "block" else _FP8
        return replace(packing, input_kind=InputKind.EXACT) if weight_format.activations == "none" else packing
    if weight_format == INT8:
        return _INT8_ROWS
    if isinstance(weight_format, Int8W8A8):
        return _W8A8
    if isinstance(weight_format, Mxfp4):
        return _MXFP4
    if isinstance(weight_format, GgufBlocks):
        return _GGUF.get(weight_format.type_name)
    if isinstance(weight_format, Int4Groups | Int8Groups):
        return _packing_of_groups(weight_format)
    return None


def _packing_of_groups(groups: Int4Groups | Int8Groups) -> Packing | None:
    bits = 4 if isinstance(groups, Int4Groups) else 8
    size, wide = groups.group_size, groups.scale_dtype != "float16"
    number = _GROUPS.get((bits, groups.zero_points, "wide" if wide else "strips" if size == 16 else ""))
    if number is None or (wide and size == 16):
        return None
    shift = _WHOLE_ROW if size == -1 else size.bit_length() - 1
    scale_dtype = torch.float32 if wide else torch.float16
    return Packing(number, bits, shift, "zero point" if groups.zero_points else "", scale_dtype)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix in panels; `unpacked` undoes `pack_matrix`.

    Attributes:
        codes: uint8 [panels, bytes].
        scales: uint8 [panels, bytes]; of layout "bytes": float32 [rows, filled up with zeros]; of "floats": float32
            [panels, groups, 16], of which e4m3 blocks have one in place of 16, and bf16 has none.
        kept: tensors as they are stored: what concerns activations alone, and scales of e4m3.
        byte_offset: the library's.
    """

    format: WeightFormat
    packing: Packing
    shape: Shape
    codes: Tensor
    scales: Tensor
    kept: Mapping[str, Tensor]
    byte_offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + self.scales.nbytes + sum(tensor.nbytes for tensor in self.kept.values())

    def unpacked(self) -> Matrix:
        """The matrix as it is stored, a copy."""
        pieces = [self._piece(begin, end) for begin, end in _row_ranges(self.shape)]
        tensors = {suffix: _joined([piece[suffix] for piece in pieces]) for suffix in pieces[0]} | dict(self.kept)
        specs = self.format.tensors(self.shape, "float32")
        if self.packing.layout == "bytes":
            tensors["weight_scale"] = self.scales[: specs["weight_scale"].shape[0]].clone()
        return Matrix(self.format, self.shape, {suffix: tensors[suffix] for suffix in specs})

    def _piece(self, begin: int, end: int) -> dict[str, Tensor]:
        """What is packed of the rows [begin, end)."""
        panels = slice(begin // PANEL_ROWS, -(-end // PANEL_ROWS))
        shape = (end - begin, self.shape[1])
        if self.packing.layout == "bytes":
            return {"weight": _unpacked_int8(self.codes[panels], shape, self.byte_offset)}
        if self.packing.layout == "floats":
            dtype = torch.bfloat16 if self.packing == _BF16 else torch.float8_e4m3fn
            return {"weight": _unpacked_pairs(self.codes[panels], shape, dtype)}
        codes = _unpacked_codes(self.codes[panels], self.packing.bits, shape)
        factors = _unpacked_factors(self.scales[panels], self.packing, shape)
        return _stored(self.format, codes, factors, self.byte_offset)


def pack_matrix(matrix: Matrix, byte_offset: int) -> PackedMatrix:
    """`matrix` in panels; its format has a `Packing`. `byte_offset`: of 8-bit codes in this library, 0 or 128."""
    packing = packing_of(matrix.format, matrix.weight.dtype)
    assert packing is not None, matrix.format
    rows, columns = matrix.shape
    kept = {suffix: tensor for suffix, tensor in matrix.tensors.items() if suffix in _INPUT_TENSORS}
    codes, scales = [], []
    for begin, end in _row_ranges(matrix.shape):
        weight = matrix.weight[begin:end]
        if packing.layout == "bytes":
            codes.append(_packed_int8(weight, byte_offset))
        elif packing.layout == "floats":
            codes.append(_packed_pairs(weight))
        else:
            tensors = matrix.format.cut(matrix.tensors, matrix.shape, "out", begin, end)
            integers, factors = _parts(matrix.format, packing, tensors, columns, byte_offset)
            codes.append(_packed_codes(integers, packing.bits))
            scales.append(_packed_factors(factors, packing, columns))
    if packing.layout == "bytes":
        scales = [F.pad(matrix.tensors["weight_scale"].float().expand(rows), (0, -rows % PANEL_ROWS))]
    elif isinstance(matrix.format, Fp8):
        packing, fp8_scales = _fp8_scales(matrix, packing)
        scales, kept["weight_scale"] = [fp8_scales], matrix.tensors["weight_scale"]
    joined = _joined(scales).contiguous() if scales else torch.empty(0)
    return PackedMatrix(matrix.format, packing, matrix.shape, _joined(codes), joined, kept, byte_offset)


_INPUT_TENSORS = ("input_scale", "input_order", "activation_scale")


def _fp8_scales(matrix: Matrix, packing: Packing) -> tuple[Packing, Tensor]:
    """How the library has the matrix, and its scales, NaN where a weight of the row is."""
    rows, columns = matrix.shape
    scale = matrix.tensors["weight_scale"].float()
    num_panels = -(-rows // PANEL_ROWS)
    is_nan = matrix.weight.view(torch.uint8) & 127 == 127
    if packing == replace(_FP8_BLOCKS, input_kind=packing.input_kind):
        if not bool(is_nan.any()):
            return packing, scale.repeat_interleave(BLOCK // PANEL_ROWS, 0)[:num_panels]
        # The library has one scale for 16 rows of a block, or one for each.
        packing = replace(packing, number=_FP8.number)
        scale = scale.repeat_interleave(BLOCK, 0)[:rows]
        is_nan = F.pad(is_nan, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK)).any(2)
    else:
        scale, is_nan = scale.view(-1, 1).expand(rows, 1), is_nan.any(1, keepdim=True)
    scale = scale.masked_fill(is_nan, torch.nan)
    return packing, F.pad(scale, (0, 0, 0, -rows % PANEL_ROWS)).unflatten(0, (num_panels, PANEL_ROWS)).transpose(1, 2)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _row_ranges(shape: Shape) -> Iterator[tuple[int, int]]:
    """Ranges of whole panels with about `_MAX_WEIGHTS` weights each."""
    step = max(1, _MAX_WEIGHTS // (shape[1] * PANEL_ROWS)) * PANEL_ROWS
    for begin in range(0, shape[0], step):
        yield begin, min(begin + step, shape[0])


def _by_panel(entries: Tensor) -> Tensor:
    """Bytes [rows, n, size] as [panels, n, 16 * size]."""
    rows, count, size = entries.shape
    padded = F.pad(entries, (0, 0, 0, 0, 0, -rows % PANEL_ROWS)).view(-1, PANEL_ROWS, count, size)
    return padded.transpose(1, 2).reshape(-1, count, PANEL_ROWS * size)


def _by_row(panels: Tensor, rows: int, size: int) -> Tensor:
    """Undoes `_by_panel`: [rows, n * size]."""
    count = panels.shape[1]
    entries = panels.view(-1, count, PANEL_ROWS, size).transpose(1, 2)
    return entries.reshape(panels.shape[0] * PANEL_ROWS, count * size)[:rows]


def _packed_pairs(weight: Tensor) -> Tensor:
    """Numbers [rows, columns] as [panels, bytes]."""
    size, columns = weight.dtype.itemsize, weight.shape[1]
    numbers = as_bytes(weight.view(torch.uint8) if size == 1 else weight)
    return _by_panel(F.pad(numbers, (0, 0, 0, columns % 2)).view(len(weight), -1, 2 * size)).flatten(1)


def _unpacked_pairs(panels: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Undoes `_packed_pairs`."""
    size = dtype.itemsize
    pairs = panels.view(panels.shape[0], -1, 2 * size * PANEL_ROWS)
    return _by_row(pairs, shape[0], 2 * size)[:, : shape[1] * size].contiguous().view(dtype)


def _packed_int8(weight: Tensor, byte_offset: int) -> Tensor:
    if byte_offset:
        return _packed_codes(weight.view(torch.uint8) ^ 128, 8)
    pairs = F.pad(weight.view(torch.uint8), (0, weight.shape[1] % 2))
    return _by_panel(pairs.view(weight.shape[0], -1, 2)).flatten(1)


def _unpacked_int8(panels: Tensor, shape: Shape, byte_offset: int) -> Tensor:
    """Undoes `_packed_int8`."""
    if byte_offset:
        return (_unpacked_codes(panels, 8, shape) ^ 128).view(torch.int8)
    pairs = panels.view(panels.shape[0], -1, 2 * PANEL_ROWS)
    return _by_row(pairs, shape[0], 2)[:, : shape[1]].contiguous().view(torch.int8)


_BITS = torch.arange(8, dtype=torch.uint8)
_PAIRS_OF_BITS = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]


def _packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, columns] as [panels, bytes]."""
    padded = F.pad(codes, (0, -codes.shape[1] % _GROUP_COLUMNS))
    quads = _by_panel(padded.view(codes.shape[0], -1, 4))
    if bits == 8:
        return quads.flatten(1)
    strips = quads.view(quads.shape[0], -1, 4, 64)
    low_bits = 4 if bits >= 4 else 2
    low, high = strips & (1 << low_bits) - 1, strips >> low_bits
    if low_bits == 4:
        pieces = [(low[:, :, 0::2] | low[:, :, 1::2] << 4).flatten(2)]
    else:
        pieces = [(low << _PAIRS_OF_BITS).sum(2, dtype=torch.uint8)]
    if bits - low_bits == 1:
        pieces.append((high.view(*high.shape[:2], 32, 8) << _BITS).sum(-1, dtype=torch.uint8))
    elif bits - low_bits == 2:
        pieces.append((high << _PAIRS_OF_BITS).sum(2, dtype=torch.uint8))
    return torch.cat(pieces, 2).flatten(1)


def _unpacked_codes(packed: Tensor, bits: int, shape: Shape) -> Tensor:
    """Undoes `_packed_codes`."""
    panels, groups = packed.shape[0], -(-shape[1] // _GROUP_COLUMNS)
    if bits == 8:
        strips = packed.view(panels, -1, 4, 64)
    else:
        strip = packed.view(panels, 2 * groups, -1)
        low_bits, low_bytes = (4, 128) if bits >= 4 else (2, 64)
        if low_bits == 4:
            both = strip[:, :, :low_bytes].view(panels, -1, 2, 1, 64)
            strips = torch.cat((both & 15, both >> 4), 3).view(panels, -1, 4, 64)
        else:
            strips = strip[:, :, None, :low_bytes] >> _PAIRS_OF_BITS & 3
        if bits - low_bits == 1:
            high = strip[:, :, low_bytes:, None] >> _BITS & 1
            strips = strips | high.view(strips.shape) << low_bits
        elif bits - low_bits == 2:
            strips = strips | (strip[:, :, None, low_bytes:] >> _PAIRS_OF_BITS & 3) << low_bits
    return _by_row(strips.view(panels, -1, 64), shape[0], 4)[:, : shape[1]].contiguous()


def _packed_factors(factors: Factors, packing: Packing, columns: int) -> Tensor:
    """Factors as [panels, bytes], with zeros for columns that only fill a vector."""
    entries = [factors.scales] if factors.minima is None else [factors.scales, factors.minima]
    if not packing.supers:
        padded = -(-columns // _GROUP_COLUMNS) * _GROUP_COLUMNS
        groups = (padded - 1 >> packing.group_shift) + 1
        entries = [F.pad(entry, (0, groups - entry.shape[1])) for entry in entries]
    pieces = [_by_panel(as_bytes(entry)) for entry in entries]
    if factors.steps is not None:
        rows = factors.steps.shape[0]
        panels, supers = pieces[0].shape[:2]
        steps = _by_panel(factors.steps.view(rows, -1, 1))  # [panels, groups * parts, 16]
        pieces.append(steps.reshape(panels, supers, -1))
    return torch.cat(pieces, 2).flatten(1)


def _unpacked_factors(packed: Tensor, packing: Packing, shape: Shape) -> Factors:
    """Undoes `_packed_factors`."""
    rows, columns = shape
    panels = packed.shape[0]
    parts = 2 if packing.minima else 1

    def entries(piece: Tensor, dtype: torch.dtype, count: int) -> Tensor:
        size = dtype.itemsize
        flat = _by_row(piece.contiguous(), rows, size)[:, : count * size]
        return flat.contiguous().view(dtype)

    if packing.supers:
        supers = columns // 256
        blocks = packed.view(panels, supers, -1)
        scales, minima = blocks[:, :, :32], blocks[:, :, 32:64]
        steps = blocks[:, :, 32 * parts :].reshape(panels, -1, PANEL_ROWS)
        return Factors(
            entries(scales, torch.float16, supers),
            entries(minima, torch.float16, supers) if packing.minima else None,
            _by_row(steps, rows, 1).reshape(rows, -1, parts),
        )
    count = (columns - 1 >> packing.group_shift) + 1
    groups = (-(-columns // _GROUP_COLUMNS) * _GROUP_COLUMNS - 1 >> packing.group_shift) + 1
    blocks = packed.view(panels, groups, -1)
    scale_bytes = PANEL_ROWS * packing.scale_dtype.itemsize
    minima_type = torch.uint8 if packing.minima == "zero point" else torch.float16
    return Factors(
        entries(blocks[:, :, :scale_bytes], packing.scale_dtype, count),
        entries(blocks[:, :, scale_bytes:], minima_type, count) if packing.minima else None,
    )


def _parts(
    weight_format: WeightFormat, packing: Packing, tensors: Mapping[str, Tensor], columns: int, byte_offset: int
) -> tuple[Tensor, Factors]:
    """Codes uint8 [rows, columns] and factors of a matrix's tensors."""
    if isinstance(weight_format, Int4Groups | Int8Groups):
        weight, scale = tensors["weight"], tensors["weight_scale"].to(packing.scale_dtype)
        codes = unpack_nibbles(weight) if isinstance(weight_format, Int4Groups) else weight ^ (128 - byte_offset)
        return codes, Factors(scale, tensors.get("zero_point"))
    if isinstance(weight_format, Mxfp4):
        return unpack_nibbles(tensors["weight"]), Factors(tensors["weight_scale"])
    assert isinstance(weight_format, GgufBlocks)
    blocks = tensors["weight"]
    codes, factors = from_blocks(weight_format.type_name, blocks, byte_offset)
    return codes.reshape(blocks.shape[0], columns), factors


def _stored(weight_format: WeightFormat, codes: Tensor, factors: Factors, byte_offset: int) -> dict[str, Tensor]:
    """Undoes `_parts`."""
    if isinstance(weight_format, Int4Groups | Int8Groups):
        weight = pack_nibbles(codes) if isinstance(weight_format, Int4Groups) else codes ^ (128 - byte_offset)
        tensors = {"weight": weight, "weight_scale": factors.scales.to(torch_dtype(weight_format.scale_dtype))}
        return tensors if factors.minima is None else {**tensors, "zero_point": factors.minima}
    if isinstance(weight_format, Mxfp4):
        return {"weight": pack_nibbles(codes), "weight_scale": factors.scales}
    assert isinstance(weight_format, GgufBlocks)
    codes = codes.view(codes.shape[0], -1, weight_format.block_size)
    return {"weight": to_blocks(weight_format.type_name, codes, factors, byte_offset)}
