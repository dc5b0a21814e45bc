"""A run of kills, with what it may not leave behind, and its table."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import multiprocessing
import random
import statistics
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil

from benchmarks.cluster_kills.killing import KINDS, POLL_S, Killing
from benchmarks.cluster_kills.victims import LocalVictim, ProcessVictim, RayVictim, Victim, make_llm
from benchmarks.kills import Kill
from benchmarks.process_replicas import fork_server
from benchmarks.report import format_table
from llmengine import LLM

Where = Literal["threads", "processes", "ray"]
"""What replicas are: threads of this process, processes below it, or actors of a Ray that is started for them."""

_RAY_CPUS = 64


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may not leave behind.

    Attributes:
        num_threads: of ours, in this process.
        num_processes: below this one; with Ray, its replicas' processes only.
        num_files: open ones of this process; not with Ray, which has connections of its own.
        num_engines: in this process, that were not collected.
        num_cpus: that actors of Ray hold.
    """

    num_threads: int
    num_processes: int
    num_files: int
    num_engines: int
    num_cpus: float

    @classmethod
    def now(cls, where: Where, engines: Sequence[weakref.ref[LLM]]) -> Resources:
        """Count, after a garbage collection."""
        multiprocessing.active_children()  # forgets those that have ended, which hold files until another starts
        gc.collect()
        process = psutil.Process()
        return cls(
            sum(thread.name.startswith("llmengine") for thread in threading.enumerate()),
            len(actor_processes() if where == "ray" else process.children(recursive=True)),
            0 if where == "ray" else process.num_fds(),
            sum(engine() is not None for engine in engines),
            _used_cpus() if where == "ray" else 0.0,
        )

    def exceed(self, before: Resources) -> bool:
        """Whether there is more of anything. There may be less, since what ran before may end late."""
        return any(now > then for now, then in zip(astuple(self), astuple(before), strict=True))


def actor_processes() -> list[psutil.Process]:
    """The processes below this one that are replicas of a cluster on Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ReplicaActor" in process.name() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _used_cpus() -> float:
    import ray

    return float(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))


@contextmanager
def _victims(where: Where, engines: list[weakref.ref[LLM]]) -> Iterator[Callable[[], Victim]]:
    """What makes replicas; those in this process are added to `engines`."""
    if where == "threads":
        yield lambda: LocalVictim(engines)
    elif where == "processes":
        context = fork_server()
        yield lambda: ProcessVictim(context, make_llm)
    else:
        import ray

        ray.init("local", num_cpus=_RAY_CPUS, include_dashboard=False, log_to_driver=False)
        numbers = itertools.count()
        try:
            with TemporaryDirectory() as directory:
                yield lambda: RayVictim(Path(directory, f"replica-{next(numbers)}"))
        finally:
            ray.shutdown()


def _wait_until(condition: Callable[[], bool], bound_s: float) -> None:
    """Wait for a condition, but no longer than the bound."""
    until = time.monotonic() + bound_s
    while not condition() and time.monotonic() < until:
        time.sleep(POLL_S)


def kill_all(
    kinds: Sequence[str], *, where: Where = "threads", bound_s: float = 30.0, **settings: Any
) -> tuple[list[Kill], list[str]]:
    """Run `Killing` in an event loop of its own; return the kills, and what went wrong or was left, in words.

    Args:
        kinds: what to kill, in order; see `KINDS`.
        settings: of `Killing`.
    """
    engines: list[weakref.ref[LLM]] = []
    with _victims(where, engines) as new_victim:
        asyncio.run(Killing(new_victim, num_clients=1).run(()))  # what starts once and stays, such as the fork server
        if where == "ray":  # what actors held is free a moment after they were told to end
            _wait_until(lambda: not actor_processes() and not _used_cpus(), bound_s)
        before = Resources.now(where, engines)
        killing = Killing(new_victim, bound_s=bound_s, **settings)
        with _without_logs():
            asyncio.run(killing.run(kinds))
        _wait_until(lambda: not Resources.now(where, engines).exceed(before), bound_s)
        left = Resources.now(where, engines)
    if left.exceed(before):
        killing.faults.append(f"left behind: {left}; before: {before}")
    return killing.kills, killing.faults


@contextmanager
def _without_logs() -> Iterator[None]:
    """Each kill would log a traceback, and a record that is kept would keep an engine."""
    logger = logging.getLogger("llmengine")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def order_of(num_kills: int, seed: int) -> list[str]:
    """So many kinds in a random order, with the slow ones, silence and lost connections, a tenth as often as others."""
    weights = [1 if kind in ("silence", "connection", "start") else 10 for kind in KINDS]
    return [*KINDS, *random.Random(seed).choices(KINDS, weights, k=num_kills)][:num_kills]


def table(kills: Sequence[Kill]) -> str:
    """A row for each kind of kill, as Markdown."""
    by_kind: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        by_kind[kill.kind].append(kill)
    rows = []
    for kind in (kind for kind in KINDS if kind in by_kind):
        mine = by_kind[kind]
        endings = sum((kill.endings for kill in mine), Counter())
        errors = endings.total() - endings["whole"] - endings["aborted"]
        whole_s = [kill.whole_s for kill in mine]
        slowest_s = max(kill.slowest_s for kill in mine)
        rows.append(
            [
                kind,
                *map(str, (len(mine), endings["whole"], endings["aborted"], errors)),
                f"{slowest_s:.2f}",
                f"{statistics.median(whole_s):.2f}",
                f"{max(whole_s):.2f}",
            ]
        )
    header = ["killed", "times", "whole", "aborted", "error", "slowest stream, s", "whole again, s: median", "most"]
    return format_table(header, rows)
