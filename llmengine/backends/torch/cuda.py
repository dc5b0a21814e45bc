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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch

from llmengine.backends.logit_edits import mask_words
from llmengine.backends.sampler import no_token_message
from llmengine.backends.torch.cuda_generic import make_cuda_segments
from llmengine.backends.torch.cuda_graphs import GraphCache
from llmengine.backends.torch.cuda_model import CudaModel, CudaWeights, allocate_weights, load_weights
from llmengine.backends.torch.cuda_sampling import DeviceSampler, PendingLogprobs
from llmengine.backends.torch.cuda_segments import MadeSegments, MakeSegments
from llmengine.backends.torch.cuda_step import Bucket, SlotTables, StepBuffer, StepLimits
from llmengine.backends.torch.cuda_stream import CudaStream, HostStream, StepStream
from llmengine.backends.torch.kv_sizing import context_limit, num_kv_blocks
from llmengine.batch import BackendInfo, Batch, StepResult
from llmengine.config import ModelConfig, SchedulerConfig
from llmengine.kernels.gemm_choice import ROW_BUCKETS
from llmengine.kernels.step import SlotState, end_step
from llmengine.models.source import ModelSource

_logger = logging.getLogger("llmengine.backends.torch.cuda")

_DEFAULT_FRACTION = 0.9
_STEPS_IN_FLIGHT = 8
_COMPILE_THREADS = 8
_FIRST_CAPTURES_S = 2.0
"""Most seconds that loading spends on captures; the other buckets follow when they are first seen."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A launched step: where its results will be, and which step was in flight before it."""

    batch: Batch
    ring_index: int
    sampled: Sequence[int]
    logprobs: PendingLogprobs | None
    before: int | None


