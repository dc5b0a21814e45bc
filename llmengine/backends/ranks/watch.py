"""What rank 0 knows of the other ranks: a thread that reads their reports and finds out how they fail."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmengine.backends.ranks.host import HostedRank
from llmengine.backends.ranks.progress import Seen, Stuck, StuckJudge
from llmengine.backends.ranks.reports import Raised, Report, ReportReader
from llmengine.errors import EngineDeadError, LLMEngineError

__all__ = ["RankFailure", "RankWatch", "WatchedRank"]

_TICK_S = 0.5
# Time for the cause to show up where what is known may be its consequence.
_CAUSE_S = 1.0
# A process whose socket is closed ends next, but on a busy machine the kernel may take its time.
_END_S = 10.0
_DUMP_S = 0.15
_MOST_DUMP_S = 5.0


@dataclass(frozen=True)
class RankFailure:
    """Why a group can go on no longer.

    Attributes:
        summary: names the rank and what happened to it.
        details: its traceback, or where its threads were; may be empty.
        error: what it raised, if that is one of llmengine's errors.
        consequence: it failed because another rank did.
    """

    summary: str
    details: str = ""
    error: LLMEngineError | None = None
    consequence: bool = False

    def dead(self) -> EngineDeadError:
        """A new error that says so, with what the rank raised as its cause."""
        text = f"{self.summary}\n\n{self.details}" if self.details else self.summary
        dead = EngineDeadError(text)
        dead.__cause__ = self.error
        return dead

    def raised(self) -> LLMEngineError:
        """What the rank raised if it is an error of ours, which has rank and traceback as a note; else `dead`."""
        return self.error or self.dead()


@dataclass(frozen=True)
class WatchedRank:
    """A rank's process, and rank 0's end of the socket for its reports."""

    rank: int
    process: HostedRank
    connection: socket.socket


class RankWatch:
    """Reads the reports of all ranks in a thread of its own. Any failure kills all ranks, which ends every wait.

    Attributes:
        stuck_after_s: how long a rank may work without a mark of progress, see `StuckJudge`; None: for ever.
        busy_after_s: the same for one that uses a processor, if that is longer.
        failure: the first failure.

    Args:
        look: how far all ranks are; None for one of which nothing new is known.
    """

    def __init__(self, ranks: Sequence[WatchedRank], size: int, look: Callable[[], Sequence[Seen | None]]) -> None:
        self._ranks = ranks
        self._readers = {rank.rank: ReportReader(rank.connection) for rank in ranks}
        self._size = size
        self._look: Callable[[], Sequence[Seen | None]] | None = look
        processes = {rank.rank: rank.process for rank in ranks}
        self._judge = StuckJudge(size, lambda rank: processes[rank].sleeps())
        self._looked_at = time.monotonic()
        self.stuck_after_s: float | None = None
        self.busy_after_s = 0.0
        self._changed = threading.Condition()
        self._replies: dict[int, deque[bytes]] = {rank.rank: deque() for rank in ranks}
        self._ready: set[int] = set()
        self._reported: dict[int, RankFailure] = {}
        self._settle_at = float("inf")
        self._stopped: set[int] = set()
        self._closing = False
        self._asking = False
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="llmengine-ranks", daemon=True)
        self._on_failure: Callable[[], None] | None = None
        self.failure: RankFailure | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def expect_end(self) -> None:
        """From now on, ranks that end do not fail."""
        self._closing = True

    def stop(self) -> None:
        """End the thread, after `expect_end`."""
        self._waker.send(b"\0")
        if self._thread is not threading.current_thread() and self._thread.ident is not None:
            self._thread.join()
        self._waker.close()
        self._woken.close()
        self._look = None  # its memory is a file that the process has open

    def all_ready(self) -> bool:
        """Whether every rank has its target."""
        return len(self._ready) == len(self._ranks)

    def all_replied(self) -> bool:
        """Whether there is a reply of every rank."""
        return all(self._replies.values())

    def without_ready(self) -> list[int]:
        """The ranks that are not ready."""
        return [rank.rank for rank in self._ranks if rank.rank not in self._ready]

    def without_reply(self) -> list[int]:
        """The ranks of which there is no reply."""
        return [rank for rank, replies in self._replies.items() if not replies]

    def take_replies(self) -> list[bytes]:
        """The oldest reply of each rank, in their order."""
        return [self._replies[rank.rank].popleft() for rank in self._ranks]

    def wait(self, happened: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait until something has happened or a rank failed; False if the time is over first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failure is not None or happened(), timeout_s)

    def wake(self) -> None:
        """Let waiters look again."""
        with self._changed:
            self._changed.notify_all()

    def late(self, what: str, waited_s: float, ranks: Sequence[int] = ()) -> None:
        """Fail because ranks are late with something, `ranks` or those that do not wait in a collective themselves."""
        asked = [rank for rank in self._ranks if not ranks or rank.rank in ranks]
        where = self._ask(asked)
        late = {
            number: dump for number, dump in where.items() if "in all_reduce" not in dump and "in gather" not in dump
        }
        late = late or where
        names = " and ".join(self._name(rank) for rank in asked if rank.rank in late)
        self.fail(RankFailure(f"{names} did not {what} within {waited_s:.3g} s", _threads(late)))

    def _stuck(self, stuck: Stuck) -> None:
        """Fail because a rank is stuck."""
        rank = next(rank for rank in self._ranks if rank.rank == stuck.rank)
        how = "it sleeps" if stuck.sleeps else "it runs, but gets nowhere"
        what = f" at {stuck.what}" if stuck.what else ""
        summary = f"{self._name(rank)} has been stuck{what} for {stuck.for_s:.3g} s: {how}"
        self.fail(RankFailure(summary, _threads(self._ask([rank]))))

    def _ask(self, ranks: Sequence[WatchedRank]) -> dict[int, str]:
        """Where the threads of each rank are, as far as they can say."""
        self._asking = True  # the signal ends a rank that is not prepared for it yet, which is no cause
        for rank in ranks:
            rank.process.interrupt()
        until, found = time.monotonic() + _MOST_DUMP_S, dict[int, str]()
        while True:  # a rank writes line by line, and on a busy machine not at once
            time.sleep(_DUMP_S)
            before, found = found, {rank.rank: rank.process.dumped() for rank in ranks}
            if (found == before and all(found.values())) or time.monotonic() > until:
                return found

    def fail(self, failure: RankFailure) -> None:
        """Fail for this reason, unless there was one before, and kill all ranks."""
        with self._changed:
            if self.failure is None and not self._closing:
                self.failure = failure
            self._changed.notify_all()
        for rank in self._ranks:
            rank.process.kill()
        self._tell()

    def tell(self, on_failure: Callable[[], None]) -> None:
        """Call this, on any thread, when there is a failure."""
        self._on_failure = on_failure
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            on_failure = self._on_failure if self.failure is not None else None
            if on_failure is not None:
                self._on_failure = None
        if on_failure is not None:
            on_failure()

    def _name(self, rank: WatchedRank) -> str:
        return f"rank {rank.rank} of {self._size} ({rank.process.name})"

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # nobody would ever be told of anything
            self.fail(RankFailure(f"rank 0 cannot watch the others any more: {error!r}"))

    def _watch(self) -> None:
        readers = {rank.connection.fileno(): (rank, self._readers[rank.rank]) for rank in self._ranks}
        poll = select.poll()
        for fd in (*readers, self._woken.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            for fd, _ in poll.poll(_TICK_S * 1000):
                if fd not in readers:
                    return
                rank, reader = readers[fd]
                for kind, data in reader.read():
                    self._take(rank, kind, data)
                if reader.ended:
                    poll.unregister(fd)
                    self._ended(rank)
            self._look_at_processes()
            self._look_at_progress()
            if self._reported and self.failure is None and not self._closing and not self._asking:
                self._settle()

    def _take(self, rank: WatchedRank, kind: Report, data: bytes) -> None:
        if kind is Report.RAISED:
            raised = Raised.load(data)
            details = f"Traceback of rank {rank.rank}:\n{raised.traceback}"
            summary = f"{self._name(rank)} raised {raised.summary}"
            if raised.error is not None:
                raised.error.add_note(f"Raised by {self._name(rank)}. {details}")
            self._report(rank, RankFailure(summary, details, raised.error, raised.peer_lost))
            return
        with self._changed:
            if kind is Report.READY:
                self._ready.add(rank.rank)
            else:
                self._replies[rank.rank].append(data)
            self._changed.notify_all()

    def _take_rest(self, rank: WatchedRank) -> None:
        """Take what a process that has ended had still to say: it may have ended just after its socket was read."""
        reader, poll = self._readers[rank.rank], select.poll()
        poll.register(rank.connection, select.POLLIN)
        while not reader.ended and poll.poll(0):
            for kind, data in reader.read():
                self._take(rank, kind, data)

    def _ended(self, rank: WatchedRank) -> None:
        """Report how a process ended that may have reported why."""
        if self._closing:
            return
        how = rank.process.ending(_END_S) or "closed its socket"
        self._report(rank, RankFailure(f"{self._name(rank)} {how}", rank.process.dumped()))

    def _look_at_processes(self) -> None:
        stopped = set()
        for rank in self._ranks:
            if rank.process.ending() is not None:
                self._take_rest(rank)
                if rank.rank not in self._reported:
                    self._ended(rank)
            elif rank.process.is_stopped():
                stopped.add(rank.rank)
                if rank.rank in self._stopped:
                    self._report(rank, RankFailure(f"{self._name(rank)} was stopped (SIGSTOP) and does not run"))
        self._stopped = stopped

    def _look_at_progress(self) -> None:
        now, look = time.monotonic(), self._look
        since_s = now - self._looked_at
        if look is None or self.stuck_after_s is None or since_s < _TICK_S / 2 or self._is_over():
            return
        self._looked_at = now
        busy_after_s = max(self.stuck_after_s, self.busy_after_s)
        stuck = self._judge.look(look(), since_s, self.stuck_after_s, busy_after_s)
        if stuck is not None:
            self._stuck(stuck)

    def _is_over(self) -> bool:
        return bool(self._reported) or self.failure is not None or self._closing or self._asking

    def _report(self, rank: WatchedRank, failure: RankFailure) -> None:
        """Keep the first that is known of a rank, and decide later which rank's it was."""
        if not self._reported:
            self._settle_at = time.monotonic() + _CAUSE_S
        self._reported.setdefault(rank.rank, failure)

    def _settle(self) -> None:
        """Fail for the cause, as soon as one is known that is no consequence, or with what there is after a while."""
        causes = [failure for failure in self._reported.values() if not failure.consequence]
        if causes:
            self.fail(causes[0])
        elif time.monotonic() >= self._settle_at:
            self.fail(next(iter(self._reported.values())))


def _threads(dumps: Mapping[int, str]) -> str:
    return "\n\n".join(f"Threads of rank {rank}:\n{dump}" for rank, dump in dumps.items() if dump)
