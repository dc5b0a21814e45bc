"""LLM: the public face, and the only place where tokenizer, scheduler and backend are wired together."""

from __future__ import annotations

import copy
import itertools
import logging
import secrets
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import anyio.to_thread

from llmengine.batch import Backend, BackendInfo, SavableBackend
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.engine.admission import AdmissionTicket
from llmengine.engine.engine import Engine
from llmengine.engine.handle import RequestHandle
from llmengine.engine.request import Request
from llmengine.engine.stats import EngineHealth, EngineStats
from llmengine.engine.stream import OutputStream, wake
from llmengine.errors import ConfigError, InvalidRequestError, LLMEngineError, PromptTooLongError
from llmengine.outputs import GenerationOutput, OutputLog
from llmengine.sampling_params import SamplingParams
from llmengine.tokenizer import ChatTokenizer, IncrementalDetokenizer, Tokenizer, adapt_tokenizer

if TYPE_CHECKING:
    from llmengine.models.source import ModelSource

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
"""Text, or token ids."""

_NUM_TOKENIZER_THREADS = 4
_EXIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Encoded:
    text: str | None
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Model:
    """What the requests need to know of the loaded model."""

    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    special_token_ids: frozenset[int]
    default_params: SamplingParams


class LLM:
    """A loaded model that generates for any number of callers at once, from any thread and any event loop.

    The constructor loads the model and blocks until it is ready (`await LLM.create(...)` does the same without
    blocking an event loop). Close it with `close()`, `aclose()`, or a ``with`` / ``async with`` block; its memory is
    then given back.

    Args:
        config: a `ModelConfig`, or just the path that would be its `model_dir`.
        tokenizer: anything with `encode(text)` and `decode(token_ids)`, both safe to call from several threads; None:
            the model's own.
        enable_tokenizer: False: prompts are token ids, and outputs have no text.
        async_mode: accepted for compatibility and without effect: every `LLM` serves sync and async callers.

    Raises:
        ConfigError, ModelLoadError (UnsupportedModelError, CorruptFileError), OutOfMemoryError.
    """

    def __init__(
        self,
        config: ModelConfig | str | Path,
        tokenizer: Any = None,
        enable_tokenizer: bool = True,
        async_mode: bool = False,
    ) -> None:
        from llmengine.backends import load_backend
        from llmengine.models.source import open_model

        resolved = (config if isinstance(config, ModelConfig) else ModelConfig(config)).resolve()
        source = open_model(resolved.model_dir, resolved.load_format)
        self._loaded: tuple[ModelConfig, ModelSource] | None = (resolved, source)
        self._tokenizer_threads = ThreadPoolExecutor(_NUM_TOKENIZER_THREADS, "llmengine-tokenizer")
        loading = self._tokenizer_threads.submit(_load_tokenizer, source, tokenizer, enable_tokenizer)
        self._start(partial(load_backend, resolved, source), resolved.scheduler_config, resolved.kv_cache_config)
        try:
            adapted = loading.result()
        except BaseException:
            self.close()
            raise
        self._model = _Model(
            tokenizer=adapted,
            eos_token_ids=frozenset(source.eos_token_ids),
            special_token_ids=frozenset(getattr(adapted, "special_ids", ())),
            default_params=SamplingParams.from_generation_config(source.generation_config),
        )

    @classmethod
    def from_backend(
        cls,
        backend_factory: Callable[[], Backend],
        *,
        tokenizer: Any = None,
        eos_token_ids: Iterable[int] = (),
        scheduler_config: SchedulerConfig | None = None,
        kv_cache_config: KvCacheConfig | None = None,
    ) -> Self:
        """Return an `LLM` on a backend of the caller's, such as `llmengine.testing.FakeBackend`.

        `backend_factory` runs on the engine thread. Without a tokenizer, prompts are token ids.
        """
        llm = cls.__new__(cls)
        llm._loaded = None
        llm._tokenizer_threads = ThreadPoolExecutor(_NUM_TOKENIZER_THREADS, "llmengine-tokenizer")
        adapted = None if tokenizer is None else adapt_tokenizer(tokenizer)
        special = frozenset(getattr(adapted, "special_ids", ()))
        llm._model = _Model(adapted, frozenset(eos_token_ids), special, SamplingParams())
        llm._start(
            backend_factory,
            (scheduler_config or SchedulerConfig()).resolve(),
            (kv_cache_config or KvCacheConfig()).resolve(),
        )
        return llm

    @classmethod
    async def create(
        cls,
        config: ModelConfig | str | Path,
        tokenizer: Any = None,
        enable_tokenizer: bool = True,
    ) -> Self:
        """Return `LLM(config, ...)` without blocking the running event loop while the model loads."""
        return await anyio.to_thread.run_sync(partial(cls, config, tokenizer, enable_tokenizer))

    def _start(
        self, backend_factory: Callable[[], Backend], scheduler: SchedulerConfig, kv_cache: KvCacheConfig
    ) -> None:
        self._request_ids = itertools.count()
        self._engine = Engine(backend_factory, scheduler, kv_cache)
        # Runs when the LLM is collected or the interpreter exits: an engine thread must not outlive either.
        self._finalizer = weakref.finalize(self, _shut_down, self._engine, self._tokenizer_threads)
        try:
            self._info: BackendInfo = self._engine.start()
        except BaseException:
            self._tokenizer_threads.shutdown(wait=False)
            raise
        logger.info("%s", self._info.description)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in use, adapted to the `Tokenizer` protocol."""
        return self._model.tokenizer

    @property
    def info(self) -> BackendInfo:
        """Facts about the loaded backend: description, vocabulary size, context length, KV blocks, bytes."""
        return self._info

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what `generate` uses when given none: the model's `generation_config.json`, else greedy."""
        return self._model.default_params

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        progress: bool = False,
    ) -> list[GenerationOutput]:
        """Generate for all prompts at once, block until all are finished, and return their outputs in order.

        Args:
            prompts: a string, a list of token ids, or an iterable of either. More than fit the queue are submitted
                as room comes up.
            sampling_params: for all prompts, or one a prompt; None: `get_default_sampling_params()`.
            priority: see `generate_async`.
            progress: show a progress bar on stderr.

        Raises what `generate_async` raises for the first prompt that is at fault; all others are then aborted. A
        request that fails alone does not raise: its output has finish reason "error".
        """
        _check_scheduling(priority, None, None)
        handles: list[RequestHandle] = []
        try:
            for index, prompt in enumerate(_as_prompts(prompts)):
                params = self._params_for(sampling_params, index)
                handles.append(self._generate_one(prompt, params, priority))
            if isinstance(sampling_params, Sequence) and len(sampling_params) != len(handles):
                raise InvalidRequestError(f"{len(sampling_params)} sampling_params for {len(handles)} prompts")
            return [handle.result() for handle in _with_progress(handles, progress)]
        finally:
            for handle in handles:
                handle.abort()

    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: Hashable = None,
    ) -> RequestHandle:
        """Submit one request and return its handle at once: ``async for`` it, or ``await`` it.

        Needs no running event loop and never blocks: text is tokenized on a thread of its own.

        Args:
            prompt: text or token ids.
            sampling_params: None: `get_default_sampling_params()`.
            streaming: the handle yields whenever tokens arrive; otherwise the final output only.
            priority: higher is scheduled first and preempted last.
            deadline_s: seconds from now after which the request ends, wherever it is, with finish reason "timeout".
            cache_salt: the request shares cached prefix blocks only with requests of an equal salt.

        Raises:
            InvalidRequestError: a parameter or token id is out of range.
            PromptTooLongError: the prompt leaves no room for a token (from the handle where the prompt is text).
            QueueFullError: too many requests or prompt tokens are waiting (the latter from the handle as well).
            EngineClosedError, EngineDeadError.
        """
        params = self._check_params(sampling_params)
        _check_scheduling(priority, deadline_s, cache_salt)
        make = partial(self._make_request, params=params, priority=priority, deadline_s=deadline_s, salt=cache_salt)
        if isinstance(prompt, str):
            return self._submit_later(partial(self._encode, prompt), make, streaming, params)
        return self._submit_now(self._encode(prompt), make, streaming, params)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template_kwargs: Any,
    ) -> GenerationOutput:
        """Answer a conversation through the model's chat template and block until the answer is finished.

        `messages` are mappings with "role" and "content". Raises `InvalidRequestError` where the template rejects them
        or the model has none.
        """
        return self.chat_async(messages, sampling_params, **template_kwargs).result()

    def chat_async(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        cache_salt: Hashable = None,
        **template_kwargs: Any,
    ) -> RequestHandle:
        """`generate_async` for a conversation; `template_kwargs` reach the chat template."""
        params = self._check_params(sampling_params)
        _check_scheduling(priority, deadline_s, cache_salt)
        make = partial(self._make_request, params=params, priority=priority, deadline_s=deadline_s, salt=cache_salt)
        # A copy: the caller may go on with its list while a thread renders it.
        copied = copy.deepcopy(list(messages)) if isinstance(messages, Sequence) else messages
        encode = partial(self._encode_chat, copied, template_kwargs)
        return self._submit_later(encode, make, streaming, params)

    def save(self, directory: str | Path) -> None:
        """Write an engine directory that `ModelConfig(model_dir=directory)` loads: fused weights as they are
        quantized, tokenizer, and a manifest with the hash of each file.

        Loading it gives the same tokens. Blocks; requests in progress wait until the weights are written.

        Raises:
            ConfigError: `directory` holds something that is not an engine, or this `LLM` came from `from_backend`.
            EngineError: writing failed (a full disk, say); nothing is left behind.
        """
        if self._loaded is None:
            raise ConfigError("this LLM was made from a backend and has no model to save")
        from llmengine.models.engine_dir import save_model

        config, source = self._loaded
        dtype: str = config.dtype
        if dtype == "auto":
            # A float32 copy of 16-bit weights goes back to 16 bits without loss; dequantized GGUF weights do not.
            dtype = "float32" if source.kind == "gguf" else source.checkpoint_dtype
        quantization: dict[str, Any] = dict(source.quantization)
        if config.quant_config.weights != "none":
            quantization["weights"] = config.quant_config.weights

        def write(backend: Backend) -> None:
            weights = cast(SavableBackend, backend).weights()
            save_model(
                directory, source, weights, dtype=dtype, quantization=quantization, tokenizer=self._model.tokenizer
            )

        self._engine.call(write).result()

    def stats(self) -> EngineStats:
        """Return running and waiting requests, KV blocks, token counts, preemptions, hit rate and step times."""
        return self._engine.stats()

    def health(self) -> EngineHealth:
        """Return whether the engine serves, and if not, why."""
        return self._engine.health()

    def close(self) -> None:
        """Abort what is running, stop the engine thread and give the memory back. Blocks for about one step."""
        self._finalizer()  # does nothing while another thread's call is still waiting in it
        self._engine.join()

    async def aclose(self, drain: float = 0.0) -> None:
        """Like `close()` without blocking the event loop; first lets requests go on for up to `drain` seconds.

        When cancelled, the engine still stops by itself.
        """
        self._engine.stop(drain)
        await anyio.to_thread.run_sync(self._engine.join, abandon_on_cancel=True)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def _params_for(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, index: int
    ) -> SamplingParams | None:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            return sampling_params
        if not isinstance(sampling_params, Sequence):
            raise InvalidRequestError(f"sampling_params={sampling_params!r} is no SamplingParams, nor a list of them")
        if index >= len(sampling_params):
            raise InvalidRequestError(f"{len(sampling_params)} sampling_params for more than {index} prompts")
        return sampling_params[index]

    def _check_params(self, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            return self._model.default_params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling_params={params!r} is not a SamplingParams")
        if params.stop and self._model.tokenizer is None:
            raise InvalidRequestError(f"stop={params.stop!r} needs a tokenizer; use stop_token_ids")
        for token_id in params.stop_token_ids:
            if token_id >= self._info.vocab_size:
                raise InvalidRequestError(f"stop_token_ids holds {token_id}, outside [0, {self._info.vocab_size})")
        return params

    def _generate_one(self, prompt: Prompt, params: SamplingParams | None, priority: int) -> RequestHandle:
        """Submit one prompt of a `generate` call, waiting for room in the queue."""
        checked = self._check_params(params)
        make = partial(self._make_request, params=checked, priority=priority, deadline_s=None, salt=None)
        try:
            encoded = self._encode(prompt)
        except LLMEngineError:
            raise
        except Exception as fault:
            raise _rejection(fault) from fault
        self._engine.check_open()
        ticket = self._engine.admission.acquire_blocking()
        return self._submit_now(encoded, make, False, checked, ticket)

    def _submit_now(
        self,
        encoded: _Encoded,
        make: Callable[[OutputStream, _Encoded, AdmissionTicket], Request],
        streaming: bool,
        params: SamplingParams,
        ticket: AdmissionTicket | None = None,
    ) -> RequestHandle:
        bounded = ticket is None
        if ticket is None:
            self._engine.check_open()
            ticket = self._engine.admission.acquire_nowait()
        stream = self._new_stream(params)
        handle = RequestHandle(stream, self._engine.abort, streaming=streaming, owner=self)
        try:
            ticket.add_tokens(len(encoded.token_ids), bounded=bounded)
            self._engine.submit(make(stream, encoded, ticket))
        except BaseException as fault:
            ticket.release()
            if isinstance(fault, Exception) and not isinstance(fault, LLMEngineError):
                raise _rejection(fault) from fault
            raise
        return handle

    def _submit_later(
        self,
        encode: Callable[[], _Encoded],
        make: Callable[[OutputStream, _Encoded, AdmissionTicket], Request],
        streaming: bool,
        params: SamplingParams,
    ) -> RequestHandle:
        self._engine.check_open()
        ticket = self._engine.admission.acquire_nowait()
        stream = self._new_stream(params)
        handle = RequestHandle(stream, self._engine.abort, streaming=streaming, owner=self)
        try:
            self._tokenizer_threads.submit(_encode_and_submit, self._engine, stream, encode, make, ticket)
        except RuntimeError:  # the threads were shut down since `check_open()`
            ticket.release()
            self._engine.check_open()
            raise
        return handle

    def _new_stream(self, params: SamplingParams) -> OutputStream:
        log = OutputLog(request_id=next(self._request_ids), queued=time.monotonic())
        if params.logprobs is not None:
            log.logprobs = []
        return OutputStream(log)

    def _encode(self, prompt: Prompt) -> _Encoded:
        if isinstance(prompt, str):
            if self._model.tokenizer is None:
                raise InvalidRequestError("the prompt is text, but there is no tokenizer; pass token ids")
            return _Encoded(prompt, self._model.tokenizer.encode(prompt))
        return _Encoded(None, _as_token_ids(prompt, self._info.vocab_size))

    def _encode_chat(self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]) -> _Encoded:
        tokenizer = self._model.tokenizer
        if not isinstance(tokenizer, ChatTokenizer):
            raise InvalidRequestError("the tokenizer has no apply_chat_template(); render the prompt yourself")
        text = tokenizer.apply_chat_template(messages, **template_kwargs)
        return _Encoded(text, tokenizer.encode(text, add_special_tokens=False))

    def _make_request(
        self,
        stream: OutputStream,
        encoded: _Encoded,
        ticket: AdmissionTicket,
        *,
        params: SamplingParams,
        priority: int,
        deadline_s: float | None,
        salt: Hashable,
    ) -> Request:
        num_tokens, limit = len(encoded.token_ids), self._info.max_model_len
        if num_tokens == 0:
            raise InvalidRequestError("the prompt has no tokens")
        if num_tokens >= limit:
            raise PromptTooLongError(
                f"the prompt has {num_tokens} tokens; with one generated token the limit is {limit} "
                "(max_model_len, and what kv_cache_config leaves room for)"
            )
        stream.log.prompt = encoded.text
        stream.log.prompt_token_ids = tuple(encoded.token_ids)
        model = self._model
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= model.eos_token_ids
        detokenizer = None
        if model.tokenizer is not None:
            skip = model.special_token_ids if params.skip_special_tokens else frozenset()
            detokenizer = IncrementalDetokenizer(model.tokenizer, encoded.token_ids, skip, params.stop)
        return Request(
            stream=stream,
            prompt_token_ids=encoded.token_ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids,
            max_total_tokens=limit if params.max_new_tokens is None else min(limit, num_tokens + params.max_new_tokens),
            priority=priority,
            deadline=None if deadline_s is None else stream.log.queued + deadline_s,
            cache_salt=salt,
            detokenizer=detokenizer,
            ticket=ticket,
        )


