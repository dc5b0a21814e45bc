"""Which implementation of a matrix product is fastest on the GPU at hand: measured once, kept on disk.

A choice is made for the shape of a bucket of rows, among the `gemm_candidates`.

A candidate is not timed alone: what starts early beside the kernel before, or leaves the caches warm for the one after,
counts as well. So a chain of a step's products is timed with each.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import triton

from llmengine.dtypes import dtype_name
from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.cuda_program import can_compile
from llmengine.kernels.gemm_candidates import bucket_of, bucketed_shape, candidates
from llmengine.kernels.gemm_config import (
    GemmShape,
    HopperConfig,
    HopperFewConfig,
    HopperScaledConfig,
    LinearConfig,
    parse_config,
)
from llmengine.kernels.limits import max_shared_bytes, tiled_sms
from llmengine.kernels.linear import LinearKernels
from llmengine.quantization.formats import Dense
from llmengine.user_cache import cache_dir, read_choices, write_choices

_logger = logging.getLogger("llmengine.kernels.gemm_choice")

_FILE_VERSION = 9
"""Part of the file: raise it when kernels change so much that old measurements mislead."""

_NUM_FINALISTS, _FINAL_ROUNDS, _CLOSE = 3, 3, 1.05
"""Candidates that take at most `_CLOSE` times the least are measured in further rounds, and the least time of each
counts: the GPU's clock changes meanwhile by as much."""

TimeUs = Callable[[GemmShape], float]
"""Measures the microseconds of a chain of products that this one is part of, with the present choices; infinity where
one of them cannot run."""


class GemmChoices:
    """The choice for every shape: measured where it was, else the likeliest.

    Args:
        max_shared: bytes of shared memory that a program can have.
        num_sms: multiprocessors of a Hopper GPU, which cuBLASLt's tiles are chosen for; 0: another GPU, and only what
            cuBLASLt proposes is tried.
        compiles_cuda: whether CUDA C++ can be compiled (`cuda_program.can_compile`).
        file: where measurements are kept between processes. A file that is unreadable or cannot be written is
            reported in the log, and otherwise as if it were not there.
        clock: seconds, for the budget.
    """

    def __init__(
        self,
        file: Path,
        max_shared: int,
        num_sms: int = 0,
        compiles_cuda: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._max_shared = max_shared
        self._num_sms = num_sms
        self._compiles_cuda = compiles_cuda
        self._clock = clock
        self._chosen = _read(file)

    def choose(self, shape: GemmShape) -> LinearConfig:
        """The configuration for `shape`, any number of rows."""
        if bucket_of(shape) is None:
            return CublasConfig()
        chosen = self._chosen.get(_key(shape))
        if isinstance(chosen, HopperConfig | HopperFewConfig | HopperScaledConfig) and not self._compiles_cuda:
            chosen = None  # measured while there was a compiler
        return self.candidates(shape)[0] if chosen is None else chosen

    def candidates(self, shape: GemmShape) -> list[LinearConfig]:
        """The configurations worth measuring for a shape, the likeliest first; one means that there is no choice."""
        return candidates(shape, self._max_shared, self._num_sms, self._compiles_cuda)

    def missing(self, shapes: Iterable[GemmShape]) -> list[GemmShape]:
        """The shapes that are not measured and have more than one candidate, bucketed, each once."""
        bucketed = {_key(shape): shape for shape in map(bucketed_shape, shapes) if shape is not None}
        return [shape for key, shape in bucketed.items() if key not in self._chosen and len(self.candidates(shape)) > 1]

    def measure(self, shapes: Iterable[GemmShape], budget_s: float, time_us: TimeUs) -> int:
        """Measure the shapes that are not known yet until `budget_s` is spent; return how many are left.

        The first shapes come first. Runs on the device and must not overlap a graph capture. The budget is looked at
        before each configuration, so it is exceeded by one at most; a shape that was not finished counts as left.
        """
        missing = self.missing(shapes)
        deadline = self._clock() + budget_s
        num_measured = 0
        for shape in missing:
            times = self._times_us(shape, deadline, time_us)
            if times is None:
                break
            self._chosen[_key(shape)] = min(times, key=times.__getitem__)
            num_measured += 1
            _logger.debug("%s: %s", _key(shape), {str(config): round(us, 2) for config, us in times.items()})
        if num_measured:
            # What other processes have measured meanwhile stays.
            _write(self._file, _read(self._file) | self._chosen)
        left = len(missing) - num_measured
        if left:
            _logger.info("%d of %d matrix shapes were not measured in %.1f s", left, len(missing), budget_s)
        return left

    def _times_us(self, shape: GemmShape, deadline: float, time_us: TimeUs) -> dict[LinearConfig, float] | None:
        """The microseconds with each candidate, None if the deadline came first; the choice stays open."""
        times: dict[LinearConfig, float] = {}
        try:
            for config in self.candidates(shape):
                if self._clock() >= deadline:
                    return None
                self._chosen[_key(shape)] = config
                times[config] = time_us(shape)
            for config in _finalists(times) * _FINAL_ROUNDS:
                if self._clock() < deadline:
                    self._chosen[_key(shape)] = config
                    times[config] = min(times[config], time_us(shape))
            return times
        finally:
            self._chosen.pop(_key(shape), None)


def _finalists(times: Mapping[LinearConfig, float]) -> list[LinearConfig]:
    """The fastest ones if several are close, else none."""
    ranked = sorted(times, key=times.__getitem__)
    close = [config for config in ranked[:_NUM_FINALISTS] if times[config] <= _CLOSE * times[ranked[0]]]
    return close if len(close) > 1 else []


def cuda_choices(kernels: LinearKernels, device: torch.device) -> GemmChoices:
    """Choices for `kernels` on `device`, kept in `cache_dir()`."""
    name = f"{torch.cuda.get_device_name(device)}-torch{torch.__version__}-triton{triton.__version__}"
    if kernels.pdl:
        name += "-pdl"
    file = cache_dir() / f"gemm-{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}.json"
    return GemmChoices(file, max_shared_bytes(device), tiled_sms(device), can_compile())


def _key(shape: GemmShape) -> str:
    """The shape's name on disk, the same for all numbers of rows in a bucket."""
    # The key of a dense product has no format, as it was before there were others: kept measurements stay valid.
    weights = "" if isinstance(shape.weight_format, Dense) else f" {shape.weight_format}"
    dtypes = f"{dtype_name(shape.dtype)}->{dtype_name(shape.out_dtype)}"
    return f"{shape.operation} {bucket_of(shape)}x{shape.n}x{shape.k} {dtypes}{weights}"


def _read(file: Path) -> dict[str, LinearConfig]:
    try:
        return {key: parse_config(name) for key, name in read_choices(file, _FILE_VERSION).items()}
    except (ValueError, KeyError) as error:
        _logger.warning("measured choices in %s are ignored: %r", file, error)
        return {}


def _write(file: Path, chosen: Mapping[str, LinearConfig]) -> None:
    write_choices(file, _FILE_VERSION, {key: str(config) for key, config in chosen.items()})
