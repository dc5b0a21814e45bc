"""Memory of processes that tests measure."""

from __future__ import annotations

import os
import subprocess
import sys

from tests import ROOT


def output_in_steady_heap(program: str, *arguments: str) -> str:
    """What the Python `program` prints, in a process whose heap returns each block of 1 MiB or more when it is freed.

    By default glibc decides by what was freed before, so that the resident set of two runs can differ by 50 %.

    Raises:
        subprocess.CalledProcessError: The program failed.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=environment, timeout=600
    ).stdout
