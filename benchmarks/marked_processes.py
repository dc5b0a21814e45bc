"""Processes of a run that are known by their environment, also once those that started them are gone."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_NAME = "LLMENGINE_BENCHMARK_RUN"


class MarkedProcesses:
    """All processes that are started within `running`, by this one or by those below it."""

    def __init__(self) -> None:
        self._mark = uuid.uuid4().hex

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[MarkedProcesses]:
        """Mark what is started from now on, until the context ends."""
        marked = cls()
        os.environ[_NAME] = marked._mark
        try:
            yield marked
        finally:
            del os.environ[_NAME]

    def find(self, *words: str) -> list[psutil.Process]:
        """Those that live, and have one of the words in their command line or title."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_NAME) == self._mark:
                    line = " ".join(process.cmdline())
                    if any(word in line for word in words):
                        found.append(process)
        return found
