"""CUDA graphs of whole steps, captured by bucket, within a budget of time and memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

from llmengine.backends.cuda.stream import StepStream

KeyT = TypeVar("KeyT", bound=Hashable)

_logger = logging.getLogger("llmengine.backends.cuda.backend")

CAPTURE_BUDGET_S = 30.0
"""Most seconds that all captures of a model may take; later buckets run eagerly."""

CAPTURE_BUDGET_BYTES = 1 << 30
"""Most device memory that all captures may take."""

_SHARE_AHEAD = 0.5
"""Share of both budgets that captures ahead of need may take."""

_MOST_FAILURES = 5
"""Captures that may fail, as one does if another thread calls `torch.cuda.synchronize` meanwhile."""


class GraphCache(Generic[KeyT]):
    """Runs functions on fixed device addresses: eagerly the first two times, as a graph from then on.

    The second time also pays for the capture, unless `capture` was called in a quiet moment. A function must not
    synchronise, must launch the same work whenever it is called with the same key, and must keep no tensor that it
    allocated. Graphs hold raw addresses, so the owner of the tensors clears the cache before it frees them.

    Args:
        announce: called before the work of a key is queued, and with whether it is queued again to be captured.
    """

    def __init__(
        self, device: torch.device, stream: StepStream, announce: Callable[[KeyT, bool], None] | None = None
    ) -> None:
        self._announce = announce
        self._stream = stream
        self._device = device
        self._graphs: dict[KeyT, Any] = {}
        self._seen: dict[KeyT, None] = {}
        self._may_capture = True
        self._num_failures = 0
        self._spent_s = 0.0
        self._spent_bytes = 0

    def __contains__(self, key: KeyT) -> bool:
        return key in self._graphs

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def may_capture_ahead(self) -> bool:
        """Whether `capture` may be called for keys that were not needed yet."""
        return self._may_capture and (
            self._spent_s < _SHARE_AHEAD * CAPTURE_BUDGET_S and self._spent_bytes < _SHARE_AHEAD * CAPTURE_BUDGET_BYTES
        )

    def seen(self) -> Iterator[KeyT]:
        """Yield the keys that have run and have no graph yet."""
        return (key for key in self._seen if key not in self._graphs)

    def run(self, key: KeyT, function: Callable[[], None]) -> None:
        """Queue the work of `function` in the current stream."""
        graph = self._graphs.get(key)
        captures = graph is None and key in self._seen and self._may_capture
        if self._announce is not None:
            self._announce(key, captures)
        if graph is not None:
            self._stream.replay(graph)
            return
        function()
        if captures:
            self._capture(key, function)
        self._seen[key] = None

    def follow(self, key: KeyT, function: Callable[[], None], *, captures: bool) -> None:
        """Queue the work of `function` as another cache announced it."""
        graph = self._graphs.get(key)
        if graph is not None and not captures:
            self._stream.replay(graph)
            return
        function()
        if captures:
            self._capture(key, function)

    def capture(self, key: KeyT, function: Callable[[], None]) -> None:
        """Run the function once, which loads what it needs, then capture it.

        If the device is too full for that, raises `torch.OutOfMemoryError` and captures nothing from then on.
        """
        if self._announce is not None:
            self._announce(key, self._may_capture)
        try:
            function()
        except torch.OutOfMemoryError:
            self._may_capture = False
            raise
        self._capture(key, function)

    def drop(self, stale: Callable[[KeyT], bool]) -> None:
        """Drop the graphs of all keys that are `stale`; nothing may be running."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if not stale(key)}

    def clear(self) -> None:
        """Drop all graphs; nothing may be running."""
        self._graphs.clear()

    def _capture(self, key: KeyT, function: Callable[[], None]) -> None:
        if not self._may_capture:
            return
        began, free = time.perf_counter(), self._free_bytes()
        try:
            self._graphs[key] = self._stream.capture(function)
        except RuntimeError as failure:  # torch.OutOfMemoryError among them
            self._num_failures += 1
            self._may_capture = not isinstance(failure, torch.OutOfMemoryError) and self._num_failures < _MOST_FAILURES
            then = "it will be tried again" if self._may_capture else "it runs eagerly from now on, as do new ones"
            _logger.warning("step %s: capture failed, %s: %s", key, then, failure)
            return
        self._spent_s += time.perf_counter() - began
        self._spent_bytes += max(0, free - self._free_bytes())
        _logger.debug("captured %s in %.3f s", key, time.perf_counter() - began)
        if self._spent_s > CAPTURE_BUDGET_S or self._spent_bytes > CAPTURE_BUDGET_BYTES:
            self._may_capture = False
            _logger.warning(
                "captured %d step sizes in %.1f s and %.0f MiB, the most allowed; further ones run eagerly",
                len(self._graphs),
                self._spent_s,
                self._spent_bytes / 2**20,
            )

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else 0
