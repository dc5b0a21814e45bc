"""SlowConsumers: pausing and aborting requests whose consumers do not read (`RequestOptions.slow_consumer`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llmengine.engine.commands import CommandQueue
from llmengine.engine.request import Request, RequestStatus
from llmengine.engine.scheduler import Scheduler
from llmengine.errors import EngineError, RequestError


class SlowConsumers:
    """Pauses or aborts requests that are `max_unread_tokens` ahead of their consumers. Engine thread only.

    A paused request goes on when its consumer has read something. The consumer says so by `OutputStream.resume`.

    Args:
        abort: ends a request and gives its output the error.
    """

    def __init__(
        self, scheduler: Scheduler, commands: CommandQueue, abort: Callable[[Request, RequestError], None]
    ) -> None:
        self._scheduler = scheduler
        self._commands = commands
        self._abort = abort
        self._max_paused = scheduler.config.max_queued_requests

    def hold_back(self, request: Request) -> None:
        """Pause or abort a request whose consumer is behind."""
        stream = request.stream
        if stream.slow_consumer == "abort":
            num_unread = stream.num_published - stream.num_read
            error = RequestError(
                f"{num_unread} tokens are unread (scheduler_config.max_unread_tokens={stream.max_unread}, "
                "slow_consumer='abort')"
            )
            self._abort(request, error)
        elif request.status is RequestStatus.RUNNING:
            self._scheduler.pause(request)
            stream.resume = partial(self._commands.send, partial(self._resume, request), _ignore)
            self._resume(request)  # the consumer may have read before it could see that it has to ask
            self._limit_paused()

    def _limit_paused(self) -> None:
        # Paused requests do not count as queued: callers that wait for room while they read nothing would wait forever.
        if self._scheduler.num_paused > self._max_paused:
            error = RequestError(
                f"more than scheduler_config.max_queued_requests={self._max_paused} requests are paused for consumers "
                "that do not read; this one has been paused the longest"
            )
            self._abort(self._scheduler.longest_paused, error)

    def _resume(self, request: Request) -> None:
        """Let a paused request go on unless its consumer is behind (again)."""
        if request.status is RequestStatus.PAUSED and not request.stream.is_behind:
            request.stream.resume = None
            self._scheduler.resume(request)


def _ignore(_: EngineError) -> None:
    """An engine that has ended has nothing to resume."""
