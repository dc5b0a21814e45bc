"""What ranks of these tests run that have no tensors. It does without torch, which takes seconds to import."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

from llmengine.backends.ranks.channel import RankChannel
from llmengine.errors import OutOfMemoryError


def obey(channel: RankChannel, payload: bytes) -> None:
    """Do what messages say: the first word is the command, the rest its argument."""
    do_what_messages_say(channel, COMMANDS)


def do_what_messages_say(channel: RankChannel, commands: Mapping[str, Callable[[RankChannel, bytes], None]]) -> None:
    while True:
        command, _, rest = channel.receive().partition(b" ")
        commands[command.decode()](channel, rest)


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


def _leave(channel: RankChannel, rest: bytes) -> None:
    if channel.rank == int(rest):
        os._exit(3)


def _kill(channel: RankChannel, rest: bytes) -> None:
    rank, number = map(int, rest.split())
    if channel.rank == rank:
        os.kill(os.getpid(), number)


def sleep(channel: RankChannel, rest: bytes) -> None:
    rank, seconds = rest.split()
    if channel.rank == int(rank):
        time.sleep(float(seconds))


def freeze(channel: RankChannel, rest: bytes) -> None:
    """Sleep without giving up the interpreter's lock."""
    rank, seconds = rest.split()
    if channel.rank == int(rank):
        ctypes.PyDLL(None).sleep(int(seconds))


def loop(channel: RankChannel, rest: bytes) -> None:
    """Run on and on, without an end or with one after so many seconds."""
    rank, seconds = rest.split()
    until = time.monotonic() + float(seconds)
    while channel.rank == int(rank) and time.monotonic() < until:
        pass


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


def _told(channel: RankChannel, rest: bytes) -> None:
    facts = {
        "pid": str(os.getpid()),
        "main": str(getattr(sys.modules["__main__"], "__file__", "")),
        "torch": str("torch" in sys.modules),
        "sigint": str(signal.getsignal(signal.SIGINT) == signal.SIG_IGN),
    }
    channel.reply(facts[rest.decode()].encode())


COMMANDS = {
    "echo": _echo,
    "leave": _leave,
    "kill": _kill,
    "sleep": sleep,
    "freeze": freeze,
    "loop": loop,
    "deadlock": _deadlock,
    "wait_for_child": _wait_for_child,
    "told": _told,
}
