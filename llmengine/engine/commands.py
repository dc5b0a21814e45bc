"""CommandQueue: what other threads ask the engine thread to do between two steps."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import anyio

from llmengine.engine.stream import check_process
from llmengine.errors import EngineClosedError, EngineError


@dataclass(frozen=True, slots=True)
class _Command:
    """A function for the engine thread to run, and one to call instead if the thread has ended."""

    run: Callable[[], None]
    refuse: Callable[[EngineError], None]


class CommandQueue:
    """Commands from any thread for the thread that calls `run_all` and `wait`.

    Args:
        refusal: makes the error for a command that will never run.
    """

    def __init__(self, refusal: Callable[[], EngineError]) -> None:
        self._refusal = refusal
        self._commands: deque[_Command] = deque()
        self._wake_up: Callable[[], object] | None = None
        self._closed = False
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self._commands)

    @property
    def is_forked(self) -> bool:
        """True in a process that was forked from the queue's, where its thread does not run."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Raise `EngineClosedError` in a forked process."""
        check_process(self._pid)

    def send(self, run: Callable[[], None], refuse: Callable[[EngineError], None]) -> None:
        """Queue a command. Takes no lock, since a garbage collection on any thread may call it."""
        try:
            self.check_process()
        except EngineClosedError as error:
            refuse(error)
            return
        self._commands.append(_Command(run, refuse))
        if (wake_up := self._wake_up) is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: the thread will refuse the command
                wake_up()
        if self._closed:  # the thread may have emptied the deque before the append
            self.close()

    def nudge(self) -> None:
        """Wake the thread, so that it looks again at whether it has anything to wait for. Never blocks."""
        self.send(_nothing, _ignore)

    def close(self) -> None:
        """Refuse all commands, those in the queue and later ones. Idempotent, any thread."""
        self._closed = True
        while self._commands:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            command.refuse(self._refusal())

    def run_all(self) -> None:
        """Run the commands in the queue."""
        while self._commands:
            self._commands.popleft().run()

    async def wait(self, until: float | None) -> None:
        """Wait for a command, or until the moment `until` on the monotonic clock."""
        event = anyio.Event()
        self._wake_up = partial(asyncio.get_running_loop().call_soon_threadsafe, event.set)
        if not self._commands:  # a command that came before `_wake_up` was set did not wake this thread
            with anyio.move_on_after(None if until is None else until - time.monotonic()):
                await event.wait()
        self._wake_up = None


def _nothing() -> None:
    """Being awake is all that a nudge is for."""


def _ignore(_: EngineError) -> None:
    """A thread that has ended waits for nothing."""