class CudaBackend:
    """Implements `batch.Backend` on one CUDA device; made, used and closed by one thread.

    On a CPU device (with Triton's interpreter) the same code runs without graphs, for tests.

    Args:
        make_segments: makes what computes between the attentions.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: ModelSource,
        device: torch.device,
        make_segments: MakeSegments = make_cuda_segments,
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
        limit = context_limit(config, arch)
        block_size, num_slots = config.kv_cache_config.block_size, scheduler.max_batch_size
        with torch.inference_mode():
            weights = allocate_weights(config, source, device)
            model = CudaModel(arch, weights, config, limit, make_segments)
            self._model: CudaModel | None = model
            dtype = model.embedding.dtype
            block_shape = (2, arch.num_kv_heads, block_size, arch.head_dim)
            bytes_per_block = arch.num_layers * torch.Size(block_shape).numel() * dtype.itemsize
            num_blocks = num_kv_blocks(config, limit, bytes_per_block, _free_bytes(device), _DEFAULT_FRACTION)
            # Zeros: what is masked out of an attention must still be finite.
            self._kv: torch.Tensor | None = torch.zeros(
                (arch.num_layers, num_blocks, *block_shape), dtype=dtype, device=device
            )
            max_model_len = min(limit, (num_blocks - 1) * block_size)
            max_blocks = -(-max_model_len // block_size)
            self._state = SlotState.empty(num_slots, max_blocks, device)
            self._sampler = DeviceSampler(num_slots, num_slots, arch.vocab_size, device)
            depth = _STEPS_IN_FLIGHT + 1
            self._ring = torch.zeros((depth, num_slots), dtype=torch.int32, pin_memory=device.type == "cuda")
            self._buffers = {
                mixed: StepBuffer(limits, self._state, model.query_block, depth)
                for mixed, limits in _limits(scheduler, max_blocks, model.query_block).items()
            }
            self._load(weights, source)
            _tune(model.made, config.tuning_budget_s)
        self._tables = SlotTables(num_slots, max_blocks)
        self._stream: StepStream = CudaStream(depth) if device.type == "cuda" else HostStream()
        self._graphs: GraphCache[Bucket] = GraphCache(device, self._stream)
        self._pending: deque[_Pending] = deque()
        self._next_ring_index = 0
        self._capture_decodes()
        self._info = BackendInfo(
            description=f"torch {torch.__version__}, {_device_name(device)}, {_dtype_name(dtype)} weights, "
            f"{model.made.description}",
            vocab_size=arch.vocab_size,
            max_model_len=max_model_len,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_bytes_per_block=bytes_per_block,
            weight_bytes=weights.size_bytes,
            max_steps_in_flight=_STEPS_IN_FLIGHT,
        )
        _logger.info("%s; KV cache of %d tokens", self._info.description, (num_blocks - 1) * block_size)

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
            bucket = self._bucket(batch)
            ring_index = self._next_ring_index
            self._next_ring_index = (ring_index + 1) % len(self._ring)
            buffer = self._buffers[bucket.mixed]
            updates = self._tables.updates(batch.rows, batch.slot_inits)
            sampled = buffer.fill(batch, updates, bucket, ring_index)
            before = self._pending[-1].ring_index if self._pending else None
            self._stream.mark_begin(ring_index)
            buffer.send(ring_index, self._stream)
            self._graphs.run(bucket, partial(self._step, bucket))
            logprobs = self._sampler.logprobs(self._model.logits, sampled)
            self._stream.mark_end(ring_index)
            self._pending.append(_Pending(batch, ring_index, sampled, logprobs, before))

    def collect(self) -> StepResult:
        """Wait for the oldest step, without the GIL, and return what it sampled."""
        pending = self._pending.popleft()
        forward_s, idle_s = self._stream.wait(pending.ring_index, pending.before)
        ids = self._ring[pending.ring_index, : len(pending.sampled)].tolist()
        chosen = dict(zip(pending.sampled, ids, strict=True))
        chosen.pop(-1, None)
        errors = {}
        if min(ids, default=0) < 0:
            errors = {
                row.slot: no_token_message(row.start + row.num_tokens)
                for row in pending.batch.rows
                if chosen.get(row.slot, 0) < 0
            }
            chosen = {slot: token_id for slot, token_id in chosen.items() if token_id >= 0}
        logprobs = {} if pending.logprobs is None else pending.logprobs.collect()
        for slot in errors:
            logprobs.pop(slot, None)
        return StepResult(
            step=pending.batch.step,
            token_ids=chosen,
            logprobs=logprobs,
            errors=errors,
            forward_s=forward_s,
            idle_s=idle_s,
        )

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
        assert self._model is not None
        assert self._kv is not None
        step = self._buffers[bucket.mixed].step
        logits = self._model.forward(step, self._state, self._kv, bucket)
        self._sampler.choose(logits, step, bucket)
        end_step(step, self._state, self._sampler.ids, self._sampler.failed, self._ring, bucket.num_samples)

    def _bucket(self, batch: Batch) -> Bucket:
        rows = batch.rows
        draws = self._sampler.draws(rows)
        if not batch.slot_inits and batch.num_tokens == len(rows):
            size = _round_up(self._decode_sizes, len(rows))
            return Bucket(size, size, mixed=False, draws=draws)
        num_samples = sum(row.sample for row in rows)
        return Bucket(
            _round_up(self._mixed_sizes, batch.num_tokens),
            _round_up(self._sample_sizes, num_samples),
            mixed=True,
            draws=draws,
        )

    def _first_buckets(self) -> list[Bucket]:
        """Return buckets that together use every kernel in every form that depends on the number of rows."""
        sizes = sorted({_round_up(self._decode_sizes, min(rows, self._decode_sizes[-1])) for rows in ROW_BUCKETS})
        decodes = [Bucket(size, size, mixed=False) for size in sizes]
        mixed = Bucket(self._mixed_sizes[0], self._sample_sizes[0], mixed=True)
        return [mixed, *decodes, replace(decodes[0], draws=True)]

    def _load(self, weights: CudaWeights, source: ModelSource) -> None:
        """Fill the weights; kernels are compiled meanwhile."""
        assert self._model is not None
        began = time.monotonic()
        with ThreadPoolExecutor(_COMPILE_THREADS, "llmengine-compile") as threads:
            stream = _stream_after_current(self._device)
            steps = [threads.submit(self._compile, bucket, stream) for bucket in self._first_buckets()]
            load_weights(weights, source)
            loaded = time.monotonic()
            for future in steps:
                future.result()
        _logger.info("weights were there after %.1f s, kernels after %.1f s", loaded - began, time.monotonic() - began)

    def _compile(self, bucket: Bucket, stream: torch.cuda.Stream | None) -> None:
        """Run a step without rows on `stream`, one for all threads: kernels share scratch. Results go nowhere."""
        if stream is None:
            return
        torch.cuda.set_device(self._device)
        with torch.inference_mode(), torch.cuda.stream(stream):
            self._step(bucket)
        stream.synchronize()

    def _capture_decodes(self) -> None:
        """Capture steps of decodes, small ones first, so that serving does not begin with captures."""
        deadline = time.monotonic() + _FIRST_CAPTURES_S
        with torch.inference_mode():
            for size in self._decode_sizes if self._device.type == "cuda" else ():
                if time.monotonic() >= deadline:
                    break
                bucket = Bucket(size, size, mixed=False)
                self._graphs.run(bucket, partial(self._step, bucket))

    def _forget_draws(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._graphs.drop(lambda bucket: bucket.draws)


def _tune(made: MadeSegments, budget_s: float) -> None:
    began = time.monotonic()
    made.tune(budget_s)
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
