"""The CUDA backend: steps queued ahead on one stream, each one copy in, one graph replay, one event.

::

    host    fill N+1, send, replay | wait for N, update | fill N+2, ...
    device  ... step N ...................| step N+1 ...................| step N+2
                                          ^ ids of N are in pinned memory

Sampled ids stay on the device as the slots' last tokens, so step N+1 does not wait for the host to see step N.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from llmengine.backends.cuda.compile_threads import compile_threads
from llmengine.backends.cuda.fused_segments import SegmentsFactory, TunableSegments
from llmengine.backends.cuda.generic_segments import build_cuda_segments
from llmengine.backends.cuda.graphs import GraphCache
from llmengine.backends.cuda.model import CudaModel, CudaWeights, allocate_weights, load_weights, memory_error_context
from llmengine.backends.cuda.sampling import DeviceSampler, PendingLogprobs, PendingPromptLogprobs
from llmengine.backends.cuda.step_buffer import Bucket, SlotStateUpdater, StepBuffer, StepLimits, in_mixed_order
from llmengine.backends.cuda.stream import CudaStream, HostStream, StepStream
from llmengine.backends.kv_layout import context_limit, fit_kv_pool, joint_kv_layout
from llmengine.backends.logit_edits import mask_words
from llmengine.backends.prompt_logprobs import PromptLogprobs, WantedLogprobs
from llmengine.backends.row_errors import no_token_message
from llmengine.batch import BackendInfo, Batch, StepResult
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.kernels.gemm_choice import ROW_BUCKETS
from llmengine.kernels.step import SlotState, end_step

_logger = logging.getLogger("llmengine.backends.cuda.backend")

_DEFAULT_FRACTION = 0.9
_STEPS_IN_FLIGHT = 8
_FIRST_CAPTURES_S = 2.0
"""Most seconds that loading spends on captures; the other buckets follow in quiet moments, or when they are needed."""

_EMPTY_BATCH = Batch(-1, ())
"""A step without rows."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A launched step: where its results will be, and which step was in flight before it."""

    batch: Batch
    ring_index: int
    sampled: Sequence[int]
    logprobs: PendingLogprobs | None
    prompt_logprobs: PendingPromptLogprobs | None
    before: int | None


