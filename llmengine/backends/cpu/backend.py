"""The CPU backend: one step at a time, run to its end in `launch`."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch

from llmengine.backends.cpu.attention import LayerAttention, PagedAttention
from llmengine.backends.cpu.deterministic import native_pieces, sampling_all, token_pieces
from llmengine.backends.cpu.kv_store import AttentionShape
from llmengine.backends.cpu.native import (
    BYTE_KV_MULTIPLE,
    MAX_BYTE_HEAD_DIM,
    MAX_FEW_TOKENS,
    NATIVE_DIRECTORY,
    NativeDecoder,
    NativeUnavailableError,
    load_native_library,
    looks_up,
    multiplies,
)
from llmengine.backends.cpu.openmp import TorchThreads
from llmengine.backends.cpu.prompt_logprobs import compute_prompt_logprobs
from llmengine.backends.cpu.sampler import Sampler, Samples
from llmengine.backends.cpu.step_inputs import HostSlotState, StepInputs, in_step_order
from llmengine.backends.cpu.weights import CpuModel, load_cpu_model
from llmengine.backends.kv_layout import KvLayout, byte_kv_layout, context_limit, fit_kv_pool, split_kv_layout
from llmengine.backends.logit_edits import mask_words
from llmengine.backends.prompt_logprobs import PromptLogprobs, WantedLogprobs
from llmengine.backends.row_errors import no_token_message
from llmengine.batch import BackendInfo, Batch, StepResult, TokenLogprobs
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import forward, forward_to_last
from llmengine.models.rope import layer_tables
from llmengine.quantization.formats import DENSE
from llmengine.quantization.model_formats import ModelFormats

_logger = logging.getLogger("llmengine.backends.cpu.backend")

_DEFAULT_FRACTION = 0.2

_LEAST_SHARED_ELEMENTS = 4 << 20
"""Logits of a step, from which on torch's operators take all threads."""


