"""The ranks of one host: the memory that they share, and their processes, as their host sees them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmengine.backends.ranks.launcher import Launcher, RankProcess
from llmengine.backends.ranks.layout import Link, LinkEnds, RankLayout
from llmengine.backends.ranks.memory import anonymous_file
from llmengine.backends.ranks.pipe import PipeLinks
from llmengine.backends.ranks.process import write_start_file
from llmengine.backends.ranks.process_state import Activity, is_stopped
from llmengine.backends.ranks.progress import progress_size
from llmengine.backends.ranks.ring import ring_size
from llmengine.backends.ranks.shared_collectives import shared_size

__all__ = ["HostRanks", "HostedRank", "LocalRank", "RankStart"]


@dataclass(frozen=True, slots=True)
class RankStart:
    """What all ranks of a group are started with: a target as "module:function", and what it is given."""

    target: str
    payload: bytes


class HostedRank(Protocol):
    """The process of a rank, on this host or on another."""

    @property
    def name(self) -> str:
        """The process, for people."""

    def ending(self, timeout_s: float = 0.0) -> str | None:
        """How it has ended, such as "was killed by SIGKILL"; None while it runs, for at most so long."""

    def kill(self) -> None:
        """End it and what it started, at once; does nothing if it has ended."""

    def interrupt(self) -> None:
        """Ask it to write down where its threads are."""

    def dumped(self) -> str:
        """What it has written down."""

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""

    def sleeps(self) -> bool:
        """Whether it has done nothing at all, not even wait for a processor, since this was last asked."""


class LocalRank:
    """Implements `HostedRank` for a process of this host.

    Args:
        process: as it was launched.
        dumps: descriptor of the file where it writes where its threads are; closed with this.
    """

    def __init__(self, process: RankProcess, dumps: int) -> None:
        self.process = process
        self._dumps = dumps
        self._activity = Activity(process.pid)

    @property
    def name(self) -> str:
        return f"process {self.process.pid}"

    def ending(self, timeout_s: float = 0.0) -> str | None:
        status = self.process.wait(timeout_s) if timeout_s else self.process.poll()
        return None if status is None else _ending(status)

    def kill(self) -> None:
        self.process.kill()

    def interrupt(self) -> None:
        self.process.interrupt()

    def dumped(self) -> str:
        size = os.fstat(self._dumps).st_size
        return os.pread(self._dumps, size, 0).decode(errors="replace").rstrip()

    def is_stopped(self) -> bool:
        return is_stopped(self.process.pid)

    def sleeps(self) -> bool:
        return self._activity.sleeps()

    def close(self) -> None:
        """Close the file of dumps."""
        os.close(self._dumps)


class HostRanks:
    """Launches the ranks of one host, without rank 0, and holds what keeps them alive.

    Attributes:
        ranks: those that were launched, by number.
        ring, progress: files for the messages of rank 0 (empty on other hosts than its own), and for progress.
        pipes: of neighbours that are both here.

    Args:
        host: its number.
        launcher: starts the processes.
    """

    def __init__(self, layout: RankLayout, host: int, start: RankStart, launcher: Launcher) -> None:
        self._layout = layout
        self._host = host
        self._launcher = launcher
        self._members = [rank for rank in layout.on(host) if rank]
        self._lifelines: list[int] = []
        self.ranks: dict[int, LocalRank] = {}
        self.ring = anonymous_file("ring", ring_size(len(self._members)) if not host else 0)
        self.progress = anonymous_file("progress", progress_size(layout.size))
        self._start = anonymous_file("start")
        write_start_file(self._start, _start_values(start), start.payload)
        self._sums = {stage.start: anonymous_file("sums", shared_size(len(stage))) for stage in self._own_stages()}
        self.pipes = PipeLinks(layout, host)

    @property
    def readers(self) -> list[int]:
        """The ranks that read the ring, in the order of its readers."""
        return [] if self._host else self._members

    def sums(self, rank: int) -> int | None:
        """The file through which a rank's stage adds up; None for a stage on several hosts."""
        return self._sums.get(self._layout.stage(rank).start)

    def launch(self, links: LinkEnds) -> dict[int, socket.socket]:
        """Start the processes; the other ends of the sockets of those that read the ring.

        Args:
            links: connections of these ranks; stay the caller's.
        """
        sockets: dict[int, socket.socket] = {}
        try:
            for rank in self._members:
                if self._host:
                    self._launch(rank, links[Link("messages", 0, rank), rank], links)
                    continue
                sockets[rank], theirs = socket.socketpair()
                with theirs:
                    self._launch(rank, theirs, links)
        except BaseException:
            for ours in sockets.values():
                ours.close()
            raise
        return sockets

    def release(self) -> None:
        """Close what is needed for launching only."""
        self.pipes.close()
        for fd in (self.ring, self.progress, self._start, *self._sums.values()):
            os.close(fd)

    def end(self, timeout_s: float) -> None:
        """End all processes at once, and wait for that."""
        for rank in self.ranks.values():
            rank.kill()
        for lifeline in self._lifelines:
            os.close(lifeline)
        self._lifelines.clear()
        for rank in self.ranks.values():
            rank.ending(timeout_s)

    def close(self) -> None:
        """Close the files of the ranks, after `end`."""
        for rank in self.ranks.values():
            rank.close()
        self.ranks.clear()

    def _own_stages(self) -> Iterator[range]:
        """The stages of which all ranks are here."""
        for first in range(0, self._layout.size, self._layout.stage_size):
            stage = self._layout.stage(first)
            if self._layout.is_on_one_host(stage) and self._layout.hosts[first] == self._host:
                yield stage

    def _launch(self, rank: int, reports: socket.socket, links: LinkEnds) -> None:
        dumps = anonymous_file("dumps")
        read_end, write_end = os.pipe()
        self._lifelines.append(write_end)
        wires = self._wires(rank, links)
        wires |= {"socket": reports.fileno(), "lifeline": read_end, "dumps": dumps, "start": self._start}
        inherited = [*(fd for fd in wires.values() if fd >= 0)]
        peers = {
            link.first + link.second - rank: connection.fileno()
            for (link, owner), connection in links.items()
            if link.kind == "sums" and owner == rank
        }
        values = {
            **{"rank": rank, "size": self._layout.size, "stage_size": self._layout.stage_size, "parent": os.getpid()},
            **{"num_on_host": len(self._layout.on(self._host)), "num_readers": len(self.readers)},
            **{"reader": self.readers.index(rank) if self.readers else -1, "peers": peers},
            **wires,
        }
        try:
            process = self._launcher.launch([json.dumps(values)], [*inherited, *peers.values()])
            self.ranks[rank] = LocalRank(process, dumps)
        except BaseException:
            os.close(dumps)
            raise
        finally:
            os.close(read_end)

    def _wires(self, rank: int, links: LinkEnds) -> dict[str, int]:
        """Descriptors of what the rank shares with others; -1 where there is none."""
        sums = self.sums(rank)
        wires = {"ring": self.ring if self.readers else -1, "sums": -1 if sums is None else sums}
        wires |= {"progress": self.progress, **self.pipes.ends_of(rank)}
        for (link, owner), connection in links.items():
            if link.kind == "pipe" and owner == rank:
                wires["outbox" if rank == link.first else "inbox"] = connection.fileno()
        return wires


def _start_values(start: RankStart) -> dict[str, Any]:
    return {"path": [str(Path(entry).absolute()) for entry in sys.path], "target": start.target}


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended by itself with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", as the kernel does when memory runs out" if -status == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"
