"""Ranks that fail: what rank 0 is told, and that none is left."""

from __future__ import annotations

import multiprocessing.spawn
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import pytest
import torch

from llmengine.backends.ranks import LocalLauncher, RankGroup
from llmengine.backends.ranks.host import HostedRank
from llmengine.backends.ranks.launcher import RankProcess
from llmengine.backends.ranks.reports import Raised, Report, ReportSender
from llmengine.backends.ranks.watch import RankWatch, WatchedRank
from llmengine.errors import ConfigError, EngineDeadError, OutOfMemoryError
from tests.backends.ranks.helpers import OBEY, OBEY_WITH_TENSORS, is_gone, open_group, pids

TARGETS = "tests.backends.ranks.targets"


def start_and_hear(group: RankGroup) -> None:
    group.start()
    group.replies()


def add_up(group: RankGroup) -> None:
    group.collectives.all_reduce(torch.ones(4))


def broadcast_many(group: RankGroup) -> None:
    for _ in range(200):
        group.broadcast(b"sleep 0 0" + b"0" * 100_000)


def check_until_it_raises(group: RankGroup) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        group.check()
        time.sleep(0.01)


def test_what_a_target_raises_comes_with_rank_and_traceback() -> None:
    group = RankGroup(2, f"{TARGETS}:raise_at_once", b"")
    with pytest.raises(EngineDeadError, match=r"rank 1 of 2.*ValueError: boom on 1") as caught:
        start_and_hear(group)
    group.close()
    assert 'raise ValueError(f"boom on {channel.rank}")' in str(caught.value)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("tests.backends.ranks.nowhere:f", "ModuleNotFoundError: No module named 'tests.backends.ranks.nowhere'"),
        (f"{TARGETS}:nothing", "AttributeError: .*has no attribute 'nothing'"),
        (f"{TARGETS}:unpickle", "UnpicklingError"),
        (f"{TARGETS}:return_at_once", "ended by itself with exit status 0"),
    ],
)
def test_a_target_that_cannot_run(target: str, says: str) -> None:
    group = RankGroup(2, target, b"no pickle")
    with pytest.raises(EngineDeadError, match=f"rank 1 of 2.*{says}"):
        start_and_hear(group)
    group.close()


