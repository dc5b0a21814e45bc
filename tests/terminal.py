"""A terminal that tests look at, in place of stderr."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from unittest import mock


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
