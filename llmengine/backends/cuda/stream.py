"""The stream that steps run on: copies, graph launches and time stamps, without giving up the GIL.

torch gives up the GIL for each such call. Beside a thread that computes in Python, each call then takes an interpreter
switch interval (5 ms by default) to get it back, and a launch makes four calls. So these calls go to the CUDA driver
directly. None of them waits for the device; only `wait` does, and it gives up the GIL.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_NOT_READY = 600
"""CUDA_ERROR_NOT_READY."""


class StepStream(Protocol):
    """A queue of device work. `index` names one of a fixed number of steps whose time stamps are kept."""

    def claim(self) -> None:
        """Make this the stream in which torch queues what the calling thread does from now on."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy from (pinned) host memory; both are contiguous and of one size."""

    def capture(self, function: Callable[[], None]) -> Any:
        """Call `function` without running its work, and return that work for `replay`. Raises RuntimeError."""

    def replay(self, graph: Any) -> None:
        """Queue a captured graph."""

    def mark_begin(self, index: int) -> None:
        """Queue the time stamp of a step's begin."""

    def mark_end(self, index: int) -> None:
        """Queue the time stamp of a step's end."""

    def synchronize(self) -> None:
        """Block, without the GIL, until all that is queued is done."""

    def wait(self, index: int, before: int | None) -> tuple[float, float]:
        """Block until the step has ended; return its seconds, and those from the end of `before` to its begin."""

    def close(self) -> None:
        """Free what the stream holds; nothing may be queued."""


class CudaStream:
    """`StepStream` on a CUDA stream.

    Args:
        driver: the CUDA driver's library, called with the GIL held.
        waiting_driver: the same, called without it.
        stream: in which torch queues the kernels of steps while it is the thread's current one, see `claim`.
        begins: events that mark the begin of each step; closed with the stream, like `ends`.
    """

    def __init__(
        self,
        driver: ctypes.PyDLL,
        waiting_driver: ctypes.CDLL,
        stream: torch.cuda.Stream,
        begins: list[ctypes.c_void_p],
        ends: list[ctypes.c_void_p],
    ) -> None:
        self._driver = driver
        self._waiting_driver = waiting_driver
        self._torch_stream = stream
        self._stream = ctypes.c_void_p(stream.cuda_stream)
        # All graphs share one pool: they never run at the same time, and none reads what another left in it.
        self._pool = torch.cuda.graph_pool_handle()
        self._begins = begins
        self._ends = ends

    @classmethod
    def open(cls, num_steps: int) -> CudaStream:
        """Open torch's current stream of the calling thread, with time stamps for `num_steps` steps."""
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        driver = ctypes.PyDLL(name)
        begins, ends = ([_new_event(driver) for _ in range(num_steps)] for _ in range(2))
        return cls(driver, ctypes.CDLL(name), torch.cuda.current_stream(), begins, ends)

    def claim(self) -> None:
        """Make this torch's current stream on the calling thread, and its device the current one."""
        torch.cuda.set_stream(self._torch_stream)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy from pinned host memory."""
        address, size = ctypes.c_uint64(target.data_ptr()), ctypes.c_size_t(source.nbytes)
        source_address = ctypes.c_void_p(source.data_ptr())
        _check(self._driver.cuMemcpyHtoDAsync_v2(address, source_address, size, self._stream), "cuMemcpyHtoDAsync")

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture the work that `function` queues."""
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # tensors that it frees on this thread could end the capture
        try:
            # Other threads may use CUDA meanwhile; by default a capture forbids them to allocate.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        finally:
            if collects:
                gc.enable()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Queue a captured graph."""
        _check(self._driver.cuGraphLaunch(ctypes.c_void_p(graph.raw_cuda_graph_exec()), self._stream), "cuGraphLaunch")

    def mark_begin(self, index: int) -> None:
        """Queue the time stamp of a step's begin."""
        _check(self._driver.cuEventRecord(self._begins[index], self._stream), "cuEventRecord")

    def mark_end(self, index: int) -> None:
        """Queue the time stamp of a step's end."""
        _check(self._driver.cuEventRecord(self._ends[index], self._stream), "cuEventRecord")

    def synchronize(self) -> None:
        """Block, without the GIL, until all that is queued is done."""
        _check(self._waiting_driver.cuStreamSynchronize(self._stream), "the steps queued")

    def wait(self, index: int, before: int | None) -> tuple[float, float]:
        """Block, without the GIL, until the step has ended; see `StepStream.wait`."""
        status = self._driver.cuEventQuery(self._ends[index])
        if status == _NOT_READY:
            status = self._waiting_driver.cuEventSynchronize(self._ends[index])
        _check(status, "a step")
        idle_s = 0.0 if before is None else self._seconds(self._ends[before], self._begins[index])
        return self._seconds(self._begins[index], self._ends[index]), idle_s

    def close(self) -> None:
        """Free the events; nothing may be queued."""
        for event in (*self._begins, *self._ends):
            _check(self._driver.cuEventDestroy_v2(event), "cuEventDestroy")
        self._begins, self._ends = [], []

    def _seconds(self, begin: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        milliseconds = ctypes.c_float()
        _check(self._driver.cuEventElapsedTime(ctypes.byref(milliseconds), begin, end), "cuEventElapsedTime")
        return milliseconds.value * 1e-3


class HostStream:
    """`StepStream` on the CPU, where everything is done when it is queued; for tests."""

    def claim(self) -> None:
        """Nothing: there is no other."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Return the function itself."""
        return function

    def replay(self, graph: Callable[[], None]) -> None:
        """Call what was captured."""
        graph()

    def mark_begin(self, index: int) -> None:
        """Nothing is timed."""

    def mark_end(self, index: int) -> None:
        """Nothing is timed."""

    def synchronize(self) -> None:
        """Return at once."""

    def wait(self, index: int, before: int | None) -> tuple[float, float]:
        """Return at once."""
        return 0.0, 0.0

    def close(self) -> None:
        """Nothing to free."""


def _new_event(driver: ctypes.PyDLL) -> ctypes.c_void_p:
    event = ctypes.c_void_p()
    _check(driver.cuEventCreate(ctypes.byref(event), ctypes.c_uint(0)), "cuEventCreate")
    return event


def _check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what} failed with CUDA error {status}; the GPU's memory is in an unknown state")
