"""What ranks of these tests run."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time

import torch

from llmengine.backends.ranks.channel import RankChannel
from llmengine.errors import ConfigError, OutOfMemoryError


def obey(channel: RankChannel, payload: bytes) -> None:
    """Do what messages say: the first word is the command, the rest its argument."""
    while True:
        command, _, rest = channel.receive().partition(b" ")
        COMMANDS[command.decode()](channel, rest)


def raise_at_once(channel: RankChannel, payload: bytes) -> None:
    raise ValueError(f"boom on {channel.rank}")


def raise_ours(channel: RankChannel, payload: bytes) -> None:
    if channel.rank == channel.size - 1:
        raise OutOfMemoryError(f"no memory on {channel.rank}")
    channel.receive()


def unpickle(channel: RankChannel, payload: bytes) -> None:
    pickle.loads(payload)


def return_at_once(channel: RankChannel, payload: bytes) -> None:
    return


def _echo(channel: RankChannel, rest: bytes) -> None:
    channel.reply(b"%d %b" % (channel.rank, rest))


def _sum(channel: RankChannel, rest: bytes) -> None:
    channel.collectives.all_reduce(torch.full((int(rest),), float(channel.rank + 1)))


def _gather(channel: RankChannel, rest: bytes) -> None:
    channel.collectives.gather(torch.arange(int(rest), dtype=torch.float32) + 100 * channel.rank)


def _raise(channel: RankChannel, rest: bytes) -> None:
    if channel.rank == int(rest):
        raise ConfigError(f"a mistake of {channel.rank}")
    channel.collectives.all_reduce(torch.ones(1))


def _leave(channel: RankChannel, rest: bytes) -> None:
    if channel.rank == int(rest):
        os._exit(3)


def _kill(channel: RankChannel, rest: bytes) -> None:
    rank, number = map(int, rest.split())
    if channel.rank == rank:
        os.kill(os.getpid(), number)


def _sleep(channel: RankChannel, rest: bytes) -> None:
    rank, seconds = rest.split()
    if channel.rank == int(rank):
        time.sleep(float(seconds))


def _sleep_then_sum(channel: RankChannel, rest: bytes) -> None:
    _sleep(channel, rest)
    _sum(channel, b"4")


def _freeze(channel: RankChannel, rest: bytes) -> None:
    """Sleep without giving up the interpreter's lock."""
    rank, seconds = rest.split()
    if channel.rank == int(rank):
        ctypes.PyDLL(None).sleep(int(seconds))


def _freeze_then_sum(channel: RankChannel, rest: bytes) -> None:
    _freeze(channel, rest)
    _sum(channel, b"4")


def _loop(channel: RankChannel, rest: bytes) -> None:
    """Run on and on, without an end or with one after so many seconds."""
    rank, seconds = rest.split()
    until = time.monotonic() + float(seconds)
    while channel.rank == int(rank) and time.monotonic() < until:
        pass


def _loop_then_sum(channel: RankChannel, rest: bytes) -> None:
    channel.progress.mark(b"layer 7")
    _loop(channel, rest)
    _sum(channel, b"4")


def _deadlock(channel: RankChannel, rest: bytes) -> None:
    if channel.rank == int(rest):
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


def _wait_for_child(channel: RankChannel, rest: bytes) -> None:
    """A rank waits for a process, as for a compiler."""
    rank, seconds = rest.split()
    if channel.rank == int(rank):
        subprocess.run([sys.executable, "-c", f"import time; time.sleep({float(seconds)})"], check=True)


def _allocate(channel: RankChannel, rest: bytes) -> None:
    """Take more memory than the process may have."""
    if channel.rank == int(rest):
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        torch.zeros(1 << 32)


def _told(channel: RankChannel, rest: bytes) -> None:
    facts = {
        "pid": str(os.getpid()),
        "main": str(getattr(sys.modules["__main__"], "__file__", "")),
        "sigint": str(signal.getsignal(signal.SIGINT) == signal.SIG_IGN),
    }
    channel.reply(facts[rest.decode()].encode())


def _pass_on(channel: RankChannel, rest: bytes) -> None:
    """Send on what the stage before sent, and this rank; the first stage begins with 100 times the rank."""
    size, numbers = channel.collectives.size, int(rest)
    if size <= channel.rank < 2 * size:
        tensor = torch.full((numbers,), 100.0 * channel.rank)
    else:
        tensor = channel.pipe.receive((numbers,), torch.float32)
    channel.collectives.all_reduce(tensor)
    if channel.rank >= size:
        channel.pipe.send(tensor + channel.rank)


def _pass_on_unless(channel: RankChannel, rest: bytes) -> None:
    rank, numbers = rest.split()
    if channel.rank == int(rank):
        raise ConfigError(f"a mistake of {channel.rank}")
    _pass_on(channel, numbers)


def _pass_on_late(channel: RankChannel, rest: bytes) -> None:
    rank, seconds, numbers = rest.split()
    if channel.rank == int(rank):
        time.sleep(float(seconds))
    _pass_on(channel, numbers)


COMMANDS = {
    "echo": _echo,
    "sum": _sum,
    "gather": _gather,
    "raise": _raise,
    "leave": _leave,
    "kill": _kill,
    "sleep": _sleep,
    "sleep_then_sum": _sleep_then_sum,
    "freeze": _freeze,
    "loop": _loop,
    "allocate": _allocate,
    "loop_then_sum": _loop_then_sum,
    "deadlock": _deadlock,
    "wait_for_child": _wait_for_child,
    "freeze_then_sum": _freeze_then_sum,
    "told": _told,
    "pass_on": _pass_on,
    "pass_on_late": _pass_on_late,
    "pass_on_unless": _pass_on_unless,
}
