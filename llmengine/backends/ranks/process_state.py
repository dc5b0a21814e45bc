"""What the operating system says of a process: whether it was stopped, and whether it does anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Activity", "is_stopped"]

# Threads that look for something now and then use less than this part of a processor. The system counts in hundredths
# of a second.
_NOTHING = 0.05


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
        self._threads: dict[str, _Thread] = {}

    def sleeps(self) -> bool:
        """Whether it has used no processor since the last call, and no thread of it waited for one, or for a disk.

        A process that has children may wait for them, and one that a debugger holds is not asleep either.
        """
        try:
            process = psutil.Process(self._pid)
            times, now = process.cpu_times(), time.monotonic()
            used_s = times.user + times.system
            used_nothing = used_s - self._used_s < _NOTHING * (now - self._asked_at)
            self._used_s, self._asked_at = used_s, now
            return self._all_sleep(process) and used_nothing and not process.children()
        except psutil.Error:
            return False

    def _all_sleep(self, process: psutil.Process) -> bool:
        before, self._threads = self._threads, _threads(process.pid)
        if not self._threads:
            return bool(process.status() == psutil.STATUS_SLEEPING)
        return all(thread.sleeps(before.get(name, _Thread("S", 0, 0))) for name, thread in self._threads.items())


@dataclass(frozen=True, slots=True)
class _Thread:
    """What Linux says of a thread.

    Attributes:
        state: "S" and "I": asleep; "R": runs, or waits for a processor; "D": waits for a disk.
        num_gave_up: how often it has given up its processor.
        num_lost: how often it was taken from it.
    """

    state: str
    num_gave_up: int
    num_lost: int

    def sleeps(self, before: _Thread) -> bool:
        """Whether it has not computed, not even on a busy machine, since it was seen before.

        A thread that wants the interpreter's lock looks for it 200 times a second, but gives up its processor each
        time. One that computes has it taken away, or waits for it all the time.
        """
        gave_up, lost = self.num_gave_up - before.num_gave_up, self.num_lost - before.num_lost
        return (self.state in ("S", "I") and lost <= gave_up) or (self.state == "R" and lost < gave_up)


def _threads(pid: int) -> dict[str, _Thread]:
    """The process's threads by number; none where there is no such directory, on other systems than Linux."""
    threads = {}
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # a thread that has ended
            continue
        gave_up, lost = (fields.get(f"{kind}_ctxt_switches", "0") for kind in ("voluntary", "nonvoluntary"))
        threads[status.parent.name] = _Thread(fields["State"].split()[0], int(gave_up), int(lost))
    return threads
