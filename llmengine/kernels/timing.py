"""Time that calls take on the GPU when a CUDA graph runs them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_REPEATS = 9
_MIN_REPLAY_US = 400.0


def time_graph(functions: Sequence[Callable[[], None]], repeats: int = _REPEATS) -> float:
    """Microseconds of one call when `functions` run one after the other in a CUDA graph.

    Each function should work on buffers of its own, together more than the L2 holds, so that it finds them cold. The
    result is the median of `repeats` measurements, each with enough replays for the resolution of the events.
    """
    functions[0]()  # compiles kernels and creates cuBLAS handles, which a capture must not do
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads of the program may use CUDA
        for function in functions:
            function()
    graph.replay()
    estimate_us = _replay_us(graph, 1)
    replays = max(1, round(_MIN_REPLAY_US / max(estimate_us, 1.0)))
    times = [_replay_us(graph, replays) for _ in range(repeats)]
    return statistics.median(times) / len(functions)


def _replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000.0 / replays
