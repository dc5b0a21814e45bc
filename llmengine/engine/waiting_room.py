"""WaitingRoom: the requests that the engine has and the scheduler does not know yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llmengine.engine.admission import Admission, AdmissionTicket, Applicant
from llmengine.engine.commands import CommandQueue
from llmengine.engine.deadlines import Deadlines
from llmengine.engine.stats import EngineCounters
from llmengine.engine.stream import Stream, wake
from llmengine.engine.worker_threads import Job
from llmengine.errors import EngineError, LLMEngineError, RequestFailedError
from llmengine.outputs import FinishReason

Prepare = Callable[[AdmissionTicket], Job]
"""Has a thread prepare a request that holds the ticket. Raises RuntimeError where no thread can be had."""


@dataclass(slots=True)
class UnpreparedRequest:
    """A request that waits for a ticket, or that a thread prepares.

    Attributes:
        applicant: its place among those that wait for a ticket; None before and after that.
        ticket: set once there is room for it in the queue.
        job: its preparation, once that was handed to a thread.
    """

    stream: Stream
    prepare: Prepare
    applicant: Applicant | None = None
    ticket: AdmissionTicket | None = None
    job: Job | None = None


class WaitingRoom:
    """Where a request is until it is prepared: first it waits for an admission ticket, then for a thread.

    While a request is here it can be aborted, expire and end with the engine, whatever the thread does. It leaves
    exactly once: by `leave()`, with its ticket, when it is prepared, or by `finish()`, `reject()` or `close()`, which
    end its stream, withdraw its application, cancel its job and give its ticket back. Calls that come later do nothing.
    Methods may be called from any thread unless they say otherwise.

    Args:
        deadlines: the deadlines of all requests; touched on the engine thread only.
        refusal: makes the error that new work gets; None while the engine takes new work.
    """

    def __init__(
        self,
        admission: Admission,
        commands: CommandQueue,
        deadlines: Deadlines,
        counters: EngineCounters,
        refusal: Callable[[], EngineError | None],
    ) -> None:
        self._admission = admission
        self._commands = commands
        self._deadlines = deadlines
        self._counters = counters
        self._refusal = refusal
        self._requests: dict[int, UnpreparedRequest] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._requests

    def prepare(self, stream: Stream, prepare: Prepare, ticket: AdmissionTicket, *, deadline: float | None) -> None:
        """Take in a request that holds a ticket, and have it prepared. Never blocks.

        The job ends in `leave()` or `reject()`; once the request has ended here, nothing depends on the job any more.
        Raises RuntimeError where no thread can be had; the caller then still holds the ticket.
        """
        request_id = stream.log.request_id
        request = self._requests[request_id] = UnpreparedRequest(stream, prepare, ticket=ticket)
        try:
            _start_job(request)
        except BaseException:
            self._requests.pop(request_id, None)
            raise
        if deadline is not None:
            self._commands.send(partial(self._deadlines.add, deadline, request_id), _ignore)
        if self._closed and (refusal := self._refusal()) is not None:  # perhaps before the request could be seen
            self.reject(stream, refusal)

    def apply(
        self, stream: Stream, prepare: Prepare, *, tenant: str | None, priority: int, deadline: float | None
    ) -> None:
        """Take in a request that applies for a ticket. It is prepared, on the engine thread, once it has one.

        Never blocks. An engine that is draining or has ended fails the stream.
        """

        def refuse(failure: EngineError) -> None:
            wake(stream.fail(failure))

        self._commands.send(
            partial(self._take_applicant, UnpreparedRequest(stream, prepare), tenant, priority, deadline), refuse
        )

    def leave(self, request_id: int) -> bool:
        """Release a prepared request, with its ticket; False if it has ended meanwhile."""
        return self._requests.pop(request_id, None) is not None

    def reject(self, stream: Stream, failure: LLMEngineError) -> None:
        """End a request with an error, unless it has left."""
        if self._take_out(stream.log.request_id) is not None:
            wake(stream.fail(failure))
            self._commands.nudge()  # the engine may be draining and wait for this request

    def finish(self, request_id: int, reason: FinishReason) -> None:
        """End a request with an empty output, unless it has left. Engine thread only."""
        if (request := self._take_out(request_id)) is None:
            return
        self._counters.num_finished_requests += len(request.stream.members)
        for member in request.stream.members:
            member.log.finish_reason = reason
            member.log.finished = time.monotonic()
            wake(member.finish())

    def refuse_applicants(self) -> None:
        """Reject the requests that have no ticket, since the engine drains. Engine thread only."""
        for request in list(self._requests.values()):
            if request.ticket is None and (refusal := self._refusal()) is not None:
                self.reject(request.stream, refusal)

    def close(self) -> None:
        """Reject all requests, those that are here and later ones, since the engine has ended."""
        self._closed = True
        for request_id in list(self._requests):
            if (refusal := self._refusal()) is not None and (request := self._take_out(request_id)) is not None:
                wake(request.stream.fail(refusal))

    def _take_applicant(
        self, request: UnpreparedRequest, tenant: str | None, priority: int, deadline: float | None
    ) -> None:
        if (refusal := self._refusal()) is not None:
            wake(request.stream.fail(refusal))
            return
        request_id = request.stream.log.request_id
        self._requests[request_id] = request
        if request.stream.abort_requested:
            self.finish(request_id, "abort")
            return
        request.applicant = self._admission.apply(partial(self._grant, request_id), tenant, priority)
        if deadline is not None:
            self._deadlines.add(deadline, request_id)

    def _grant(self, request_id: int, ticket: AdmissionTicket) -> None:
        """Pass a ticket on to the engine thread. On the thread that made the room."""
        self._commands.send(partial(self._prepare_applicant, request_id, ticket), lambda _: ticket.release())

    def _prepare_applicant(self, request_id: int, ticket: AdmissionTicket) -> None:
        if (request := self._requests.get(request_id)) is None:
            ticket.release()  # it ended before it heard of the ticket
            return
        request.applicant = None
        request.ticket = ticket
        try:
            _start_job(request)
        except RuntimeError as fault:
            failure: LLMEngineError | None = self._refusal()  # the threads end before the engine does
            if failure is None:
                failure = RequestFailedError(f"the prompt could not be prepared: {fault}")
                failure.__cause__ = fault
            self.reject(request.stream, failure)

    def _take_out(self, request_id: int) -> UnpreparedRequest | None:
        """Remove a request, with all that it holds, to end its stream; None if another thread has removed it."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            if request.applicant is not None:
                self._admission.withdraw(request.applicant)
            if request.job is not None:
                request.job.cancel()
            if request.ticket is not None:
                request.ticket.release()
        return request


def _start_job(request: UnpreparedRequest) -> None:
    assert request.ticket is not None
    request.job = request.prepare(request.ticket)
    if request.stream.ended:  # before its job was known
        request.job.cancel()


def _ignore(_: EngineError) -> None:
    """A deadline means nothing to an engine that has ended."""
