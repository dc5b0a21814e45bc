"""Watchdog: notices that a call into the backend does not return."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

# In the time that a call may take.
_NUM_LOOKS = 10


class Watchdog:
    """Calls `on_hang` once, from a thread of its own, when a watched call takes longer than `timeout_s` seconds.

    It looks ten times in `timeout_s`, and counts looks rather than time: a process that stands still as a whole, as by
    SIGSTOP, in a frozen container or on a paused virtual machine, is given one look for all of that. So a call that
    hangs is found after 1 to 1.1 times `timeout_s`.

    One thread makes the calls, between `begin()` and `end()`. While `on_hang` runs, that thread is still in its call,
    or waits in `end()`.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[], None]) -> None:
        self.timeout_s = timeout_s
        self._on_hang = on_hang
        self._numbers = itertools.count()
        self._call: int | None = None
        self._hung = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmengine-watchdog", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Note that a call begins."""
        self._call = next(self._numbers)

    def end(self) -> None:
        """Note that the call has returned. Raises `TimeoutError` if that was too late."""
        with self._lock:
            self._call = None
            if self._hung:
                raise TimeoutError(self.message)

    @property
    def message(self) -> str:
        """The error message for a call that did not return."""
        return f"the backend did not return within {self.timeout_s:g} s (scheduler_config.step_timeout_s)"

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        # Waking it for each call would switch threads at each step.
        seen, num_looks = None, 0
        while not self._stopped.wait(self.timeout_s / _NUM_LOOKS):
            with self._lock:
                num_looks = num_looks + 1 if self._call is not None and self._call == seen else 0
                seen = self._call
                if num_looks == _NUM_LOOKS:
                    self._hung = True
                    self._on_hang()
                    return
