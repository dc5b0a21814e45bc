"""Bounded admission: how many requests and prompt tokens may wait for their first step."""

from __future__ import annotations

import threading

from llmengine.config import SchedulerConfig
from llmengine.errors import QueueFullError


class Admission:
    """Counts waiting requests and their prompt tokens, from any thread."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._changed = threading.Condition()
        self.num_requests = 0
        self.num_tokens = 0
        self._closed = False

    def acquire_nowait(self) -> AdmissionTicket:
        """Return a ticket for one request; raises `QueueFullError` when the queue is full."""
        with self._changed:
            if self.num_requests >= self._config.max_queued_requests:
                raise QueueFullError(
                    f"{self.num_requests} requests are waiting "
                    f"(scheduler_config.max_queued_requests={self._config.max_queued_requests})"
                )
            self.num_requests += 1
        return AdmissionTicket(self, bounded=True)

    def acquire_blocking(self) -> AdmissionTicket:
        """Return a ticket, blocking this thread while the queue is full of requests or tokens and not closed."""
        with self._changed:
            while not self._closed and (
                self.num_requests >= self._config.max_queued_requests
                or self.num_tokens >= self._config.max_queued_tokens
            ):
                self._changed.wait()
            self.num_requests += 1
        return AdmissionTicket(self, bounded=False)

    def close(self) -> None:
        """Let nobody wait for room any more: the engine takes no more requests, and says so at their submission."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _add_tokens(self, num_tokens: int, *, bounded: bool) -> None:
        with self._changed:
            if bounded and self.num_tokens and self.num_tokens + num_tokens > self._config.max_queued_tokens:
                raise QueueFullError(
                    f"{self.num_tokens} prompt tokens are waiting and {num_tokens} more do not fit "
                    f"(scheduler_config.max_queued_tokens={self._config.max_queued_tokens})"
                )
            self.num_tokens += num_tokens

    def _release(self, num_tokens: int) -> None:
        with self._changed:
            self.num_requests -= 1
            self.num_tokens -= num_tokens
            self._changed.notify_all()


class AdmissionTicket:
    """One request's place in the queue; given back when it is first scheduled or ends, whichever comes first."""

    __slots__ = ("_admission", "_bounded", "_num_tokens")

    def __init__(self, admission: Admission, *, bounded: bool) -> None:
        self._admission: Admission | None = admission
        self._bounded = bounded
        self._num_tokens = 0

    def add_tokens(self, num_tokens: int) -> None:
        """Count the prompt once its length is known; raises `QueueFullError` if it does not fit.

        Who waited for room (`acquire_blocking`) is let in whatever the length.
        """
        assert self._admission is not None
        self._admission._add_tokens(num_tokens, bounded=self._bounded)
        self._num_tokens = num_tokens

    def release(self) -> None:
        """Give the place back; idempotent."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._release(self._num_tokens)
