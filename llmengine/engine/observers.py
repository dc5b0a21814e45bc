"""Observers: tells `EngineObserver`s what happens, at no cost per token and at none while there are no observers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.request import Request, RequestStatus
from llmengine.engine.step_plan import LaunchedStep
from llmengine.engine.stream import OutputStream, Stream
from llmengine.observer import EngineObserver, PrefixCacheChange, RequestEnd, StepRecord, SubmittedRequest
from llmengine.outputs import GenerationOutput, OutputLog, RequestTimeline

logger = logging.getLogger(__name__)

_FEW = 64
"""Requests that end while they are absent may be referred to until there are this many."""


class TokenGaps:
    """How long requests wait from one token to the next. Engine thread only.

    Nearly always a step gives a token to the same requests as the step before it. Their gaps are all the time between
    the two steps, and one comparison of two lists shows it. Only when the requests differ, those that came and went are
    looked at one by one: some have their first token, and some come back that had none for some steps (preempted,
    paused, or waiting for a grammar).
    """

    def __init__(self) -> None:
        self._previous: list[Request] = []
        """Requests that had a token in the latest step, in the step's order."""
        self._before: set[Request] = set()
        """The same requests."""
        self._at = 0.0
        """When that step ended."""
        self._absent: dict[Request, float] = {}
        """Request without a token in the latest step -> when it had its latest. Some may have ended since."""
        self._max_absent = _FEW

    def update(
        self, changed: list[Request], now: float
    ) -> tuple[Sequence[tuple[float, int]], Sequence[RequestTimeline]]:
        """The gaps that end with a step's tokens, with how often each occurs, and the timelines of first tokens.

        `changed` are the requests that got tokens, at the moment `now`.
        """
        first: Sequence[RequestTimeline] = ()
        gaps: Sequence[tuple[float, int]] = ()
        if changed != self._previous:
            gaps, first = self._compare(changed, now)
        elif changed:
            gaps = ((now - self._at, len(changed)),)
        self._previous, self._at = changed, now
        return gaps, first

    def forget(self) -> None:
        """Drop all references to requests, since none is left."""
        self._previous = []
        self._before.clear()
        self._absent.clear()

    def _compare(
        self, changed: list[Request], now: float
    ) -> tuple[Sequence[tuple[float, int]], Sequence[RequestTimeline]]:
        gaps: list[tuple[float, int]] = []
        first: list[RequestTimeline] = []
        here = set(changed)
        came, went = here - self._before, self._before - here
        self._before = here
        if num_stayed := len(here) - len(came):
            gaps.append((now - self._at, num_stayed))
        for request in came:
            log = request.stream.log
            since = self._absent.pop(request, None)
            if since is not None:
                gaps.append((now - since, 1))
            elif log.first_token is not None and log.first_token >= now:
                first.append(_timeline(log))
        for request in went:
            if request.status is not RequestStatus.FINISHED:
                self._absent[request] = self._at
        if len(self._absent) > self._max_absent:
            items = self._absent.items()
            self._absent = {request: since for request, since in items if request.status is not RequestStatus.FINISHED}
            self._max_absent = 2 * len(self._absent) + _FEW
        return gaps, first


class RequestObservation:
    """Who is told of the end of a request's outputs, and what each of them noted when it was submitted."""

    __slots__ = ("_notes", "_observers", "_request")

    def __init__(
        self, observers: Observers, request: SubmittedRequest, notes: Sequence[tuple[EngineObserver, object]]
    ) -> None:
        self._observers = observers
        self._request = request
        self._notes = notes

    def ended(self, stream: OutputStream) -> None:
        """Report that one of the request's streams has ended. Any thread."""
        log = stream.log
        ended = log.finished if log.finished is not None and stream.failure is None else time.monotonic()
        output = GenerationOutput(log, 0, stream.num_published, log.finish_reason)
        error = stream.failure or log.error
        for observer, note in self._notes:
            self._observers.tell_end(observer, RequestEnd(self._request, note, output, error, ended))


