"""Directories that appear complete or not at all: they are written under a temporary name, synced and renamed."""

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
    """An empty directory that replaces `target` when the `with` block ends.

    The block must sync every file that it writes (`sync_file`). `target` is an absolute path without links; a directory
    that exists there is replaced in one step. (On file systems that cannot swap two directories, a process killed
    between two renames leaves the replaced one beside it as `.NAME.*.old`.) If the block raises, everything stays as it
    was. The temporary directory of a killed process is removed by the next call that finds it more than a day old.
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
            with contextlib.suppress(OSError):  # not empty: something else was created there
                parent.rmdir()


def sync_file(file: BinaryIO) -> None:
    """Flush an open file and sync it to the disk."""
    file.flush()
    os.fsync(file.fileno())


def files_below(directory: Path) -> set[str]:
    """Relative paths of everything below a directory except directories; links are listed, not followed."""

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
    """Rename `staging` to `target`. A replaced directory ends up at `staging`; it is restored if renaming fails."""
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
    """Swap two directories in one step. Returns False where that is impossible, as on any system but Linux."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    status: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return status == 0


def _remove_stale(target: Path) -> None:
    """Remove temporary directories that killed processes left for `target`, old enough not to be in use any more."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_S:
                shutil.rmtree(left)
