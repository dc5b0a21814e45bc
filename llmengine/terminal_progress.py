"""TerminalProgress: a bar on stderr while work of a known number of steps is done, where stderr is a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


def start_bar(bar: Progress) -> None:
    """Show a bar. If Ctrl-C comes while it is first drawn, the terminal gets its cursor back, and this raises."""
    try:
        bar.start()
    except BaseException:
        bar.stop()
        raise


class TerminalProgress:
    """Shows how many steps are done; used as a context manager by one thread. Leaves nothing on the screen.

    Args:
        description: what is being done.
        enabled: False shows nothing; neither does a stderr that is no terminal.
    """

    def __init__(self, description: str, num_steps: int, *, enabled: bool = True) -> None:
        self._bar = None
        if not enabled or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = self._bar.add_task(description, total=num_steps)

    def __enter__(self) -> Self:
        if self._bar is not None:
            start_bar(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Count one more step as done."""
        if self._bar is not None:
            self._bar.advance(self._task)
