"""Quantized weights as the device's weight-only products read them: packed words, scales and zero points, in tiles.

One layout serves every number of rows. Words are int16 [tiles, blocks, 64, slice_columns]: a tile is 64 rows of the
matrix, a block as many columns as fit into the words of one row: `slice_columns` times the values of a word (4 of 4
bits, 2 of 8). Value i of word w in block b is column (b * values + i) * slice_columns + w. So what a program reads lies
in one piece, and one shift gives a whole slice of columns; two words in a register become two numbers at once.

Groups of columns with a scale are whole slices. The scales of a block stand side by side in one integer for each row,
[tiles, blocks, 64], which a thread loads at once; zero points likewise. Rows and columns are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.dtypes import torch_dtype
from llmengine.kernels.packed_gguf import gguf_packing
from llmengine.kernels.packings import VALUES, Codes, Kind, Packing, packing_of
from llmengine.kernels.quantized_matrix import ROW_UNIT, QuantizedMatrix
from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.gguf_blocks import GgufBlocks
from llmengine.quantization.matrix import Matrix

TILE_ROWS = 64

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
        has_zeros: groups have zero points; otherwise it is 8 for "int4", and 0.
        scale_dtype: of the scales of groups.
        has_row_scales: each row has a scale, float32, beside those of its groups if there are any.
        table: the numbers of the codes of "table".
    """

    kind: Kind
    shape: Shape
    dtype: torch.dtype
    slice_columns: int
    num_groups: int
    has_zeros: bool
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
            is_even = shape[1] % (slice_columns * packing.values_per_word) == 0
            if num_groups is not None and (is_even or slice_columns == _SLICES[-1]):
                return cls(
                    kind=packing.kind,
                    shape=shape,
                    dtype=dtype,
                    slice_columns=slice_columns,
                    num_groups=num_groups,
                    has_zeros=packing.has_zeros,
                    scale_dtype=packing.scale_dtype,
                    has_row_scales=packing.has_row_scales,
                    table=packing.table,
                )
        return None

    @property
    def values_per_word(self) -> int:
        """Values in an int16."""
        return VALUES[self.kind]

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return self.slice_columns * self.values_per_word

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
        """New tensors: words, and those of scales, row_scales and zeros that there are."""
        tiles, blocks = self.num_tiles, self.num_blocks
        tensors = {
            "words": torch.empty((tiles, blocks, TILE_ROWS, self.slice_columns), dtype=torch.int16, device=device)
        }
        if self.has_row_scales:
            tensors["row_scales"] = torch.empty(tiles * TILE_ROWS, dtype=torch.float32, device=device)
        sizes = {}
        if self.num_groups > 0:
            sizes["scales"] = self.num_groups * self.scale_dtype.itemsize
        if self.has_zeros:
            sizes["zeros"] = self.num_groups * self.num_zero_copies * self.zero_dtype.itemsize
        for name, size in sizes.items():
            tensors[name] = torch.empty((tiles, blocks, TILE_ROWS), dtype=_WORDS[size], device=device)
        return tensors


class PackedMatrix(QuantizedMatrix):
    """A matrix whose weights alone are quantized.

    Attributes:
        layout: of `tensors`: "words", "scales", "row_scales" and "zeros", beside which there are, of the stored
            tensors, those that activations are prepared with: "input_order" and "input_scale".
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
        words = _to_words(codes.values, layout)
        place = slice(first, first + len(words))
        self.tensors["words"][place] = words
        if layout.has_row_scales:
            self.tensors["row_scales"][first_row : first_row + len(codes.row_scales)] = codes.row_scales
        if layout.num_groups > 0:
            group_of = _group_of(layout, self._packing.group_size).to(words.device)
            self.tensors["scales"][place] = _to_group_words(codes.scales[:, group_of], layout)
        if codes.zeros is not None:
            zeros = -(codes.zeros.float() + layout.zero_offset).to(layout.zero_dtype)[:, group_of]
            self.tensors["zeros"][place] = _to_group_words(zeros.repeat_interleave(layout.num_zero_copies, 1), layout)
        for name in self._input_names:
            self.tensors[name].copy_(tensors[name])

    def stored(self) -> Matrix:
        rows = max(1, _CHUNK_WEIGHTS // self.shape[1] // ROW_UNIT) * ROW_UNIT
        pieces = [self._stored(begin, min(begin + rows, self.shape[0])) for begin in range(0, self.shape[0], rows)]
        return Matrix(self.format, self.shape, self.format.join(pieces, self.shape, "out"))

    def _stored(self, begin: int, end: int) -> dict[str, Tensor]:
        layout, num_rows = self.layout, end - begin
        place = slice(begin // TILE_ROWS, -(-end // TILE_ROWS))
        values = _from_words(self.tensors["words"][place], layout)[:num_rows, : self.shape[1]].contiguous()
        codes = Codes(values)
        if layout.has_row_scales:
            codes = replace(codes, row_scales=self.tensors["row_scales"][begin:end])
        if layout.num_groups > 0:
            first = _first_of(layout, self._packing.group_size)
            scales = _from_group_words(self.tensors["scales"][place], layout.scale_bits)[:num_rows, first]
            codes = replace(codes, scales=scales.contiguous())
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


def _to_words(values: Tensor, layout: PackedLayout) -> Tensor:
    """Values, uint8 [rows, columns], as int16 [tiles, blocks, 64, slice_columns]."""
    rows, columns = values.shape
    padded = F.pad(values, (0, layout.num_blocks * layout.block_columns - columns, 0, -rows % TILE_ROWS))
    sliced = padded.view(-1, TILE_ROWS, layout.num_blocks, layout.values_per_word, layout.slice_columns)
    parts = sliced.transpose(1, 2).unbind(3)
    if layout.values_per_word == 4:
        parts = (parts[0] | parts[1] << 4, parts[2] | parts[3] << 4)
    return torch.stack(parts, dim=-1).view(torch.int16).squeeze(-1)


def _from_words(words: Tensor, layout: PackedLayout) -> Tensor:
    """Undoes `_to_words`, up to what was filled up."""
    parts = words.unsqueeze(-1).view(torch.uint8).unbind(-1)
    if layout.values_per_word == 4:
        parts = (parts[0] & 15, parts[0] >> 4, parts[1] & 15, parts[1] >> 4)
    sliced = torch.stack(parts, dim=3).transpose(1, 2)  # [tiles, 64, blocks, values, slice]
    return sliced.flatten(2).flatten(0, 1)


def _to_group_words(entries: Tensor, layout: PackedLayout) -> Tensor:
    """What the groups of all blocks have, [rows, blocks * some], as integers of a block's, [tiles, blocks, 64]."""
    rows, columns = entries.shape
    padded = F.pad(entries, (0, 0, 0, -rows % TILE_ROWS)).contiguous()
    words = padded.view(_WORDS[columns // layout.num_blocks * entries.dtype.itemsize])
    return words.view(-1, TILE_ROWS, layout.num_blocks).transpose(1, 2)


def _from_group_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Undoes `_to_group_words`, up to what was filled up."""
    tiles, _, rows = words.shape
    return words.transpose(1, 2).reshape(-1).view(dtype).view(tiles * rows, -1)