class CpuBackend:
    """Implements `batch.Backend` with torch's CPU operators; made, used and closed by one thread.

    Activations and logits are float32 whatever the weights are, and so is KV unless `quant_config.kv_cache` asks for 8
    bits. Where the native decoder is available, it runs the steps, but for large ones of some weights (see
    `NativeDecoder`), and torch's operators take one thread.

    Args:
        native_directory: where the native library is looked for.
    """

    def __init__(self, config: ModelConfig, source: ModelSource, native_directory: Path = NATIVE_DIRECTORY) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        arch = source.arch
        limit = context_limit(config, arch)
        why_not_native = _why_not_native(config, arch, limit, source.formats)
        runs_native = why_not_native is None
        try:
            native_library = load_native_library(native_directory, borrowed_threads=not runs_native)
            native_text = f"no native decoder: {why_not_native}"
        except NativeUnavailableError as error:
            native_library, runs_native, native_text = None, False, f"no native decoder: {error}"
        with torch.inference_mode():
            # The fastest format is measured, so it need not be the same the next time.
            row_major = runs_native or config.deterministic
            model = load_cpu_model(config, source, native_library, row_major=row_major)
            layout = cpu_kv_layout(config, arch)
            free_bytes = psutil.virtual_memory().available
            pool = fit_kv_pool(layout, config, limit, free_bytes, _DEFAULT_FRACTION)
            max_model_len = pool.max_model_len
            self._attention: PagedAttention | None = PagedAttention(
                _attention_shape(arch), pool, _attention_layers(arch, model, max_model_len)
            )
            self._native: NativeDecoder | None = None
            if native_library is not None and runs_native:
                self._native = NativeDecoder(
                    native_library,
                    arch,
                    embedding=model.embed.source,
                    norms={name: norm.weight for name, norm in model.norms.items()},
                    linears=model.linears,
                    lm_head=model.lm_head,
                    attention=self._attention,
                    max_context=max_model_len,
                )
                native_text = f"{_native_steps(self._native)} in the native decoder ({native_library.variant})"
        self._native_library = native_library
        self._torch_threads = TorchThreads()
        self._model: CpuModel | None = model
        self._deterministic = config.deterministic
        num_slots = config.scheduler_config.max_batch_size
        self._slots = HostSlotState(num_slots, pool.max_blocks_per_request)
        self._sampler = Sampler(num_slots, arch.vocab_size)
        self._prompt_logprobs = PromptLogprobs(arch.vocab_size)
        self._result: StepResult | None = None
        self._info = BackendInfo(
            description=f"torch {torch.__version__}, cpu with {torch.get_num_threads()} threads, {model.description}, "
            + native_text
            + f", KV cache in {layout.kv_dtype}"
            + (", deterministic" if config.deterministic else ""),
            vocab_size=arch.vocab_size,
            max_model_len=max_model_len,
            num_blocks=pool.num_blocks,
            block_size=layout.block_size,
            kv_bytes_per_block=layout.bytes_per_block,
            kv_dtype=layout.kv_dtype,
            weight_bytes=model.size_bytes,
            max_steps_in_flight=1,
            has_prompt_logprobs=True,
        )
        _logger.info("%s; KV cache of %d tokens", self._info.description, pool.num_tokens)

    @property
    def info(self) -> BackendInfo:
        return self._info

    def launch(self, batch: Batch) -> None:
        """Run one step to its end; `collect` hands out its result."""
        assert self._result is None, "one step in flight at most"
        assert self._model is not None, "the backend is closed"
        for init in batch.slot_inits:
            self._slots.init_slot(init)
            self._sampler.init_slot(init)
            self._prompt_logprobs.init_slot(init)
        with torch.inference_mode(), self._few_torch_threads():
            inputs = self._slots.flatten(batch)
            begin = time.perf_counter()
            prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
            if self._prompt_logprobs and (wanted := self._prompt_logprobs.take_wanted(in_step_order(batch.rows))):
                with self._torch_threads_for(_LEAST_SHARED_ELEMENTS):
                    logits, prompt_logprobs = self._forward_with_prompt_logprobs(inputs, wanted)
            else:
                logits = self._forward(inputs)
            forward_s = time.perf_counter() - begin
            if logits is None:
                self._result = StepResult(
                    step=batch.step, token_ids={}, prompt_logprobs=prompt_logprobs, forward_s=forward_s
                )
                return
            masks = mask_words(batch.masks)
            with self._torch_threads_for(logits.numel()):
                samples = self._sampler.sample(logits, inputs.sample_slots, inputs.sample_positions, masks)
        self._slots.store_sampled(inputs.sample_slots, samples.token_ids)
        self._result = replace(_step_result(batch.step, inputs, samples, forward_s), prompt_logprobs=prompt_logprobs)

    def _forward(self, inputs: StepInputs) -> torch.Tensor | None:
        """Write the KV of all tokens and return the logits [num_samples, vocab], None without samples."""
        if not self._deterministic:
            return self._forward_at_once(inputs)
        native = self._native
        pieces = token_pieces(inputs) if native is None else native_pieces(inputs, MAX_FEW_TOKENS)
        found = [(self._forward_at_once(piece), num_samples) for piece, num_samples in pieces]
        logits = [some[:num_samples] for some, num_samples in found if some is not None]
        return torch.cat(logits) if logits else None

    def _few_torch_threads(self) -> AbstractContextManager[None]:
        """Keep torch's threads from spinning on the cores of the native decoder's."""
        return contextlib.nullcontext() if self._native is None else self._torch_threads.one()

    def _torch_threads_for(self, num_elements: int) -> AbstractContextManager[None]:
        """Give torch's operators all threads where that gains more than starting and ending these costs."""
        if self._native is None or num_elements < _LEAST_SHARED_ELEMENTS:
            return contextlib.nullcontext()
        return self._torch_threads.all()

    def _forward_at_once(self, inputs: StepInputs) -> torch.Tensor | None:
        native = self._native
        if native is not None and (native.max_tokens is None or len(inputs.token_ids) <= native.max_tokens):
            return native.forward(inputs, self._slots.block_tables)
        with self._torch_threads_for(_LEAST_SHARED_ELEMENTS):
            return self._forward_by_torch(inputs)

    def _forward_by_torch(self, inputs: StepInputs) -> torch.Tensor | None:
        assert self._model is not None
        assert self._attention is not None
        self._attention.plan(inputs, self._slots.block_tables)
        every = len(inputs.sample_tokens) == len(inputs.token_ids)
        sample_tokens = None if every else torch.from_numpy(inputs.sample_tokens)
        x = self._model.embed(torch.from_numpy(inputs.token_ids))
        return forward(self._model.segments, x, self._attention.attend, sample_tokens)

    def _forward_with_prompt_logprobs(
        self, inputs: StepInputs, wanted: Sequence[WantedLogprobs]
    ) -> tuple[torch.Tensor | None, dict[int, list[TokenLogprobs]]]:
        """The same as `_forward`, with log-probabilities of prompt tokens."""
        if self._deterministic:
            # These tokens are computed again, which writes the same keys and values.
            logits = self._forward(inputs)
            return logits, compute_prompt_logprobs(wanted, partial(self._logits_after, inputs), self._info.vocab_size)
        model, attention = self._model, self._attention
        assert model is not None
        assert attention is not None
        attention.plan(inputs, self._slots.block_tables)
        x = model.embed(torch.from_numpy(inputs.token_ids))
        attended, x = forward_to_last(model.segments, x, attention.attend)
        last = partial(model.segments.last, attended, x)
        prompt_logprobs = compute_prompt_logprobs(wanted, last, self._info.vocab_size)
        samples = torch.from_numpy(inputs.sample_tokens)
        return last(samples) if len(samples) else None, prompt_logprobs

    def _logits_after(self, inputs: StepInputs, tokens: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab] of the step's tokens int64 [n], which are consecutive."""
        logits = self._forward(sampling_all(inputs, slice(int(tokens[0]), int(tokens[-1]) + 1)))
        assert logits is not None
        return logits

    def collect(self) -> StepResult:
        """The result of the step that was launched."""
        result, self._result = self._result, None
        assert result is not None, "collect() follows launch()"
        return result

    @torch.inference_mode()
    def score(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the logits [num_tokens, vocab] of a step with one row, see `batch.ScoringBackend`."""
        assert self._result is None, "a step is in flight"
        assert self._model is not None, "the backend is closed"
        for init in batch.slot_inits:
            self._slots.init_slot(init)
        with self._few_torch_threads():
            inputs = self._slots.flatten(batch)
            logits = self._forward(sampling_all(inputs, slice(None)))
        assert logits is not None
        yield logits

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the canonical weights as they are used, in `canonical_shapes` order, one copy at a time.

        An int8 matrix comes as `X.weight` (int8 [out, in]) followed by `X.weight_scale` (fp32 [out]); a loader that
        streams both back gets the same tokens. With tied embeddings the output matrix is not among them: it is
        made from `embed_tokens.weight` again, in the same way.
        """
        assert self._model is not None, "the backend is closed"
        return self._model.canonical()

    def close(self) -> None:
        """Release weights and KV cache, back to the system; idempotent."""
        self._model = None
        self._attention = None
        self._native = None
        self._result = None
        library, self._native_library = self._native_library, None
        if library is not None:
            library.close()
        _trim_heap()


def _attention_layers(arch: ModelArch, model: CpuModel, max_model_len: int) -> list[LayerAttention]:
    tables = layer_tables(arch, max_model_len)
    return [
        LayerAttention(tables[index], arch.layer(index).sliding_window, *model.qk_norms[index])
        for index in range(arch.num_layers)
    ]


def cpu_kv_layout(config: ModelConfig, arch: ModelArch) -> KvLayout:
    """What a KV block of this backend consists of."""
    block_size, number_format = config.kv_cache_config.block_size, config.quant_config.kv_cache
    if number_format == "none":
        return split_kv_layout(arch, block_size)
    return byte_kv_layout(arch, block_size, number_format)


def _why_not_native(config: ModelConfig, arch: ModelArch, limit: int, formats: ModelFormats) -> str | None:
    """What the native decoder lacks for a model, None if nothing."""
    if not arch.is_llama(limit):
        return f"it does not compute {arch.architecture} with contexts of {limit} tokens"
    if (lacking_kv := _why_no_native_kv(config, arch)) is not None:
        return lacking_kv
    lacking = sorted({str(item) for item in formats.in_use if not multiplies(item)})
    if lacking:
        return f"it does not multiply {', '.join(lacking)} weights"
    embedding = formats.of("embed_tokens")
    return None if embedding == DENSE or looks_up(embedding) else f"it does not look up rows of {embedding} embeddings"


def _why_no_native_kv(config: ModelConfig, arch: ModelArch) -> str | None:
    number_format, block_size = config.quant_config.kv_cache, config.kv_cache_config.block_size
    if number_format == "fp8":
        return "it has no fp8 KV cache"
    if number_format == "int8" and (
        block_size % BYTE_KV_MULTIPLE or arch.head_dim % BYTE_KV_MULTIPLE or arch.head_dim > MAX_BYTE_HEAD_DIM
    ):
        return (
            f"its int8 KV cache needs blocks of a multiple of {BYTE_KV_MULTIPLE} tokens, not {block_size}, and heads "
            f"of a multiple of {BYTE_KV_MULTIPLE} and at most {MAX_BYTE_HEAD_DIM} dimensions, not {arch.head_dim}"
        )
    return None


def _native_steps(native: NativeDecoder) -> str:
    return "steps" if native.max_tokens is None else f"steps of up to {native.max_tokens} tokens"


def _trim_heap() -> None:
    """Have glibc return freed memory: it keeps the small half of a model's matrices in its heap otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _step_result(step: int, inputs: StepInputs, samples: Samples, forward_s: float) -> StepResult:
    slots = inputs.sample_slots.tolist()
    token_ids = dict(zip(slots, zip(samples.token_ids, strict=True), strict=True))
    logprobs = {slots[row]: (value,) for row, value in samples.logprobs.items()}
    errors = {}
    if any(samples.failed):
        for slot, position, failed in zip(slots, inputs.sample_positions.tolist(), samples.failed, strict=True):
            if failed:
                errors[slot] = no_token_message(position)
                del token_ids[slot]
                logprobs.pop(slot, None)
    return StepResult(step=step, token_ids=token_ids, logprobs=logprobs, errors=errors, forward_s=forward_s)


def _attention_shape(arch: ModelArch) -> AttentionShape:
    return AttentionShape(
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        score_scale=arch.score_scale,
        soft_cap=arch.attention_soft_cap,
    )
