"""Helpers of the tests of ranks."""

from __future__ import annotations

import time

import psutil

from llmengine.backends.ranks import RankGroup

OBEY = "tests.backends.ranks.targets:obey"


def pids(group: RankGroup) -> list[int]:
    """The process of each rank, as it says itself."""
    group.broadcast(b"told pid")
    return [int(reply) for reply in group.replies()]


def is_gone(pid: int, within_s: float = 0.0) -> bool:
    """Whether a process has ended, or ends in time; one that nobody has waited for has ended."""
    until = time.monotonic() + within_s
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
