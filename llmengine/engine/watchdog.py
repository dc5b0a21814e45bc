"""Watchdog: notices that a call into the backend does not return."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls `on_hang` once, from a thread of its own, when a watched call takes longer than `timeout_s` seconds.

    One thread makes the calls, between `begin()` and `end()`. While `on_hang` runs, that thread is still in its call,
    or waits in `end()`.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[], None]) -> None:
        self.timeout_s = timeout_s
        self._on_hang = on_hang
        self._began: float | None = None
        self._hung = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmengine-watchdog", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Note that a call begins."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Note that the call has returned. Raises `TimeoutError` if that was too late."""
        with self._lock:
            self._began = None
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
        # It sleeps until a call could be late. Waking it for each call would switch threads at each step.
        delay_s = self.timeout_s
        while not self._stopped.wait(delay_s):
            with self._lock:
                began = self._began
                delay_s = self.timeout_s if began is None else began + self.timeout_s - time.monotonic()
                if delay_s <= 0:
                    self._hung = True
                    self._on_hang()
                    return
