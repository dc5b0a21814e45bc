"""What is sent, what came of it, and the seam between the load and whatever serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ENDED_EARLY = "disconnected"
"""Kind of a request whose connection or stream ended in the middle."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request of a load: a prompt or a conversation, one of which is None, and the most tokens to generate."""

    prompt: str | None
    messages: Sequence[Mapping[str, Any]] | None
    output_tokens: int


@dataclass(slots=True)
class RequestRecord:
    """Moments of one request in seconds of `time.perf_counter()`, and its counts.

    Attributes:
        due: the moment at which the load wanted it sent. Latencies count from here, so a client or a server that falls
            behind does not make them look better than a user would find them.
        sent: the moment at which it was handed over.
        arrivals: moments at which tokens arrived; tokens that arrived at the same moment are one arrival.
        num_pieces: chunks (of an endpoint) or tokens (of a library) in each arrival.
        finished: the end of its stream.
        num_prompt_tokens, num_output_tokens: as the server counted them; None if it did not say.
        error: the kind of failure; None for a success.
        detail: what the failure said.
    """

    due: float
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    num_pieces: list[int] = field(default_factory=list)
    finished: float = 0.0
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    detail: str = ""

    def arrived(self, moment: float, num_pieces: int = 1) -> None:
        """Note that pieces of the answer arrived."""
        if self.arrivals and self.arrivals[-1] == moment:
            self.num_pieces[-1] += num_pieces
        else:
            self.arrivals.append(moment)
            self.num_pieces.append(num_pieces)

    def fail(self, kind: str, detail: str) -> None:
        """Note a failure; the first one counts."""
        if self.error is None:
            self.error, self.detail = kind, detail


class RequestFailure(Exception):
    """A request failed, which the load counts by kind and outlives."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Target(Protocol):
    """Whatever serves a load."""

    async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
        """Send the request, note in the record what arrives, and return at its end.

        Raises `RequestFailure`. Cancelling this ends the request.
        """
        ...

    async def count_prompt_tokens(self, request: LoadRequest) -> int:
        """Tokens that the request's prompt has there, with what a chat template adds.

        Raises `EndpointError` or an `LLMEngineError` if it cannot say.
        """
        ...
