"""Rank 0's side: the processes of the other ranks, from their start to their end."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from llmengine.backends.ranks.collectives import Collectives, GlooCollectives, host_store, join_gloo
from llmengine.backends.ranks.launcher import Launcher, LocalLauncher
from llmengine.backends.ranks.memory import anonymous_file
from llmengine.backends.ranks.pipe import Pipe, PipeLinks, SharedPipe
from llmengine.backends.ranks.process import write_start_file
from llmengine.backends.ranks.progress import Progress, progress_size
from llmengine.backends.ranks.ring import Ring, RingWriter, ring_size
from llmengine.backends.ranks.shared_collectives import SharedCollectives, shared_size
from llmengine.backends.ranks.watch import RankFailure, RankWatch, WatchedRank
from llmengine.errors import EngineClosedError, EngineDeadError

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
        launcher: starts the processes.
        timeout_s: a rank hangs that is late by this in a collective, or with reading messages when the ring is full.
        start_timeout_s: what starting may take, imports included.
        stuck_after_s: a rank hangs that works this long without a mark of progress, asleep; while it does anything, a
            multiple of the longest time that rank 0 lately took between two marks is added. Before the first message
            it is `timeout_s`. None: ranks need not mark their progress.
        collectives: through memory that the ranks share, or by gloo over TCP, in whose sums the order of ranks depends
            on an element's place in its tensor.
        stage_size: ranks of each stage of a pipeline, a divisor of `size`; collectives are among these. None: all are
            one stage. Several stages need `collectives="memory"`.
        check_wanted: called again and again while ranks are started, awaited or told something; what it raises ends
            that.
    """

    def __init__(
        self,
        size: int,
        target: str,
        payload: bytes,
        launcher: Launcher | None = None,
        timeout_s: float = 60.0,
        start_timeout_s: float = _START_TIMEOUT_S,
        stuck_after_s: float | None = None,
        collectives: Literal["memory", "gloo"] = "memory",
        stage_size: int | None = None,
        check_wanted: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self._stage_size = stage_size or size
        assert not size % self._stage_size, (size, stage_size)
        assert self._stage_size == size or collectives == "memory", collectives
        self._target = target
        self._payload = payload
        self._launcher = launcher or LocalLauncher()
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._stuck_after_s = stuck_after_s
        self._check_wanted = check_wanted
        self._owner = os.getpid()
        self._ranks: list[WatchedRank] = []
        self._lifelines: list[int] = []
        self._watch: RankWatch | None = None
        self._writer: RingWriter | None = None
        self._kind = collectives
        self._collectives: Collectives | None = None
        self._progress: Progress | None = None
        self._pipe: Pipe | None = None
        self._worked_at = 0.0
        self._store: Any = None
        self._closing = threading.Lock()
        self._closed = False

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
        """Send a message to every rank, in order. Blocks while a rank is behind by the whole ring (4 MiB)."""
        self.check()
        watch, writer, progress = self._watch, self._writer, self._progress
        assert watch is not None
        assert writer is not None
        assert progress is not None
        if self._stuck_after_s is not None:
            watch.stuck_after_s = self._stuck_after_s
        progress.rest()
        writer.write(message)
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
        port = self._host_store() if self._kind == "gloo" else 0
        ring = anonymous_file("ring", ring_size(self.size - 1))
        sums = [anonymous_file("sums", shared_size(self._stage_size)) for _ in range(self.size // self._stage_size)]
        moved = anonymous_file("progress", progress_size(self.size))
        start = anonymous_file("start")
        links = PipeLinks(self.size, self._stage_size)
        try:
            write_start_file(start, self._start_values(port), self._payload)
            memory = Ring(ring, self.size - 1)
            self._progress = Progress(moved, 0, self.size)
            shared = SharedCollectives(sums[0], 0, self._stage_size, self._while_waiting, self._progress)
            inbox = links.inbox_of_rank_0(self._while_piping)
            self._pipe = SharedPipe(inbox, None, self._progress, self._collective_failed)
            for rank in range(1, self.size):
                files = {"ring": ring, "sums": sums[rank // self._stage_size], "progress": moved, "start": start}
                self._launch(rank, {**files, **links.ends_of(rank)})
        finally:
            links.close()
            for fd in (ring, *sums, moved, start):
                os.close(fd)
        self._writer = RingWriter(memory, [rank.connection for rank in self._ranks], self._while_full)
        self._watch = RankWatch(self._ranks, self.size, self._progress)
        if self._stuck_after_s is not None:
            self._watch.stuck_after_s = self._timeout_s
        if self._stage_size < self.size:
            self._watch.busy_after_s = self._timeout_s  # rank 0 waits for the stages before, and knows no pace yet
        self._watch.start()
        self._await_ready()
        self._collectives = self._join_gloo() if self._kind == "gloo" else shared

    def _host_store(self) -> int:
        """Bind a port before anybody is told of it; the port."""
        listener = socket.create_server((self._launcher.host, 0), backlog=self.size + 16)
        port: int = listener.getsockname()[1]
        self._store = host_store(listener, self._start_timeout_s)
        return port

    def _start_values(self, port: int) -> dict[str, object]:
        return {
            "path": [str(Path(entry).absolute()) for entry in sys.path],
            "target": self._target,
            "host": self._launcher.host,
            "port": port,
            "collectives": self._kind,
            "start_timeout_s": self._start_timeout_s,
        }

    def _launch(self, rank: int, shared: dict[str, int]) -> None:
        ours, theirs = socket.socketpair()
        dumps = anonymous_file("dumps")
        read_end, write_end = os.pipe()
        self._lifelines.append(write_end)
        wires = {"socket": theirs.fileno(), "lifeline": read_end, "dumps": dumps, **shared}
        sizes = {"size": self.size, "stage_size": self._stage_size}
        values = {"rank": rank, **sizes, "parent": os.getpid(), **wires}
        inherited = [fd for fd in wires.values() if fd >= 0]
        try:
            process = self._launcher.launch([f"--{name}={value}" for name, value in values.items()], inherited)
            self._ranks.append(WatchedRank(rank, process, ours, dumps))
        except BaseException:
            ours.close()
            os.close(dumps)
            raise
        finally:
            theirs.close()
            os.close(read_end)

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

    def _join_gloo(self) -> Collectives:
        """Meet the ranks, in a thread, so that a rank that fails meanwhile and Ctrl-C end the waiting."""
        watch = self._running()
        store = self._store
        results: list[Any] = []

        def join() -> None:
            try:
                results.append(join_gloo(store, 0, self.size, self._launcher.host, self._start_timeout_s))
            except Exception as error:
                results.append(error)
            watch.wake()

        threading.Thread(target=join, name="llmengine-rendezvous", daemon=True).start()
        if not watch.wait(lambda: bool(results), self._start_timeout_s):
            watch.late("meet rank 0", self._start_timeout_s)
        if watch.failure is not None:
            raise watch.failure.raised()
        (result,) = results
        if isinstance(result, Exception):
            self._collective_failed(result)
        return GlooCollectives(result, self._timeout_s, self._collective_failed)

    def _while_full(self, reader: int, waited_s: float) -> None:
        self._await([self._ranks[reader].rank], "read its messages", waited_s)
        time.sleep(_FULL_PAUSE_S)

    def _while_waiting(self, late: Sequence[int], waited_s: float) -> None:
        self._await(late, "take part in a collective", waited_s)

    def _while_piping(self, waited_s: float) -> None:
        """Wait for the stages before: as long as one of them works, where their progress is watched."""
        now = time.monotonic()
        if self._stuck_after_s is not None and self.progress.others_work():
            self._worked_at = now
        self._await([], "send hidden states", min(waited_s, now - self._worked_at))

    def _await(self, late: Sequence[int], what: str, waited_s: float) -> None:
        """Raise if a rank has failed, or if ranks have been late for too long."""
        self.check()
        limit_s = self._timeout_s
        if self._stuck_after_s is not None and not self.progress.others_work():
            limit_s = self._stuck_after_s  # they wait for messages or for each other
        if waited_s > limit_s:
            self._running().late(what, limit_s, late)
            self.check()

    def _collective_failed(self, error: Exception) -> NoReturn:
        """Raise the error that says why a collective failed; if no rank has failed, one is late."""
        if self._closed:
            raise EngineClosedError("the ranks were closed") from None
        watch = self._running()
        timed_out = "Timed out" in str(error)
        if not watch.wait(lambda: self._closed, 0 if timed_out else _CAUSE_S):
            if timed_out:
                watch.late("take part in a collective", self._timeout_s)
            else:
                watch.fail(RankFailure(f"ranks cannot reach each other: {error}"))
        self.check()
        raise EngineDeadError(str(error))

    def _let_ranks_end(self) -> None:
        if self._watch is not None:
            self._watch.expect_end()
            if self._watch.failure is None and self._writer is not None:
                self._writer.close()
        if self._collectives is not None:
            self._collectives.close()
            until = time.monotonic() + _GRACE_S
            for rank in self._ranks:
                rank.process.wait(max(0.0, until - time.monotonic()))

    def _end_ranks(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
        for lifeline in self._lifelines:
            os.close(lifeline)
        for rank in self._ranks:
            rank.process.wait(_KILL_S)
        if self._watch is not None:
            self._watch.stop()
        for rank in self._ranks:
            rank.connection.close()
            os.close(rank.dumps)
        if self._pipe is not None:
            self._pipe.close()
        self._store = None
        # Their memory is freed when no call uses it any more.
        self._writer = self._collectives = self._pipe = self._progress = None
