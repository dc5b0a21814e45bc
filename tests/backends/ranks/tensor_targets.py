"""What ranks of these tests run that have tensors."""

from __future__ import annotations

import resource
import time

import torch

from llmengine.backends.ranks.channel import RankChannel
from llmengine.errors import ConfigError
from tests.backends.ranks.targets import COMMANDS, do_what_messages_say, freeze, loop, sleep


def obey(channel: RankChannel, payload: bytes) -> None:
    """As `targets.obey`, with more commands."""
    do_what_messages_say(channel, {**COMMANDS, **TENSOR_COMMANDS})


def _sum(channel: RankChannel, rest: bytes) -> None:
    channel.collectives.all_reduce(torch.full((int(rest),), float(channel.rank + 1)))


def _gather(channel: RankChannel, rest: bytes) -> None:
    channel.collectives.gather(torch.arange(int(rest), dtype=torch.float32) + 100 * channel.rank)


def _raise(channel: RankChannel, rest: bytes) -> None:
    if channel.rank == int(rest):
        raise ConfigError(f"a mistake of {channel.rank}")
    channel.collectives.all_reduce(torch.ones(1))


def _sleep_then_sum(channel: RankChannel, rest: bytes) -> None:
    sleep(channel, rest)
    _sum(channel, b"4")


def _freeze_then_sum(channel: RankChannel, rest: bytes) -> None:
    freeze(channel, rest)
    _sum(channel, b"4")


def _loop_then_sum(channel: RankChannel, rest: bytes) -> None:
    channel.progress.mark(b"layer 7")
    loop(channel, rest)
    _sum(channel, b"4")


def _allocate(channel: RankChannel, rest: bytes) -> None:
    """Take more memory than the process may have."""
    if channel.rank == int(rest):
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        torch.zeros(1 << 32)


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


TENSOR_COMMANDS = {
    "sum": _sum,
    "gather": _gather,
    "raise": _raise,
    "sleep_then_sum": _sleep_then_sum,
    "allocate": _allocate,
    "loop_then_sum": _loop_then_sum,
    "freeze_then_sum": _freeze_then_sum,
    "pass_on": _pass_on,
    "pass_on_late": _pass_on_late,
    "pass_on_unless": _pass_on_unless,
}
