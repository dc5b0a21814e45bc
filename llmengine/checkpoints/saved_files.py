"""Files of a saved engine with sizes and hashes, and the plans among them, which a backend built for its model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from llmengine.errors import CorruptFileError


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file in memory or on disk, with the size and hash that it must have.

    Attributes:
        content: the bytes, or the path of the file.
        sha256: hex.
    """

    content: bytes | Path
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        """A file with these contents."""
        return cls(content, len(content), hashlib.sha256(content).hexdigest())

    def check_size(self) -> None:
        """Raise `CorruptFileError` unless the file exists and has its size."""
        if isinstance(self.content, bytes):
            return
        try:
            found = self.content.stat().st_size if self.content.is_file() else None
        except OSError as error:
            raise CorruptFileError(f"{self.content}: cannot be read: {error.strerror or error}") from error
        if found is None:
            raise CorruptFileError(f"{self.content}: is missing, expected {self.size_bytes} bytes")
        if found != self.size_bytes:
            raise CorruptFileError(f"{self.content}: has {found} bytes, expected {self.size_bytes}")

    def check(self) -> None:
        """Raise `CorruptFileError` unless the file has its size and hash; reads it in pieces.

        The message names the file, what was found and what was expected.
        """
        if isinstance(self.content, bytes):
            return
        self.check_size()
        try:
            with self.content.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CorruptFileError(f"{self.content}: cannot be read: {error.strerror or error}") from error
        self._compare(self.content, found)

    def read(self) -> bytes:
        """The contents; raises as `check` does."""
        if isinstance(self.content, bytes):
            return self.content
        self.check_size()
        try:
            content = self.content.read_bytes()
        except OSError as error:
            raise CorruptFileError(f"{self.content}: cannot be read: {error.strerror or error}") from error
        self._compare(self.content, hashlib.sha256(content).hexdigest())
        return content

    def _compare(self, path: Path, found: str) -> None:
        if found != self.sha256:
            raise CorruptFileError(f"{path}: has sha256 {found}, expected {self.sha256}")


@dataclass(frozen=True, slots=True)
class SavedPlans:
    """The plans of a model.

    Attributes:
        facts: JSON-ready description of the plans and their devices, read only by the backend that wrote it.
        files: name in the engine directory's plans/ -> file. They are checked when they are used, because damaged plans
            can be rebuilt from undamaged weights.
    """

    facts: Mapping[str, Any]
    files: Mapping[str, SavedFile]


@runtime_checkable
class PlanHolder(Protocol):
    """A backend whose plans are saved with its weights."""

    def saved_plans(self) -> SavedPlans | None:
        """The plans to save, None for none; their files must not change until they are written."""


def size_text(size_bytes: int) -> str:
    """A size for people: "512 B", "1.21 MB"."""
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
