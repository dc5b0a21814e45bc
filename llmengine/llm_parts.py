"""LLMParts: what an `LLM` is made of, loaded from a model's files or put around a caller's backend.

The only place where engine and backends meet.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmengine.batch import Backend, BackendInfo, SavableBackend
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.engine.blocking import result_of
from llmengine.engine.engine import Engine
from llmengine.engine.intake import Intake
from llmengine.engine.owner import EngineOwner
from llmengine.engine.worker_threads import PreparationThreads
from llmengine.errors import ConfigError, EngineClosedError, UnsupportedModelError
from llmengine.generation_config import forbidden_sequences
from llmengine.sampling_params import SamplingParams
from llmengine.tokenizer.end_tokens import tokenizer_end_ids
from llmengine.tokenizer.protocol import Tokenizer, adapt_tokenizer

if TYPE_CHECKING:
    from llmengine.checkpoints.source import ModelSource
    from llmengine.quantization.model_formats import ModelFormats
    from llmengine.quantization.quality_report import QualityReport
    from llmengine.rank_hosts import RankHosts

logger = logging.getLogger(__name__)

_LARGEST_KV_ITEM = 4
"""Bytes of a number in the largest KV cache, that of the CPU."""

_CANCELLED_LOADING_S = 10.0
"""Longest wait for the engine thread after Ctrl-C while an `LLM` is made. One that loads ends when it next looks."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The files that an `LLM` was loaded from, and how: `config` has every default filled in."""

    config: ModelConfig
    source: ModelSource

    @property
    def formats(self) -> ModelFormats:
        """The formats in which the backend holds the weights."""
        from llmengine.checkpoints.quantized_source import loaded_formats

        return loaded_formats(self.source, self.config.quant_config)

    def save(
        self, directory: str | Path, tokenizer: Tokenizer | None, quality: QualityReport | None, backend: Backend
    ) -> None:
        """Write the backend's weights and plans as an engine directory. On the engine thread, between two steps.

        A tokenizer that cannot save itself is replaced by the model's own, and a missing `quality` by that of the saved
        engine that this model was loaded from. Raises what `LLM.save` raises.
        """
        from llmengine.checkpoints.model_saving import dtype_to_save, save_model
        from llmengine.checkpoints.saved_files import PlanHolder
        from llmengine.tokenizer.loading import tokenizer_to_save

        source, formats = self.source, self.formats
        weights = cast(SavableBackend, backend).weights
        save_model(
            directory,
            source,
            weights(),
            dtype=dtype_to_save(self.config, source, formats, weights),
            formats=formats,
            tokenizer=tokenizer if hasattr(tokenizer, "save") else tokenizer_to_save(source),
            plans=backend.saved_plans() if isinstance(backend, PlanHolder) else None,
            quality=quality or (source.quality if formats == source.formats else None),
        )

    def file_bytes(self, backend: Backend) -> int:
        """Bytes of the weights that `save` writes. On the engine thread."""
        from llmengine.checkpoints.model_saving import dtype_to_save

        weights = cast(SavableBackend, backend).weights
        dtype = dtype_to_save(self.config, self.source, self.formats, weights)
        return sum(spec.size_bytes for spec in self.formats.layout(self.source.arch, dtype).values())

    def unquantized(self, num_kv_tokens: int) -> ModelConfig | None:
        """The configuration of this model without what `quant_config` asks for; None if that changes nothing.

        The KV cache is made for `num_kv_tokens` tokens.
        """
        from llmengine.quantization.gguf_blocks import GgufBlocks

        config, arch = self.config, self.source.arch
        asked = config.quant_config
        keeps_blocks = asked.weights == "stored" and any(isinstance(item, GgufBlocks) for item in self.formats.kinds)
        changes_weights = keeps_blocks or self.formats != self.source.formats
        if asked.kv_cache == "none" and not changes_weights:
            return None
        # Blocks stay where no dtype is named.
        names_dtype = changes_weights and config.dtype == "auto"
        dense = "float32" if config.device == "cpu" else self.source.checkpoint_dtype
        max_bytes = 2 * _LARGEST_KV_ITEM * arch.num_layers * arch.num_kv_heads * arch.head_dim * num_kv_tokens
        return dataclasses.replace(
            config,
            dtype=dense if names_dtype else config.dtype,
            quant_config=QuantConfig(),
            kv_cache_config=dataclasses.replace(config.kv_cache_config, max_bytes=max_bytes),
        )


@dataclass(frozen=True, slots=True)
class LLMParts:
    """The parts of an `LLM`, ready for its first request.

    Attributes:
        owner: closes the engine and its threads; they end as well when nothing refers to it any more.
        engine: runs, with a backend that is ready.
        info: of that backend.
        intake: submits requests to the engine.
        default_params: for requests without parameters of their own, or why the model's files give none.
        model: None on a caller's backend, which cannot be saved.
        quality: what a limit of `quant_config` was checked by; None without a limit.
    """

    owner: EngineOwner
    engine: Engine
    info: BackendInfo
    intake: Intake
    default_params: SamplingParams | str
    model: LoadedModel | None
    quality: QualityReport | None = None

    def require_default_params(self) -> SamplingParams:
        """The parameters of requests that bring none. Raises `UnsupportedModelError` if the model's files give none."""
        if isinstance(self.default_params, str):
            raise UnsupportedModelError(self.default_params)
        return self.default_params


