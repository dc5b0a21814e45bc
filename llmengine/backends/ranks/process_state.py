"""What the operating system says of a process: whether it was stopped, and whether it does anything."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

__all__ = ["Activity", "is_stopped"]

# Threads that look for something twice a second use less than this part of a processor.
_NOTHING = 0.02


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process (SIGSTOP); a debugger that holds it has not."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


class Activity:
    """Whether a process does anything, judged from one call to the next."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._used_s = self._asked_at = 0.0

    def sleeps(self) -> bool:
        """Whether it has used no processor since the last call, and no thread of it waits for one, or for a disk.

        A process that has children may wait for them, and one that a debugger holds is not asleep either.
        """
        try:
            process = psutil.Process(self._pid)
            times, now = process.cpu_times(), time.monotonic()
            used_s = times.user + times.system
            used_nothing = used_s - self._used_s < _NOTHING * (now - self._asked_at)
            self._used_s, self._asked_at = used_s, now
            return used_nothing and _all_sleep(process) and not process.children()
        except psutil.Error:
            return False


def _all_sleep(process: psutil.Process) -> bool:
    states = set()
    for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
        try:
            # The name before the state may hold anything, parentheses too.
            states.add(stat.read_text().rpartition(")")[2].split()[0])
        except OSError:  # a thread that has ended
            continue
    return states <= {"S", "I"} if states else bool(process.status() == psutil.STATUS_SLEEPING)
