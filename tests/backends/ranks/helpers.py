"""Helpers of the tests of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import psutil

from llmengine.backends.ranks import RankGroup

OBEY = "tests.backends.ranks.targets:obey"


@contextmanager
def open_group(
    size: int,
    timeout_s: float = 60.0,
    collectives: Literal["memory", "gloo"] = "memory",
    stuck_after_s: float | None = None,
) -> Iterator[RankGroup]:
    """A started group whose ranks do what messages say."""
    group = RankGroup(size, OBEY, b"", timeout_s=timeout_s, stuck_after_s=stuck_after_s, collectives=collectives)
    group.start()
    try:
        yield group
    finally:
        group.close()


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
