"""From a checkpoint's tensors to canonical weights: what the readers of all file formats have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, Protocol

from llmengine.checkpoints.source import WeightStream
from llmengine.dtypes import model_dtype_name, torch_dtype
from llmengine.errors import CorruptFileError
from llmengine.models.arch import ModelArch, fused_parts, head_order
from llmengine.models.sharding import NOTHING, Cut
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats

if TYPE_CHECKING:
    import torch

COPY_ELEMENTS = 1 << 22
"""Elements converted at a time, so that a temporary copy of a large embedding stays small."""

NO_SLICES: Mapping[str, Cut] = MappingProxyType({})


class ReadPart(Protocol):
    """Fills tensors from a checkpoint's files."""

    def __call__(self, part: str, out: torch.Tensor, first_row: int = 0, columns: range | None = None) -> None:
        """Fill `out` with the rows of a part from `first_row` on, or with the blocks of these rows if it is uint8.

        `columns` are those wanted of each row, None for all; blocks have all.
        """


def stream_fused(
    arch: ModelArch,
    dtype: torch.dtype,
    read_part: ReadPart,
    formats: ModelFormats = DENSE_MODEL,
    read_matrix: Callable[[str], Mapping[str, torch.Tensor] | None] = lambda matrix: None,
    slices: Mapping[str, Cut] = NO_SLICES,
) -> WeightStream:
    """Yield the canonical weights of `arch` in `formats`.

    `read_matrix(matrix)` gives the tensors of a matrix, by name less ".weight"; None if it has one tensor, or one for
    each part, which are filled in place, in the order of `fused_parts`. Heads of q and k are brought from the
    checkpoint's order of rows into `head_order`. Of dense tensors only what `slices` say is read, if they are in there;
    tensors and matrices of which they say `NOTHING` are left out.
    """
    import torch

    layout = formats.layout(arch, model_dtype_name(dtype))

    def read(part: str, out: torch.Tensor, first_row: int = 0, columns: range | None = None) -> None:
        read_part(part, out, first_row, columns)
        _order_heads(arch, part, out)

    for name, parts in fused_parts(arch).items():
        matrix = name.removesuffix(".weight")
        if slices.get(name) == NOTHING:
            continue
        if name in slices:
            yield name, _read_slices(parts, slices[name], torch_dtype(layout[name].dtype), read)
            continue
        if (given := read_matrix(matrix)) is not None:
            yield from ((f"{matrix}.{suffix}", tensor) for suffix, tensor in given.items())
            continue
        names = [name, *(item for index in range(1, len(parts)) if (item := f"{name}_{index}") in layout)]
        tensors = [torch.empty(layout[item].shape, dtype=torch_dtype(layout[item].dtype)) for item in names]
        places = tensors if len(names) > 1 else tensors[0].split([shape[0] for _, shape in parts])
        for (part, _), rows in zip(parts, places, strict=True):
            read(part, rows)
        yield from zip(names, tensors, strict=True)


def _read_slices(
    parts: Sequence[tuple[str, tuple[int, ...]]], cut: Cut, dtype: torch.dtype, read: ReadPart
) -> torch.Tensor:
    """What `cut` says of a dense tensor: rows of each of its parts, or columns of its only one."""
    import torch

    lengths = [len(held) for held in cut.ranges]
    if cut.axis == "in":
        ((part, shape),) = parts
        out = torch.empty((shape[0], *lengths), dtype=dtype)
        read(part, out, 0, cut.ranges[0])
        return out
    out = torch.empty((sum(lengths), *parts[0][1][1:]), dtype=dtype)
    first = 0
    for (part, shape), held, rows in zip(parts, cut.ranges, out.split(lengths), strict=True):
        read(part, rows, held.start - first)
        first += shape[0]
    return out


def _order_heads(arch: ModelArch, part: str, rows: torch.Tensor) -> None:
    order = head_order(arch)
    if order is not None and part.split(".")[-2] in ("q", "k", "q_norm", "k_norm"):
        for head in rows.split(arch.head_dim):
            head.copy_(head[list(order)])


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Where a checkpoint has a part: rows [first_row, first_row + num_rows) of a tensor with `total_rows`."""

    tensor: str
    first_row: int
    num_rows: int
    total_rows: int


def stored_parts(arch: ModelArch, stored_name: Callable[[str], str]) -> dict[str, StoredPart]:
    """The place where each part of `arch` is stored; parts with the same stored name are stacked in order."""
    first_rows: dict[str, int] = {}
    totals = {name: shape[0] for name, shape in stored_shapes(arch, stored_name).items()}
    places = {}
    for parts in fused_parts(arch).values():
        for part, shape in parts:
            name = stored_name(part)
            first = first_rows.get(name, 0)
            places[part] = StoredPart(name, first, shape[0], totals[name])
            first_rows[name] = first + shape[0]
    return places


def stored_shapes(arch: ModelArch, stored_name: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that holds parts of `arch`, by its name in the files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parts in fused_parts(arch).values():
        for part, shape in parts:
            name = stored_name(part)
            shapes[name] = (shapes.get(name, (0,))[0] + shape[0], *shape[1:])
    return shapes


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    is_harmless: Callable[[str], bool] = lambda name: False,
    file_of: Callable[[str], str] | None = None,
    may_be_padded: Collection[str] = (),
) -> None:
    """Raise `CorruptFileError` unless the files hold the `expected` names and shapes, and beyond only harmless ones.

    Tensors that `may_be_padded` may have more rows than expected: an embedding's rows beyond the vocabulary are unused.
    """
    missing = [name for name in expected if name not in found]
    if missing:
        raise CorruptFileError(f"{where}: {_count(missing)} missing: {_listed(missing)}")
    for name, shape in expected.items():
        is_padded = name in may_be_padded and found[name][1:] == shape[1:] and found[name][:1] > shape[:1]
        if found[name] != shape and not is_padded:
            file = file_of(name) if file_of else where
            raise CorruptFileError(f"{file}: tensor {name!r} has shape {found[name]}, expected {shape}")
    left_over = [name for name in found if name not in expected and not is_harmless(name)]
    if left_over:
        raise CorruptFileError(
            f"{where}: {_count(left_over)} left over that the configured model does not have: {_listed(left_over)}"
        )


def read_exactly(file: BinaryIO, out: torch.Tensor, what: str) -> None:
    """Fill `out` (contiguous) with the next bytes of `file`; raises `CorruptFileError` naming `what` if they end."""
    import torch

    buffer: memoryview = out.view(-1).view(torch.uint8).numpy().data
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise CorruptFileError(f"{what}: {len(buffer) - filled} of {len(buffer)} bytes are missing: truncated?")
        filled += count


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
