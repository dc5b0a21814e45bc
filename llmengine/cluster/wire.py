"""What a cluster and its replicas tell each other: commands one way, updates the other.

Both travel in batches: all commands of a turn of the cluster's loop, and all that a replica's requests put out since
its latest update. Tuples are pickled in a third of the time that dataclasses take.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmengine.batch import BackendInfo, TokenLogprobs
from llmengine.chat.answers.answer_log import PieceParser
from llmengine.engine.stats import EngineHealth, EngineStats
from llmengine.errors import InvalidRequestError, LLMEngineError, RequestFailedError
from llmengine.outputs import FinishReason
from llmengine.sampling_params import SamplingParams


class ChatCall(NamedTuple):
    """A conversation, which the replica renders: messages, and the keywords of its template."""

    messages: Sequence[Mapping[str, Any]]
    keywords: Mapping[str, Any]


Prompt = str | Sequence[int] | ChatCall


class Submit(NamedTuple):
    """Begin a request.

    Attributes:
        key: names it from now on.
        packed: what it is, see `pack_request`.
        limits_s: what is left of its deadlines, by their names in `RequestOptions`.
    """

    key: int
    packed: bytes
    limits_s: Mapping[str, float]


def pack_request(prompt: Prompt, params: SamplingParams, options: Mapping[str, Any]) -> bytes:
    """A request as bytes, of which the wire need know nothing.

    Packed where it is submitted, so that a value that cannot be sent is its caller's error. On the wire, it would break
    the connection to a replica, and with it the requests of others.

    Args:
        options: `RequestOptions` as keywords, without the deadlines.

    Raises:
        InvalidRequestError: a value cannot be pickled; the message names it.
    """
    try:
        return pickle.dumps((prompt, params, options))
    except Exception as error:
        for name, value in {"the prompt": prompt, "sampling_params": params, **options}.items():
            try:
                pickle.dumps(value)
            except Exception as its_error:
                raise InvalidRequestError(f"{name} cannot be sent to a replica: {its_error}") from its_error
        raise InvalidRequestError(f"the request cannot be sent to a replica: {error}") from error


def unpack_request(packed: bytes) -> tuple[Prompt, SamplingParams, dict[str, Any]]:
    """What `pack_request` was given. Raises what a value's class does, or its absence, where it is unpickled."""
    request: tuple[Prompt, SamplingParams, dict[str, Any]] = pickle.loads(packed)
    return request


class Abort(NamedTuple):
    """End a request, see `RequestHandle.abort`."""

    key: int
    keep_prefix: bool


class Hold(NamedTuple):
    """Stop reading a request's output, or read on: its consumer is behind, or has caught up."""

    key: int
    held: bool


Command = Submit | Abort | Hold


class Head(NamedTuple):
    """What is known of an output with its first token: its prompt, how long it waited for its first step, and how the
    answer to a conversation is divided.
    """

    prompt: str | None
    prompt_token_ids: Sequence[int]
    prompt_logprobs: Sequence[TokenLogprobs | None] | None
    num_cached_tokens: int
    queued_s: float | None
    new_answer_parser: Callable[[], PieceParser] | None


class End(NamedTuple):
    """Why an output ended."""

    finish_reason: FinishReason
    matched_stop: str | int | None
    num_preemptions: int
    error: Fault | None


class Delta(NamedTuple):
    """What one output of a request has put out since its previous delta.

    Attributes:
        key: of the request.
        member: number of the output among those of its prompt.
        token_ids, text, logprobs: what is new.
        token_texts: (position counted from the prompt's first token, token id) -> text, of all tokens in `logprobs`,
            and of the prompt's in the first delta.
        head: in the first delta.
        end: in the last one.
    """

    key: int
    member: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs] | None
    token_texts: dict[tuple[int, int], str] | None
    head: Head | None
    end: End | None


class Fault(NamedTuple):
    """An error that was caught, with what caused it as text, since pickling loses `__cause__`."""

    error: LLMEngineError
    cause: str | None

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """Describe an error; one that is not llmengine's becomes the cause of a `RequestFailedError`.

        A caller's subclass of one of llmengine's may not exist at the other end, or hold what cannot be pickled; it
        becomes the cause of the error that it specializes.
        """
        if not isinstance(error, LLMEngineError):
            return cls(RequestFailedError(f"the request could not be run: {error!r}"), _text(error))
        kind = next(each for each in type(error).__mro__ if each.__module__ == LLMEngineError.__module__)
        if kind is not type(error):
            return cls(kind(str(error)), _text(error))
        return cls(error, None if error.__cause__ is None else _text(error.__cause__))

    def restore(self) -> LLMEngineError:
        """The error, caused by a `RemoteError` if it had a cause."""
        if self.cause is not None:
            self.error.__cause__ = RemoteError(self.cause)
        return self.error


class RemoteError(Exception):
    """An error of another process, as Python printed it there."""


class Failed(NamedTuple):
    """A request that failed as a whole, such as one that the replica does not take."""

    key: int
    fault: Fault


class Update(NamedTuple):
    """All that a replica has to say since its previous update."""

    outputs: list[Delta | Failed]
    stats: EngineStats
    health: EngineHealth


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Facts about a loaded replica.

    Attributes:
        backend: see `LLM.info`.
        default_params: see `LLM.get_default_sampling_params`.
        max_unread_tokens: see `SchedulerConfig`.
    """

    backend: BackendInfo
    default_params: SamplingParams
    max_unread_tokens: int


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()
