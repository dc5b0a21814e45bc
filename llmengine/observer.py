"""EngineObserver: the hooks by which metrics, traces and programs of one's own follow an engine's work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from llmengine.errors import LLMEngineError
from llmengine.outputs import GenerationOutput, RequestTimeline
from llmengine.request_options import RequestOptions
from llmengine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SubmittedRequest:
    """A request as its caller made it.

    Attributes:
        number: the engine's number of the request, unique within an `LLM`.
        params: the parameters in force.
        options: the request's options, with the caller's `request_id` and `metadata`.
        is_chat: the prompt is a conversation.
        is_streaming: the caller asked for outputs as tokens arrive.
    """

    number: int
    params: SamplingParams
    options: RequestOptions
    is_chat: bool
    is_streaming: bool


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """The end of one output of a request; a request with `SamplingParams.num_outputs` above 1 has several.

    Attributes:
        request: what was submitted.
        note: what this observer's `request_submitted` returned for the request.
        output: everything that was generated. Its `finish_reason` is None if the request failed with `error`, as when
            the engine ended or its prompt was refused after it had been tokenized.
        error: the failure, if there was one.
        ended: moment of the end, in seconds of `time.monotonic()`.
    """

    request: SubmittedRequest
    note: object
    output: GenerationOutput
    error: LLMEngineError | None
    ended: float


@dataclass(slots=True)
class StepRecord:
    """A step that has ended. It is never changed; it is not frozen, since that would make it slower to create.

    Attributes:
        number: steps are numbered from 1, in order.
        ended: moment at which its result arrived, in seconds of `time.monotonic()`.
        duration_s: wall-clock seconds from the end of the previous step, or from the end of the engine's sleep if it
            slept, to the end of this one.
        forward_s: seconds of the model's forward pass; 0 if the backend does not report it.
        num_requests: requests in the step.
        num_tokens: tokens that the model computed in it.
        token_gaps: (seconds since the previous token, number of requests for which it was that long), for all requests
            that got a further token. Tokens that one step gives a request arrive together and count once.
        first_tokens: timelines of the requests that got their first token.
    """

    number: int
    ended: float
    duration_s: float
    forward_s: float
    num_requests: int
    num_tokens: int
    token_gaps: Sequence[tuple[float, int]]
    first_tokens: Sequence[RequestTimeline]


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """The content of a full KV block that later requests can reuse.

    Attributes:
        uid: number of the content, unique within an `LLM`; a content that is lost and computed again has a new one.
        parent: uid of the content before it; None at the start of a prompt.
        salt: only requests of an equal salt can reuse it, see `RequestOptions.cache_salt`.
        token_ids: the block's own tokens, as many as a block has.
    """

    uid: int
    parent: int | None
    salt: Hashable
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixCacheChange:
    """How the content of the prefix cache changed since the observer was last told.

    Attributes:
        is_whole: `stored` is all that the cache has; forget what was known before.
        removed: uids of contents that can be found no more.
        stored: contents that can be found from now on, parents before their children.
        block_size: tokens of a block.
    """

    is_whole: bool
    removed: Sequence[int]
    stored: Sequence[CachedBlock]
    block_size: int


class EngineObserver:
    """What an engine tells those that follow its work; override the methods that you need.

    `LLM.add_observer` adds an observer. Its methods are called on the threads named here, several of them possibly at
    once, and delay what these threads do: `step_ended` delays the next step of all requests. So they return within
    microseconds and never block. They may count under a lock that is held as briefly, append to a deque, put into a
    `queue.SimpleQueue`, call `loop.call_soon_threadsafe`, `LLM.stats()`, `LLM.health()` and `RequestHandle.abort()`.
    Everything else belongs on another thread.

    An observer whose method raises is removed, and the error is logged. The engine goes on.

    The engine refers to its observers. An observer that refers to the `LLM` keeps it from being collected, so it
    should do so weakly.
    """

    def request_submitted(self, request: SubmittedRequest) -> object:
        """A request is about to be handed to the engine. On the caller's thread and in its context (`contextvars`).

        Returns anything; it comes back as `RequestEnd.note`. One `request_ended` follows for each output of the
        request. Requests that are refused at once, which raise in `generate_async`, are not reported.
        """
        return None

    def request_ended(self, end: RequestEnd) -> None:
        """An output has ended, for whatever reason; nothing of it will change. On the engine thread, mostly.

        Its readers see the end when this has returned. Reported for requests that were submitted after the observer
        had been added.
        """

    def step_ended(self, step: StepRecord) -> None:
        """A step has ended; its tokens can be read when this has returned. On the engine thread."""

    def prefix_cache_changed(self, change: PrefixCacheChange) -> None:
        """Other prefixes can be reused than before. On the engine thread, at most once for each step.

        The first change tells the whole content. Followed only for observers that override this method.
        """

    def engine_ended(self, failure: BaseException | None) -> None:
        """The engine has ended all requests and will take no others; `failure` is what killed it.

        On the engine thread, or on the watchdog's if a step hangs.
        """

    def engine_closed(self) -> None:
        """The `LLM` was closed or collected; nothing follows. On any thread, perhaps inside a garbage collection.

        So this must take no lock.
        """
