"""The waiting room by itself: a request leaves once, and takes nothing with it that others need."""

from __future__ import annotations

import itertools
import time

import pytest

from llmengine.config import SchedulerConfig
from llmengine.engine.admission import Admission, AdmissionTicket
from llmengine.engine.commands import CommandQueue
from llmengine.engine.deadlines import Deadlines
from llmengine.engine.stats import EngineCounters
from llmengine.engine.stream import FamilyStream, OutputStream, Stream
from llmengine.engine.waiting_room import WaitingRoom
from llmengine.engine.worker_threads import Job
from llmengine.errors import EngineClosedError, EngineError, RequestFailedError
from llmengine.outputs import FinishReason, OutputLog


class Lobby:
    """A waiting room with everything around it. This thread is the engine thread, and no job runs by itself."""

    def __init__(self, max_queued_requests: int = 2) -> None:
        self.is_open = True
        self.admission = Admission(SchedulerConfig(max_queued_requests=max_queued_requests).resolve())
        self.commands = CommandQueue(lambda: EngineClosedError("the test has closed"))
        self.deadlines = Deadlines()
        self.counters = EngineCounters()
        self.room = WaitingRoom(self.admission, self.commands, self.deadlines, self.counters, self.refusal)
        self.tickets: list[AdmissionTicket] = []
        self.jobs: list[Job] = []
        self.done: list[int] = []
        self.has_threads = True
        self._request_ids = itertools.count()

    def refusal(self) -> EngineError | None:
        return None if self.is_open else EngineClosedError("the test has closed")

    def stream(self) -> OutputStream:
        return OutputStream(OutputLog(next(self._request_ids), time.monotonic()))

    def job(self, stream: Stream, ticket: AdmissionTicket) -> Job:
        if not self.has_threads:
            raise RuntimeError("can't start new thread")
        self.tickets.append(ticket)
        job = Job(lambda: self.done.append(stream.log.request_id))
        self.jobs.append(job)
        return job

    def prepare(self, stream: Stream, deadline: float | None = None) -> AdmissionTicket:
        ticket = self.admission.acquire_nowait()
        self.room.prepare(stream, lambda ticket: self.job(stream, ticket), ticket, deadline=deadline)
        return ticket

    def apply(self, stream: Stream, deadline: float | None = None) -> None:
        self.room.apply(stream, lambda ticket: self.job(stream, ticket), tenant=None, priority=0, deadline=deadline)
        self.commands.run_all()

    def run_jobs(self) -> list[int]:
        for job in self.jobs:
            job.run()
        return self.done


def test_a_prepared_request_leaves_once_and_keeps_its_ticket() -> None:
    lobby, stream = Lobby(), OutputStream(OutputLog(7, 0.0))
    ticket = lobby.prepare(stream)
    assert 7 in lobby.room
    assert lobby.run_jobs() == [7]
    assert lobby.room.leave(7)
    assert ticket.is_held
    assert not lobby.room.leave(7)
    lobby.room.reject(stream, RequestFailedError("too late"))
    lobby.room.finish(7, "abort")
    assert not stream.ended
    assert (len(lobby.room), lobby.admission.num_requests, lobby.counters.num_finished_requests) == (0, 1, 0)


@pytest.mark.parametrize("reason", ["abort", "timeout"])
def test_a_request_that_ends_here_gives_everything_back(reason: FinishReason) -> None:
    lobby = Lobby()
    family = FamilyStream([lobby.stream(), lobby.stream()])
    ticket = lobby.prepare(family)
    lobby.room.finish(family.log.request_id, reason)
    assert family.ended
    assert [member.log.finish_reason for member in family.members] == [reason, reason]
    assert not ticket.is_held
    assert lobby.run_jobs() == [], "its job was not cancelled"
    assert not lobby.room.leave(family.log.request_id)
    assert lobby.counters.num_finished_requests == 2


def test_a_rejected_request_fails_and_the_engine_looks_again() -> None:
    lobby, failure = Lobby(), RequestFailedError("no such token")
    stream = lobby.stream()
    ticket = lobby.prepare(stream)
    lobby.commands.run_all()
    lobby.room.reject(stream, failure)
    assert stream.failure is failure
    assert not ticket.is_held
    assert len(lobby.commands) == 1, "a draining engine would sleep on"
    assert lobby.counters.num_finished_requests == 0


def test_an_applicant_is_prepared_when_there_is_room() -> None:
    lobby = Lobby(max_queued_requests=1)
    taken, stream = lobby.admission.acquire_nowait(), lobby.stream()
    lobby.apply(stream)
    assert stream.log.request_id in lobby.room
    assert lobby.tickets == []
    taken.release()
    assert lobby.tickets == [], "it is prepared on the engine thread"
    lobby.commands.run_all()
    assert [ticket.is_held for ticket in lobby.tickets] == [True]
    assert lobby.run_jobs() == [stream.log.request_id]