def _encode_and_submit(
    engine: Engine,
    stream: OutputStream,
    encode: Callable[[], _Encoded],
    make: Callable[[OutputStream, _Encoded, AdmissionTicket], Request],
    ticket: AdmissionTicket,
) -> None:
    """Tokenize and submit on a tokenizer thread; whatever goes wrong ends up in the stream."""
    try:
        encoded = encode()
        ticket.add_tokens(len(encoded.token_ids), bounded=True)
        engine.submit(make(stream, encoded, ticket))
    except Exception as fault:
        ticket.release()
        wake(stream.fail(_rejection(fault)))


def _rejection(fault: Exception) -> LLMEngineError:
    """Return our own errors as they are, and what the caller's tokenizer raised as the cause of one of ours."""
    if isinstance(fault, LLMEngineError):
        return fault
    failure = InvalidRequestError(f"the prompt could not be tokenized: {fault!r}")
    failure.__cause__ = fault
    return failure


def _load_tokenizer(source: ModelSource, tokenizer: Any, enable_tokenizer: bool) -> Tokenizer | None:
    if not enable_tokenizer:
        return None
    if tokenizer is not None:
        return adapt_tokenizer(tokenizer)
    from llmengine.tokenizer_loading import load_tokenizer, tokenizer_from_gguf

    if source.gguf is not None:
        return tokenizer_from_gguf(source.gguf.metadata, str(source.gguf.path))
    return load_tokenizer(source.tokenizer_path, source.kind)


