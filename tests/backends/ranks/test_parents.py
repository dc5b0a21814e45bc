"""Where groups are started from, and what becomes of ranks when the process of rank 0 ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llmengine.backends.ranks import RankGroup
from tests import ROOT
from tests.backends.ranks.helpers import OBEY, OBEY_WITH_TENSORS, is_gone, open_group, pids

# Ranks must be gone after 2 s; a busy machine may need longer for anything.
GONE_S = 20.0

SCRIPT = """
import os, sys, time
print("this script runs", flush=True)
from llmengine.backends.ranks import RankGroup
from tests.backends.ranks.helpers import OBEY as TARGET, pids
group = RankGroup(2, TARGET, b"")
group.start()
print(*pids(group), flush=True)
"""


@contextmanager
def script(text: str, path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A running Python script without a guard, whose output is read line by line."""
    path.write_text(text)
    command = [sys.executable, *(arguments or (str(path),))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = {"env": env, "cwd": path.parent, "start_new_session": True, "text": True}
    with path.open() as stdin, subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, **settings) as process:
        try:
            yield process
        finally:
            process.kill()


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    """What `SCRIPT` prints, which must be all that anybody has printed."""
    assert process.stdout is not None
    assert process.stdout.readline() == "this script runs\n"
    return [int(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("how", ["file", "-c", "-"])
def test_a_script_needs_no_guard_and_leaves_no_ranks(tmp_path: Path, how: str) -> None:
    path = tmp_path / "script.py"
    arguments = {"file": (), "-c": ("-c", SCRIPT), "-": ("-",)}[how]
    with script(SCRIPT, path, *arguments) as process:
        ranks = read_pids(process)
        assert len(ranks) == 1
        assert process.stdout is not None
        assert process.stdout.read() == "", "ran again in a rank"
        assert process.wait(60) == 0
    assert all(is_gone(pid, GONE_S) for pid in ranks)


@pytest.mark.parametrize(
    "meanwhile",
    [
        "",
        "group.broadcast(b'sleep 1 600')",
        "group.broadcast(b'freeze 1 600')",
        "group.broadcast(b'sum 4')",
        "import signal; os.kill(pids(group)[0], signal.SIGSTOP)",
        "child = os.fork()\nif not child: time.sleep(600)",
    ],
    ids=["idle", "busy", "holds the lock", "in a collective", "stopped", "a fork lives on"],
)
def test_ranks_die_with_a_parent_that_is_killed(tmp_path: Path, meanwhile: str) -> None:
    script_text = SCRIPT.replace("OBEY as", "OBEY_WITH_TENSORS as") if "sum" in meanwhile else SCRIPT
    text = f"{script_text}\nchild = 0\n{meanwhile}\ntime.sleep(0.3)\nprint(child, flush=True)\ntime.sleep(600)"
    with script(text, tmp_path / "script.py") as process:
        ranks = read_pids(process)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        try:
            assert all(is_gone(pid, GONE_S) for pid in ranks)
        finally:
            if child:
                os.kill(child, signal.SIGKILL)


def test_ctrl_c_while_starting_ends_the_ranks(tmp_path: Path) -> None:
    text = """
import subprocess
from llmengine.backends.ranks import LocalLauncher, RankGroup
class Telling(LocalLauncher):
    def launch(self, arguments, descriptors):
        process = super().launch(arguments, descriptors)
        print(process.pid, flush=True)
        return process
group = RankGroup(2, "tests.backends.ranks.slow_to_import:run", b"", Telling())
try:
    group.start()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""
    with script(text, tmp_path / "script.py") as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        # If the signal came before the group had the process, only its lifeline ends it.
        assert is_gone(rank, GONE_S)
        assert process.wait(60) == 0


def test_ranks_ignore_what_ends_their_parent_in_order() -> None:
    with open_group(2) as group:
        (rank,) = pids(group)
        assert os.getsid(rank) == rank, "not of the terminal's session"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(rank, number)
        group.broadcast(b"echo here")
        assert group.replies() == [b"1 here"]


@pytest.mark.parametrize("hosts", [None, (0, 1)])
def test_groups_that_start_at_once_do_not_meet(hosts: tuple[int, ...] | None) -> None:
    def run(number: int) -> list[bytes]:
        with open_group(2, hosts=hosts, target=OBEY_WITH_TENSORS) as group:
            group.broadcast(b"echo %d" % number)
            group.broadcast(b"sum 4")
            tensor = torch.full((4,), 10.0 * number)
            group.collectives.all_reduce(tensor)
            assert tensor.tolist() == [10.0 * number + 2] * 4
            return group.replies()

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(run, range(3))) == [[b"1 %d" % number] for number in range(3)]


def test_a_rank_imports_torch_for_its_target_only() -> None:
    with open_group(2) as group:
        group.broadcast(b"told torch")
        assert group.replies() == [b"False"]


def test_ranks_outlive_the_thread_that_started_them() -> None:
    group = RankGroup(2, OBEY, b"")
    thread = threading.Thread(target=group.start)
    thread.start()
    thread.join()
    ranks = pids(group)
    assert not is_gone(ranks[0], 0.5)
    group.broadcast(b"echo here")
    assert group.replies() == [b"1 here"]
    group.close()
    assert is_gone(ranks[0])


async def test_a_running_loop_and_no_signal_handlers() -> None:
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    with open_group(2) as group:
        await asyncio.sleep(0)
        group.broadcast(b"echo here")
        assert await asyncio.to_thread(group.replies) == [b"1 here"]
        assert [signal.getsignal(number) for number in signal.valid_signals()] == before


def test_nothing_stays_open_after_close() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with open_group(2):  # torch opens a few once
        pass
    gc.collect()
    before = open_files(), threading.active_count()
    for _ in range(2):
        with open_group(2):
            pass
    # What tests left that ran before may go meanwhile.
    assert open_files() <= before[0]
    assert threading.active_count() <= before[1]


def test_the_callers_process_group_is_left_alone() -> None:
    with open_group(2):
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("path", ["", "."])
def test_ranks_import_what_rank_0_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    (tmp_path / "target_of_mine.py").write_text(
        "import llmengine\ndef run(channel, payload):\n"
        "    channel.reply(llmengine.__file__.encode())\n    channel.receive()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path)
    group = RankGroup(2, "target_of_mine:run", b"")
    group.start()
    assert group.replies() == [str(ROOT / "llmengine" / "__init__.py").encode()]
    group.close()
