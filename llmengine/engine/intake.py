"""Intake: turns what a caller passes into a `Request` that the engine has, and checks all of it on the way.

Every fault of a request is found here, on the caller's thread or on a tokenizer thread, so that no request can fail on
the engine thread and take others with it.
"""

from __future__ import annotations

import itertools
import random
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from llmengine.batch import BackendInfo
from llmengine.chat.answers.answer_log import AnswerLog
from llmengine.checks import require_kind
from llmengine.engine.admission import AdmissionTicket
from llmengine.engine.bad_words import WordIds, bad_word_ids
from llmengine.engine.chat_prompt import ChatPrompt
from llmengine.engine.engine import Engine
from llmengine.engine.handle import RequestHandle
from llmengine.engine.prompt_encoder import EncodedPrompt, Prompt, PromptEncoder, tokenizer_faults
from llmengine.engine.request import Family, Request
from llmengine.engine.seeds import child_seed
from llmengine.engine.stats import RequestStats
from llmengine.engine.stream import FamilyStream, OutputStream, Stream, request_stats
from llmengine.engine.worker_threads import PreparationThreads, WorkerThreads
from llmengine.errors import (
    InvalidRequestError,
    LLMEngineError,
    RequestFailedError,
)
from llmengine.observer import SubmittedRequest
from llmengine.outputs import OutputLog
from llmengine.request_options import RequestOptions
from llmengine.sampling_params import SamplingParams
from llmengine.structured.grammar import GrammarCompiler
from llmengine.tokenizer.detokenizer import IncrementalDetokenizer, TokenTexts
from llmengine.tokenizer.protocol import Tokenizer

_NUM_CACHED_BAD_WORDS = 16

_MANY_CHARS = 16_384
"""Longer texts may take more than 10 ms to tokenize."""


@dataclass(frozen=True, slots=True)
class _TenantSalt:
    """A cache salt that only requests of one tenant can have."""

    tenant: str
    salt: Hashable


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """What to generate and how to run it. Raises `InvalidRequestError` if these contradict each other.

    `has_grammar`: the prompt brings a grammar that the parameters do not show.
    """

    params: SamplingParams
    options: RequestOptions
    streaming: bool = False
    has_grammar: bool = False

    def __post_init__(self) -> None:
        require_kind("sampling_params", self.params, SamplingParams)
        if self.streaming and self.params.num_outputs > self.params.n:
            raise InvalidRequestError(
                f"best_of={self.params.best_of} above n={self.params.n} cannot be streamed, since the best outputs are "
                "known only when all are finished"
            )


