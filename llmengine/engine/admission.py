"""Bounded admission: how many requests and prompt tokens may wait for their first step, and which callers wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from llmengine.config import SchedulerConfig
from llmengine.engine.blocking import wait_in_pieces
from llmengine.engine.fair_queue import FairQueue
from llmengine.errors import QueueFullError


class Applicant:
    """A caller that waits for a ticket."""

    __slots__ = ("grant", "tenant", "waiting")

    def __init__(self, tenant: str | None, grant: Callable[[AdmissionTicket], None]) -> None:
        self.tenant = tenant
        self.grant = grant
        self.waiting = True


class Admission:
    """Counts waiting requests and their prompt tokens, and queues applicants while there is no room. Any thread.

    Applicants are served fairly: tenants take turns, those with more weight more often. Among one tenant's applicants
    the priority counts, which ages as it does in the scheduler, then the order of arrival. No request overtakes them:
    while an applicant waits, `acquire_nowait` raises.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._applicants: FairQueue[Applicant] = FairQueue(config.tenant_weights, lambda applicant: applicant.waiting)
        self._num_applications = 0
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        """Times that `QueueFullError` was raised."""
        self._closed = False

    @property
    def num_applicants(self) -> int:
        """Applicants that wait for room."""
        return len(self._applicants)

    def acquire_nowait(self) -> AdmissionTicket:
        """A ticket for one request. Raises `QueueFullError` if the queue is full."""
        with self._lock:
            if self.num_requests >= self._config.max_queued_requests:
                self.num_refused += 1
                raise QueueFullError(
                    f"{self.num_requests} requests are waiting "
                    f"(scheduler_config.max_queued_requests={self._config.max_queued_requests})"
                )
            if self._applicants:
                self.num_refused += 1
                raise QueueFullError(
                    f"{len(self._applicants)} requests are waiting for room behind {self.num_tokens} prompt tokens "
                    f"(scheduler_config.max_queued_tokens={self._config.max_queued_tokens})"
                )
            self.num_requests += 1
        return AdmissionTicket(self, bounded=True)

    def apply(
        self, grant: Callable[[AdmissionTicket], None], tenant: str | None = None, priority: int = 0
    ) -> Applicant:
        """Have `grant` called with a ticket as soon as there is room: in this call, or on the thread that makes room.

        `grant` must neither block nor raise. A closed admission grants every ticket; the engine refuses the request.
        """
        applicant = Applicant(tenant, grant)
        with self._lock:
            rank = time.monotonic() - priority * self._config.priority_ageing_s
            self._applicants.push(self._applicants.share(tenant), rank, self._num_applications, applicant)
            self._num_applications += 1
        self._grant()
        return applicant

    def withdraw(self, applicant: Applicant) -> bool:
        """Stop waiting; False if the ticket has been granted, or is being granted now."""
        with self._lock:
            if not applicant.waiting:
                return False
            applicant.waiting = False
            self._applicants.left(self._applicants.share(applicant.tenant))
        return True

    def acquire_blocking(self, tenant: str | None = None, priority: int = 0) -> AdmissionTicket:
        """A ticket; blocks this thread while there is no room and the admission is not closed."""
        granted: list[AdmissionTicket] = []
        event = threading.Event()

        def grant(ticket: AdmissionTicket) -> None:
            granted.append(ticket)
            event.set()

        applicant = self.apply(grant, tenant, priority)
        try:
            wait_in_pieces(event.wait)
        except BaseException:  # KeyboardInterrupt
            if not self.withdraw(applicant):
                event.wait()
                granted[0].release()
            raise
        return granted[0]

    def close(self) -> None:
        """Grant all tickets from now on: the engine takes no more requests, and refuses them at their submission."""
        with self._lock:
            self._closed = True
        self._grant()

    def _has_room(self) -> bool:
        return self._closed or (
            self.num_requests < self._config.max_queued_requests and self.num_tokens < self._config.max_queued_tokens
        )

    def _grant(self) -> None:
        """Grant tickets while there is room."""
        while True:
            with self._lock:
                if not self._applicants or not self._has_room():
                    return
                applicant = self._applicants.pop()
                self._applicants.share(applicant.tenant).charge(1)
                applicant.waiting = False
                if not self._applicants:
                    self._applicants.forget()
                self.num_requests += 1
            applicant.grant(AdmissionTicket(self, bounded=False))

    def _add_tokens(self, ticket: AdmissionTicket, num_tokens: int) -> None:
        with self._lock:
            if not ticket.is_held:
                return
            if ticket.bounded and self.num_tokens and self.num_tokens + num_tokens > self._config.max_queued_tokens:
                self.num_refused += 1
                raise QueueFullError(
                    f"{self.num_tokens} prompt tokens are waiting, and {num_tokens} more do not fit "
                    f"(scheduler_config.max_queued_tokens={self._config.max_queued_tokens})"
                )
            self.num_tokens += num_tokens
            ticket.num_tokens = num_tokens

    def _release(self, ticket: AdmissionTicket) -> None:
        with self._lock:
            if not ticket.is_held:
                return
            ticket.is_held = False
            self.num_requests -= 1
            self.num_tokens -= ticket.num_tokens
        if self._applicants:
            self._grant()


class AdmissionTicket:
    """One request's place in the queue. It is given back when the request is first scheduled or ends.

    Attributes:
        bounded: the prompt must fit `max_queued_tokens`. A request that waited for room may have any length.
        num_tokens: length of the prompt, once it is known.
        is_held: False once the place was given back.
    """

    __slots__ = ("_admission", "bounded", "is_held", "num_tokens")

    def __init__(self, admission: Admission, *, bounded: bool) -> None:
        self._admission = admission
        self.bounded = bounded
        self.num_tokens = 0
        self.is_held = True

    def add_tokens(self, num_tokens: int) -> None:
        """Count the prompt once its length is known, unless the request has ended meanwhile. Any thread.

        Raises `QueueFullError` if the prompt does not fit.
        """
        self._admission._add_tokens(self, num_tokens)

    def release(self) -> None:
        """Give the place back. Idempotent, any thread."""
        self._admission._release(self)