def test_our_own_errors_keep_their_type() -> None:
    group = RankGroup(3, f"{TARGETS}:raise_ours", b"")
    with pytest.raises(OutOfMemoryError, match="no memory on 2") as caught:
        start_and_hear(group)
    group.close()
    assert any("rank 2 of 3" in note and "in raise_ours" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("hosts", [None, (0, 1, 1), (0, 1, 2)])
def test_a_rank_that_raises_is_named_and_not_those_that_waited_for_it(hosts: tuple[int, ...] | None) -> None:
    with open_group(3, hosts=hosts, target=OBEY_WITH_TENSORS) as group:
        ranks = pids(group)
        group.broadcast(b"raise 2")
        with pytest.raises(EngineDeadError, match=r"rank 2 of 3.*a mistake of 2") as caught:
            add_up(group)
        assert isinstance(caught.value.__cause__, ConfigError)
        assert all(is_gone(pid, 20) for pid in ranks), "a group fails as a whole"
        for use in (RankGroup.check, RankGroup.replies, add_up, lambda group: group.broadcast(b"echo")):
            with pytest.raises((EngineDeadError, ConfigError), match="a mistake of 2"):
                use(group)


@pytest.mark.parametrize(
    ("command", "says", "wait"),
    [
        (b"leave 1", "ended by itself with exit status 3", add_up),
        (b"kill 1 9", "was killed by SIGKILL", add_up),
        (b"kill 1 9", "was killed by SIGKILL", RankGroup.replies),
        (b"kill 1 9", "was killed by SIGKILL", check_until_it_raises),
        (b"kill 1 19", "was stopped", RankGroup.replies),
    ],
)
def test_a_rank_that_dies_or_stops_is_named(command: bytes, says: str, wait: Callable[[RankGroup], object]) -> None:
    with open_group(3, target=OBEY_WITH_TENSORS if wait is add_up else OBEY) as group:
        ranks = pids(group)
        group.broadcast(command)
        if wait is add_up:
            group.broadcast(b"sum 4")
        with pytest.raises(EngineDeadError, match=f"rank 1 of 3.*{says}"):
            wait(group)
    assert all(map(is_gone, ranks))


def test_a_rank_that_runs_out_of_memory_is_named() -> None:
    with open_group(3, target=OBEY_WITH_TENSORS) as group:
        ranks = pids(group)
        group.broadcast(b"allocate 2")
        with pytest.raises(EngineDeadError, match=r"rank 2 of 3.*memory(.|\n)*in _allocate"):
            group.replies()
    assert all(map(is_gone, ranks))


def test_a_crash_says_where() -> None:
    with open_group(2) as group:
        group.broadcast(b"kill 1 11")
        with pytest.raises(EngineDeadError, match=r"was killed by SIGSEGV(.|\n)*in _kill"):
            group.replies()


@pytest.mark.parametrize(
    ("command", "hosts"),
    [(b"sleep_then_sum 1 600", (0, 1, 2)), (b"freeze_then_sum 1 600", None), (b"freeze_then_sum 1 600", (0, 1, 1))],
)
def test_a_rank_that_hangs_is_named_and_not_the_one_that_waits_for_it(
    command: bytes, hosts: tuple[int, ...] | None
) -> None:
    with open_group(3, 6.0, hosts, target=OBEY_WITH_TENSORS) as group:  # longer than a rank is likely to stand still
        ranks = pids(group)
        group.broadcast(b"sum 4")  # afterwards the ranks are connected
        add_up(group)
        group.broadcast(command)
        with pytest.raises(
            EngineDeadError, match=r"rank 1 of 3 .*did not take part in a collective within 6 s"
        ) as caught:
            add_up(group)
    text = str(caught.value)
    assert "rank 2" not in text
    assert f"in _{command.split(b'_')[0].decode()}" in text, "the place where it hangs"
    assert all(map(is_gone, ranks))


def test_a_rank_that_reads_no_messages_is_named() -> None:
    with open_group(3, timeout_s=5.0) as group:
        group.broadcast(b"sleep 2 600")
        with pytest.raises(EngineDeadError, match=r"rank 2 of 3 .*did not read its messages"):
            broadcast_many(group)


def test_a_reply_that_does_not_come() -> None:
    with open_group(3) as group:
        group.broadcast(b"sleep 2 600")
        group.broadcast(b"echo")
        with pytest.raises(EngineDeadError, match=r"rank 2 of 3 .*did not reply within 5 s"):
            group.replies(timeout_s=5.0)


class LastFails:
    """Launches ranks on this host, but instead of the last one raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.launched: list[RankProcess] = []

    def launch(self, arguments: Sequence[str], descriptors: Sequence[int]) -> RankProcess:
        if self.launched:
            raise self.error
        self.launched.append(LocalLauncher().launch(arguments, descriptors))
        return self.launched[0]


@pytest.mark.parametrize("error", [OSError("no more processes"), KeyboardInterrupt()])
def test_a_start_that_is_interrupted_leaves_no_rank(error: BaseException) -> None:
    launcher = LastFails(error)
    group = RankGroup(3, OBEY, b"", launcher)
    with pytest.raises(type(error)):
        group.start()
    assert launcher.launched[0].poll() == -signal.SIGKILL
    group.close()


def test_a_program_that_embeds_python_must_name_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", None)
    with pytest.raises(ConfigError, match="set_executable"):
        RankGroup(2, OBEY, b"").start()


@pytest.mark.parametrize("after_s", [0.01, 3.0])
def test_a_slow_start_is_late(after_s: float) -> None:
    group = RankGroup(2, "tests.backends.ranks.slow_to_import:run", b"", start_timeout_s=after_s)
    with pytest.raises(EngineDeadError, match=rf"rank 1 of 2 .*did not start within {after_s:.3g} s"):
        group.start()


class EndsWhenLookedAt:
    """A process that reports what it raised, and has ended, between two looks at its socket and at it."""

    name = "process 7"

    def __init__(self, socket_of_rank: socket.socket) -> None:
        self.socket = socket_of_rank

    def ending(self, timeout_s: float = 0.0) -> str | None:
        if self.socket.fileno() >= 0:
            ReportSender(self.socket).send(Report.RAISED, Raised.of(ConfigError("a mistake")).dump())
            self.socket.close()
        return "ended by itself with exit status 1"

    def kill(self) -> None:
        """It has ended."""

    def dumped(self) -> str:
        return ""


def test_what_a_rank_said_last_counts_and_not_that_it_ended() -> None:
    ours, theirs = socket.socketpair()
    rank = WatchedRank(1, cast(HostedRank, EndsWhenLookedAt(theirs)), ours)
    watch, failed = RankWatch([rank], 2, lambda: [None, None]), threading.Event()
    watch.tell(failed.set)
    watch.start()
    assert failed.wait(60)
    watch.stop()
    ours.close()
    assert watch.failure is not None
    assert "ConfigError: a mistake" in watch.failure.summary


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_cannot_close_what_is_its_parents() -> None:
    with open_group(2) as group:
        child = os.fork()
        if not child:
            group.close()
            os._exit(0)
        os.waitpid(child, 0)
        group.broadcast(b"echo still")
        assert group.replies() == [b"1 still"]
