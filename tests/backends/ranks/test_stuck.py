"""Ranks that get nowhere, told from those that take long: by rules, and with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from llmengine.backends.ranks import RankGroup
from llmengine.backends.ranks.process_state import Activity
from llmengine.backends.ranks.progress import Seen, Stuck, StuckJudge
from llmengine.errors import EngineDeadError
from tests.backends.ranks.helpers import OBEY, OBEY_WITH_TENSORS, is_gone, open_group, pids

TICK_S = 0.5
LIMIT_S = 4.0


def judge(
    looks: Iterator[list[Seen]], sleeps: Callable[[int], bool] = lambda rank: False
) -> tuple[float, Stuck] | None:
    """When a rank is found stuck, in seconds since the first look, and which."""
    found = StuckJudge(3, sleeps)
    for number, seen in enumerate(looks):
        stuck = found.look(seen, TICK_S, LIMIT_S)
        if stuck is not None:
            return number * TICK_S, stuck
    return None


def looks(seconds: float, of: Callable[[int, float], Seen]) -> Iterator[list[Seen]]:
    """What is seen of three ranks, twice a second."""
    for number in range(int(seconds / TICK_S)):
        yield [of(rank, number * TICK_S) for rank in range(3)]


def going_on(at: float) -> Seen:
    return Seen(int(at / TICK_S), True)


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_rank_without_progress_is_stuck(sleeps: bool) -> None:
    def of(rank: int, at: float) -> Seen:
        return Seen(7, True, "layer 3") if rank == 2 else going_on(at)

    result = judge(looks(60, of), lambda rank: sleeps)
    assert result is not None
    after_s, stuck = result
    assert (stuck.rank, stuck.sleeps, stuck.what) == (2, sleeps, "layer 3")
    assert LIMIT_S <= after_s <= LIMIT_S + TICK_S


def test_a_rank_that_rests_or_goes_on_is_not() -> None:
    assert judge(looks(600, lambda rank, at: going_on(at) if rank != 1 else Seen(7, False)), lambda rank: True) is None


def test_a_rank_may_take_long_while_rank_0_does() -> None:
    assert judge(looks(600, lambda rank, at: Seen(1, True))) is None


def test_a_rank_may_take_a_multiple_of_what_rank_0_took() -> None:
    def of(rank: int, at: float) -> Seen:
        if rank == 0:
            return Seen(1, True) if at < 10 else Seen(2, False)
        return Seen(1, True)

    result = judge(looks(600, of))
    assert result is not None
    assert 25 < result[0] < 35


def test_a_sleeping_rank_is_stuck_even_while_rank_0_works() -> None:
    result = judge(looks(60, lambda rank, at: Seen(1, True)), lambda rank: rank == 1)
    assert result is not None
    assert result[1].rank == 1
    assert result[0] <= LIMIT_S + TICK_S


def test_a_rank_that_fell_asleep_after_its_last_mark_is_said_to_sleep() -> None:
    found = StuckJudge(2, lambda rank: next(asleep))
    for number_awake, says_asleep in ((1, True), (9, False)):
        asleep = iter([False] * number_awake + [True] * 100)
        found.look([Seen(number_awake, False), Seen(number_awake, False)], TICK_S, LIMIT_S)
        looks = (found.look([Seen(0, False), Seen(9 + number_awake, True)], TICK_S, 10 * TICK_S) for _ in range(100))
        stuck = next(one for one in looks if one is not None)
        assert stuck.sleeps is says_asleep


def test_stages_that_rank_0_waits_for_may_take_longer() -> None:
    seen = [Seen(1, False), Seen(1, True)]
    found = StuckJudge(2, lambda rank: False)
    times = [number for number in range(200) if found.look(seen, TICK_S, LIMIT_S, 60.0) is not None]
    assert times[0] == pytest.approx(60 / TICK_S, abs=2)
    asleep = StuckJudge(2, lambda rank: True)
    times = [number for number in range(200) if asleep.look(seen, TICK_S, LIMIT_S, 60.0) is not None]
    assert times[0] == pytest.approx(LIMIT_S / TICK_S, abs=2)


def test_a_rank_of_which_nothing_is_heard_is_not_judged() -> None:
    found = StuckJudge(2, lambda rank: True)
    for number in range(200):
        seen = [Seen(number, True), Seen(1, True) if number % 100 == 0 else None]
        assert found.look(seen, TICK_S, LIMIT_S) is None


def test_time_in_which_nobody_looked_counts_little() -> None:
    found = StuckJudge(2, lambda rank: True)
    for _ in range(4):
        assert found.look([Seen(1, False), Seen(1, True)], 3600.0, LIMIT_S) is None


SLEEPS = "print(flush=True); import time; time.sleep(600)"
SPINS = "print(flush=True)\nwhile True: pass"
YIELDS = "import os; print(flush=True)\nwhile True: os.sched_yield()"  # as a driver does whose queue is full
FREEZES = """
import ctypes, threading, time
threading.Thread(target=lambda: [time.sleep(0.001) for _ in iter(int, 1)], daemon=True).start()
print(flush=True)
ctypes.PyDLL(None).sleep(600)  # the thread asks for the interpreter's lock again and again
"""


def test_whether_a_process_sleeps_is_seen_on_a_busy_machine() -> None:
    """Beside more processes than there are cores. One that stands still for long is looked at again."""
    expected = {SLEEPS: True, FREEZES: True, SPINS: False, YIELDS: False}
    with ExitStack() as stack:
        activities = []
        for source in [SPINS] * 2 * (os.cpu_count() or 1) + list(expected):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
            activities.append(Activity(process.pid))
        found = dict(zip(expected, activities[-len(expected) :], strict=True))
        for activity in found.values():
            activity.sleeps()
        for _ in range(4):
            right = dict.fromkeys(expected, 0)
            for _ in range(8):
                time.sleep(0.5)
                for source, activity in found.items():
                    right[source] += activity.sleeps() == expected[source]
            if min(right.values()) >= 6:
                return
    pytest.fail(f"right answers of 8: {right}")


def add_up(group: RankGroup) -> None:
    group.collectives.all_reduce(torch.ones(4))


def wait_for_replies(group: RankGroup) -> None:
    group.replies()


@pytest.mark.parametrize(
    ("command", "how", "where", "wait"),
    [
        (b"sleep_then_sum 1 600", "it sleeps", "in _sleep", add_up),
        (b"freeze_then_sum 1 600", "it sleeps", "in _freeze", wait_for_replies),
        (b"loop_then_sum 1 600", "it runs, but gets nowhere", "in _loop", add_up),
        (b"deadlock 1", "it sleeps", "in _deadlock", wait_for_replies),
    ],
)
@pytest.mark.parametrize("hosts", [None, (0, 1, 1)])
def test_a_stuck_rank_is_named_with_where_it_is(
    command: bytes, how: str, where: str, wait: Callable[[RankGroup], None], hosts: tuple[int, ...] | None
) -> None:
    target = OBEY_WITH_TENSORS if b"sum" in command else OBEY
    with open_group(3, stuck_after_s=3.0, hosts=hosts, target=target) as group:
        ranks = pids(group)
        group.broadcast(command)
        with pytest.raises(EngineDeadError, match=rf"rank 1 of 3 .* has been stuck at .* for .* s: {how}") as caught:
            wait(group)
    assert where in str(caught.value)
    assert ("layer 7" in str(caught.value)) == (b"loop" in command)
    assert all(map(is_gone, ranks))


def test_a_rank_that_forgets_a_collective_is_named() -> None:
    with open_group(3, stuck_after_s=1.0) as group:
        group.broadcast(b"echo instead")
        with pytest.raises(EngineDeadError, match=r"rank 1 of 3.*did not take part in a collective within 1 s"):
            add_up(group)


def test_a_rank_that_is_stopped_is_named_soon() -> None:
    with open_group(2, stuck_after_s=60.0) as group:
        group.broadcast(b"kill 1 %d" % signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match=r"rank 1 of 2 .*was stopped \(SIGSTOP\)"):
            add_up(group)


@contextmanager
def busy_machine() -> Iterator[None]:
    """Two processes that loop beside."""
    with ExitStack() as stack:
        for _ in range(2):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(process.kill)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("command", [b"loop_then_sum", b"wait_for_child"])
@pytest.mark.parametrize("hosts", [None, (0, 1, 2)])
def test_a_long_step_on_a_busy_machine_is_no_hang(command: bytes, hosts: tuple[int, ...] | None) -> None:
    with busy_machine(), open_group(3, stuck_after_s=1.0, hosts=hosts, target=OBEY_WITH_TENSORS) as group:
        for rank in (1, 2):
            group.broadcast(b"%b %d 3" % (command, rank))
            until = time.monotonic() + 3
            while time.monotonic() < until:  # rank 0 has a part as well
                group.check()
            if command == b"loop_then_sum":
                add_up(group)
        group.broadcast(b"echo")
        assert group.replies() == [b"1 ", b"2 "]
