"""Times on a device by which one way of computing a step is preferred to another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from llmengine.kernels.timing import time_graph

_TIMED_BATCHES = (1, 8, 64)
"""Requests of the decode steps that are timed, beside the largest batch."""


def timed_sizes(max_batch_size: int) -> list[int]:
    """Return the tokens of the decode steps that are timed, ascending."""
    return [*(size for size in _TIMED_BATCHES if size < max_batch_size), max_batch_size]


def time_us(functions: Sequence[Callable[[], None]], device: torch.device) -> float:
    """Return the microseconds of one call when `functions` run one after the other; on a GPU in a CUDA graph."""
    if device.type == "cuda":
        return time_graph(functions)
    begin = time.perf_counter()
    for function in functions:
        function()
    return (time.perf_counter() - begin) * 1e6 / len(functions)


def speedup(times_us: Mapping[int, tuple[float, float]]) -> float:
    """Return the second time over the first, the geometric mean over the steps that were timed."""
    logs = [math.log(second / first) for first, second in times_us.values()]
    return math.exp(sum(logs) / len(logs))