def _as_prompts(prompts: Any) -> Iterable[Prompt]:
    """Return one prompt, or several, as several. An empty list is no prompt; arrays of one dimension are token ids."""
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
    for kind in set(map(type, token_ids)):
        if not _is_integer_type(kind):
            raise InvalidRequestError(f"the prompt holds a {kind.__name__}; token ids are integers")
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        worst = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequestError(f"the prompt holds token id {worst}, outside [0, {vocab_size})")
    return [int(token_id) for token_id in token_ids]


def _is_integer_type(kind: type) -> bool:
    """Return whether objects of this type count as token ids; arrays have `__index__` too, but are not."""
    return kind is not bool and hasattr(kind, "__index__") and not hasattr(kind, "__len__")


def _check_scheduling(priority: Any, deadline_s: Any, cache_salt: Any) -> None:
    """Raise `InvalidRequestError` for what would otherwise fail on the engine thread, and with it everybody else."""
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidRequestError(f"priority={priority!r} is not an integer")
    if deadline_s is not None and (not isinstance(deadline_s, (int, float)) or not deadline_s > 0):
        raise InvalidRequestError(f"deadline_s={deadline_s!r} is not a number above 0")
    if not isinstance(cache_salt, Hashable):
        raise InvalidRequestError(f"cache_salt={cache_salt!r} is not hashable")


def _with_progress(handles: Sequence[RequestHandle], progress: bool) -> Iterable[RequestHandle]:
    if not progress:
        return handles
    from rich.console import Console
    from rich.progress import track

    return track(handles, "generating", console=Console(stderr=True))


def _shut_down(engine: Engine, tokenizer_threads: ThreadPoolExecutor) -> None:
    engine.stop()
    tokenizer_threads.shutdown(wait=False, cancel_futures=False)
    engine.join(_EXIT_TIMEOUT_S)
