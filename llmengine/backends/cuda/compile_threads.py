"""Threads that compile kernels while weights are loaded."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

_MOST_THREADS = 16
_NICER = 10


def compile_threads() -> ThreadPoolExecutor:
    """Threads, one for each processor up to a limit, that give way to other threads.

    Beside threads of equal priority, copies of weights would stand still until the kernels are compiled, because each
    copy waits for the slowest of its own threads.
    """
    return ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "llmengine-compile", initializer=_be_nice)


def _be_nice() -> None:
    if sys.platform == "linux":  # where a thread, and what it starts, can have a niceness of its own
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICER))