def test_an_applicant_that_ends_waits_no_more() -> None:
    lobby = Lobby(max_queued_requests=1)
    taken = lobby.admission.acquire_nowait()
    first, second = lobby.stream(), lobby.stream()
    lobby.apply(first)
    lobby.apply(second)
    lobby.room.finish(first.log.request_id, "abort")
    assert lobby.admission.num_applicants == 1
    taken.release()
    lobby.commands.run_all()
    assert lobby.run_jobs() == [second.log.request_id]


def test_a_ticket_that_comes_too_late_is_given_back() -> None:
    lobby = Lobby(max_queued_requests=1)
    taken, stream = lobby.admission.acquire_nowait(), lobby.stream()
    lobby.apply(stream)
    taken.release()  # the ticket is on its way to the engine thread
    lobby.room.finish(stream.log.request_id, "abort")
    lobby.commands.run_all()
    assert lobby.tickets == []
    assert lobby.admission.num_requests == 0


def test_an_applicant_that_was_aborted_before_never_applies() -> None:
    lobby = Lobby()
    stream = lobby.stream()
    stream.abort_requested = True
    lobby.apply(stream)
    assert stream.log.finish_reason == "abort"
    assert (len(lobby.room), lobby.admission.num_requests, lobby.tickets) == (0, 0, [])


def test_a_job_that_becomes_known_after_the_end_is_cancelled() -> None:
    lobby = Lobby()
    stream = lobby.stream()

    def prepare(ticket: AdmissionTicket) -> Job:
        lobby.room.finish(stream.log.request_id, "abort")
        return lobby.job(stream, ticket)

    ticket = lobby.admission.acquire_nowait()
    lobby.room.prepare(stream, prepare, ticket, deadline=None)
    assert lobby.run_jobs() == []
    assert not ticket.is_held


def test_deadlines_are_noted_on_the_engine_thread() -> None:
    lobby = Lobby()
    first, second = lobby.stream(), lobby.stream()
    lobby.prepare(first, deadline=5.0)
    assert lobby.deadlines.next is None
    lobby.commands.run_all()
    lobby.apply(second, deadline=3.0)
    assert list(lobby.deadlines.passed(9.0)) == [second.log.request_id, first.log.request_id]


def test_without_a_thread_the_caller_keeps_its_ticket_and_an_applicant_fails() -> None:
    lobby = Lobby()
    lobby.has_threads = False
    stream = lobby.stream()
    ticket = lobby.admission.acquire_nowait()
    with pytest.raises(RuntimeError, match="new thread"):
        lobby.room.prepare(stream, lambda ticket: lobby.job(stream, ticket), ticket, deadline=None)
    assert ticket.is_held
    assert not stream.ended
    applicant = lobby.stream()
    lobby.apply(applicant)
    lobby.commands.run_all()
    assert isinstance(applicant.failure, RequestFailedError)
    assert "could not be prepared" in str(applicant.failure)
    assert (len(lobby.room), lobby.admission.num_requests) == (0, 1)


def test_threads_that_ended_with_the_engine_are_not_the_requests_fault() -> None:
    lobby = Lobby(max_queued_requests=1)
    taken, stream = lobby.admission.acquire_nowait(), lobby.stream()
    lobby.apply(stream)
    lobby.has_threads = lobby.is_open = False
    taken.release()
    lobby.commands.run_all()
    assert isinstance(stream.failure, EngineClosedError)


def test_a_draining_engine_refuses_those_without_a_ticket() -> None:
    lobby = Lobby(max_queued_requests=1)
    prepared, applicant, late = lobby.stream(), lobby.stream(), lobby.stream()
    lobby.prepare(prepared)
    lobby.apply(applicant)
    lobby.is_open = False
    lobby.room.refuse_applicants()
    lobby.apply(late)
    assert not prepared.ended
    assert isinstance(applicant.failure, EngineClosedError)
    assert isinstance(late.failure, EngineClosedError)
    assert lobby.admission.num_applicants == 0


def test_an_engine_that_has_ended_rejects_all_and_those_that_come_later() -> None:
    lobby = Lobby()
    early, late = lobby.stream(), lobby.stream()
    ticket = lobby.prepare(early)
    lobby.is_open = False
    lobby.room.close()
    late_ticket = lobby.prepare(late)
    assert isinstance(early.failure, EngineClosedError)
    assert isinstance(late.failure, EngineClosedError)
    assert early.failure is not late.failure
    assert not ticket.is_held
    assert not late_ticket.is_held
    assert lobby.run_jobs() == []
    assert len(lobby.room) == 0
