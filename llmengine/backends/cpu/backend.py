"""The CPU backend: one step at a time, run to its end in `launch`."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch

from llmengine.backends.cpu.deterministic import native_pieces, sampling_all, token_pieces
from llmengine.backends.cpu.forward_pass import StepPass
from llmengine.backends.cpu.native import MAX_FEW_TOKENS, NativeDecoder
from llmengine.backends.cpu.native_library import NativeLibrary
from llmengine.backends.cpu.openmp import TorchThreads
from llmengine.backends.cpu.prompt_logprobs import compute_prompt_logprobs
from llmengine.backends.cpu.sampler import Logits, Sampler, Samples
from llmengine.backends.cpu.step_inputs import BlockTables, HostSlotState, StepInputs, in_step_order
from llmengine.backends.cpu.weights import CpuModel
from llmengine.backends.logit_edits import mask_words
from llmengine.backends.prompt_logprobs import PromptLogprobs, WantedLogprobs
from llmengine.backends.row_errors import no_token_message
from llmengine.batch import BackendInfo, Batch, StepResult, TokenLogprobs

_LEAST_SHARED_ELEMENTS = 4 << 20
"""Logits of a step, from which on torch's operators take all threads."""


@dataclass(frozen=True, slots=True)
class CpuParts:
    """The parts of a `CpuBackend`, ready for its first step.

    Attributes:
        forward_pass: by torch's operators.
        native: the native decoder; None: torch's operators run all steps.
        native_library: closed with the backend; it may be there without the decoder, for its products.
        deterministic: cut steps so that no token depends on what is beside it.
    """

    info: BackendInfo
    model: CpuModel
    forward_pass: StepPass
    native: NativeDecoder | None
    native_library: NativeLibrary | None
    tables: BlockTables
    deterministic: bool


class CpuBackend:
    """Implements `batch.Backend` with torch's CPU operators; made, used and closed by one thread.

    Activations and logits are float32 whatever the weights are, and so is KV unless `quant_config.kv_cache` asks for 8
    bits. Where the native decoder is available, it runs the steps, but for large ones of some weights (see
    `NativeDecoder`), and torch's operators take one thread. `loading.load_cpu_backend` makes one.
    """

    def __init__(self, parts: CpuParts) -> None:
        info = parts.info
        self._info = info
        self._model: CpuModel | None = parts.model
        self._forward_pass: StepPass | None = parts.forward_pass
        self._native: NativeDecoder | None = parts.native
        self._native_library: NativeLibrary | None = parts.native_library
        self._deterministic = parts.deterministic
        self._torch_threads = TorchThreads()
        self._slots = HostSlotState(parts.tables)
        self._sampler = Sampler(len(parts.tables.array), info.vocab_size)
        self._prompt_logprobs = PromptLogprobs(info.vocab_size)
        self._result: StepResult | None = None

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
            with self._torch_threads_for(logits.values.numel()):
                samples = self._sampler.sample(
                    logits.values, inputs.sample_slots, inputs.sample_positions, masks, logits.likeliest
                )
        self._slots.store_sampled(inputs.sample_slots, samples.token_ids)
        self._result = replace(_step_result(batch.step, inputs, samples, forward_s), prompt_logprobs=prompt_logprobs)

    def _forward(self, inputs: StepInputs) -> Logits | None:
        """Write the KV of all tokens and return the logits of those that sample, None without such."""
        if not self._deterministic:
            return self._forward_at_once(inputs)
        native = self._native
        pieces = token_pieces(inputs) if native is None else native_pieces(inputs, MAX_FEW_TOKENS)
        found = [(self._forward_at_once(piece), num_samples) for piece, num_samples in pieces]
        logits = [some.values[:num_samples] for some, num_samples in found if some is not None]
        return Logits(torch.cat(logits)) if logits else None

    def _few_torch_threads(self) -> AbstractContextManager[None]:
        """Keep torch's threads from spinning on the cores of the native decoder's."""
        return contextlib.nullcontext() if self._native is None else self._torch_threads.one()

    def _torch_threads_for(self, num_elements: int) -> AbstractContextManager[None]:
        """Give torch's operators all threads where that gains more than starting and ending these costs."""
        if self._native is None or num_elements < _LEAST_SHARED_ELEMENTS:
            return contextlib.nullcontext()
        return self._torch_threads.all()

    def _forward_at_once(self, inputs: StepInputs) -> Logits | None:
        native = self._native
        if native is not None and (native.max_tokens is None or len(inputs.token_ids) <= native.max_tokens):
            return native.forward(inputs, self._slots.block_tables)
        with self._torch_threads_for(_LEAST_SHARED_ELEMENTS):
            return self._forward_by_torch(inputs)

    def _forward_by_torch(self, inputs: StepInputs) -> Logits | None:
        assert self._forward_pass is not None
        logits = self._forward_pass.run(inputs)
        return None if logits is None else Logits(logits)

    def _forward_with_prompt_logprobs(
        self, inputs: StepInputs, wanted: Sequence[WantedLogprobs]
    ) -> tuple[Logits | None, dict[int, list[TokenLogprobs]]]:
        """The same as `_forward`, with log-probabilities of prompt tokens."""
        if self._deterministic:
            # These tokens are computed again, which writes the same keys and values.
            logits = self._forward(inputs)
            return logits, compute_prompt_logprobs(wanted, partial(self._logits_after, inputs), self._info.vocab_size)
        assert self._forward_pass is not None
        last = self._forward_pass.begin(inputs)
        prompt_logprobs = compute_prompt_logprobs(wanted, last, self._info.vocab_size)
        samples = torch.from_numpy(inputs.sample_tokens)
        return Logits(last(samples)) if len(samples) else None, prompt_logprobs

    def _logits_after(self, inputs: StepInputs, tokens: torch.Tensor) -> torch.Tensor:
        """Logits float32 [n, vocab] of the step's tokens int64 [n], which are consecutive."""
        logits = self._forward(sampling_all(inputs, slice(int(tokens[0]), int(tokens[-1]) + 1)))
        assert logits is not None
        return logits.values

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
        yield logits.values

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
        self._forward_pass = None
        self._native = None
        self._result = None
        library, self._native_library = self._native_library, None
        if library is not None:
            library.close()
        trim_heap()


def trim_heap() -> None:
    """Have glibc return freed memory.

    It keeps the small half of a model's matrices in its heap otherwise, and of the buffers that loading needs.
    """
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