class Observers:
    """The observers of one engine. They may be added and removed on any thread, at any time.

    Attributes:
        active: all observers; replaced, never changed.
        cache_followers: those of them that override `prefix_cache_changed`; likewise.
    """

    def __init__(self) -> None:
        self.active: tuple[EngineObserver, ...] = ()
        self.cache_followers: tuple[EngineObserver, ...] = ()
        self._informed: tuple[EngineObserver, ...] = ()
        """Followers that know the cache's content as of the latest report."""
        self._lock = threading.Lock()
        self._gaps = TokenGaps()
        self._busy_since: float | None = None
        """When the latest step ended; None if the engine has slept since."""

    def add(self, observer: EngineObserver) -> None:
        """Tell the observer what happens from now on. Adding it twice changes nothing."""
        with self._lock:
            if observer not in self.active:
                self.active = (*self.active, observer)
                self.cache_followers = tuple(filter(_follows_cache, self.active))

    def remove(self, observer: EngineObserver) -> None:
        """Tell the observer nothing more, except for a call that is under way. Idempotent."""
        with self._lock:
            self.active = tuple(other for other in self.active if other is not observer)
            self.cache_followers = tuple(filter(_follows_cache, self.active))

    def submitted(self, stream: Stream, request: SubmittedRequest) -> None:
        """Report a new request, and remember who is told of its end. On the caller's thread."""
        notes = []
        for observer in self.active:
            try:
                notes.append((observer, observer.request_submitted(request)))
            except Exception:
                self._drop(observer)
        observation = RequestObservation(self, request, notes)
        for member in stream.members:
            member.observation = observation

    def tell_end(self, observer: EngineObserver, end: RequestEnd) -> None:
        """Report the end of an output to an observer, unless it was removed."""
        if observer in self.active:
            try:
                observer.request_ended(end)
            except Exception:
                self._drop(observer)

    def step_ended(
        self,
        step: LaunchedStep,
        changed: list[Request],
        *,
        began: float,
        ended: float,
        forward_s: float,
    ) -> None:
        """Report a step, between the update of its requests and their publication. On the engine thread.

        `changed` are the requests that got tokens; `began` is the beginning of the engine's loop for this step.
        """
        gaps, first_tokens = self._gaps.update(changed, ended)
        began = began if self._busy_since is None else self._busy_since
        self._busy_since = ended
        record = StepRecord(
            number=step.batch.step,
            ended=ended,
            duration_s=ended - began,
            forward_s=forward_s,
            num_requests=len(step.batch.rows),
            num_tokens=step.num_tokens,
            token_gaps=gaps,
            first_tokens=first_tokens,
        )
        for observer in self.active:
            try:
                observer.step_ended(record)
            except Exception:
                self._drop(observer)

    def report_cache(self, cache: KVCacheManager) -> None:
        """Report what changed in the prefix cache since the last call, if anybody follows it. On the engine thread."""
        followers = self.cache_followers
        if not followers:
            cache.journal, self._informed = None, ()
            return
        journal = cache.journal or cache.start_journal()
        stored, removed = journal.take()
        for observer in followers:
            is_whole = observer not in self._informed
            if not (is_whole or stored or removed):
                continue
            change = PrefixCacheChange(
                is_whole, () if is_whole else removed, journal.blocks if is_whole else stored, cache.block_size
            )
            try:
                observer.prefix_cache_changed(change)
            except Exception:
                self._drop(observer)
        self._informed = followers

    def sleeps(self, *, has_requests: bool) -> None:
        """Note that the engine has nothing to compute; refer to no request if it has none. On the engine thread."""
        self._busy_since = None
        if not has_requests:
            self._gaps.forget()

    def engine_ended(self, failure: BaseException | None) -> None:
        """Report that the engine has ended all requests."""
        for observer in self.active:
            try:
                observer.engine_ended(failure)
            except Exception:
                self._drop(observer)

    def close(self) -> None:
        """Report that the engine's owner closed it, and report nothing more. Takes no lock."""
        observers, self.active, self.cache_followers = self.active, (), ()
        for observer in observers:
            try:
                observer.engine_closed()
            except Exception:
                _log_failure(observer)

    def _drop(self, observer: EngineObserver) -> None:
        _log_failure(observer)
        self.remove(observer)


def _follows_cache(observer: EngineObserver) -> bool:
    return type(observer).prefix_cache_changed is not EngineObserver.prefix_cache_changed


def _log_failure(observer: EngineObserver) -> None:
    """Log the exception that is being handled."""
    logger.exception("llmengine: observer %r raised an error and was removed", observer)


def _timeline(log: OutputLog) -> RequestTimeline:
    return RequestTimeline(log.queued, log.first_scheduled, log.first_token, None, log.num_preemptions)
