"""Warm-up in stages: compile kernels while weights arrive, measure what is fastest, capture graphs.

Each stage takes finished parts and decides by nothing but its arguments and what it measures. So a process that holds
one rank of a model can be told to run a stage when the others do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from llmengine.backends.cuda.buckets import Bucket, BucketSizes
from llmengine.backends.cuda.compile_threads import compile_threads
from llmengine.backends.cuda.graphs import GraphCache
from llmengine.backends.cuda.step_program import StepProgram
from llmengine.backends.cuda.stream import StepStream
from llmengine.backends.cuda.weights import load_weights
from llmengine.batch import Batch
from llmengine.checkpoints.source import ModelSource

_logger = logging.getLogger("llmengine.backends.cuda.backend")

_FIRST_CAPTURES_S = 2.0
"""Most seconds that loading spends on captures; the other buckets follow in quiet moments, or when they are needed."""

_EMPTY_BATCH = Batch(-1, ())
"""A step without rows."""


def load_and_compile(program: StepProgram, sizes: BucketSizes, source: ModelSource) -> None:
    """Fill the model's weights from `source`, and meanwhile compile every kernel.

    The last copies of weights may still be under way, in the current stream.
    """
    began = time.monotonic()
    device = program.kv.device
    with ThreadPoolExecutor(1, "llmengine-compile") as thread:
        compiled = thread.submit(_compile_kernels, program, sizes, _stream_after_current(device))
        if not program.model.tunable_segments.has_loaded_weights:
            load_weights(program.model.weights, source)
        loaded = time.monotonic()
        compiled.result()
    _logger.info("weights were there after %.1f s, kernels after %.1f s", loaded - began, time.monotonic() - began)


def _compile_kernels(program: StepProgram, sizes: BucketSizes, stream: torch.cuda.Stream | None) -> None:
    """Compile every kernel in every form that depends on the number of rows, on threads; nothing without a stream.

    Each call compiles one kernel: a step would compile its kernels one after the other, and two steps would compile
    twice what they have in common. Then steps without rows run, one of each kind, for what is left. Everything is
    queued on `stream`, as scratch is shared, and leaves junk.
    """
    if stream is None:
        return

    def run(call: Callable[[], object]) -> None:
        torch.cuda.set_device(stream.device)
        with torch.inference_mode(), torch.cuda.stream(stream):
            call()

    first, *others = program.compilations(sizes)
    run(first)  # alone: with its first kernel Triton hashes itself, which every thread would do for seconds
    with compile_threads() as threads:
        for job in [threads.submit(run, call) for call in others]:
            job.result()
    for bucket in sizes.kernel_buckets():
        run(partial(program.run, bucket))
    stream.synchronize()


def _stream_after_current(device: torch.device) -> torch.cuda.Stream | None:
    """A new stream whose work starts when what is queued in the current one is done; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def tune(program: StepProgram, budget_s: float) -> None:
    """Choose the fastest matrix products and decode attention for the weights in their places.

    No graph may exist yet. Writes junk to the KV cache.

    Args:
        budget_s: seconds for matrix products.
    """
    began = time.monotonic()
    program.model.tunable_segments.tune(budget_s)
    _logger.info("choosing matrix products took %.1f s", time.monotonic() - began)
    program.model.tune_attention(program.state, program.kv)


class GraphWarmup:
    """Captures graphs of steps before they are needed: the first ones at the start, the others in quiet moments."""

    def __init__(
        self, program: StepProgram, graphs: GraphCache[Bucket], sizes: BucketSizes, stream: StepStream
    ) -> None:
        self._program = program
        self._graphs = graphs
        self._sizes = sizes
        self._stream = stream
        self._likely = sizes.likely_buckets()

    def capture_first(self) -> None:
        """Capture steps of decodes, so that serving does not begin with captures; none is kept if that fails."""
        deadline = time.monotonic() + _FIRST_CAPTURES_S
        try:
            # All that a step allocates fits into what the largest one leaves behind.
            for bucket in dict.fromkeys((self._sizes.largest(), *self._sizes.decode_buckets())):
                if time.monotonic() >= deadline:
                    break
                self._graphs.capture(bucket, partial(self._program.run, bucket))
        except BaseException:
            self._graphs.clear()  # which the traceback would keep, and NCCL ends after them
            raise

    def capture_next(self, ring_index: int) -> bool:
        """Capture one bucket without a graph: one that was needed, or else the likeliest; False if none is left.

        Args:
            ring_index: a mirror of the step buffers that no step uses; it is free again on return.
        """
        bucket = next(self._graphs.seen(), None)
        if bucket is None:
            bucket = next((bucket for bucket in self._likely if bucket not in self._graphs), None)
        if bucket is None or not self._graphs.may_capture_ahead:
            return False
        self._program.buffer(bucket).fill(_EMPTY_BATCH, (), bucket, ring_index)
        self._program.send(bucket, ring_index, self._stream)
        try:
            self._graphs.capture(bucket, partial(self._program.run, bucket))
        except torch.OutOfMemoryError as failure:
            if self._program.is_shared:
                raise  # the other ranks wait in a step that does not end
            _logger.warning("steps that are new run eagerly from now on: no memory to capture %s: %s", bucket, failure)
        self._stream.synchronize()  # the next step is written where this one was
        return True
