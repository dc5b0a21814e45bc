"""Entry points of the OpenMP and of the BLAS that torch brings along, and how many threads its operators take.

Threads of GNU OpenMP spin for milliseconds after each parallel region, for the next one. On their cores the native
decoder's threads have their work to do meanwhile, and so may other programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

_PAUSE_SOFT = 1


@cache
def torch_function(name: str) -> int | None:
    """The address of a C function in torch's CPU library or in a library linked to it, None if there is none."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    prefix = "" if sys.platform == "win32" else "lib"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"{prefix}torch_cpu.{suffix}"))
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


class TorchThreads:
    """Threads that torch's operators take when the calling thread calls them; one caller at a time.

    Where torch has no OpenMP, or one that cannot end its threads, everything is left as it is.
    """

    def __init__(self) -> None:
        self._all = torch.get_num_threads()
        set_number, pause = (torch_function(name) for name in ("omp_set_num_threads", "omp_pause_resource_all"))
        self._works = set_number is not None and pause is not None
        self._set_number = ctypes.PYFUNCTYPE(None, ctypes.c_int)(set_number or 0)
        self._pause = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(pause or 0)

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Have operators run on the calling thread alone."""
        if not self._works:
            yield
            return
        self._set_number(1)
        try:
            yield
        finally:
            self._set_number(self._all)

    @contextlib.contextmanager
    def all(self) -> Iterator[None]:
        """Within `one()`, have operators run on all threads, and end these, which would go on spinning."""
        if not self._works:
            yield
            return
        self._set_number(self._all)
        try:
            yield
        finally:
            self._pause(_PAUSE_SOFT)
            self._set_number(1)