def load_parts(
    config: ModelConfig | str | Path, tokenizer: Any, enable_tokenizer: bool, rank_hosts: RankHosts | None = None
) -> LLMParts:
    """Load a model and start an engine on it; blocks until it is ready. The arguments and errors are those of `LLM`."""
    from llmengine.backends import choose_device, load_backend
    from llmengine.backends.blocks_in_use import source_in_use
    from llmengine.checkpoints.opening import open_model
    from llmengine.checkpoints.quantized_source import quantized_source

    given = config if isinstance(config, ModelConfig) else ModelConfig(config)
    resolved = given.resolve()
    source = open_model(resolved.model_dir, resolved.load_format)
    threads = PreparationThreads()
    # Beside the weights: each takes seconds.
    loading_tokenizer = threads.call(partial(_load_tokenizer, source, tokenizer, enable_tokenizer))
    try:
        device = choose_device(resolved.device)
        resolved = dataclasses.replace(resolved, device=device, scheduler_config=given.scheduler_config)
        resolved = resolved.resolve(accelerator=device != "cpu")
        source = source_in_use(resolved, source)
        cancelled = threading.Event()
        check = partial(_check_wanted, cancelled, loading_tokenizer)
        weights = quantized_source(source, resolved.quant_config, loading_tokenizer.result, check)
    except BaseException:
        threads.stop()
        raise
    engine = Engine(
        partial(load_backend, resolved, weights, check, rank_hosts), resolved.scheduler_config, resolved.kv_cache_config
    )
    try:
        parts = _start(
            engine,
            threads,
            partial(result_of, loading_tokenizer),
            source.eos_token_ids,
            source.generation_config,
            LoadedModel(resolved, source),
        )
        _collect_garbage_once()
        return parts
    except BaseException:  # Ctrl-C, whether the engine thread still loads or calibrates, or has a backend already
        cancelled.set()
        engine.stop()
        threads.stop()
        engine.join(_CANCELLED_LOADING_S)
        raise


def _check_wanted(cancelled: threading.Event, loading_tokenizer: Future[Tokenizer | None]) -> None:
    """Raise on the engine thread once its caller no longer waits for the weights, or the tokenizer cannot be loaded."""
    if cancelled.is_set():
        raise EngineClosedError("the LLM is closed")
    if loading_tokenizer.done():
        loading_tokenizer.result()


def parts_from_backend(
    backend_factory: Callable[[], Backend],
    tokenizer: Any,
    eos_token_ids: Iterable[int],
    scheduler_config: SchedulerConfig | None,
    kv_cache_config: KvCacheConfig | None,
) -> LLMParts:
    """Start an engine on a caller's backend. The arguments and errors are those of `LLM.from_backend`."""
    adapted = None if tokenizer is None else adapt_tokenizer(tokenizer)
    engine = Engine(
        backend_factory,
        (scheduler_config or SchedulerConfig()).resolve(),
        (kv_cache_config or KvCacheConfig()).resolve(),
    )
    return _start(engine, PreparationThreads(), lambda: adapted, eos_token_ids, {}, None)


def _start(
    engine: Engine,
    threads: PreparationThreads,
    get_tokenizer: Callable[[], Tokenizer | None],
    eos_token_ids: Iterable[int],
    generation_config: Mapping[str, Any],
    model: LoadedModel | None,
) -> LLMParts:
    """Start the engine and put the other parts around it. Where that fails, engine and threads end."""
    owner = EngineOwner(engine, threads)
    info = owner.start()
    try:
        logger.info("%s", info.description)
        tokenizer = get_tokenizer()
        intake = Intake(
            engine,
            info,
            tokenizer,
            _end_ids(eos_token_ids, tokenizer, info.vocab_size),
            threads,
            forbidden=_within_vocabulary(forbidden_sequences(generation_config), info.vocab_size),
        )
        return LLMParts(owner, engine, info, intake, _default_params(generation_config, info.vocab_size), model)
    except BaseException:
        owner.close()
        raise


def _load_tokenizer(source: ModelSource, tokenizer: Any, enable_tokenizer: bool) -> Tokenizer | None:
    """The caller's tokenizer, adapted, else the model's own."""
    if not enable_tokenizer:
        return None
    if tokenizer is not None:
        return adapt_tokenizer(tokenizer)
    from llmengine.tokenizer.loading import source_tokenizer

    return source_tokenizer(source)


def _end_ids(eos_token_ids: Iterable[int], tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
    """All tokens that end an answer. Raises `ConfigError` for one that the backend does not know."""
    end_ids = frozenset(eos_token_ids) | tokenizer_end_ids(tokenizer, vocab_size)
    for token_id in end_ids:
        if not 0 <= token_id < vocab_size:
            raise ConfigError(f"eos_token_ids holds token id {token_id}, outside the vocabulary [0, {vocab_size})")
    return end_ids


def _default_params(generation_config: Mapping[str, Any], vocab_size: int) -> SamplingParams | str:
    """The parameters that the model's files ask for, or why they cannot be honoured."""
    try:
        params = SamplingParams.from_generation_config(generation_config)
    except UnsupportedModelError as error:
        logger.warning("%s: requests without sampling_params will raise this", error)
        return str(error)
    return params.replace(bad_words=_within_vocabulary(params.bad_words, vocab_size))


def _within_vocabulary(words: Iterable[Any], vocab_size: int) -> tuple[Any, ...]:
    """The sequences of token ids that the vocabulary has; no others can be generated anyway."""
    return tuple(word for word in words if max(word) < vocab_size)


@functools.cache
def _collect_garbage_once() -> None:
    """Collect the garbage now for which importing torch and transformers has made a full collection due.

    The collection looks at all of their 350,000 objects, for 160 to 200 ms in which no coroutine of the program runs.
    Otherwise it would come at some moment of the first few hundred thousand tokens.
    """
    if gc.isenabled():
        gc.collect()
