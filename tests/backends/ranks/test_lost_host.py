"""A host that is gone without a word: no connection is closed, nothing arrives any more. Needs a network to cut."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from itertools import count

import psutil
import pytest
import torch

from benchmarks.pretended_hosts import PretendedHosts
from llmengine.backends.ranks import RankGroup
from llmengine.errors import EngineDeadError
from tests.backends.ranks.helpers import OBEY_WITH_TENSORS, is_gone
from tests.backends.ranks.test_failures import check_until_it_raises

# Both ends notice within 9 s; a busy machine may need longer for anything.
NOTICED_S = 40.0
_NUMBERS = count()
HERE, THERE = "198.18.0.1", "198.18.0.2"


def ip(*arguments: str) -> None:
    """Run the program that sets up networks."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def link() -> Iterator[tuple[str, str]]:
    """Another network on this machine, and the name of the only link to it."""
    number = next(_NUMBERS)
    name, link = f"llmengine-{os.getpid()}-{number}", f"ve{os.getpid()}n{number}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("networks cannot be made here")
    try:
        ip("link", "add", link, "type", "veth", "peer", "name", "veth0", "netns", name)
        ip("addr", "add", f"{HERE}/30", "dev", link)
        ip("link", "set", link, "up")
        ip("netns", "exec", name, "ip", "addr", "add", f"{THERE}/30", "dev", "veth0")
        ip("netns", "exec", name, "ip", "link", "set", "veth0", "up")
        yield name, link
        ip("link", "del", link)
    finally:
        ip("netns", "del", name)


def wait_for_it(group: RankGroup, command: bytes) -> None:
    if command.startswith(b"sleep"):
        group.collectives.all_reduce(torch.ones(4))
    else:
        check_until_it_raises(group)


@pytest.mark.slow
@pytest.mark.parametrize("command", [b"echo idle", b"sleep_then_sum 1 600", b"sum 4"])
def test_both_ends_of_a_link_that_is_cut_notice(link: tuple[str, str], command: bytes) -> None:
    """While the group is idle, while rank 0 waits for the other rank, and while that waits for rank 0."""
    name, cable = link
    hosts = PretendedHosts((0, 1), (HERE, THERE), ("ip", "netns", "exec", name))
    group = RankGroup(2, OBEY_WITH_TENSORS, b"", hosts=hosts)
    group.start()
    try:
        group.broadcast(command)
        (rank,) = [one.pid for one in psutil.Process(hosts.agents[0].pid).children()]
        ip("link", "set", cable, "down")
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=rf"rank 1 of 2 \(process {rank} on {THERE}\) was lost with its host"):
            wait_for_it(group, command)
        noticed_s = time.monotonic() - began
        assert is_gone(rank, NOTICED_S), "its agent notices as well"
        print(f"{command.decode()}: noticed after {noticed_s:.1f} s, gone after {time.monotonic() - began:.1f} s")
    finally:
        group.close()
    assert hosts.agents[0].poll() == 0
