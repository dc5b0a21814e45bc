"""Memory that processes of one host share, and the order in which they see it change."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading

__all__ = ["LINE_WORDS", "SharedMemory", "anonymous_file"]

LINE_WORDS = 8
"""Words of 64 bits in a cache line: each process writes to lines of its own."""


def anonymous_file(name: str, size: int = 0) -> int:
    """Descriptor of a new file without a path, in memory where the system can; `name` is for people who look."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(f"llmengine-{name}")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


class SharedMemory:
    """A mapped file: words of 64 bits at its beginning, and bytes behind them.

    Args:
        fd: descriptor from `anonymous_file`; stays the caller's.
        lines: cache lines of words.
    """

    def __init__(self, fd: int, lines: int) -> None:
        view = memoryview(mmap.mmap(fd, 0))
        self.words = view[: self.header_size(lines)].cast("Q")
        self.data = view[self.header_size(lines) :]
        self._lock = threading.Lock()

    @staticmethod
    def header_size(lines: int) -> int:
        """Bytes that the words take."""
        return 8 * LINE_WORDS * lines

    def fence(self) -> None:
        """Order every access to the memory before this call before every one after it."""
        # Each pair of atomic operations is a half of it: what precedes a release stays before it, what follows an
        # acquire stays after it, and the second acquire cannot overtake the first release.
        for _ in range(2):
            with self._lock:
                pass
