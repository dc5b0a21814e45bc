"""Helpers of the tests of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from benchmarks.pretended_hosts import PretendedHosts
from llmengine.backends.ranks import RankGroup

OBEY = "tests.backends.ranks.targets:obey"
OBEY_WITH_TENSORS = "tests.backends.ranks.tensor_targets:obey"
"""Adds commands that need torch, which ranks otherwise do without."""


@contextmanager
def open_group(
    size: int,
    timeout_s: float = 60.0,
    hosts: tuple[int, ...] | None = None,
    stuck_after_s: float | None = None,
    target: str = OBEY,
) -> Iterator[RankGroup]:
    """A started group whose ranks do what messages say; on this host, or on others that `hosts` numbers."""
    where = None if hosts is None else PretendedHosts(hosts)
    group = RankGroup(size, target, b"", hosts=where, timeout_s=timeout_s, stuck_after_s=stuck_after_s)
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
