"""TerminalProgress: a bar on stderr while work of a known number of steps is done, where stderr is a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


def start_bar(bar: Progress) -> None:
    """Show a bar. If Ctrl-C comes while it is first drawn, the terminal gets its cursor back, and this raises."""
    try:
        bar.start()
    except BaseException:
        with suppress(Exception):  # rich cannot stop what has hardly begun
            stop_bar(bar)
        raise


def stop_bar(bar: Progress) -> None:
    """Remove a bar. The terminal gets its cursor back even if Ctrl-C comes meanwhile, and this raises."""
    try:
        bar.stop()
    except BaseException:
        from rich.control import Control

        # Past rich's buffer, which may hold half of something.
        print(Control.show_cursor(True), end="", file=bar.console.file, flush=True)
        raise


class TerminalProgress:
    """Shows how many steps are done; used as a context manager by one thread. Leaves nothing on the screen.

    Args:
        description: what is being done.
        enabled: if False, nothing is shown, as on a stderr that belongs to neither a terminal nor a notebook.
    """

    def __init__(self, description: str, num_steps: int, *, enabled: bool = True) -> None:
        self._bar = None
        if not enabled:
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

        console = Console(stderr=True, highlight=False)
        if not sys.stderr.isatty() and not console.is_jupyter:
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
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
            stop_bar(self._bar)

    def advance(self) -> None:
        """Count one more step as done."""
        if self._bar is not None:
            self._bar.advance(self._task)
