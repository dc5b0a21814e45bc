"""Terminals that tests look at, in place of stderr."""

from __future__ import annotations

import io
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from unittest import mock

from tests.engine.helpers import WAIT_S


class Terminal(io.StringIO):
    """Keeps all that is written to it."""

    def isatty(self) -> bool:
        return True

    @property
    def shows_cursor(self) -> bool:
        """True if the cursor was never hidden, or was shown again since."""
        return self.getvalue().rfind("\x1b[?25h") >= self.getvalue().rfind("\x1b[?25l")


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """What the program shows on stderr, which is a terminal that can move its cursor.

    No fixture: pytest sets stderr again between a test's fixtures and the test.
    """
    with mock.patch.dict("os.environ", TERM="xterm"), redirect_stderr(Terminal()) as terminal:
        yield terminal


@dataclass(frozen=True, slots=True)
class Interrupted:
    """What a program left that Ctrl-C ended; `shown` is what came on its terminal, `printed` what came on stdout."""

    return_code: int
    printed: str
    shown: str

    @property
    def shows_cursor(self) -> bool:
        """True if the cursor was hidden and then shown again."""
        return self.shown.rfind("\x1b[?25h") > self.shown.rfind("\x1b[?25l") >= 0


def interrupt(command: Sequence[str], bar: str) -> Interrupted:
    """Run a program whose stderr is a terminal, and send Ctrl-C once `bar` is shown there."""
    terminal, stderr = os.openpty()
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, preexec_fn=heed) as process:
        os.close(stderr)
        shown, begun = bytearray(), Event()

        def read() -> None:
            """Until the program closes its end, since it waits where nobody reads."""
            while data := _read(terminal):
                shown.extend(data)
                if bar.encode() in shown:
                    begun.set()
            begun.set()

        reader = Thread(target=read)
        reader.start()
        try:
            assert begun.wait(WAIT_S)
            process.send_signal(signal.SIGINT)
            printed, _ = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
            reader.join()
            os.close(terminal)
    return Interrupted(process.returncode, printed.decode(), shown.decode())


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""
