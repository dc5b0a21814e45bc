"""Directories that appear under their name complete or not at all: they are written beside it, synced and renamed."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_STALE_S = 24 * 3600.0


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Return an empty directory to write, with every file synced, that takes the place of `target` at the block's end.

    What is at `target`, an absolute path without links, is replaced in one step. (Where the file system cannot swap two
    directories, a kill between two renames leaves the replaced one beside, named `.NAME.*.old`.) A block that raises
    leaves everything as it was; what a killed one leaves beside the directory is removed by the next one, a day later.
    """
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        staging.mkdir()
        yield staging
        for folder in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
            _sync_directory(folder)
        _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # as it does where something is there now
                parent.rmdir()


def sync_file(file: BinaryIO) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def files_below(directory: Path) -> set[str]:
    """Return the relative paths of all that is in a directory but directories; links are among it, not followed."""

    def fail(error: OSError) -> None:
        raise error

    found: set[str] = set()
    for folder, folders, files in os.walk(directory, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found.update(Path(folder, name).relative_to(directory).as_posix() for name in (*files, *links))
    return found


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; a replaced directory is then at `staging`, or put back if that fails."""
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)
    elif not _exchange(staging, target):
        replaced = staging.with_suffix(".old")
        target.rename(replaced)
        try:
            staging.rename(target)
        except OSError:
            replaced.rename(target)
            raise
        replaced.rename(staging)
    _sync_directory(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; returns False where this cannot be done, which is anywhere but on Linux."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    status: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return status == 0


def _remove_stale(target: Path) -> None:
    """Remove what blocks for `target` left when they were killed, once none can be under way any more."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left)
