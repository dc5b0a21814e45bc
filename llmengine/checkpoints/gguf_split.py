"""GGUF models split into several files, as llama-gguf-split and the converter write them.

Each is a complete GGUF file: `NAME-00002-of-00003.gguf` contains some of the tensors. Its metadata has `split.no`,
which counts from 0, `split.count`, and `split.tensors.count`, the number of tensors in all files. Only the first file
has the model's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from llmengine.checkpoints.gguf_file import GgufFile, GgufTensor, read_gguf
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.errors import CorruptFileError, ModelLoadError

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.gguf)", re.IGNORECASE)
_MAX_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class _Part:
    """A file's place according to its name: number `number`, counted from 1, of `count`."""

    path: Path
    stem: str
    number: int
    count: int
    suffix: str

    def sibling(self, number: int) -> Path:
        return self.path.with_name(f"{self.stem}-{number:05d}-of-{self.count:05d}{self.suffix}")


def first_files(paths: Iterable[Path]) -> list[Path]:
    """One file for each model among GGUF files; for a split model, the first of its files that exists."""
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(paths):
        part = _parse_name(path)
        found.setdefault((part.stem, part.count) if part else (path.name, 0), path)
    return list(found.values())


def read_split_gguf(path: Path) -> GgufFile:
    """Metadata and tensor table of a GGUF file, or of all files of a split model; `path` may be any of these.

    Raises what `read_gguf` raises, `CorruptFileError` naming files that are missing or contradict each other, and
    `ModelLoadError` for one of several files whose name does not lead to the others.
    """
    given = read_gguf(path)
    num_files = Fields(given.metadata, str(path)).integer("split.count", 0, high=_MAX_PARTS)
    if num_files <= 1:
        return given
    part = _parse_name(path)
    if part is None:
        number = _file_number(given, num_files)
        raise ModelLoadError(
            f"{path}: file {number} of {num_files} of a split model, but its name does not lead to the others; rename "
            f"it to NAME-{number:05d}-of-{num_files:05d}.gguf, or merge the files with llama-gguf-split --merge"
        )
    if part.count != num_files:
        raise CorruptFileError(f"{path}: split.count={num_files} contradicts the file name, which says {part.count}")
    paths = [part.sibling(number) for number in range(1, num_files + 1)]
    missing = [file.name for file in paths if not file.is_file()]
    if missing:
        raise CorruptFileError(
            f"{path}: file {part.number} of {num_files} of a split model; {len(missing)} of them are missing: "
            + ", ".join(missing[:8])
            + (", ..." if len(missing) > 8 else "")
        )
    return _join_files([given if file == path else read_gguf(file) for file in paths])


def _join_files(files: list[GgufFile]) -> GgufFile:
    """The files of a split model, given in order, as one."""
    tensors: dict[str, GgufTensor] = {}
    for index, file in enumerate(files):
        if (number := _file_number(file, len(files))) != index + 1:
            raise CorruptFileError(f"{file.path}: split.no={number - 1} contradicts the file name, expected {index}")
        twice = tensors.keys() & file.tensors.keys()
        if twice:
            raise CorruptFileError(f"{file.path}: tensor {min(twice)!r} is also in {tensors[min(twice)].path.name}")
        tensors |= file.tensors
    first = files[0]
    total = Fields(first.metadata, str(first.path)).integer("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CorruptFileError(
            f"{first.path}: split.tensors.count={total}, but the {len(files)} files contain {len(tensors)} tensors"
        )
    return replace(first, tensors=tensors)


def _file_number(file: GgufFile, num_files: int) -> int:
    """The file's number, counted from 1. Raises `CorruptFileError` unless it is one of `num_files` files."""
    fields = Fields(file.metadata, str(file.path))
    if fields.integer("split.count", 0) != num_files:
        raise fields.error("split.count", f"{num_files}, as in the other files")
    return fields.integer("split.no", high=num_files - 1) + 1


def _parse_name(path: Path) -> _Part | None:
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return None
    return _Part(path, match["stem"], int(match["number"]), int(match["count"]), match["suffix"])
