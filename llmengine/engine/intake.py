"""Intake: from what a caller passes to a `Request` that the engine has, with everything checked on the way.

Whatever is wrong with a request is found here, on the caller's thread or on a tokenizer thread: nothing that reaches
the engine thread can fail there and take others with it.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from llmengine.batch import BackendInfo
from llmengine.engine.admission import AdmissionTicket
from llmengine.engine.bad_words import bad_word_ids
from llmengine.engine.engine import Engine
from llmengine.engine.handle import RequestHandle
from llmengine.engine.request import Request
from llmengine.engine.stream import OutputStream, wake
from llmengine.errors import EngineClosedError, InvalidRequestError, LLMEngineError, PromptTooLongError
from llmengine.outputs import OutputLog
from llmengine.sampling_params import SamplingParams
from llmengine.tokenizer import ChatTokenizer, IncrementalDetokenizer, Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation: mappings with "role" and "content"."""


_MAX_PRIORITY = 1_000_000
_NUM_CACHED_BAD_WORDS = 16


@dataclass(frozen=True, slots=True)
class _TenantSalt:
    """A cache salt that requests of one tenant alone can have."""

    tenant: str
    salt: Hashable


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How to run one request; raises `InvalidRequestError` for a value of the wrong type or range."""

    params: SamplingParams
    streaming: bool = False
    priority: int = 0
    tenant: str | None = None
    deadline_s: float | None = None
    first_token_deadline_s: float | None = None
    cache_salt: Hashable = None
    wait_for_admission: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.params, SamplingParams):
            raise InvalidRequestError(f"sampling_params={self.params!r} is not a SamplingParams")
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise InvalidRequestError(f"priority={self.priority!r} is not an integer")
        if not -_MAX_PRIORITY <= self.priority <= _MAX_PRIORITY:
            raise InvalidRequestError(f"priority={self.priority} is outside [{-_MAX_PRIORITY}, {_MAX_PRIORITY}]")
        if self.tenant is not None and not isinstance(self.tenant, str):
            raise InvalidRequestError(f"tenant={self.tenant!r} is not a string")
        _check_deadline("deadline_s", self.deadline_s)
        _check_deadline("first_token_deadline_s", self.first_token_deadline_s)
        try:
            hash(self.cache_salt)
        except TypeError as error:
            raise InvalidRequestError(f"cache_salt={self.cache_salt!r} is not hashable") from error


@dataclass(frozen=True, slots=True)
class _Encoded:
    text: str | None
    token_ids: list[int]


class Intake:
    """Checks, tokenizes and submits the requests of one model.

    Text is tokenized on `tokenizer_threads` where the caller must not be blocked. Every method may be called from any
    thread. `owner` is kept alive by the handles.
    """

    def __init__(
        self,
        engine: Engine,
        info: BackendInfo,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        tokenizer_threads: ThreadPoolExecutor,
        *,
        share_prefixes_across_tenants: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._share_prefixes = share_prefixes_across_tenants
        self._engine = engine
        self._info = info
        self._eos_token_ids = frozenset(eos_token_ids)
        self._special_ids: frozenset[int] = frozenset(getattr(tokenizer, "special_ids", ()))
        # Callers tend to send the same words with each request.
        self._bad_words = lru_cache(_NUM_CACHED_BAD_WORDS)(partial(bad_word_ids, tokenizer))
        self._threads = tokenizer_threads
        self._request_ids = itertools.count()
        # Seeded by the system once: asking it for each request takes as long as all else here.
        self._seeds = random.Random()

    def submit(self, prompt: Prompt, options: RequestOptions, owner: object) -> RequestHandle:
        """Submit without blocking; raises what is wrong with anything but the tokens of a text prompt."""
        if isinstance(prompt, str):
            return self._submit_later(partial(self._encode, prompt), options, owner)
        encoded = self._encode(prompt)
        if options.wait_for_admission:
            self._check_length(encoded)
            return self._submit_later(lambda: encoded, options, owner)
        return self._submit_now(encoded, options, owner, self._engine.admission.acquire_nowait)

    def submit_chat(
        self, messages: Messages, template_kwargs: Mapping[str, Any], options: RequestOptions, owner: object
    ) -> RequestHandle:
        """Like `submit` with the text that the chat template makes of `messages`, which must not change meanwhile."""
        return self._submit_later(partial(self._encode_chat, messages, template_kwargs), options, owner)

    def submit_blocking(self, prompt: Prompt, options: RequestOptions, owner: object) -> RequestHandle:
        """Submit, tokenizing on this thread and waiting for room in the queue."""
        acquire = partial(self._engine.admission.acquire_blocking, options.tenant, options.priority)
        return self._submit_now(self._encode(prompt), options, owner, acquire)

    def _submit_now(
        self,
        encoded: _Encoded,
        options: RequestOptions,
        owner: object,
        acquire: Callable[[], AdmissionTicket],
    ) -> RequestHandle:
        self._check_params(options.params)
        self._engine.check_open()
        ticket = acquire()
        try:
            self._engine.check_open()  # it may have closed while `acquire` was waiting
            stream = self._new_stream(options)
            handle = RequestHandle(stream, self._engine.abort, streaming=options.streaming, owner=owner)
            self._engine.submit(self._make_request(stream, encoded, options, ticket))
        except BaseException:
            ticket.release()
            raise
        return handle

    def _submit_later(self, encode: Callable[[], _Encoded], options: RequestOptions, owner: object) -> RequestHandle:
        self._check_params(options.params)
        self._engine.check_open()
        ticket = None if options.wait_for_admission else self._engine.admission.acquire_nowait()
        stream = self._new_stream(options)
        handle = RequestHandle(stream, self._engine.abort, streaming=options.streaming, owner=owner)
        if ticket is None:
            deadlines = [moment for moment in _deadlines(stream, options) if moment is not None]
            self._engine.apply(
                stream,
                partial(self._begin, stream, encode, options),
                tenant=options.tenant,
                priority=options.priority,
                deadline=min(deadlines, default=None),
            )
            return handle
        try:
            self._threads.submit(self._encode_and_submit, stream, encode, options, ticket)
        except RuntimeError:  # the threads were shut down since `check_open()`
            ticket.release()
            self._engine.check_open()
            raise
        return handle

    def _begin(
        self, stream: OutputStream, encode: Callable[[], _Encoded], options: RequestOptions, ticket: AdmissionTicket
    ) -> None:
        """Go on with a request that has its place in the queue. On the engine thread."""
        try:
            self._threads.submit(self._encode_and_submit, stream, encode, options, ticket)
        except RuntimeError:  # the threads were shut down: the LLM closes
            ticket.release()
            wake(stream.fail(EngineClosedError("the LLM is closed")))

    def _encode_and_submit(
        self, stream: OutputStream, encode: Callable[[], _Encoded], options: RequestOptions, ticket: AdmissionTicket
    ) -> None:
        """Tokenize and submit on a tokenizer thread; whatever goes wrong ends up in the stream."""
        try:
            self._engine.submit(self._make_request(stream, encode(), options, ticket))
        except LLMEngineError as failure:
            ticket.release()
            wake(stream.fail(failure))
            self._engine.nudge()  # it may be draining and wait for this request

    def _new_stream(self, options: RequestOptions) -> OutputStream:
        log = OutputLog(request_id=next(self._request_ids), queued=time.monotonic())
        if options.params.logprobs is not None:
            log.logprobs = []
        return OutputStream(log)

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        if self.tokenizer is None:
            bad_word_ids(None, params.bad_words)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", dict(params.logit_bias))
        for word in params.bad_words:
            self._check_ids("bad_words", () if isinstance(word, str) else word)

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self._info.vocab_size:
                raise InvalidRequestError(f"{name} holds {token_id}, outside [0, {self._info.vocab_size})")

    def _with_bad_word_ids(self, params: SamplingParams) -> SamplingParams:
        """Return the parameters with token ids for bad words that are strings."""
        if not any(isinstance(word, str) for word in params.bad_words):
            return params
        words = self._bad_words(params.bad_words)
        for word in words:
            self._check_ids("bad_words", word)
        return params.replace(bad_words=words)

    def _check_length(self, encoded: _Encoded) -> None:
        num_tokens, limit = len(encoded.token_ids), self._info.max_model_len
        if num_tokens == 0:
            raise InvalidRequestError("the prompt has no tokens")
        if num_tokens >= limit:
            raise PromptTooLongError(
                f"the prompt has {num_tokens} tokens; with one generated token the limit is {limit} "
                "(max_model_len, and what kv_cache_config leaves room for)"
            )

    def _encode(self, prompt: Prompt) -> _Encoded:
        if not isinstance(prompt, str):
            return _Encoded(None, _as_token_ids(prompt, self._info.vocab_size))
        if self.tokenizer is None:
            raise InvalidRequestError("the prompt is text, but there is no tokenizer; pass token ids")
        with _tokenizer_faults():
            return _Encoded(prompt, self.tokenizer.encode(prompt))

    def _encode_chat(self, messages: Messages, template_kwargs: Mapping[str, Any]) -> _Encoded:
        if not isinstance(self.tokenizer, ChatTokenizer):
            raise InvalidRequestError("the tokenizer has no apply_chat_template(); render the prompt yourself")
        with _tokenizer_faults():
            text = self.tokenizer.apply_chat_template(messages, **template_kwargs)
            return _Encoded(text, self.tokenizer.encode(text, add_special_tokens=False))

    def _make_request(
        self, stream: OutputStream, encoded: _Encoded, options: RequestOptions, ticket: AdmissionTicket
    ) -> Request:
        num_tokens, limit, params = len(encoded.token_ids), self._info.max_model_len, options.params
        self._check_length(encoded)
        ticket.add_tokens(num_tokens)
        stream.log.prompt = encoded.text
        stream.log.prompt_token_ids = tuple(encoded.token_ids)
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= self._eos_token_ids
        detokenizer = None
        if self.tokenizer is not None:
            skip = self._special_ids if params.skip_special_tokens else frozenset()
            with _tokenizer_faults():
                detokenizer = IncrementalDetokenizer(self.tokenizer, encoded.token_ids, skip, params.stop)
        deadline, first_token_deadline = _deadlines(stream, options)
        salt = options.cache_salt
        if options.tenant is not None and not self._share_prefixes:
            salt = _TenantSalt(options.tenant, salt)
        return Request(
            stream=stream,
            prompt_token_ids=encoded.token_ids,
            params=self._with_bad_word_ids(params),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids,
            max_total_tokens=limit if params.max_new_tokens is None else min(limit, num_tokens + params.max_new_tokens),
            priority=options.priority,
            tenant=options.tenant,
            deadline=deadline,
            first_token_deadline=first_token_deadline,
            cache_salt=salt,
            detokenizer=detokenizer,
            ticket=ticket,
        )


def _check_deadline(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, (int, float)) or not value > 0):
        raise InvalidRequestError(f"{name}={value!r} is not a number above 0")


def _deadlines(stream: OutputStream, options: RequestOptions) -> tuple[float | None, float | None]:
    """Return the moments by which the request has to have ended, and to have its first token."""
    queued = stream.log.queued
    whole, first = options.deadline_s, options.first_token_deadline_s
    return None if whole is None else queued + whole, None if first is None else queued + first


def as_prompts(prompts: Any) -> Iterable[Prompt]:
    """Return one prompt, or several, as several. An empty list is no prompt; arrays of one dimension are token ids.

    Raises `InvalidRequestError` for what is neither.
    """
    if isinstance(prompts, str):
        return (prompts,)
    if isinstance(prompts, Sequence):
        one = len(prompts) > 0 and _is_integer_type(type(prompts[0]))
    else:
        one = getattr(prompts, "ndim", None) in (0, 1)
    if not one and (not isinstance(prompts, Iterable) or isinstance(prompts, (Mapping, Set))):
        raise InvalidRequestError(
            f"prompts is a {type(prompts).__name__}; it must be text, token ids or several of these"
        )
    return (prompts,) if one else prompts


def _as_token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """Return token ids as ints; raises `InvalidRequestError` for anything else."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(values, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(f"the prompt is a {type(prompt).__name__}; it must be text or token ids")
    token_ids = list(values)
    kinds = set(map(type, token_ids))
    for kind in kinds:
        if not _is_integer_type(kind):
            raise InvalidRequestError(f"the prompt holds a {kind.__name__}; token ids are integers")
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        worst = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(f"the prompt holds token id {worst}, outside [0, {vocab_size})")
    return token_ids if kinds <= {int} else [int(token_id) for token_id in token_ids]


def _is_integer_type(kind: type) -> bool:
    """Return whether objects of this type count as token ids; arrays have `__index__` too, but are not."""
    return kind is not bool and hasattr(kind, "__index__") and not hasattr(kind, "__len__")


@contextmanager
def _tokenizer_faults() -> Iterator[None]:
    """Let our own errors through, and make one of ours of what a caller's tokenizer raises."""
    try:
        yield
    except LLMEngineError:
        raise
    except Exception as fault:
        raise InvalidRequestError(f"the prompt could not be tokenized: {fault!r}") from fault
