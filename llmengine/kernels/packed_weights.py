"""Quantized weights as the device's weight-only products read them: packed words, scales and zero points, in tiles.

One layout serves every number of rows. Words are int16 [tiles, blocks, 64, slice_columns]: a tile is 64 rows of the
matrix, a block as many columns as fit into the words of one row: `slice_columns` times the values of a word (4 of 4
bits, 2 of 8). Value i of word w in block b is column (b * values + i) * slice_columns + w. So what a program reads lies
in one piece, and one shift gives a whole slice of columns; two words in a register become two numbers at once.
Blocks have four values at a place also where these have fewer bits; then some consecutive blocks share their words, the
first of them in the lowest bits. Integers of 3, 5 and 6 bits have their high bits in such words of their own.

Groups of columns with a scale are whole slices. The scales of a block stand side by side in one integer for each row,
[tiles, blocks, 64], which a thread loads at once; zero points and minima likewise. Steps of minima follow those of
scales in the same integer; their units stand together too, for each 256 columns. Rows and columns are filled up with
zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.dtypes import torch_dtype
from llmengine.kernels.packed_gguf import gguf_packing
from llmengine.kernels.packings import PLANES, VALUES, Codes, Kind, Packing, packing_of
from llmengine.kernels.quantized_matrix import ROW_UNIT, QuantizedMatrix
from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.gguf_blocks import GgufBlocks
from llmengine.quantization.matrix import Matrix

TILE_ROWS = 64
UNIT_COLUMNS = 256

_SLICES = (64, 32, 16)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_CHUNK_WEIGHTS = 1 << 24
"""Weights that are packed or unpacked at a time, which bounds the scratch memory for it."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Shapes and dtypes of a packed matrix.

    Attributes:
        dtype: of the activations.
        slice_columns: columns at one place of the words; 64, 32 or 16.
        num_groups: groups of a block with a scale each: 1, 2 or 4; 0: there are none.
        has_zeros: groups have zero points; otherwise see `middle`.
        has_minima: groups have minima, in the dtype of the scales.
        scale_dtype: of the scales of groups; see `Packing` for steps.
        has_row_scales: each row has a scale, float32, beside those of its groups if there are any.
        table: the numbers of the codes of "table".
    """

    kind: Kind
    shape: Shape
    dtype: torch.dtype
    slice_columns: int
    num_groups: int
    has_zeros: bool
    has_minima: bool
    scale_dtype: torch.dtype
    has_row_scales: bool
    table: tuple[float, ...] = ()

    @classmethod
    def of(cls, weight_format: WeightFormat, shape: Shape, dtype: torch.dtype) -> PackedLayout | None:
        """The layout of a format for activations of `dtype`; None if its products are none of weights alone."""
        packing = _packing_of(weight_format)
        if packing is None:
            return None
        for slice_columns in _SLICES:
            num_groups = packing.num_groups(slice_columns, shape[1])
            is_even = shape[1] % (slice_columns * VALUES[packing.kind]) == 0
            if num_groups is not None and (is_even or slice_columns == _SLICES[-1]):
                return cls(
                    kind=packing.kind,
                    shape=shape,
                    dtype=dtype,
                    slice_columns=slice_columns,
                    num_groups=num_groups,
                    has_zeros=packing.has_zeros,
                    has_minima=packing.has_minima,
                    scale_dtype=packing.scale_dtype,
                    has_row_scales=packing.has_row_scales,
                    table=packing.table,
                )
        return None

    @property
    def num_values(self) -> int:
        """Values of a block at each place of its words."""
        return VALUES[self.kind]

    @property
    def planes(self) -> tuple[int, int]:
        """Bits of a value in the words and, above them, in those of the high bits."""
        return PLANES.get(self.kind, (16 // self.num_values, 0))

    @property
    def num_shared_planes(self) -> int:
        """How many of the planes have words that blocks share."""
        return (self.planes[0] == 2) + (self.planes[1] > 0)

    @property
    def middle(self) -> int:
        """What is subtracted from all values: of unsigned integers without zero points and minima, half their range."""
        return 0 if self.kind not in PLANES or self.has_zeros or self.has_minima else 1 << sum(self.planes) >> 1

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return self.slice_columns * self.num_values

    @property
    def num_blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.shape[1] // self.block_columns)

    @property
    def num_tiles(self) -> int:
        """Tiles of 64 rows."""
        return -(-self.shape[0] // TILE_ROWS)

    @property
    def scale_bits(self) -> torch.dtype:
        """Of scales as `Codes` has them."""
        return torch.uint8 if self.scale_dtype.itemsize == 1 else self.scale_dtype

    @property
    def has_steps(self) -> bool:
        """Whether scales and minima are steps."""
        return self.scale_dtype in (torch.int8, torch.uint8)

    @property
    def has_steps_behind(self) -> bool:
        """Whether steps of minima are behind those of scales, in bytes of their own."""
        return self.has_minima and self.scale_dtype == torch.int8

    @property
    def num_zero_copies(self) -> int:
        """How often a zero point stands in its integer, which has at least 32 bits, the least for copies ahead."""
        return 2 if self.num_groups == 1 else 1

    @property
    def zero_dtype(self) -> torch.dtype:
        """Of zero points: that of the activations, or float16 for float32."""
        return torch.float16 if self.dtype == torch.float32 else self.dtype

    @property
    def zero_offset(self) -> int:
        """What a value of 4 bits has more as the low bits of a number of the activations' dtype (1024 + q)."""
        if self.kind != "int4":
            return 0
        return {torch.float16: 1024, torch.bfloat16: 128}.get(self.dtype, 0)

    def empty(self, device: torch.device | str) -> dict[str, Tensor]:
        """New tensors: words, and those of high, shifts, scales, row_scales, zeros, minima and units that there are.

        All but shifts, which are 0, 4, 8 and 12, are to be filled.
        """
        tiles, blocks = self.num_tiles, self.num_blocks
        tensors = {}
        for name, bits in zip(("words", "high"), self.planes, strict=True):
            if bits > 0:
                plane = (tiles, _plane_blocks(self, bits), TILE_ROWS, self.slice_columns)
                tensors[name] = torch.empty(plane, dtype=torch.int16, device=device)
        if self.num_shared_planes > 0:
            tensors["shifts"] = torch.arange(0, 16, 4, dtype=torch.int32, device=device)
        if self.has_row_scales:
            tensors["row_scales"] = torch.empty(tiles * TILE_ROWS, dtype=torch.float32, device=device)
        sizes = {}
        if self.num_groups > 0:
            sizes["scales"] = self.num_groups * self.scale_dtype.itemsize * (1 + self.has_steps_behind)
        if self.has_minima and not self.has_steps:
            sizes["minima"] = self.num_groups * self.scale_dtype.itemsize
        if self.has_zeros:
            sizes["zeros"] = self.num_groups * self.num_zero_copies * self.zero_dtype.itemsize
        for name, size in sizes.items():
            tensors[name] = torch.empty((tiles, blocks, TILE_ROWS), dtype=_WORDS[size], device=device)
        if self.has_steps:
            num_units = -(-self.shape[1] // UNIT_COLUMNS)
            dtype = _WORDS[4 if self.has_minima else 2]
            tensors["units"] = torch.empty((tiles, num_units, TILE_ROWS), dtype=dtype, device=device)
        return tensors


def is_packed(weight_format: WeightFormat) -> bool:
    """Whether a format has a packed layout, which depends on the sizes of its groups and on no matrix's shape."""
    return PackedLayout.of(weight_format, (TILE_ROWS, _SLICES[0]), torch.float16) is not None


class PackedMatrix(QuantizedMatrix):
    """A matrix whose weights alone are quantized.

    Attributes:
        layout: of `tensors`, beside which there are, of the stored tensors, those that activations are prepared with:
            "input_order" and "input_scale".
    """

    def __init__(self, weight_format: WeightFormat, layout: PackedLayout, device: torch.device | str) -> None:
        packing = _packing_of(weight_format)
        assert packing is not None, weight_format
        self.format = weight_format
        self.shape = layout.shape
        self.layout = layout
        self.tensors = layout.empty(device)
        self._packing = packing
        specs = weight_format.tensors(layout.shape, "float32")
        self._input_names = [name for name in ("input_order", "input_scale") if name in specs]
        for name in self._input_names:
            spec = specs[name]
            self.tensors[name] = torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype), device=device)

    def fill(self, tensors: Mapping[str, Tensor], first_row: int = 0) -> None:
        assert first_row % TILE_ROWS == 0, first_row
        layout, codes = self.layout, self._packing.take_apart(tensors)
        first = first_row // TILE_ROWS
        place = slice(first, first - (-len(codes.values) // TILE_ROWS))
        low_bits, high_bits = layout.planes
        self.tensors["words"][place] = _to_words(codes.values & (1 << low_bits) - 1, low_bits, layout)
        if high_bits > 0:
            self.tensors["high"][place] = _to_words(codes.values >> low_bits, high_bits, layout)
        if layout.has_row_scales:
            self.tensors["row_scales"][first_row : first_row + len(codes.row_scales)] = codes.row_scales
        if layout.num_groups > 0:
            group_of = _group_of(layout, self._packing.group_size).to(codes.scales.device)
            entries = codes.scales[:, group_of]
            if codes.minima is not None and layout.has_steps_behind:
                entries = _behind(entries, codes.minima[:, group_of], layout)
            elif codes.minima is not None:
                self.tensors["minima"][place] = _to_group_words(codes.minima[:, group_of], layout.num_blocks)
            self.tensors["scales"][place] = _to_group_words(entries, layout.num_blocks)
        if codes.units is not None:
            self.tensors["units"][place] = _to_group_words(codes.units.flatten(1), codes.units.shape[1])
        if codes.zeros is not None:
            zeros = -(codes.zeros.float() + layout.zero_offset).to(layout.zero_dtype)[:, group_of]
            self.tensors["zeros"][place] = _to_group_words(
                zeros.repeat_interleave(layout.num_zero_copies, 1), layout.num_blocks
            )
        for name in self._input_names:
            self.tensors[name].copy_(tensors[name])

    def stored(self) -> Matrix:
        rows = max(1, _CHUNK_WEIGHTS // self.shape[1] // ROW_UNIT) * ROW_UNIT
        pieces = [self._stored(begin, min(begin + rows, self.shape[0])) for begin in range(0, self.shape[0], rows)]
        return Matrix(self.format, self.shape, self.format.join(pieces, self.shape, "out"))

    def _stored(self, begin: int, end: int) -> dict[str, Tensor]:
        layout, num_rows = self.layout, end - begin
        place = slice(begin // TILE_ROWS, -(-end // TILE_ROWS))
        low_bits, high_bits = layout.planes
        values = _from_words(self.tensors["words"][place], low_bits)[:num_rows, : self.shape[1]]
        if high_bits > 0:
            high = _from_words(self.tensors["high"][place], high_bits)[:num_rows, : self.shape[1]]
            values = values | high << low_bits
        codes = Codes(values.contiguous())
        if layout.has_row_scales:
            codes = replace(codes, row_scales=self.tensors["row_scales"][begin:end])
        if layout.num_groups > 0:
            first = _first_of(layout, self._packing.group_size)
            scales = _from_group_words(self.tensors["scales"][place], layout.scale_bits)[:num_rows]
            minima = None
            if layout.has_steps_behind:
                scales, minima = scales.unflatten(1, (layout.num_blocks, 2, -1)).unbind(2)
                scales, minima = scales.flatten(1), minima.flatten(1)[:, first]
            elif layout.has_minima and not layout.has_steps:
                minima = _from_group_words(self.tensors["minima"][place], layout.scale_dtype)[:num_rows, first]
            codes = replace(codes, scales=scales[:, first].contiguous(), minima=minima)
        if layout.has_steps:
            units = _from_group_words(self.tensors["units"][place], torch.float16)[:num_rows]
            codes = replace(codes, units=units.unflatten(1, (-1, 2 if layout.has_minima else 1)))
        if layout.has_zeros:
            zeros = _from_group_words(self.tensors["zeros"][place], layout.zero_dtype)[:num_rows]
            zeros = -zeros[:, first * layout.num_zero_copies].float() - layout.zero_offset
            codes = replace(codes, zeros=zeros)
        stored = self._packing.put_together(codes)
        order = self.format.tensors(self.shape, "float32")
        return {name: stored[name] if name in stored else self.tensors[name] for name in order}


def _packing_of(weight_format: WeightFormat) -> Packing | None:
    return gguf_packing(weight_format) if isinstance(weight_format, GgufBlocks) else packing_of(weight_format)


def _group_of(layout: PackedLayout, group_size: int) -> Tensor:
    """For each group of every block, the stored group, of `group_size` columns, that it is a part of."""
    columns = torch.arange(layout.num_blocks * layout.num_groups) * (layout.block_columns // layout.num_groups)
    columns = columns.clamp_(max=layout.shape[1] - 1)
    return columns // (layout.shape[1] if group_size == -1 else group_size)


def _first_of(layout: PackedLayout, group_size: int) -> Tensor:
    """For each stored group, the first of the blocks' groups that is a part of it."""
    size = layout.shape[1] if group_size == -1 else group_size
    return torch.arange(-(-layout.shape[1] // size)) * size * layout.num_groups // layout.block_columns


def _plane_blocks(layout: PackedLayout, bits: int) -> int:
    """Blocks of words in which values have as many bits."""
    return -(-layout.num_blocks * layout.num_values * bits // 16)


def _to_words(values: Tensor, bits: int, layout: PackedLayout) -> Tensor:
    """Values below 2 ** bits, uint8 [rows, columns], as int16 [tiles, blocks of words, 64, slice_columns]."""
    rows, columns = values.shape
    num_blocks, num_values = _plane_blocks(layout, bits), 16 // bits
    padded = F.pad(values, (0, num_blocks * num_values * layout.slice_columns - columns, 0, -rows % TILE_ROWS))
    sliced = padded.view(-1, TILE_ROWS, num_blocks, 2, num_values // 2, layout.slice_columns)
    in_bytes = sliced[:, :, :, :, 0]
    for index in range(1, num_values // 2):
        in_bytes = in_bytes | sliced[:, :, :, :, index] << bits * index
    return in_bytes.permute(0, 2, 1, 4, 3).contiguous().view(torch.int16).squeeze(-1)


def _from_words(words: Tensor, bits: int) -> Tensor:
    """Undoes `_to_words`, up to what was filled up."""
    in_bytes = words.unsqueeze(-1).view(torch.uint8).permute(0, 2, 1, 4, 3)  # [tiles, 64, blocks, 2, slice]
    values = [in_bytes >> bits * index & (1 << bits) - 1 for index in range(8 // bits)]
    return torch.stack(values, dim=4).flatten(2).flatten(0, 1)


def _behind(scales: Tensor, minima: Tensor, layout: PackedLayout) -> Tensor:
    """Steps of the groups of all blocks, of each block those of the scales and then those of the minima."""
    both = [steps.unflatten(1, (layout.num_blocks, -1)) for steps in (scales, minima)]
    return torch.stack(both, dim=2).flatten(1)


def _to_group_words(entries: Tensor, num_integers: int) -> Tensor:
    """What the groups of all blocks have, [rows, blocks * some], as integers of a block's, [tiles, blocks, 64]."""
    rows, columns = entries.shape
    padded = F.pad(entries, (0, 0, 0, -rows % TILE_ROWS)).contiguous()
    words = padded.view(_WORDS[columns // num_integers * entries.dtype.itemsize])
    return words.view(-1, TILE_ROWS, num_integers).transpose(1, 2)


def _from_group_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Undoes `_to_group_words`, up to what was filled up."""
    tiles, _, rows = words.shape
    return words.transpose(1, 2).reshape(-1).view(dtype).view(tiles * rows, -1)
