"""Starting the processes of ranks on the host where this runs: that of rank 0, or that of an agent (`agent.py`)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from multiprocessing import spawn
from pathlib import Path
from typing import Protocol

from llmengine.errors import ConfigError

__all__ = ["Launcher", "LocalLauncher", "RankProcess"]

_PROGRAM = Path(__file__).with_name("process.py")


class RankProcess(Protocol):
    """A process that was launched."""

    @property
    def pid(self) -> int:
        """Its number on its host."""

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    def wait(self, timeout_s: float) -> int | None:
        """Like `poll`, after it has ended or the time is over."""

    def kill(self) -> None:
        """End it and what it started, at once; does nothing if it has ended."""

    def interrupt(self) -> None:
        """Ask it to write down where its threads are (SIGUSR1)."""


class Launcher(Protocol):
    """Starts ranks."""

    def launch(self, arguments: Sequence[str], descriptors: Sequence[int]) -> RankProcess:
        """Start the program of a rank.

        Args:
            arguments: for `llmengine.backends.ranks.process`.
            descriptors: open files that it inherits, under the numbers they have here.
        """


class LocalLauncher:
    """Starts ranks as processes on this host.

    They run the interpreter of this process (`multiprocessing.set_executable` names another for programs that embed
    Python) on a file of ours: the caller's `__main__` is not imported again, nothing is forked, and no signal handler
    is installed. Each is the leader of its own session, so that the terminal's Ctrl-C does not reach it.
    """

    def launch(self, arguments: Sequence[str], descriptors: Sequence[int]) -> RankProcess:
        # -I: neither PYTHONPATH nor the current directory counts; the rank gets this process's sys.path instead.
        executable = spawn.get_executable()
        if not executable:
            raise ConfigError(
                "Python does not know its executable here; name it by multiprocessing.set_executable(path)"
            )
        command = [os.fsdecode(executable), "-I", str(_PROGRAM), *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=descriptors, close_fds=True, start_new_session=True
        )
        return _LocalProcess(process)


class _LocalProcess:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not the leader of its session yet
                self._process.kill()

    def interrupt(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
