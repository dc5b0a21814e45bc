"""The CUDA backend: steps queued ahead on one stream, each one copy in, one graph replay, one event.

::

    host    fill N+1, send, replay | wait for N, update | fill N+2, ...
    device  ... step N ...................| step N+1 ...................| step N+2
                                          ^ ids of N are in pinned memory

Sampled ids stay on the device as the slots' last tokens, so step N+1 does not wait for the host to see step N.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from llmengine.backends.cuda.buckets import Bucket, BucketSizes
from llmengine.backends.cuda.graphs import GraphCache
from llmengine.backends.cuda.sampling import PendingLogprobs, PendingPromptLogprobs
from llmengine.backends.cuda.stage_link import IdsLag
from llmengine.backends.cuda.step_buffer import SlotStateUpdater, in_mixed_order
from llmengine.backends.cuda.step_program import StepProgram
from llmengine.backends.cuda.stream import StepStream
from llmengine.backends.cuda.warmup import GraphWarmup
from llmengine.backends.kv_layout import KvPool
from llmengine.backends.logit_edits import mask_words
from llmengine.backends.prompt_logprobs import PromptLogprobs, WantedLogprobs
from llmengine.backends.row_errors import no_token_message
from llmengine.batch import BackendInfo, Batch, StepResult


@dataclass(frozen=True, slots=True)
class CudaParts:
    """Finished parts of a `CudaBackend`, see `loading.load_cuda_parts`."""

    device: torch.device
    info: BackendInfo
    sizes: BucketSizes
    pool: KvPool
    program: StepProgram
    stream: StepStream
    graphs: GraphCache[Bucket]
    warmup: GraphWarmup


@dataclass(frozen=True, slots=True)
class _PendingStep:
    """A launched step: where its results will be, and which step was in flight before it."""

    batch: Batch
    ring_index: int
    sampled: Sequence[int]
    logprobs: PendingLogprobs | None
    prompt_logprobs: PendingPromptLogprobs | None
    before: int | None


class CudaBackend:
    """Implements `batch.Backend` on one CUDA device; one thread loads, uses and closes it, and may do so with others.

    torch queues in the current stream of the thread, which loading a backend replaces. So whatever queues work here
    claims the thread first: in the stream of another backend, kernels would not wait for the copy of their step, nor
    the host for the kernels.
    """

    def __init__(self, parts: CudaParts) -> None:
        self._device = parts.device
        self._info = parts.info
        self._sizes = parts.sizes
        self._program: StepProgram | None = parts.program
        self._stream = parts.stream
        self._graphs = parts.graphs
        self._warmup: GraphWarmup | None = parts.warmup
        self._slots = SlotStateUpdater(parts.sizes.decodes[-1], parts.pool.max_blocks_per_request)
        self._prompt_logprobs = PromptLogprobs(parts.info.vocab_size)
        link = parts.program.model.link
        self._tells_ids = link is not None and not link.carries_ids
        self._ids_lag = IdsLag()
        self._latest_ids: dict[int, int] = {}
        self._pending: deque[_PendingStep] = deque()
        self._next_ring_index = 0

    @property
    def info(self) -> BackendInfo:
        return self._info

    def launch(self, batch: Batch) -> None:
        """Queue one step; returns when the device has all that it needs."""
        program = self._program
        assert program is not None, "the backend is closed"
        assert len(self._pending) < self._info.max_steps_in_flight
        self._stream.claim()
        with torch.inference_mode():
            if program.sampler.prepare(batch, mask_words(batch.masks)):
                self._forget_draws()
            wanted = self._take_wanted_logprobs(batch)
            # Log-probabilities need all logits in one place, which greedy steps that ranks share do without.
            draws = program.sampler.draws(batch.rows, with_logprobs=program.model.peers is not None)
            bucket = self._sizes.bucket_of(batch, draws=draws, needs_mixed=bool(wanted))
            ring_index = self._next_ring_index
            self._next_ring_index = (ring_index + 1) % program.ring.depth
            buffer = program.buffer(bucket)
            updates = self._slots.updates(batch.rows, batch.slot_inits)
            ids_lag = self._find_ids(program, batch)
            sampled = buffer.fill(batch, updates, bucket, ring_index, ids_lag)
            before = self._pending[-1].ring_index if self._pending else None
            self._stream.mark_begin(ring_index)
            program.send(bucket, ring_index, self._stream)
            prompt_logprobs = None
            if wanted:
                prompt_logprobs = program.run_with_prompt_logprobs(bucket, wanted, self._sizes)
            else:
                self._graphs.run(bucket, partial(program.run, bucket))
            logprobs = program.sampler.logprobs(program.model.logits, sampled)
            self._stream.mark_end(ring_index)
            self._pending.append(_PendingStep(batch, ring_index, sampled, logprobs, prompt_logprobs, before))

    def collect(self) -> StepResult:
        """Wait for the oldest step, without the GIL, and return what it sampled."""
        assert self._program is not None, "the backend is closed"
        pending = self._pending.popleft()
        forward_s, idle_s = self._stream.wait(pending.ring_index, pending.before)
        ids = self._program.ring.read(pending.ring_index, len(pending.sampled))
        if self._tells_ids:
            self._note_ids(self._program, pending)
        chosen = dict(zip(pending.sampled, zip(ids, strict=True), strict=True))
        chosen.pop(-1, None)
        errors = {}
        if min(ids, default=0) < 0:
            errors = {
                row.slot: no_token_message(row.start + row.num_tokens)
                for row in pending.batch.rows
                if chosen.get(row.slot, (0,))[0] < 0
            }
            chosen = {slot: token_ids for slot, token_ids in chosen.items() if token_ids[0] >= 0}
        logprobs = {} if pending.logprobs is None else pending.logprobs.collect()
        for slot in errors:
            logprobs.pop(slot, None)
        return StepResult(
            step=pending.batch.step,
            token_ids=chosen,
            logprobs=logprobs,
            prompt_logprobs={} if pending.prompt_logprobs is None else pending.prompt_logprobs.collect(),
            errors=errors,
            forward_s=forward_s,
            idle_s=idle_s,
        )

    @torch.inference_mode()
    def score(self, batch: Batch) -> Iterator[torch.Tensor]:
        """Yield the logits of a step with one row, of a bounded number of tokens at a time; see `ScoringBackend`."""
        program = self._program
        assert program is not None, "the backend is closed"
        assert len(self._pending) < self._info.max_steps_in_flight
        self._stream.claim()
        bucket = self._sizes.bucket_of(batch, draws=False, needs_mixed=True)
        ring_index = self._next_ring_index
        self._next_ring_index = (ring_index + 1) % program.ring.depth
        updates = self._slots.updates(batch.rows, batch.slot_inits)
        ids_lag = self._find_ids(program, batch)
        program.buffer(bucket).fill(batch, updates, bucket, ring_index, ids_lag)
        program.send(bucket, ring_index, self._stream)
        for logits in program.run_for_logits(bucket, batch.num_tokens, self._sizes):
            yield logits
            self._stream.claim()
        self._stream.synchronize()  # the host's side of the buffer is free again

    def prepare(self) -> bool:
        """Capture one kind of step that has no graph yet: one that was needed, or else the likeliest."""
        assert self._warmup is not None, "the backend is closed"
        assert not self._pending
        self._stream.claim()
        with torch.inference_mode():
            return self._warmup.capture_next(self._next_ring_index)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the canonical weights, on the CPU, one at a time."""
        assert self._program is not None, "the backend is closed"
        return self._program.model.weights.canonical()

    def close(self) -> None:
        """Release all device memory, after the steps in flight; idempotent."""
        if self._program is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._stream.close()
        self._pending.clear()
        self._program = self._warmup = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _find_ids(self, program: StepProgram, batch: Batch) -> int:
        """Where the first stage of a pipeline finds the ids that a step lacks: as `IdsLag.of` says, or 0.

        Where the last stage does not send them, this waits for them and tells them. So no device waits for what this
        thread has yet to tell, and all that is queued may be waited for.
        """
        if program.model.link is None:
            return 0
        if not self._tells_ids:
            return self._ids_lag.of(batch)
        missing = {row.slot for row in batch.rows if len(row.token_ids) < row.num_tokens}
        missing -= {init.slot for init in batch.slot_inits}
        for step in self._pending:
            if not missing.isdisjoint(step.sampled):
                self._stream.wait(step.ring_index, None)
                self._note_ids(program, step)
        if missing:
            slots = sorted(missing)
            program.tell_sampled(slots, [max(0, self._latest_ids[slot]) for slot in slots])
        return 0

    def _note_ids(self, program: StepProgram, step: _PendingStep) -> None:
        """Keep what a step that has ended sampled, for steps that lack it."""
        ids = program.ring.read(step.ring_index, len(step.sampled))
        self._latest_ids.update(zip(step.sampled, ids, strict=True))

    def _take_wanted_logprobs(self, batch: Batch) -> list[WantedLogprobs]:
        """Prompt tokens whose log-probabilities the step computes; tokens are counted as in a mixed step."""
        for init in batch.slot_inits:
            self._prompt_logprobs.init_slot(init)
        if not self._prompt_logprobs:
            return []
        return self._prompt_logprobs.take_wanted(in_mixed_order(batch.rows))

    def _forget_draws(self) -> None:
        """Drop the graphs of steps that draw: tensors that they read were replaced."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.drop(lambda bucket: bucket.draws)
