"""Progress of a build: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmengine.checkpoints.saved_files import size_text
from llmengine.terminal_progress import start_bar, stop_bar

_logger = logging.getLogger("llmengine.tensorrt")

_LEAST_KNOWN = 0.05
"""Share of the work that must be done before the time left is estimated."""


class BuildProgress:
    """Reports plans as they are built; used as a context manager by one thread.

    Args:
        write: takes the lines when `console` is not a terminal.
        console: None: stderr.
        clock: gives seconds.
    """

    def __init__(
        self,
        write: Callable[[str], None] = _logger.info,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, force_terminal=sys.stderr.isatty(), highlight=False)
        self._write = partial(self._console.print, markup=False) if self._console.is_terminal else write
        self._clock = clock
        self._work: dict[str, int] = {}
        self._done: set[str] = set()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("building plans", total=None, left="")
        self._begin = 0.0

    def __enter__(self) -> Self:
        self._begin = self._clock()
        if self._console.is_terminal:
            start_bar(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            stop_bar(self._bar)

    def begin(self, work: Mapping[str, int], what: str) -> None:
        """Announce the plans that will be built.

        Args:
            work: plan name -> amount of work, such as bytes of weights.
            what: the library and the target.
        """
        self._work = dict(work)
        self._bar.update(self._task, total=len(work))
        self._write(f"building {len(work)} plan{'s' if len(work) > 1 else ''} with {what}: {_listed(list(work))}")

    def started(self, name: str) -> None:
        """Report that the build of a plan begins."""
        self._bar.update(self._task, description=f"building {name}")

    def finished(self, name: str, size_bytes: int, detail: str) -> None:
        """Report that a plan is there; `detail`: what building it took, or that an earlier build made it."""
        self._done.add(name)
        left = self._left()
        self._bar.update(self._task, advance=1, left=left)
        self._write(
            f"[{len(self._done)}/{len(self._work)}] {name}: {size_text(size_bytes)}, {detail}"
            + (f", {left}" if left else "")
        )

    def _left(self) -> str:
        total = sum(self._work.values())
        done = sum(work for name, work in self._work.items() if name in self._done)
        if not _LEAST_KNOWN * total <= done < total:
            return ""
        return f"about {(self._clock() - self._begin) * (total - done) / done:.0f} s left"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:4])}, ... {names[-1]}"
