"""The program of a rank: `python -I process.py WIRES`, started by a `Launcher` and by nobody else.

`WIRES` is a line of JSON: the rank, the number of ranks, of those of a stage and of those on this host, the process
that has launched it, and descriptors that it inherits: the socket for reports (and for messages, or to be woken up when
one is in the ring), the lifeline, the file for dumps, the memory of messages, of collectives and of progress,
connections to the other ranks of its stage, both ends of a pipe (rings and the sockets that wake their readers up, or
connections; -1: there is none), and the file with what is the same for all ranks.

It must run before anything of llmengine can be imported, since the path of modules is part of what it reads.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from llmengine.backends.ranks.channel import MessageReader
    from llmengine.backends.ranks.collectives import Collectives
    from llmengine.backends.ranks.pipe import TensorPipe
    from llmengine.backends.ranks.progress import Progress

_WATCH_S = 0.5
_FULL_PAUSE_S = 200e-6


def main() -> None:
    """Run a rank until its target ends, its group is closed, or the process of rank 0 is gone."""
    wires = SimpleNamespace(**json.loads(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 alone decides when a rank ends
    _die_with(wires.lifeline, wires.parent)
    os.dup2(2, 1)  # the caller's output may be read by a program
    faulthandler.enable(wires.dumps)
    faulthandler.register(signal.SIGUSR1, wires.dumps)
    start, payload = read_start_file(wires.start)
    _take_path(start["path"])
    status = _run(wires, start, payload)
    sys.stderr.flush()
    os._exit(status)  # at once: there is nothing to tidy up that the kernel does not


def write_start_file(fd: int, start: dict[str, Any], payload: bytes) -> None:
    """Write what is the same for all ranks: a line of JSON, and the target's payload."""
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(json.dumps(start).encode() + b"\n" + payload)


def read_start_file(fd: int) -> tuple[dict[str, Any], bytes]:
    """Inverse of `write_start_file`."""
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as file:
        line = file.readline()
        return json.loads(line), file.read()


def _die_with(lifeline: int, parent: int) -> None:
    """End this process, whatever it does, when the other end of the lifeline is closed or the parent has ended.

    The kernel kills it when the pipe loses its last writer, even if it is stopped or never gives up the interpreter's
    lock. A thread does so where the kernel cannot, and where a forked child of rank 0 holds the pipe open.

    Rejected: PR_SET_PDEATHSIG, which kills when the *thread* that started the process ends.
    """
    import fcntl

    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_watch, args=(lifeline, parent), name="lifeline", daemon=True).start()


def _watch(lifeline: int, parent: int) -> None:
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    while not poll.poll(_WATCH_S * 1000) and os.getppid() == parent:
        pass
    leads_group = os.getpgrp() == os.getpid()
    os.kill(0 if leads_group else os.getpid(), signal.SIGKILL)  # 0: with all that it started


def _take_path(path: list[str]) -> None:
    """Import modules from where rank 0 does, and llmengine from where this file is."""
    sys.path[:] = path
    root = Path(__file__).resolve().parents[3]
    found = importlib.util.find_spec("llmengine")
    if found is None or found.origin is None or Path(found.origin).resolve().parents[1] != root:
        sys.path.insert(0, str(root))
        importlib.invalidate_caches()


def _run(wires: SimpleNamespace, start: dict[str, Any], payload: bytes) -> int:
    """Run the target and report what it raises; the exit status."""
    from llmengine.backends.ranks.channel import RankClosed
    from llmengine.backends.ranks.reports import Raised, Report, ReportSender

    connection = socket.socket(fileno=wires.socket)
    sender = ReportSender(connection)
    try:
        _run_target(wires, start, payload, connection, sender)
    except RankClosed:
        return 0
    except BaseException as error:
        try:
            sender.send(Report.RAISED, Raised.of(error).dump())
        except OSError:
            return 1  # the group is gone, and with it whoever could be told
        return 1
    return 0


def _run_target(
    wires: SimpleNamespace, start: dict[str, Any], payload: bytes, connection: socket.socket, sender: Any
) -> None:
    from llmengine.backends.ranks.channel import RankChannel
    from llmengine.backends.ranks.progress import Progress
    from llmengine.backends.ranks.reports import Report

    module, _, function = start["target"].partition(":")
    target = getattr(importlib.import_module(module), function)
    reader = _messages(wires, connection)
    progress = Progress(wires.progress, wires.rank, wires.size)
    pipe = _pipe(wires, reader, progress)
    sender.send(Report.READY)
    collectives = _collectives(wires, reader, progress)
    progress.mark(b"the start")
    channel = RankChannel(wires.rank, wires.size, wires.num_on_host, collectives, pipe, progress, reader, sender)
    try:
        target(channel, payload)
    finally:
        pipe.close()


def _messages(wires: SimpleNamespace, connection: socket.socket) -> MessageReader:
    from llmengine.backends.ranks.ring import Ring, RingReader
    from llmengine.backends.ranks.sockets import SocketReader

    if wires.ring < 0:
        return SocketReader(connection)
    return RingReader(Ring(wires.ring, wires.num_readers), wires.reader, connection)


def _pipe(wires: SimpleNamespace, messages: MessageReader, progress: Progress) -> TensorPipe:
    from llmengine.backends.ranks.channel import RankClosed
    from llmengine.backends.ranks.pipe import Inbox, Outbox, TensorPipe
    from llmengine.backends.ranks.ring import Ring, RingReader, RingWriter
    from llmengine.backends.ranks.sockets import SocketReader, SocketWriter

    def while_waiting(waited_s: float) -> None:
        if messages.closed:
            raise RankClosed

    def while_full(reader: int, waited_s: float) -> None:
        while_waiting(waited_s)
        time.sleep(_FULL_PAUSE_S)

    def when_ended(error: Exception) -> NoReturn:
        raise error

    inbox: Inbox | None = None
    outbox: Outbox | None = None
    if wires.inbox_waker >= 0:
        inbox = RingReader(Ring(wires.inbox, 1), 0, socket.socket(fileno=wires.inbox_waker), while_waiting)
    elif wires.inbox >= 0:
        inbox = SocketReader(socket.socket(fileno=wires.inbox), while_waiting)
    if wires.outbox_waker >= 0:
        outbox = RingWriter(Ring(wires.outbox, 1), [socket.socket(fileno=wires.outbox_waker)], while_full)
    elif wires.outbox >= 0:
        outbox = SocketWriter(socket.socket(fileno=wires.outbox), while_waiting)
    return TensorPipe(inbox, outbox, progress, when_ended)


def _collectives(wires: SimpleNamespace, reader: MessageReader, progress: Progress) -> Collectives:
    from llmengine.backends.ranks.channel import RankClosed
    from llmengine.backends.ranks.shared_collectives import SharedCollectives
    from llmengine.backends.ranks.socket_collectives import SocketCollectives

    def while_waiting(late: Sequence[int], waited_s: float) -> None:
        if reader.closed:
            raise RankClosed

    def when_lost(error: Exception) -> NoReturn:
        raise error

    rank, size = wires.rank % wires.stage_size, wires.stage_size
    if wires.sums >= 0:
        return SharedCollectives(wires.sums, rank, size, while_waiting, progress)
    peers = {int(peer) % size: socket.socket(fileno=fd) for peer, fd in wires.peers.items()}
    return SocketCollectives(rank, peers, while_waiting, when_lost, progress)


if __name__ == "__main__":
    main()
