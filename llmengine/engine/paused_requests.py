"""PausedRequests: the requests that wait for their consumers."""

from __future__ import annotations

from collections.abc import Iterator

from llmengine.engine.request import Request, RequestStatus


class PausedRequests:
    """Paused requests in the order of their pauses. Those that keep slot and blocks are *resident*."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._residents: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def longest(self) -> Request:
        """The request that has been paused the longest."""
        return next(iter(self._requests.values()))

    @property
    def residents(self) -> list[Request]:
        """The requests that keep slot and blocks, the longest paused first."""
        return list(self._residents.values())

    @property
    def has_residents(self) -> bool:
        """True while any paused request keeps a slot and blocks."""
        return bool(self._residents)

    def add(self, request: Request) -> None:
        """Add a request, which is resident."""
        self._requests[request.request_id] = self._residents[request.request_id] = request

    def remove(self, request: Request) -> bool:
        """Remove a request; return whether it was resident."""
        del self._requests[request.request_id]
        return self._residents.pop(request.request_id, None) is not None

    def pop_resident(self) -> Request | None:
        """The longest paused resident, which is resident no more; None if there is none."""
        return self._residents.pop(next(iter(self._residents))) if self._residents else None

    def check_integrity(self) -> None:
        """Assert that all requests are paused, and that just the residents have slots."""
        for request_id, request in self._requests.items():
            assert request.status is RequestStatus.PAUSED
            assert (request.slot is not None) == (request_id in self._residents)
