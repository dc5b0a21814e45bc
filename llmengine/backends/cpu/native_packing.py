"""Quantized matrices as the native library has them, and back, without losing a bit.

16 rows are a panel. A panel's integers, the codes, lie so that one vector has four columns of each row; codes of fewer
than 8 bits are packed. Scales of a panel's rows lie side by side. `native_products.h` (int8) and `native_codes.h` (all
others) describe the layouts, `native_inputs.h` what becomes of activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.cpu.native_gguf import Factors, as_bytes, from_blocks, to_blocks
from llmengine.dtypes import torch_dtype
from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.gguf_blocks import GgufBlocks
from llmengine.quantization.int4 import Int4Groups, pack_nibbles, unpack_nibbles
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.matrix import Matrix

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
    """

    number: int
    bits: int
    group_shift: int = 5
    minima: str = ""
    scale_dtype: torch.dtype = torch.float16
    supers: bool = False
    input_kind: InputKind = InputKind.GROUP_BYTES


_GGUF: Mapping[str, Packing] = {
    "Q8_0": Packing(4, 8),
    "Q4_0": Packing(5, 4),
    "Q4_1": Packing(6, 4, minima="stored"),
    "Q5_0": Packing(8, 5),
    "Q5_1": Packing(9, 5, minima="stored"),
    "Q4_K": Packing(10, 4, minima="stored", supers=True),
    "Q5_K": Packing(11, 5, minima="stored", supers=True),
    "Q6_K": Packing(12, 6, group_shift=4, supers=True),
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

_INT8_ROWS = Packing(3, 8, _WHOLE_ROW, scale_dtype=torch.float32, input_kind=InputKind.SHORTS)
_W8A8 = Packing(3, 8, _WHOLE_ROW, scale_dtype=torch.float32, input_kind=InputKind.BYTES)


def packing_of(weight_format: WeightFormat) -> Packing | None:
    """How the library has matrices of a quantized format, None if it does not multiply by them."""
    if weight_format == INT8:
        return _INT8_ROWS
    if isinstance(weight_format, Int8W8A8):
        return _W8A8
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
        scales: uint8 [panels, bytes]; of whole rows: float32 [rows, filled up with zeros].
        inputs: the tensors that say what becomes of activations: "input_scale", "input_order", "activation_scale".
        byte_offset: the library's.
    """

    format: WeightFormat
    packing: Packing
    shape: Shape
    codes: Tensor
    scales: Tensor
    inputs: Mapping[str, Tensor]
    byte_offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.codes.nbytes + self.scales.nbytes + sum(tensor.nbytes for tensor in self.inputs.values())

    def unpacked(self) -> Matrix:
        """The matrix as it is stored, a copy."""
        pieces = [self._piece(begin, end) for begin, end in _row_ranges(self.shape)]
        tensors = {suffix: _joined([piece[suffix] for piece in pieces]) for suffix in pieces[0]} | dict(self.inputs)
        specs = self.format.tensors(self.shape, "float32")
        if _has_row_scales(self.format):
            tensors["weight_scale"] = self.scales[: specs["weight_scale"].shape[0]].clone()
        return Matrix(self.format, self.shape, {suffix: tensors[suffix] for suffix in specs})

    def _piece(self, begin: int, end: int) -> dict[str, Tensor]:
        """What is packed of the rows [begin, end)."""
        panels = slice(begin // PANEL_ROWS, -(-end // PANEL_ROWS))
        shape = (end - begin, self.shape[1])
        if _has_row_scales(self.format):
            return {"weight": _unpacked_int8(self.codes[panels], shape, self.byte_offset)}
        codes = _unpacked_codes(self.codes[panels], self.packing.bits, shape)
        factors = _unpacked_factors(self.scales[panels], self.packing, shape)
        return _stored(self.format, codes, factors, self.byte_offset)


def pack_matrix(matrix: Matrix, byte_offset: int) -> PackedMatrix:
    """`matrix` in panels; its format has a `Packing`. `byte_offset`: of 8-bit codes in this library, 0 or 128."""
    packing = packing_of(matrix.format)
    assert packing is not None, matrix.format
    rows, columns = matrix.shape
    codes, scales = [], []
    for begin, end in _row_ranges(matrix.shape):
        tensors = matrix.format.cut(matrix.tensors, matrix.shape, "out", begin, end)
        if _has_row_scales(matrix.format):
            codes.append(_packed_int8(tensors["weight"], byte_offset))
        else:
            integers, factors = _parts(matrix.format, packing, tensors, columns, byte_offset)
            codes.append(_packed_codes(integers, packing.bits))
            scales.append(_packed_factors(factors, packing, columns))
    if _has_row_scales(matrix.format):
        scales = [F.pad(matrix.tensors["weight_scale"].float().expand(rows), (0, -rows % PANEL_ROWS))]
    inputs = {suffix: tensor for suffix, tensor in matrix.tensors.items() if suffix in INPUT_TENSORS}
    joined_scales = _joined(scales).contiguous()
    return PackedMatrix(matrix.format, packing, matrix.shape, _joined(codes), joined_scales, inputs, byte_offset)


INPUT_TENSORS = ("input_scale", "input_order", "activation_scale")
"""Tensors of a matrix that concern its activations alone."""


def _has_row_scales(weight_format: WeightFormat) -> bool:
    """Whether weights are signed bytes with a scale for each row or for all."""
    return weight_format == INT8 or isinstance(weight_format, Int8W8A8)


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


def _packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, columns] as [panels, bytes]."""
    padded = F.pad(codes, (0, -codes.shape[1] % _GROUP_COLUMNS))
    quads = _by_panel(padded.view(codes.shape[0], -1, 4))
    if bits == 8:
        return quads.flatten(1)
    strips = quads.view(quads.shape[0], -1, 4, 64)
    low = strips & 15
    pieces = [(low[:, :, 0::2] | low[:, :, 1::2] << 4).flatten(2)]
    if bits == 5:
        fifth = (strips >> 4).view(*strips.shape[:2], 32, 8)
        pieces.append((fifth << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8))
    elif bits == 6:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
        pieces.append((strips >> 4 << shifts).sum(2, dtype=torch.uint8))
    return torch.cat(pieces, 2).flatten(1)


def _unpacked_codes(packed: Tensor, bits: int, shape: Shape) -> Tensor:
    """Undoes `_packed_codes`."""
    panels, groups = packed.shape[0], -(-shape[1] // _GROUP_COLUMNS)
    if bits == 8:
        strips = packed.view(panels, -1, 4, 64)
    else:
        strip = packed.view(panels, 2 * groups, -1)
        both = strip[:, :, :128].view(panels, -1, 2, 1, 64)
        strips = torch.cat((both & 15, both >> 4), 3).view(panels, -1, 4, 64)
        if bits == 5:
            fifth = strip[:, :, 128:, None] >> torch.arange(8, dtype=torch.uint8) & 1
            strips = strips | fifth.view(strips.shape) << 4
        elif bits == 6:
            high = strip[:, :, None, 128:] >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
            strips = strips | high << 4
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
    assert isinstance(weight_format, GgufBlocks)
    codes = codes.view(codes.shape[0], -1, weight_format.block_size)
    return {"weight": to_blocks(weight_format.type_name, codes, factors, byte_offset)}
