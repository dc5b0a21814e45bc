"""Long waits of the program's own threads, which Ctrl-C always ends.

Python runs signal handlers on the main thread, and a signal wakes that thread if the kernel delivers it there. It may
also deliver it to a thread that changes its signal mask just then, as each does that starts a thread, and then a main
thread that waits for a lock sleeps on. So waits are made of short ones, between which Python looks for signals.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LONGEST_WAIT_S = 0.25


def wait_in_pieces(wait: Callable[[float], bool], timeout_s: float | None = None) -> bool:
    """Call `wait` with a number of seconds until it returns True; False if `timeout_s` seconds pass first."""
    if timeout_s is None:
        while not wait(LONGEST_WAIT_S):
            pass
        return True
    deadline = time.monotonic() + timeout_s
    while not wait(min(LONGEST_WAIT_S, max(timeout_s, 0.0))):
        if (timeout_s := deadline - time.monotonic()) <= 0:
            return False
    return True


def result_of(future: Future[T]) -> T:
    """What `future.result()` returns or raises."""

    def wait(timeout_s: float) -> bool:
        try:
            future.exception(timeout_s)
        except TimeoutError:
            return future.done()
        return True

    wait_in_pieces(wait)
    return future.result()
