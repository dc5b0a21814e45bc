"""CUDA graphs of whole steps, captured when a bucket is first seen, within a budget of time and memory."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

from llmengine.backends.torch.cuda_stream import StepStream

KeyT = TypeVar("KeyT", bound=Hashable)

_logger = logging.getLogger("llmengine.backends.torch.cuda")

CAPTURE_BUDGET_S = 30.0
"""Most seconds that all captures of a model may take; later buckets run eagerly."""

CAPTURE_BUDGET_BYTES = 1 << 30
"""Most device memory that all captures may take."""


class GraphCache(Generic[KeyT]):
    """Runs functions of fixed device addresses: eagerly the first time, as a graph from then on.

    A function must not synchronise, must launch the same work whenever it is called with the same key, and must keep
    no tensor that it allocated. Graphs hold raw addresses: whoever owns the tensors clears the cache before they go.
    """

    def __init__(self, device: torch.device, stream: StepStream) -> None:
        self._stream = stream
        self._enabled = device.type == "cuda"
        self._device = device
        self._graphs: dict[KeyT, torch.cuda.CUDAGraph] = {}
        # One pool for all: they never run at once, and none reads what another left in it.
        self._pool = torch.cuda.graph_pool_handle() if self._enabled else None
        self._spent_s = 0.0
        self._spent_bytes = 0

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def spent_s(self) -> float:
        """Seconds that the captures took."""
        return self._spent_s

    @property
    def spent_bytes(self) -> int:
        """Device memory that the captures took."""
        return self._spent_bytes

    def run(self, key: KeyT, function: Callable[[], None]) -> None:
        """Queue the work of `function` in the current stream."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._stream.replay(graph)
            return
        function()
        if self._enabled:
            self._capture(key, function)

    def drop(self, stale: Callable[[KeyT], bool]) -> None:
        """Drop the graphs of such keys; nothing may be running."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if not stale(key)}

    def clear(self) -> None:
        """Drop all graphs; nothing may be running."""
        self._graphs.clear()

    def _capture(self, key: KeyT, function: Callable[[], None]) -> None:
        began, free = time.perf_counter(), torch.cuda.mem_get_info(self._device)[0]
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it frees on this thread could end the capture
        try:
            # Other threads of the program may use CUDA meanwhile; by default a capture forbids them to allocate.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        except RuntimeError as failure:  # torch.cuda.OutOfMemoryError among them
            self._enabled = False
            _logger.warning("step %s runs eagerly from now on, as do new ones: capture failed: %s", key, failure)
            return
        finally:
            if collects:
                gc.enable()
        self._graphs[key] = graph
        self._spent_s += time.perf_counter() - began
        self._spent_bytes += max(0, free - torch.cuda.mem_get_info(self._device)[0])
        _logger.debug("captured %s in %.3f s", key, time.perf_counter() - began)
        if self._spent_s > CAPTURE_BUDGET_S or self._spent_bytes > CAPTURE_BUDGET_BYTES:
            self._enabled = False
            _logger.warning(
                "captured %d step sizes in %.1f s and %.0f MiB, the most allowed; further ones run eagerly",
                len(self._graphs),
                self._spent_s,
                self._spent_bytes / 2**20,
            )
