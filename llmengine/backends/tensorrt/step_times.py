"""Times of decode steps on a device, by which one way of computing them is preferred to another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from llmengine.kernels.timing import time_graph
from llmengine.models.decoder import Segments, forward

if TYPE_CHECKING:
    from llmengine.backends.cuda.fused_segments import SegmentsContext

_TIMED_BATCHES = (1, 8, 64)
"""Numbers of requests in the decode steps that are timed, besides the largest batch."""


def timed_batch_sizes(max_batch_size: int) -> list[int]:
    """Numbers of tokens in the decode steps that are timed, ascending."""
    return [*(size for size in _TIMED_BATCHES if size < max_batch_size), max_batch_size]


def time_us(functions: Sequence[Callable[[], None]], device: torch.device) -> float:
    """Microseconds of one call when `functions` run one after the other; on a GPU in a CUDA graph."""
    if device.type == "cuda":
        return time_graph(functions)
    begin = time.perf_counter()
    for function in functions:
        function()
    return (time.perf_counter() - begin) * 1e6 / len(functions)


def dense_step_us(segments: Segments, context: SegmentsContext, num_tokens: int) -> float:
    """Microseconds on the device of all segments of a decode step, without attention; any weights will do."""
    arch, device, dtype = context.arch, context.logits.device, context.weights.dtype
    x = torch.zeros((num_tokens, arch.hidden_size), dtype=dtype, device=device)
    attended = torch.zeros((num_tokens, arch.num_heads * arch.head_dim), dtype=dtype, device=device)

    def step() -> None:
        forward(segments, x, lambda layer, qkv: attended, None)

    return time_us([step], device)


def mean_speedup(times_us: Mapping[int, tuple[float, float]]) -> float:
    """The second time divided by the first, as the geometric mean over the steps that were timed."""
    logs = [math.log(second / first) for first, second in times_us.values()]
    return math.exp(sum(logs) / len(logs))
