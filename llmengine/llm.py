"""LLM: the public face. `llm_parts` makes the parts that it is assembled from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, Unpack, cast, overload

import anyio.to_thread

from llmengine import beam_search
from llmengine.batch import Backend, BackendInfo
from llmengine.beam_search import BeamSearchOutput, BeamSearchParams
from llmengine.chat.answers.formats import AnswerFormat
from llmengine.chat.messages import Messages, is_conversation, is_conversation_list
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.engine.handle import RequestHandle
from llmengine.engine.intake import RequestSpec
from llmengine.engine.prompt_encoder import Prompt, as_prompts
from llmengine.engine.stats import EngineHealth, EngineStats, RequestStats
from llmengine.errors import ConfigError
from llmengine.generate_all import generate_all
from llmengine.llm_parts import LLMParts, parts_from_backend
from llmengine.llm_quality import evaluate_parts, load_checked_parts
from llmengine.observer import EngineObserver
from llmengine.outputs import GenerationOutput
from llmengine.request_options import (
    ChatKeywords,
    RequestKeywords,
    RequestOptions,
    TemplateKeywords,
    as_options,
    split_options,
    takes_options,
    unknown_keyword,
)
from llmengine.sampling_params import SamplingParams
from llmengine.tokenizer.protocol import Tokenizer

if TYPE_CHECKING:
    from llmengine.quantization.quality_report import QualityReport
    from llmengine.rank_hosts import RankHosts


class LLM:
    """A loaded model that generates for any number of callers at once, from any thread and any event loop.

    The constructor loads the model and blocks until it is ready; `await LLM.create(...)` does the same without blocking
    an event loop. `close()`, `aclose()`, or the end of a ``with`` or ``async with`` block frees its memory.

    Args:
        config: a `ModelConfig`, or just the path that would be its `model_dir`. `from_backend` passes finished parts
            instead, and then nothing is loaded.
        tokenizer: anything with `encode(text)` and `decode(token_ids)`, both safe to call from several threads. None
            stands for the model's own.
        enable_tokenizer: if False, prompts are token ids, and outputs have no text.
        async_mode: accepted for compatibility, without effect: every `LLM` serves sync and async callers.
        rank_hosts: the hosts of the processes that `parallel_config` asks for, and what starts them there; closed with
            the `LLM`. None: all are on this host.

    Raises:
        ConfigError, ModelLoadError (UnsupportedModelError, CorruptFileError), OutOfMemoryError.
    """

    def __init__(
        self,
        config: ModelConfig | str | Path | LLMParts,
        tokenizer: Any = None,
        enable_tokenizer: bool = True,
        async_mode: bool = False,
        rank_hosts: RankHosts | None = None,
    ) -> None:
        if isinstance(config, LLMParts):
            parts = config
        else:
            parts = load_checked_parts(config, tokenizer, enable_tokenizer, rank_hosts)
        self._parts = parts
        self._owner = parts.owner
        self._engine = parts.engine
        self._intake = parts.intake

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
        """An `LLM` on a backend of the caller's, such as `llmengine.testing.FakeBackend`.

        `backend_factory` runs on the engine thread. Without a tokenizer, prompts are token ids. Answers end at
        `eos_token_ids` and at the tokenizer's own ends, see `Tokenizer`. Raises `ConfigError` for an end outside the
        backend's vocabulary.
        """
        return cls(parts_from_backend(backend_factory, tokenizer, eos_token_ids, scheduler_config, kv_cache_config))

    @classmethod
    async def create(
        cls,
        config: ModelConfig | str | Path,
        tokenizer: Any = None,
        enable_tokenizer: bool = True,
        rank_hosts: RankHosts | None = None,
    ) -> Self:
        """`LLM(config, ...)`, without blocking the running event loop while the model loads."""
        load = partial(cls, config, tokenizer, enable_tokenizer, rank_hosts=rank_hosts)
        return await anyio.to_thread.run_sync(load)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in use, adapted to the `Tokenizer` protocol."""
        return self._intake.tokenizer

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an answer, from the model's files and the tokenizer; see `SamplingParams.ignore_eos`."""
        return self._intake.eos_token_ids

    @property
    def info(self) -> BackendInfo:
        """Facts about the loaded backend: description, vocabulary size, context length, KV blocks, bytes."""
        return self._parts.info

    @property
    def scheduler_config(self) -> SchedulerConfig:
        """The limits of batches, queues and readers in use."""
        return self._engine.scheduler_config

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters of requests that bring none: those of the model's `generation_config.json`, else greedy.

        A request's own parameters replace all of these. To change one of them, use `.replace(temperature=0.5)`. Raises
        `UnsupportedModelError` if the file asks for something that is not supported.
        """
        return self._parts.require_default_params()

    @takes_options(wait_for_admission=True)
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        **options: Unpack[RequestKeywords],
    ) -> list[GenerationOutput]:
        """Generate for all prompts at once, block until all are finished, and return their outputs in order.

        There is one `GenerationOutput` for each prompt. With `SamplingParams.n` above 1 it has all of the prompt's
        outputs in `outputs`, and is itself the first of them.

        Args:
            prompts: a string, a list of token ids, or an iterable of either. If there are more than fit the queue, the
                rest are submitted as room becomes free.
            sampling_params: one for all prompts, or one for each; None for `get_default_sampling_params()`.
            progress: show a progress bar on stderr.
            options: the options of each request, see `RequestOptions`.

        Raises what `generate_async` raises for the first prompt that is at fault; all others are then aborted. A
        request that fails alone does not raise: its output has finish reason "error".
        """
        checked = as_options(LLM.generate, options, wait_for_admission=True)
        return generate_all(self._parts, as_prompts(prompts), sampling_params, checked, progress=progress)

    @takes_options()
    def generate_async(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        **options: Unpack[RequestKeywords],
    ) -> RequestHandle:
        """Submit one request and return its handle at once: ``async for`` it, or ``await`` it.

        Needs no running event loop and never blocks: another thread tokenizes text.

        Args:
            prompt: text or token ids.
            sampling_params: None for `get_default_sampling_params()`.
            streaming: if True, the handle yields an output whenever tokens arrive, otherwise just the final one. With
                `SamplingParams.n` above 1, each yielded output belongs to one of the prompt's outputs, which `index`
                names, and for each of these there is one that is `finished`.
            options: see `RequestOptions`.

        Raises:
            InvalidRequestError: a parameter or token id is out of range.
            PromptTooLongError: the prompt leaves no room for a token (raised by the handle if the prompt is text).
            QueueFullError: too many requests or prompt tokens are waiting (the latter may be raised by the handle).
            EngineClosedError, EngineDeadError.
        """
        spec = RequestSpec(self._params_or_default(sampling_params), as_options(LLM.generate_async, options), streaming)
        return self._intake.submit(prompt, spec, self._owner)

    @takes_options(wait_for_admission=True)
    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **options: Unpack[RequestKeywords],
    ) -> Generator[GenerationOutput, None, None]:
        """Submit one request and return a generator of its outputs as tokens arrive; each step blocks this thread.

        Leaving the loop aborts the request. `RequestHandle.stream` does the same for a handle, of a chat for instance.
        In an event loop, which this would block, use ``async for`` instead.

        Args:
            prompt, sampling_params: the same as for `generate_async`.
            options: see `RequestOptions`.

        Raises, at once or from the generator, what `generate_async` raises.
        """
        checked = as_options(LLM.stream, options, wait_for_admission=True)
        spec = RequestSpec(self._params_or_default(sampling_params), checked, streaming=True)
        return self._intake.submit(prompt, spec, self._owner).stream()

    @overload
    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        **options: Unpack[ChatKeywords],
    ) -> GenerationOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[ChatKeywords],
    ) -> list[GenerationOutput]: ...

    @takes_options(ChatKeywords)
    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[ChatKeywords],
    ) -> GenerationOutput | list[GenerationOutput]:
        """Answer a conversation through the model's chat template and block until the answer is finished.

        `messages` are mappings with "role" and "content"; see the guide to chats. Several conversations are answered at
        once, as by `generate`, and their outputs are returned in order.

        Raises `InvalidRequestError` if the model has no template, or the template rejects the messages or ignores a
        part of them, and `TypeError` for a keyword that neither this method nor the template has.
        """
        if is_conversation_list(messages):
            checked, rest = split_options(options, wait_for_admission=True)
            prompts = (self._intake.chats.prompt(LLM.chat, conversation, rest) for conversation in messages)
            return generate_all(self._parts, prompts, sampling_params, checked)
        checked, rest = split_options(options)
        spec = RequestSpec(self._params_or_default(cast(SamplingParams | None, sampling_params)), checked)
        handle = self._intake.submit(self._intake.chats.prompt(LLM.chat, messages, rest), spec, self._owner)
        try:
            return handle.result()
        finally:
            handle.abort()

    @takes_options(ChatKeywords)
    def chat_async(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        **options: Unpack[ChatKeywords],
    ) -> RequestHandle:
        """`generate_async` for a conversation, which is copied at once. Another thread renders and tokenizes it.

        Raises what `generate_async` and `chat` raise. If the template rejects the messages, reading the handle raises.
        """
        checked, rest = split_options(options)
        spec = RequestSpec(self._params_or_default(sampling_params), checked, streaming)
        return self._intake.submit(self._intake.chats.prompt(LLM.chat_async, messages, rest), spec, self._owner)

    @takes_options(TemplateKeywords)
    def count_tokens(self, prompt: Prompt | Messages, **options: Unpack[TemplateKeywords]) -> int:
        """Number of tokens that a prompt has for `generate`, or a conversation for `chat`. Blocks.

        The number may exceed the context length. The options are those of a conversation. Raises `InvalidRequestError`,
        and `TypeError` for a keyword that the template does not have.
        """
        return len(self._token_ids(LLM.count_tokens, prompt, options))

    @takes_options(TemplateKeywords)
    def tokenize(self, prompt: Prompt | Messages, **options: Unpack[TemplateKeywords]) -> list[int]:
        """Token ids of a prompt for `generate`, or of a conversation for `chat`, as the model reads them. Blocks.

        There may be more than the context has room for. Options and errors are those of `count_tokens`.
        """
        return self._token_ids(LLM.tokenize, prompt, options)

    def answer_format(self, chat_template: str | None = None, *, has_tools: bool = True) -> AnswerFormat:
        """How the model marks reasoning and tool calls in its answers, as its chat template shows.

        Outputs of chats are divided accordingly (`GenerationOutput.answer`). Raises `InvalidRequestError` without a
        tokenizer for chats.

        Args:
            chat_template: the name of another template of the model, or the text of a template.
            has_tools: the conversation has tools, for which some models have a template of their own.
        """
        return self._intake.chats.answer_format(chat_template, has_tools=has_tools)

    @takes_options(wait_for_admission=True)
    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        num_beams: int = 4,
        *,
        max_new_tokens: int = 128,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        **options: Unpack[RequestKeywords],
    ) -> list[BeamSearchOutput]:
        """The `num_beams` best continuations of each prompt that beam search finds, best first. Blocks.

        Args:
            prompts: the same as for `generate`.
            num_beams, max_new_tokens, length_penalty, early_stopping: see `BeamSearchParams`.
            options: the options of each request, see `RequestOptions`.

        Raises what `generate_async` raises, and the error of a beam's request that fails.
        """
        params = BeamSearchParams(num_beams, max_new_tokens, length_penalty, early_stopping)
        checked = as_options(LLM.beam_search, options, wait_for_admission=True)
        searches = beam_search.begin(self._intake, as_prompts(prompts), params, checked)

        def submit(token_ids: Sequence[int], sampling: SamplingParams, options: RequestOptions) -> RequestHandle:
            return self._intake.submit_blocking(token_ids, RequestSpec(sampling, options), self._owner)

        beam_search.run(searches, submit)
        return [search.output(self._intake.text) for search in searches]

    @takes_options(wait_for_admission=True)
    async def beam_search_async(
        self,
        prompts: Prompt | Iterable[Prompt],
        num_beams: int = 4,
        *,
        max_new_tokens: int = 128,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        **options: Unpack[RequestKeywords],
    ) -> list[BeamSearchOutput]:
        """`beam_search` without blocking the event loop. If this is cancelled, its requests are aborted."""
        params = BeamSearchParams(num_beams, max_new_tokens, length_penalty, early_stopping)
        checked = as_options(LLM.beam_search_async, options, wait_for_admission=True)
        listed = list(as_prompts(prompts))
        searches = await anyio.to_thread.run_sync(beam_search.begin, self._intake, listed, params, checked)

        def submit(token_ids: Sequence[int], sampling: SamplingParams, options: RequestOptions) -> RequestHandle:
            return self._intake.submit(token_ids, RequestSpec(sampling, options), self._owner)

        await beam_search.run_async(searches, submit)
        return [search.output(self._intake.text) for search in searches]

    def evaluate(
        self,
        against: LLM | ModelConfig | str | Path | None = None,
        *,
        text: str | Sequence[int] | None = None,
        text_name: str | None = None,
        windows: int | None = 32,
        window_tokens: int = 512,
        stride: int | None = None,
        measure_speed: bool = True,
        progress: bool = False,
    ) -> QualityReport:
        """Perplexity of held-out text, and top-1 agreement and KL divergence against another model; blocks.

        Requests in progress wait while a window is computed.

        Args:
            against: the reference, or what to load for that; it must have the same tokenizer. None: this model
                without quantization, if its weights were quantized when it was loaded, else no reference.
            text: text, or token ids; None: the text that comes with the package.
            text_name: how the report calls it.
            windows: most windows to score, from all over the text; None: all.
            window_tokens: tokens of a window; fewer where a model's context is shorter, as the report says.
            stride: tokens between the beginnings of windows, in whose overlap tokens are context only; None: no
                overlap.
            measure_speed: measure tokens/s as well, which takes some seconds; see `llmengine.model_quality`.
            progress: show a progress bar on stderr.

        Raises:
            ConfigError: the text is shorter than a window; the vocabularies differ; the backend gives no logits, or the
                reference cannot be loaded.
            EngineError: logits that are not finite.
            QueueFullError: requests hold too many KV blocks.
        """
        from llmengine.model_quality import tokenize
        from llmengine.quantization.evaluation import WindowPlan

        return evaluate_parts(
            self._parts,
            against._parts if isinstance(against, LLM) else against,
            tokenize(self.tokenizer, text, text_name),
            WindowPlan(window_tokens, window_tokens if stride is None else stride, windows),
            measure_speed=measure_speed,
            progress=progress,
        )

    def save(self, directory: str | Path, quality: QualityReport | None = None) -> None:
        """Write an engine directory that `ModelConfig(model_dir=directory)` loads, and block until it is written.

        It holds the fused weights as they are quantized, TensorRT plans if they were used, the tokenizer, and a
        manifest with the hash of each file. The loaded engine gives the same tokens. To that end, with `dtype="auto"`
        on a CPU, weights that the checkpoint's dtype cannot hold are written as float32. Requests in progress wait
        meanwhile.

        Args:
            quality: a report of this model's, from `evaluate`, which the manifest keeps and `llmengine inspect` shows.

        Raises:
            ConfigError: `directory` holds something that is not an engine, or this `LLM` came from `from_backend`.
            EngineError: writing failed, on a full disk for instance; nothing is left behind.
        """
        model = self._parts.model
        if model is None:
            raise ConfigError("an LLM from from_backend() cannot be saved: it was not loaded from a model's files")
        self._engine.call(partial(model.save, directory, self.tokenizer, quality or self._parts.quality))

    def requests(self) -> list[RequestStats]:
        """How far each unfinished request is, oldest first, with its id and metadata."""
        return self._intake.requests()

    def stats(self) -> EngineStats:
        """Running and waiting requests, KV blocks, token counts, preemptions, hit rate and step times."""
        return self._engine.stats()

    def health(self) -> EngineHealth:
        """Whether the engine accepts requests, and if not, why."""
        return self._engine.health()

    def add_observer(self, observer: EngineObserver) -> None:
        """Tell an observer of requests submitted from now on, of steps, and of the engine's end. Idempotent."""
        self._engine.observers.add(observer)
        self._engine.nudge()  # an idle engine tells it of the prefix cache, too

    def remove_observer(self, observer: EngineObserver) -> None:
        """Tell an observer nothing more, except for a call that is under way. Idempotent."""
        self._engine.observers.remove(observer)

    def close(self) -> None:
        """Abort all requests, stop the engine thread and free the memory. Blocks for about one step. Idempotent."""
        self._owner.close()

    async def aclose(self, drain: float = 0.0) -> None:
        """`close()` without blocking the event loop. First, requests go on for up to `drain` seconds.

        If this is cancelled, the engine still stops by itself.
        """
        self._engine.stop(drain)
        await self._engine.wait_over()
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM cannot be pickled or copied: it owns a thread and a loaded model; use this one from any "
            "thread, or make one in each process"
        )

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

    def _token_ids(self, function: Callable[..., Any], prompt: Any, options: Mapping[str, Any]) -> list[int]:
        if isinstance(prompt, str) or not is_conversation(prompt):
            for name in options:
                raise unknown_keyword(function, name)
            return self._intake.token_ids(prompt)
        return self._intake.token_ids(self._intake.chats.prompt(function, prompt, options))

    def _params_or_default(self, sampling_params: SamplingParams | None) -> SamplingParams:
        return self.get_default_sampling_params() if sampling_params is None else sampling_params
