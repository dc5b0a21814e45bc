"""HeldFamilies: requests that wait until the prompt that they share is computed."""

from __future__ import annotations

from collections.abc import Callable

from llmengine.engine.request import Request, RequestStatus


class HeldFamilies:
    """Holds the members of each family until its first member, the leader, has computed their prompt.

    Args:
        enqueue: called with each member that need not wait any longer.
    """

    def __init__(self, enqueue: Callable[[Request], None]) -> None:
        self._enqueue = enqueue
        # Running leaders for which members wait, and some for which they no longer wait.
        self._leaders: list[Request] = []

    def hold(self, leader: Request) -> None:
        """Hold the relatives of a new request, if it has any."""
        if leader.family is not None:
            leader.family.held = list(leader.relatives[1:])
            for request in leader.family.held:
                request.status = RequestStatus.HELD

    def watch(self, request: Request) -> None:
        """Note that a request runs, which may be a leader."""
        if request.family is not None and request.family.held:
            self._leaders.append(request)

    def release_ready(self) -> None:
        """Enqueue the families whose prompts are computed by the steps launched so far."""
        if self._leaders:
            self._leaders = [leader for leader in self._leaders if self._still_holds(leader)]

    def release(self, request: Request) -> None:
        """Enqueue the family of a leader, which has ended or pauses; does nothing for other requests."""
        if request.family is not None and request is request.relatives[0]:
            held, request.family.held = request.family.held, []
            for relative in held:
                self._enqueue(relative)

    def drop(self, request: Request) -> None:
        """Forget a member that has ended."""
        if request.family is not None and request in request.family.held:
            request.family.held.remove(request)

    def _still_holds(self, leader: Request) -> bool:
        if leader.status is not RequestStatus.RUNNING:
            return False
        if leader.num_computed_tokens < len(leader.prompt_token_ids):
            return True
        self.release(leader)
        return False