class Intake:
    """Checks, tokenizes and submits the requests of one model. Every method may be called from any thread.

    The handles keep the `owner` of their submission alive.

    Args:
        info: facts about the engine's backend.
        tokenizer: None if prompts are token ids.
        eos_token_ids: tokens that end an answer.
        threads: they tokenize text if the caller must not be blocked, and compile grammars.
        forbidden: sequences of token ids that no request generates.
    """

    def __init__(
        self,
        engine: Engine,
        info: BackendInfo,
        tokenizer: Tokenizer | None,
        eos_token_ids: Iterable[int],
        threads: PreparationThreads,
        *,
        forbidden: Sequence[WordIds] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._prompts = PromptEncoder(tokenizer, info.vocab_size, info.max_model_len)
        self.chats = self._prompts.chats
        self.forbidden = tuple(forbidden)
        self.max_model_len = info.max_model_len
        self._share_prefixes = engine.scheduler_config.share_prefixes_across_tenants
        self._engine = engine
        self._info = info
        self.eos_token_ids = frozenset(eos_token_ids)
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)
        self._special_ids: frozenset[int] = frozenset(getattr(tokenizer, "special_ids", ()))
        self._special_texts: dict[str, int] | None = None
        # Cached, since callers tend to send the same words with each request.
        self._bad_words = lru_cache(_NUM_CACHED_BAD_WORDS)(partial(bad_word_ids, tokenizer))
        self._threads = threads
        self._grammars = GrammarCompiler(tokenizer, info.vocab_size, self.eos_token_ids)
        self._request_ids = itertools.count()
        self._streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        # The system seeds this once: asking it for each request would take as long as everything else here.
        self._seeds = random.Random()

    def check_open(self) -> None:
        """Raise `EngineDeadError` (with its cause) or `EngineClosedError` unless the engine takes requests."""
        self._engine.check_open()

    def submit(self, prompt: Prompt | ChatPrompt, spec: RequestSpec, owner: object) -> RequestHandle:
        """Submit without blocking. Faults of a text or chat that show when it is tokenized are raised by the handle.

        Raises what `LLM.generate_async` raises.
        """
        if isinstance(prompt, ChatPrompt) and prompt.plan.has_grammar:
            self._grammars.check()
            spec = replace(spec, has_grammar=True)
        if isinstance(prompt, str | ChatPrompt):
            return self._submit_later(partial(self._prompts.encode, prompt), prompt, spec, owner)
        encoded = self._prompts.encode(prompt)
        params = spec.params
        if spec.options.wait_for_admission or params.structured is not None or _has_long_words(params):
            self._prompts.check_length(encoded)
            return self._submit_later(lambda: encoded, prompt, spec, owner)
        return self._submit_now(encoded, prompt, spec, owner, self._engine.admission.acquire_nowait)

    def submit_blocking(self, prompt: Prompt | ChatPrompt, spec: RequestSpec, owner: object) -> RequestHandle:
        """Submit a request that is tokenized on this thread, which also waits for room if the options say so.

        The engine prepares requests with a deadline instead, since the deadline may pass meanwhile.
        """
        admission, options = self._engine.admission, spec.options
        if options.has_deadline:
            return self.submit(prompt, spec, owner)
        acquire = partial(admission.acquire_blocking, options.tenant, options.priority)
        return self._submit_now(
            self._prompts.encode(prompt),
            prompt,
            spec,
            owner,
            acquire if options.wait_for_admission else admission.acquire_nowait,
        )

    def _submit_now(
        self,
        encoded: EncodedPrompt,
        prompt: Prompt | ChatPrompt,
        spec: RequestSpec,
        owner: object,
        acquire: Callable[[], AdmissionTicket],
    ) -> RequestHandle:
        self._check_params(spec.params)
        self._engine.check_open()
        ticket = acquire()
        try:
            self._engine.check_open()  # it may have closed while `acquire` was waiting
            stream = self._new_stream(spec)
            handle = self._new_handle(stream, prompt, spec, owner)
            try:
                self._engine.submit(self._make_request(stream, encoded, spec, ticket))
            except BaseException as fault:
                stream.fail(_as_failure(fault))
                raise
        except BaseException:
            ticket.release()
            self._engine.nudge()  # it may be draining and wait for this request
            raise
        return handle

    def _submit_later(
        self,
        encode: Callable[[], EncodedPrompt],
        prompt: Prompt | ChatPrompt,
        spec: RequestSpec,
        owner: object,
    ) -> RequestHandle:
        """Submit a request that a thread prepares."""
        self._check_params(spec.params)
        self._engine.check_open()
        ticket = None if spec.options.wait_for_admission else self._engine.admission.acquire_nowait()
        stream = self._new_stream(spec)
        handle = self._new_handle(stream, prompt, spec, owner)
        deadlines = [moment for moment in _deadlines(stream.log, spec) if moment is not None]
        deadline = min(deadlines, default=None)
        threads = self._threads_for(spec, prompt)
        waiting_room = self._engine.waiting_room

        def work(ticket: AdmissionTicket) -> Callable[[], None]:
            return partial(self._encode_and_submit, stream, encode, spec, ticket)

        if ticket is None:
            options = spec.options
            waiting_room.apply(
                stream,
                lambda ticket: self._threads.submit_from_engine(threads, work(ticket)),
                tenant=options.tenant,
                priority=options.priority,
                deadline=deadline,
            )
            return handle
        try:
            waiting_room.prepare(stream, lambda ticket: threads.submit(work(ticket)), ticket, deadline=deadline)
        except BaseException as fault:
            ticket.release()
            stream.fail(_as_failure(fault))
            self._engine.nudge()  # it may be draining and wait for this request
            self._engine.check_open()  # the threads may have ended with it
            raise
        return handle

    def _threads_for(self, spec: RequestSpec, prompt: Prompt | ChatPrompt) -> WorkerThreads:
        form = spec.params.structured
        if spec.has_grammar or (form is not None and not self._grammars.has(form)):
            return self._threads.grammars
        num_chars = _num_chars(prompt) if isinstance(prompt, str | ChatPrompt) else 0
        is_long = num_chars > _MANY_CHARS or _has_long_words(spec.params)
        return self._threads.long_texts if is_long else self._threads.texts

    def _encode_and_submit(
        self, stream: Stream, encode: Callable[[], EncodedPrompt], spec: RequestSpec, ticket: AdmissionTicket
    ) -> None:
        """Tokenize, compile and submit on a preparation thread. All faults go into the stream.

        If the request ends meanwhile, the result is ignored.
        """
        try:
            encoded = encode()
            if not stream.ended:
                self._engine.submit_prepared(self._make_request(stream, encoded, spec, ticket))
        except BaseException as fault:  # a tokenizer may panic in Rust, which is not an `Exception`
            self._engine.waiting_room.reject(stream, _as_failure(fault))

    def _new_handle(
        self, stream: Stream, prompt: Prompt | ChatPrompt, spec: RequestSpec, owner: object
    ) -> RequestHandle:
        self._streams[stream.log.request_id] = stream
        if (observers := self._engine.observers).active:
            is_chat = isinstance(prompt, ChatPrompt)
            observers.submitted(
                stream,
                SubmittedRequest(stream.log.request_id, spec.params, spec.options, is_chat, spec.streaming),
            )
        return RequestHandle(stream, self._engine.abort, streaming=spec.streaming, owner=owner)

    def _new_stream(self, spec: RequestSpec) -> Stream:
        params = spec.params
        if params.num_outputs == 1:
            return self._new_output(spec)
        members = [self._new_output(spec) for _ in range(params.num_outputs)]
        leader = members[0].log
        for index, member in enumerate(members):
            member.log.index = index
            member.log.family_id = leader.request_id
            member.log.queued = leader.queued
            member.log.prompt_logprobs = leader.prompt_logprobs
        return FamilyStream(members, params.n)

    def _new_output(self, spec: RequestSpec) -> OutputStream:
        params = spec.params
        options = spec.options
        log = OutputLog(
            request_id=next(self._request_ids),
            queued=time.monotonic(),
            given_id=options.request_id,
            metadata=options.metadata,
            tenant=options.tenant,
            priority=options.priority,
        )
        if params.logprobs is not None or params.num_outputs > params.n:
            log.logprobs = []
        if params.prompt_logprobs is not None:
            log.prompt_logprobs = [None]
        return OutputStream(log, options.slow_consumer, self._engine.scheduler_config.max_unread_tokens)

    def _check_params(self, params: SamplingParams) -> None:
        if params.structured is not None:
            self._grammars.check()
        if params.stop and self.tokenizer is None:
            raise InvalidRequestError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        if self.tokenizer is None:
            bad_word_ids(None, params.bad_words)
        if params.prompt_logprobs is not None and not self._info.has_prompt_logprobs:
            raise InvalidRequestError(
                f"prompt_logprobs={params.prompt_logprobs} needs the logits of all prompt tokens, and this backend "
                f"computes only those of the final one ({self._info.description})"
            )
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", dict(params.logit_bias))
        for word in params.bad_words:
            self._check_ids("bad_words", () if isinstance(word, str) else word)

    def _check_ids(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self._info.vocab_size:
                raise InvalidRequestError(
                    f"{name} holds token id {token_id}, outside the vocabulary [0, {self._info.vocab_size})"
                )

    def _with_bad_word_ids(self, params: SamplingParams) -> SamplingParams:
        """The parameters with all bad words as token ids, and with the sequences that the model forbids."""
        if not self.forbidden and not any(isinstance(word, str) for word in params.bad_words):
            return params
        with tokenizer_faults("encode bad_words"):
            words = self._bad_words((*params.bad_words, *self.forbidden))
        for word in words:
            self._check_ids("bad_words", word)
        return params.replace(bad_words=words)

    def requests(self) -> list[RequestStats]:
        """How far each unfinished request is, oldest first."""
        # Not `values()`, which fails if another thread adds a stream meanwhile.
        streams = [stream for reference in self._streams.valuerefs() if (stream := reference()) is not None]
        return [stats for stream in streams if (stats := request_stats(stream)).state != "finished"]

    def encode(self, prompt: Prompt | ChatPrompt) -> EncodedPrompt:
        """The prompt's token ids, which fit the context; blocks while text is tokenized.

        Raises `InvalidRequestError`, `PromptTooLongError`, and `RequestFailedError` for a fault of the tokenizer.
        """
        encoded = self._prompts.encode(prompt)
        self._prompts.check_length(encoded)
        return encoded

    def token_ids(self, prompt: Prompt | ChatPrompt) -> list[int]:
        """The prompt's tokens, which may be more than fit; blocks while text is tokenized."""
        return self._prompts.encode(prompt, has_limit=False).token_ids

    def text(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Text of ids generated after a prompt, without special tokens; "" without a tokenizer."""
        if self._texts is None:
            return ""
        with tokenizer_faults("decode"):
            return self._texts.text(prompt_token_ids, token_ids)

    def _special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by their texts."""
        if self._special_texts is None:  # at worst, two threads make it twice
            assert self.tokenizer is not None
            with tokenizer_faults("decode its special tokens"):
                texts = {self.tokenizer.decode([token_id]): token_id for token_id in sorted(self._special_ids)}
            texts.pop("", None)
            self._special_texts = texts
        return self._special_texts

    def _make_request(
        self, stream: Stream, encoded: EncodedPrompt, spec: RequestSpec, ticket: AdmissionTicket
    ) -> Request:
        """The request; with several outputs that of the first, whose relatives are those of the others."""
        self._prompts.check_length(encoded, spec.params.max_total_tokens)
        ticket.add_tokens(len(encoded.token_ids))
        params = spec.params
        if encoded.plan is not None and encoded.text is not None:
            params = encoded.plan.params(params, encoded.text, self._special_tokens())
        params = self._with_bad_word_ids(params).for_prompt(len(encoded.token_ids))
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        if isinstance(stream, OutputStream):
            return self._make_member(stream, encoded, params, seed, spec, ticket)
        ranked = params.num_outputs > params.n and params.logprobs is None
        params = params.replace(n=1, best_of=None, logprobs=0 if ranked else params.logprobs)
        # Only the first member asks for the prompt's log-probabilities, which all share.
        others = params.replace(prompt_logprobs=None)
        members = [
            self._make_member(member, encoded, params if index == 0 else others, child_seed(seed, index), spec)
            for index, member in enumerate(stream.members)
        ]
        leader = members[0]
        leader.ticket = ticket
        family = Family(members)
        for member in members:
            member.family = family
            member.stream.log.prompt_token_ids = leader.stream.log.prompt_token_ids
        return leader

    def _make_member(
        self,
        stream: OutputStream,
        encoded: EncodedPrompt,
        params: SamplingParams,
        seed: int,
        spec: RequestSpec,
        ticket: AdmissionTicket | None = None,
    ) -> Request:
        num_tokens, limit = len(encoded.token_ids), self._info.max_model_len
        stream.log.prompt = encoded.text
        stream.log.prompt_token_ids = tuple(encoded.token_ids)
        if encoded.plan is not None and encoded.text is not None:
            stream.log.answer = AnswerLog(partial(encoded.plan.parser, encoded.text))
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= self.eos_token_ids
        detokenizer = None
        if self._texts is not None:
            skip = self._special_ids if params.skip_special_tokens else frozenset()
            if skip and params.keep_special_tokens:
                kept = self._special_tokens()
                skip = skip.difference(kept[text] for text in params.keep_special_tokens if text in kept)
            structured = params.structured is not None
            with tokenizer_faults("decode the prompt's end"):
                detokenizer = IncrementalDetokenizer(
                    self._texts, encoded.token_ids, skip, params.stop, structured=structured
                )
            log = stream.log
            log.read_token = self._texts.reader(log.prompt_token_ids, log.token_ids, structured)
        grammar = None if params.structured is None else self._grammars.compile(params.structured, stop_token_ids)
        deadline, first_token_deadline = _deadlines(stream.log, spec)
        salt = spec.options.cache_salt
        if spec.options.tenant is not None and not self._share_prefixes:
            salt = _TenantSalt(spec.options.tenant, salt)
        return Request(
            stream=stream,
            prompt_token_ids=encoded.token_ids,
            params=params,
            seed=seed,
            stop_token_ids=stop_token_ids,
            max_total_tokens=limit if params.max_new_tokens is None else min(limit, num_tokens + params.max_new_tokens),
            priority=spec.options.priority,
            tenant=spec.options.tenant,
            deadline=deadline,
            first_token_deadline=first_token_deadline,
            cache_salt=salt,
            detokenizer=detokenizer,
            grammar=grammar,
            ticket=ticket,
        )


def _has_long_words(params: SamplingParams) -> bool:
    return sum(len(word) for word in params.bad_words if isinstance(word, str)) > _MANY_CHARS


def _num_chars(prompt: Any) -> int:
    """Approximate length of a prompt's or a conversation's text."""
    if isinstance(prompt, ChatPrompt):
        prompt = prompt.messages
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, Mapping):
        return sum(_num_chars(prompt[key]) for key in ("content", "text") if key in prompt)
    return sum(map(_num_chars, prompt)) if isinstance(prompt, (list, tuple)) else 0


def _deadlines(log: OutputLog, spec: RequestSpec) -> tuple[float | None, float | None]:
    """The moments by which the request must have ended, and must have its first token; None if there are none."""
    queued = log.queued
    whole, first = spec.options.deadline_s, spec.options.first_token_deadline_s
    return None if whole is None else queued + whole, None if first is None else queued + first


def _as_failure(fault: BaseException) -> LLMEngineError:
    if isinstance(fault, LLMEngineError):
        return fault
    failure = RequestFailedError(f"the prompt could not be prepared: {fault!r}")
    failure.__cause__ = fault
    return failure
