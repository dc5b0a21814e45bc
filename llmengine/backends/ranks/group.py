"""Rank 0's side: the processes of the other ranks, from their start to their end."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

from llmengine.backends.ranks.collectives import Collectives
from llmengine.backends.ranks.host import HostRanks, RankStart
from llmengine.backends.ranks.launcher import Launcher, LocalLauncher
from llmengine.backends.ranks.layout import Link, LinkEnds, RankLayout
from llmengine.backends.ranks.pipe import Inbox, Pipe, TensorPipe
from llmengine.backends.ranks.progress import Progress, Seen
from llmengine.backends.ranks.remote_host import RemoteHosts
from llmengine.backends.ranks.ring import Ring, RingWriter
from llmengine.backends.ranks.shared_collectives import SharedCollectives
from llmengine.backends.ranks.socket_collectives import SocketCollectives
from llmengine.backends.ranks.sockets import SocketReader, SocketWriter
from llmengine.backends.ranks.watch import RankFailure, RankWatch, WatchedRank
from llmengine.errors import EngineClosedError, EngineDeadError
from llmengine.rank_hosts import RankHosts, hosts_of_ranks

__all__ = ["RankGroup"]

_START_TIMEOUT_S = 300.0
# What ranks get to end by themselves.
_GRACE_S = 2.0
_KILL_S = 10.0
_WANTED_S = 0.2
_FULL_PAUSE_S = 200e-6
# How long rank 0 looks for the cause of a collective that failed.
_CAUSE_S = 3.0


class RankGroup:
    """Processes that run a target each, with collectives among them and rank 0, and messages from rank 0.

    One thread at a time uses it, except `check` and `close`. When a rank raises, dies or hangs, all ranks are killed,
    and every call, waiting or later, raises the `EngineDeadError` that names the rank.

    Args:
        size: ranks, including rank 0, which is the caller.
        target: "module:function" of what ranks 1.. call with their `RankChannel` and the payload.
        payload: what the target is given.
        launcher: starts the processes of this host.
        hosts: where ranks lie that are not on this host; None: all are here.
        timeout_s: a rank hangs that is late by this in a collective, or with reading messages when the ring is full.
        start_timeout_s: what starting may take, imports included.
        stuck_after_s: a rank hangs that works this long without a mark of progress, asleep; while it does anything, a
            multiple of the longest time that rank 0 lately took between two marks is added. Before the first message
            it is `timeout_s`. None: ranks need not mark their progress.
        stage_size: ranks of each stage of a pipeline, a divisor of `size`; collectives are among these. None: all are
            one stage.
        check_wanted: called again and again while ranks are started, awaited or told something; what it raises ends
            that.
    """

    def __init__(
        self,
        size: int,
        target: str,
        payload: bytes,
        launcher: Launcher | None = None,
        hosts: RankHosts | None = None,
        timeout_s: float = 60.0,
        start_timeout_s: float = _START_TIMEOUT_S,
        stuck_after_s: float | None = None,
        stage_size: int | None = None,
        check_wanted: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self._layout = RankLayout(stage_size or size, hosts_of_ranks(hosts, size))
        assert not size % self._layout.stage_size, (size, stage_size)
        self._start_with = RankStart(target, payload)
        self._launcher = launcher or LocalLauncher()
        self._hosts = hosts
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._stuck_after_s = stuck_after_s
        self._check_wanted = check_wanted
        self._owner = os.getpid()
        self._ranks: list[WatchedRank] = []
        self._local: HostRanks | None = None
        self._remote: RemoteHosts | None = None
        self._watch: RankWatch | None = None
        self._ring: RingWriter | None = None
        self._senders: list[SocketWriter] = []
        self._collectives: Collectives | None = None
        self._progress: Progress | None = None
        self._pipe: Pipe | None = None
        self._worked_at = 0.0
        self._closing = threading.Lock()
        self._closed = False

    @property
    def address(self) -> str:
        """Of this host, at which the other ranks reach it."""
        return "127.0.0.1" if self._hosts is None else self._hosts.address

    @property
    def num_on_host(self) -> int:
        """How many ranks are on this host, rank 0 included."""
        return len(self._layout.on(0))

    def start(self) -> None:
        """Launch the ranks and connect to them; returns when their targets begin.

        Raises an `EngineDeadError`, or the error of ours that a rank raised. Whatever it raises, no rank is left.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def collectives(self) -> Collectives:
        """Rank 0's end of those of its stage."""
        if self._collectives is None:
            raise EngineClosedError("the ranks are not started")
        return self._collectives

    @property
    def pipe(self) -> Pipe:
        """Rank 0's end of the pipeline, at which it only receives."""
        if self._pipe is None:
            raise EngineClosedError("the ranks are not started")
        return self._pipe

    @property
    def progress(self) -> Progress:
        """Where rank 0 says how far it is; `broadcast` and the collectives do so as well."""
        self._running()
        assert self._progress is not None
        return self._progress

    def expect_progress(self, stuck_after_s: float) -> None:
        """From the next message on, a rank hangs that works this long without a mark, as with `stuck_after_s`."""
        self._stuck_after_s = stuck_after_s

    def rest(self) -> None:
        """Rank 0 works on nothing until the next message, so its time tells nothing of how long ranks may take."""
        if self._progress is not None:
            self._progress.rest()

    def broadcast(self, message: bytes) -> None:
        """Send a message to every rank, in order. Blocks while a rank is behind by the whole ring (4 MiB), or by what
        the system keeps of a connection.
        """
        self.check()
        watch, ring, progress = self._watch, self._ring, self._progress
        assert watch is not None
        assert progress is not None
        if self._stuck_after_s is not None:
            watch.stuck_after_s = self._stuck_after_s
        progress.rest()
        if ring is not None:
            ring.write(message)
        for sender in self._senders:
            sender.write(message)
        progress.mark(b"a message")

    def replies(self, timeout_s: float | None = None) -> list[bytes]:
        """Wait for one reply from each rank; they come in the order of ranks, without rank 0.

        Raises an `EngineDeadError`, after the timeout too, or the error of ours that a rank raised instead.
        """
        watch = self._running()
        self.progress.rest()
        in_time = self._wait(watch.all_replied, timeout_s)
        if not in_time:
            assert timeout_s is not None
            watch.late("reply", timeout_s, watch.without_reply())
        if watch.failure is not None:
            raise watch.failure.raised()
        self.progress.mark()
        return watch.take_replies()

    def check(self) -> None:
        """Raise the `EngineDeadError` of a rank that failed, if one has; costs next to nothing otherwise."""
        self._check_wanted()
        failure = self._running().failure
        if failure is not None:
            raise failure.dead()

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Call `on_failure` once, on any thread, when a rank has failed; `check` raises the cause."""
        self._running().tell(on_failure)

    def close(self) -> None:
        """End the ranks: those that do not end by themselves within 2 s are killed. Idempotent, from any thread."""
        with self._closing:
            if self._closed or os.getpid() != self._owner:  # a forked child has copies that are not its own
                return
            self._closed = True
            try:
                self._let_ranks_end()
            finally:
                self._end_ranks()

    def _running(self) -> RankWatch:
        if self._watch is None or self._closed:
            raise EngineClosedError("the ranks are closed" if self._closed else "the ranks are not started")
        return self._watch

    def _start(self) -> None:
        links: LinkEnds = {}
        if self._hosts is not None and self._layout.num_hosts > 1:
            self._remote = RemoteHosts(self._layout, self._hosts, self._start_timeout_s, self._check_wanted)
            self._remote.start(self._start_with)
            links = self._remote.links
        local = self._local = HostRanks(self._layout, 0, self._start_with, self._launcher)
        try:
            self._progress = Progress(local.progress, 0, self.size)
            self._collectives = self._own_collectives(local, links)
            self._pipe = TensorPipe(self._inbox(local, links), None, self._progress, self._collective_failed)
            ring = Ring(local.ring, len(local.readers))
            sockets = local.launch(links)
        finally:
            local.release()
            for (_, owner), connection in links.items():
                if owner:  # which has it by now
                    connection.close()
        if local.readers:
            self._ring = RingWriter(ring, list(sockets.values()), partial(self._while_full, local.readers))
        for rank in range(1, self.size):
            self._ranks.append(self._watched(rank, local, sockets, links))
        self._watch = RankWatch(self._ranks, self.size, self._look)
        if self._stuck_after_s is not None:
            self._watch.stuck_after_s = self._timeout_s
        if self._layout.stage_size < self.size:
            self._watch.busy_after_s = self._timeout_s  # rank 0 waits for the stages before, and knows no pace yet
        self._watch.start()
        self._await_ready()

    def _watched(
        self, rank: int, local: HostRanks, sockets: Mapping[int, socket.socket], links: LinkEnds
    ) -> WatchedRank:
        if rank in local.ranks:
            return WatchedRank(rank, local.ranks[rank], sockets[rank])
        assert self._remote is not None
        connection = links[Link("messages", 0, rank), 0]
        self._senders.append(SocketWriter(connection, partial(self._while_full, [rank], 0)))
        return WatchedRank(rank, self._remote.rank(rank), connection)

    def _own_collectives(self, local: HostRanks, links: LinkEnds) -> Collectives:
        """Rank 0's end of those of its stage."""
        assert self._progress is not None
        sums = local.sums(0)
        if sums is not None:
            return SharedCollectives(sums, 0, self._layout.stage_size, self._while_waiting, self._progress)
        peers = {link.second: end for (link, owner), end in links.items() if link.kind == "sums" and not owner}
        return SocketCollectives(0, peers, self._while_waiting, self._collective_failed, self._progress)

    def _inbox(self, local: HostRanks, links: LinkEnds) -> Inbox | None:
        for (link, owner), connection in links.items():
            if link.kind == "pipe" and not owner:
                return SocketReader(connection, self._while_piping)
        return local.pipes.inbox_of_rank_0(self._while_piping)

    def _look(self) -> list[Seen | None]:
        """How far all ranks are."""
        progress, remote = self._progress, self._remote
        here: Sequence[Seen | None] = progress.look() if progress is not None else [None] * self.size
        return [
            seen if remote is None or not self._layout.hosts[rank] else remote.take_seen(rank)
            for rank, seen in enumerate(here)
        ]

    def _others_work(self) -> bool:
        """Whether any other rank is not resting."""
        return self.progress.others_work() or (self._remote is not None and self._remote.work())

    def _wait(self, happened: Callable[[], bool], timeout_s: float | None) -> bool:
        """`RankWatch.wait` that ends when the group is not wanted any more."""
        watch, until = self._running(), float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while not watch.wait(happened, min(_WANTED_S, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                return False
            self._check_wanted()
        return True

    def _await_ready(self) -> None:
        watch = self._running()
        if not self._wait(watch.all_ready, self._start_timeout_s):
            watch.late("start", self._start_timeout_s, watch.without_ready())
        if watch.failure is not None:
            raise watch.failure.raised()

    def _while_full(self, ranks: Sequence[int], reader: int, waited_s: float) -> None:
        self._await([ranks[reader]], "read its messages", waited_s)
        time.sleep(_FULL_PAUSE_S)

    def _while_waiting(self, late: Sequence[int], waited_s: float) -> None:
        self._await(late, "take part in a collective", waited_s)

    def _while_piping(self, waited_s: float) -> None:
        """Wait for the stages before: as long as one of them works, where their progress is watched."""
        now = time.monotonic()
        if self._stuck_after_s is not None and self._others_work():
            self._worked_at = now
        self._await([], "send hidden states", min(waited_s, now - self._worked_at))

    def _await(self, late: Sequence[int], what: str, waited_s: float) -> None:
        """Raise if a rank has failed, or if ranks have been late for too long."""
        self.check()
        limit_s = self._timeout_s
        if self._stuck_after_s is not None and not self._others_work():
            limit_s = self._stuck_after_s  # they wait for messages or for each other
        if waited_s > limit_s:
            self._running().late(what, limit_s, late)
            self.check()

    def _collective_failed(self, error: Exception) -> NoReturn:
        """Raise the error that says why a collective failed; if no rank has failed, one is late."""
        if self._closed:
            raise EngineClosedError("the ranks were closed") from None
        watch = self._running()
        if not watch.wait(lambda: self._closed, _CAUSE_S):
            watch.fail(RankFailure(f"ranks cannot reach each other: {error}"))
        self.check()
        raise EngineDeadError(str(error))

    def _let_ranks_end(self) -> None:
        if self._watch is None:
            return
        self._watch.expect_end()
        if self._watch.failure is None:
            for writer in (*self._senders, *(() if self._ring is None else (self._ring,))):
                writer.close()
        if not self._watch.all_ready():
            return  # some cannot know yet
        until = time.monotonic() + _GRACE_S
        for rank in self._ranks:
            rank.process.ending(max(0.0, until - time.monotonic()))

    def _end_ranks(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        if self._local is not None:
            self._local.end(_KILL_S)
        for rank in self._ranks:
            rank.process.ending(_KILL_S)
        if self._watch is not None:
            self._watch.stop()
        if self._remote is not None:
            self._remote.close()
        for rank in self._ranks:
            rank.connection.close()
        if self._local is not None:
            self._local.close()
        if self._collectives is not None:
            self._collectives.close()
        if self._pipe is not None:
            self._pipe.close()
        # Their memory is freed when no call uses it any more.
        self._ring = self._collectives = self._pipe = self._progress = None
        self._senders.clear()