class CudaBackend:
    """Implements `batch.Backend` on one CUDA device; made, used and closed by one thread.

    On a CPU device (with Triton's interpreter) the same code runs without graphs, for tests.

    Args:
        segments_factory: makes what computes between the attentions.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: ModelSource,
        device: torch.device,
        segments_factory: SegmentsFactory = build_cuda_segments,
    ) -> None:
        self._device = device
        if device.type == "cuda":
            # Both belong to this thread alone.
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))
        arch, scheduler = source.arch, config.scheduler_config
        self._decode_sizes = _decode_sizes(scheduler.max_batch_size)
        self._mixed_sizes = _mixed_sizes(scheduler.max_tokens_per_step)
        self._sample_sizes = _sample_sizes(scheduler.max_batch_size)
        self._deterministic = config.deterministic
        self._prompt_logprobs = PromptLogprobs(arch.vocab_size)
        limit = context_limit(config, arch)
        num_slots = scheduler.max_batch_size
        with torch.inference_mode():
            weights = allocate_weights(config, source, device)
            sizes = f"max_tokens_per_step={scheduler.max_tokens_per_step} and max_batch_size={num_slots}"
            with memory_error_context(f"activations: buffers for {sizes}", device, "lower these of scheduler_config"):
                model = CudaModel(arch, weights, config, limit, segments_factory)
            self._model: CudaModel | None = model
            dtype = model.embedding.dtype
            layout = joint_kv_layout(arch, config.kv_cache_config.block_size, dtype)
            pool = fit_kv_pool(layout, config, limit, _free_bytes(device), _DEFAULT_FRACTION)
            max_blocks = pool.max_blocks_per_request
            depth = _STEPS_IN_FLIGHT + 1
            component = f"KV cache: {pool.size_bytes / 2**20:.0f} MiB, and what steps need beside it,"
            kv_memory_context = partial(
                memory_error_context, component, device, "lower kv_cache_config.free_memory_fraction"
            )
            with kv_memory_context():
                self._kv: torch.Tensor | None = pool.zeros("kv", device)
                self._state = SlotState.empty(num_slots, max_blocks, device)
                self._sampler = DeviceSampler(num_slots, num_slots, arch.vocab_size, device, config.deterministic)
                self._ring = torch.zeros((depth, num_slots), dtype=torch.int32, pin_memory=device.type == "cuda")
                self._buffers = {
                    mixed: StepBuffer(limits, self._state, model.query_block, depth, decodes=not config.deterministic)
                    for mixed, limits in _limits(scheduler, max_blocks, model.query_block).items()
                }
                self._load(weights, source)
                _tune(model.tunable_segments, config.tuning_budget_s)
                model.tune_attention(self._state, self._kv)
        self._tables = SlotStateUpdater(num_slots, max_blocks)
        self._stream: StepStream = CudaStream(depth) if device.type == "cuda" else HostStream()
        self._graphs: GraphCache[Bucket] = GraphCache(device, self._stream)
        self._pending: deque[_Pending] = deque()
        self._next_ring_index = 0
        self._likely = iter(_likely_buckets(self._mixed_sizes, self._sample_sizes, self._decode_buckets()))
        with kv_memory_context():
            self._capture_first()
        self._info = BackendInfo(
            description=f"torch {torch.__version__}, {_device_name(device)}, {_dtype_name(dtype)} weights, "
            f"{model.description}" + (", deterministic" if config.deterministic else ""),
            vocab_size=arch.vocab_size,
            max_model_len=pool.max_model_len,
            num_blocks=pool.num_blocks,
            block_size=layout.block_size,
            kv_bytes_per_block=layout.bytes_per_block,
            weight_bytes=weights.size_bytes,
            max_steps_in_flight=_STEPS_IN_FLIGHT,
            has_prompt_logprobs=True,
        )
        _logger.info("%s; KV cache of %d tokens", self._info.description, pool.num_tokens)

    @property
    def info(self) -> BackendInfo:
        return self._info

    def launch(self, batch: Batch) -> None:
        """Queue one step; returns when the device has all that it needs."""
        assert self._model is not None, "the backend is closed"
        assert len(self._pending) < _STEPS_IN_FLIGHT
        with torch.inference_mode():
            if self._sampler.prepare(batch, mask_words(batch.masks)):
                self._forget_draws()
            wanted = self._wanted(batch)
            bucket = self._bucket(batch, decodes=not wanted)
            ring_index = self._next_ring_index
            self._next_ring_index = (ring_index + 1) % len(self._ring)
            buffer = self._buffers[bucket.mixed]
            updates = self._tables.updates(batch.rows, batch.slot_inits)
            sampled = buffer.fill(batch, updates, bucket, ring_index)
            before = self._pending[-1].ring_index if self._pending else None
            self._stream.mark_begin(ring_index)
            buffer.send(ring_index, self._stream)
            prompt_logprobs = None
            if wanted:
                prompt_logprobs = self._step_with_prompt_logprobs(bucket, wanted)
            else:
                self._graphs.run(bucket, partial(self._step, bucket))
            logprobs = self._sampler.logprobs(self._model.logits, sampled)
            self._stream.mark_end(ring_index)
            self._pending.append(_Pending(batch, ring_index, sampled, logprobs, prompt_logprobs, before))

    def collect(self) -> StepResult:
        """Wait for the oldest step, without the GIL, and return what it sampled."""
        pending = self._pending.popleft()
        forward_s, idle_s = self._stream.wait(pending.ring_index, pending.before)
        ids = self._ring[pending.ring_index, : len(pending.sampled)].tolist()
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

    def prepare(self) -> bool:
        """Capture one kind of step that has no graph yet: one that was needed, else the likeliest."""
        assert self._model is not None, "the backend is closed"
        assert not self._pending
        bucket = next(self._graphs.seen(), None)
        if bucket is None:
            bucket = next((bucket for bucket in self._likely if bucket not in self._graphs), None)
        if bucket is None or not self._graphs.may_capture_ahead:
            return False
        with torch.inference_mode():
            buffer = self._buffers[bucket.mixed]
            buffer.fill(_EMPTY_BATCH, (), bucket, self._next_ring_index)
            buffer.send(self._next_ring_index, self._stream)
            try:
                self._graphs.capture(bucket, partial(self._step, bucket))
            except torch.OutOfMemoryError as failure:
                _logger.warning(
                    "steps that are new run eagerly from now on: no memory to capture %s: %s", bucket, failure
                )
        self._stream.synchronize()  # the next step is written where this one was
        return True

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the canonical weights, on the CPU, one at a time."""
        assert self._model is not None, "the backend is closed"
        return self._model.weights.canonical()

    def close(self) -> None:
        """Release all device memory; idempotent. Steps in flight are waited for."""
        if self._model is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.clear()
        self._stream.close()
        self._pending.clear()
        self._model = None
        self._kv = None
        del self._state, self._sampler, self._ring, self._buffers
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, bucket: Bucket) -> None:
        """Queue all device work of a step; the function that graphs are captured from."""
        self._end_step(bucket, *self._forward_to_last(bucket))

    def _step_with_prompt_logprobs(self, bucket: Bucket, wanted: Sequence[WantedLogprobs]) -> PendingPromptLogprobs:
        """Queue a mixed step and the logits of prompt tokens; never from a graph, since these are any number."""
        assert self._model is not None
        attended, x = self._forward_to_last(bucket)
        logits_after = partial(self._model.last, attended, x)
        prompt_logprobs = self._sampler.prompt_logprobs(wanted, logits_after, self._sample_sizes)
        self._end_step(bucket, attended, x)  # comes last: the sampled tokens' logits are looked at again
        return prompt_logprobs

    def _forward_to_last(self, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._model is not None
        assert self._kv is not None
        return self._model.forward_to_last(self._buffers[bucket.mixed].step, self._state, self._kv, bucket)

    def _end_step(self, bucket: Bucket, attended: torch.Tensor, x: torch.Tensor) -> None:
        """Queue what comes after the last attention, for the tokens that sample."""
        assert self._model is not None
        step = self._buffers[bucket.mixed].step
        self._model.last(attended, x, step.sample_tokens[: bucket.num_samples] if bucket.mixed else None)
        self._choose(bucket)

    def _choose(self, bucket: Bucket) -> None:
        """Queue what comes after the logits."""
        assert self._model is not None
        step = self._buffers[bucket.mixed].step
        self._sampler.choose(self._model.logits[: bucket.num_samples], step, bucket)
        end_step(step, self._state, self._sampler.ids, self._sampler.failed, self._ring, bucket.num_samples)

    def _wanted(self, batch: Batch) -> list[WantedLogprobs]:
        """Return the prompt tokens whose log-probabilities the step gives; tokens as in a mixed step."""
        for init in batch.slot_inits:
            self._prompt_logprobs.init_slot(init)
        if not self._prompt_logprobs:
            return []
        return self._prompt_logprobs.take_wanted(in_mixed_order(batch.rows))

    def _bucket(self, batch: Batch, decodes: bool = True) -> Bucket:
        """Return the padded sizes of a step.

        Args:
            decodes: a step that only decodes need not be a mixed one.
        """
        rows = batch.rows
        draws = self._sampler.draws(rows)
        if decodes and not batch.slot_inits and batch.num_tokens == len(rows):
            return replace(self._decode_bucket(len(rows)), draws=draws)
        num_samples = sum(row.sample > 0 for row in rows)
        return Bucket(
            _round_up(self._mixed_sizes, batch.num_tokens),
            _round_up(self._sample_sizes, num_samples),
            mixed=True,
            draws=draws,
        )

    def _decode_bucket(self, num_rows: int) -> Bucket:
        """Return the padded sizes of a step that decodes; all steps are mixed where these are deterministic."""
        if self._deterministic:
            num_tokens = _round_up(self._mixed_sizes, num_rows)
            return Bucket(num_tokens, _round_up(self._sample_sizes, num_rows), mixed=True)
        size = _round_up(self._decode_sizes, num_rows)
        return Bucket(size, size, mixed=False)

    def _load(self, weights: CudaWeights, source: ModelSource) -> None:
        """Fill the weights; kernels are compiled meanwhile."""
        began = time.monotonic()
        with ThreadPoolExecutor(1, "llmengine-compile") as thread:
            compiled = thread.submit(self._compile_first, _stream_after_current(self._device))
            load_weights(weights, source)
            loaded = time.monotonic()
            compiled.result()
        _logger.info("weights were there after %.1f s, kernels after %.1f s", loaded - began, time.monotonic() - began)

    def _compile_first(self, stream: torch.cuda.Stream | None) -> None:
        """Compile every kernel in every form that depends on the number of rows, on threads.

        Kernel by kernel, since a step would compile one after the other, and two steps what they have in common
        twice. Then steps without rows run, one of each kind, for what is left. Everything is queued on `stream`, as
        scratch is shared, and leaves junk.
        """
        if stream is None:
            return

        def run(call: Callable[[], object]) -> None:
            torch.cuda.set_device(self._device)
            with torch.inference_mode(), torch.cuda.stream(stream):
                call()

        first, *others = self._compilations()
        run(first)  # alone: with its first kernel Triton hashes itself, which each thread would do for seconds
        with compile_threads() as threads:
            for job in [threads.submit(run, call) for call in others]:
                job.result()
        for bucket in self._first_buckets():
            run(partial(self._step, bucket))
        stream.synchronize()

    def _compilations(self) -> list[Callable[[], None]]:
        """Return calls that compile what steps launch, about a kernel each, on any thread; the first is a quick one."""
        assert self._model is not None
        assert self._kv is not None
        mixed, *decodes, _ = self._first_buckets()
        steps = {bucket: self._buffers[bucket.mixed].step for bucket in (mixed, decodes[-1])}
        model = self._model.compilations(steps, self._state, self._kv)
        sampler = self._sampler.compilations(self._model.logits, steps[decodes[-1]])
        return [*model, *sampler, partial(self._choose, decodes[-1]), *self._model.tunable_segments.compilations]

    def _first_buckets(self) -> list[Bucket]:
        """Return buckets whose steps launch every kernel in every form: mixed, of decodes, the last one with draws."""
        most = self._decode_sizes[-1]
        decodes = list(dict.fromkeys(self._decode_bucket(min(rows, most)) for rows in ROW_BUCKETS))
        mixed = Bucket(self._mixed_sizes[0], self._sample_sizes[0], mixed=True)
        return [mixed, *decodes, replace(decodes[-1], draws=True)]

    def _decode_buckets(self) -> list[Bucket]:
        """Return the buckets of steps that decode, small ones first."""
        return list(dict.fromkeys(map(self._decode_bucket, self._decode_sizes)))

    def _capture_first(self) -> None:
        """Capture steps of decodes, so that serving does not begin with captures."""
        if self._device.type != "cuda":
            return
        deadline = time.monotonic() + _FIRST_CAPTURES_S
        # All that a step allocates fits into what the largest one leaves behind.
        largest = Bucket(self._mixed_sizes[-1], self._sample_sizes[-1], mixed=True)
        with torch.inference_mode():
            for bucket in dict.fromkeys((largest, *self._decode_buckets())):
                if time.monotonic() >= deadline:
                    break
                self._graphs.capture(bucket, partial(self._step, bucket))

    def _forget_draws(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.drop(lambda bucket: bucket.draws)


def _tune(segments: TunableSegments, budget_s: float) -> None:
    began = time.monotonic()
    segments.tune(budget_s)
    _logger.info("choosing matrix products took %.1f s", time.monotonic() - began)


def _limits(scheduler: SchedulerConfig, max_blocks: int, query_block: int) -> dict[bool, StepLimits]:
    """Return the sizes of the two step buffers, by `Bucket.mixed`."""
    max_tokens, max_rows = scheduler.max_tokens_per_step, scheduler.max_batch_size
    return {
        False: StepLimits(max_rows, max_rows, 0, max_rows),
        True: StepLimits(max_tokens, max_rows, max_tokens // query_block + max_rows, max_rows * (max_blocks + 1)),
    }


def _decode_sizes(max_rows: int) -> list[int]:
    """Return 1, 2, 4, 8, then steps of 8 to 32, of 16 to 128, of 32 beyond; the last is `max_rows`."""
    sizes = [1, 2, 4, 8, *range(16, 32, 8), *range(32, 128, 16), *range(128, max_rows, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]


def _mixed_sizes(max_tokens: int) -> list[int]:
    """Return 16 to 512 in factors of about 1.5, then steps of 256; the last is `max_tokens`."""
    sizes = [16, 32, 64, 96, 128, 192, 256, 384, *range(512, max_tokens, 256)]
    return [*(size for size in sizes if size < max_tokens), max_tokens]


def _sample_sizes(max_rows: int) -> list[int]:
    return [*(size for size in (1, 8, 64) if size < max_rows), max_rows]


def _likely_buckets(
    mixed_sizes: Sequence[int], sample_sizes: Sequence[int], decodes: Sequence[Bucket]
) -> Iterator[Bucket]:
    """Yield what steps can be: of decodes, mixed ones with few samples first; then all again for rows that draw."""
    for draws in (False, True):
        yield from (replace(bucket, draws=draws) for bucket in decodes)
        fewer = 0
        for num_samples in sample_sizes:
            for num_tokens in mixed_sizes:
                if num_tokens > fewer:
                    yield Bucket(num_tokens, num_samples, mixed=True, draws=draws)
            fewer = num_samples


def _round_up(sizes: Sequence[int], wanted: int) -> int:
    """Return the least of the ascending sizes that holds `wanted`."""
    return sizes[bisect_left(sizes, wanted)]


def _stream_after_current(device: torch.device) -> torch.cuda.Stream | None:
    """Return a new stream whose work starts when what is queued in the current one is done; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
