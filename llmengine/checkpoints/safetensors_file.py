"""Safetensors files, read and written a tensor at a time.

The safetensors package writes only a dict of all tensors at once; a saved engine must not need its weights twice in
memory. Reading is ours too so that one table of entries serves checks before and errors during the stream, and so
that a file that shrinks under us is an error instead of a SIGBUS in a mapping. Format: the safetensors README.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmengine.checkpoints.canonical_weights import COPY_ELEMENTS, read_exactly
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.dtypes import DType, torch_dtype
from llmengine.errors import CorruptFileError, ModelLoadError
from llmengine.quantization.formats import TensorSpec

if TYPE_CHECKING:
    import torch

DTYPE_NAMES: dict[str, DType] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
DTYPE_NAMES |= {"U8": "uint8", "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn"}
DTYPE_NAMES |= {"F8_E8M0": "float8_e8m0fnu"}
"""Safetensors' names of the dtypes that can be read, and torch's names for them."""

_DTYPE_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "BOOL": 1, "U8": 1, "I16": 2, "U16": 2, "I32": 4}
_DTYPE_SIZES |= {"U32": 4, "I64": 8, "U64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `offset` counts from the start of the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def rows(self, first: int, count: int) -> TensorEntry:
        """The entry of rows [first, first + count)."""
        row_bytes = self.size_bytes // self.shape[0]
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            offset=self.offset + first * row_bytes,
            size_bytes=count * row_bytes,
        )


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """The tensor table of a safetensors file.

    Tensors may be of any dtype; `DTYPE_NAMES` has those that can be read. Raises `CorruptFileError` unless the tensors
    lie within the file, do not overlap and fill it, `ModelLoadError` if it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            header_size = struct.unpack("<Q", file.read(8))[0] if file_size >= 8 else file_size
            if header_size > min(file_size - 8, _MAX_HEADER_BYTES):
                raise CorruptFileError(f"{path}: header of {header_size} bytes in a file of {file_size}: truncated?")
            raw = file.read(header_size)
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = Fields(json.loads(raw.decode("utf-8")), str(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: header is not JSON: {error}") from error
    start = 8 + header_size
    entries = {
        name: _read_entry(path, name, header.fields(name), start) for name in header.values if name != "__metadata__"
    }
    _check_layout(path, entries, start, file_size)
    return entries


def _read_entry(path: Path, name: str, fields: Fields, start: int) -> TensorEntry:
    dtype = fields.string("dtype")
    shape, offsets = fields.sizes("shape"), fields.sizes("data_offsets")
    size = offsets[1] - offsets[0] if len(offsets) == 2 else -1
    # Of a dtype that is younger than this code, only the file knows the size.
    if size < 0 or (dtype in _DTYPE_SIZES and size != prod(shape) * _DTYPE_SIZES[dtype]):
        raise CorruptFileError(f"{path}: tensor {name!r} of {dtype} {shape} cannot lie at data_offsets {offsets}")
    return TensorEntry(path, name, dtype, shape, start + offsets[0], offsets[1] - offsets[0])


def _check_layout(path: Path, entries: Mapping[str, TensorEntry], start: int, file_size: int) -> None:
    position = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.size_bytes)):
        if entry.offset != position:
            raise CorruptFileError(f"{path}: tensor {entry.name!r} begins at byte {entry.offset}, expected {position}")
        position += entry.size_bytes
    if position != file_size:
        raise CorruptFileError(f"{path}: the tensors end at byte {position}, but the file has {file_size} bytes")


def read_tensor(file: BinaryIO, entry: TensorEntry, out: torch.Tensor, columns: range | None = None) -> None:
    """Fill `out` (contiguous, of `entry.shape`; a floating dtype is converted) from the open file.

    With `columns`, `out` has only those of a matrix.
    """
    import torch

    stored = torch_dtype(DTYPE_NAMES[entry.dtype])
    what = f"{entry.path}: tensor {entry.name!r}"
    file.seek(entry.offset)
    if columns is not None:
        for rows in torch.split(out, max(1, COPY_ELEMENTS // entry.shape[1])):
            buffer = torch.empty((rows.shape[0], entry.shape[1]), dtype=stored)
            read_exactly(file, buffer, what)
            rows.copy_(buffer[:, columns.start : columns.stop])
        return
    if out.dtype == stored:
        read_exactly(file, out, what)
        return
    for piece in torch.split(out.view(-1), COPY_ELEMENTS):
        buffer = torch.empty(piece.shape, dtype=stored)
        read_exactly(file, buffer, what)
        piece.copy_(buffer)


def holds_same(files: Mapping[Path, BinaryIO], one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors of open files have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start in range(0, one.size_bytes, COPY_ELEMENTS):
        pieces = []
        for entry in (one, other):
            files[entry.path].seek(entry.offset + start)
            pieces.append(files[entry.path].read(min(COPY_ELEMENTS, entry.size_bytes - start)))
        if pieces[0] != pieces[1]:
            return False
    return True


def write_tensors(
    file: BinaryIO,
    layout: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> str:
    """Write a safetensors file and return its sha256 in hex, holding one tensor at a time.

    The header precedes the data, so `layout` describes each tensor, in the order in which `tensors` yields them.
    """
    import torch

    codes = {name: code for code, name in DTYPE_NAMES.items()}
    header, end = {}, 0
    for name, spec in layout.items():
        begin, end = end, end + spec.size_bytes
        header[name] = {"dtype": codes[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    for piece in (struct.pack("<Q", len(encoded)), encoded):
        digest.update(piece)
        file.write(piece)
    expected = iter(layout.items())
    for name, tensor in tensors:
        given, wanted = (name, TensorSpec.of(tensor)), next(expected, None)
        assert given == wanted, f"{given} given, expected {wanted}"
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        digest.update(data)
        file.write(data)
    missing = next(expected, None)
    assert missing is None, f"{missing} was not given"
    return digest.hexdigest()
