"""Which implementation of a matrix product is fastest on the GPU at hand: measured once, kept on disk.

A choice is made for a shape whose number of rows is one of `ROW_BUCKETS`: all numbers of rows in a bucket run the same
kernel in about the same time. More rows than the last bucket's go to cuBLAS.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from llmengine.kernels.linear import GemmShape, LinearKernels, SkinnyConfig
from llmengine.kernels.timing import time_graph

_logger = logging.getLogger("llmengine.kernels.gemm_choice")

ROW_BUCKETS = (1, 16, 32, 64)

_FILE_VERSION = 2
"""Part of the file: raise it when kernels change so much that old measurements mislead."""

_COLD_BYTES = 160 << 20
"""Weights that a measurement goes through before it meets one again; three times an H100's L2."""

_COMPILE_THREADS = 8

_CANDIDATES: dict[int, dict[str, str]] = {
    1: {
        "small norm_linear": "m1n4k512w2s1 m1n8k512w4s1 m1n4k1024w4s1 cublas",
        "large norm_linear": "m1n16k256w4s1 m1n8k512w4s1 m1n4k1024w4s1 m16n64k128w4s4-norm cublas",
        "wide norm_linear": "m16n64k128w4s4-norm m16n32k128w4s5-norm m1n8k512w4s1 m1n8k1024w8s1 cublas",
        "small norm_linear_silu": "m1n4k512w2s1 m1n4k512w4s1 m1n8k256w4s1 cublas",
        "large norm_linear_silu": "m1n16k256w4s1 m1n32k128w4s1 m1n8k512w4s1 cublas",
        "small linear_add": "m1n2k512w2s1 m1n4k512w2s1 m1n8k512w4s1 m1n4k1024w4s1 cublas",
        "large linear_add": "m1n8k512w4s1 m1n4k1024w4s1 m1n8k1024w8s1 cublas",
    },
    16: {
        "small norm_linear": "m16n32k128w4s5 cublas",
        "wide norm_linear": "m16n64k128w4s4-norm m16n32k128w4s5-norm cublas",
        "small norm_linear_silu": "m16n16k64w2s6 cublas",
        "large norm_linear_silu": "cublas m16n32k256w4s3",
        "small linear_add": "m16n64k128w4s4 cublas",
        "large linear_add": "cublas m16n16k128w2s6",
    },
    32: {
        "wide norm_linear": "m32n32k128w4s5-norm m32n64k128w4s4-norm cublas",
        "small linear_add": "cublas m32n16k128w4s4",
    },
    64: {
        "small norm_linear": "m64n64k64w4s5-norm cublas",
        "wide norm_linear": "m64n64k64w4s5-norm cublas",
        "small norm_linear_silu": "m64n32k64w4s5-norm cublas",
        "large norm_linear_silu": "m64n32k64w4s5-norm cublas",
    },
}
"""By bucket and kind of shape, those that were fast on an H100 with models of 135M, 1B and 8B parameters."""

MeasureUs = Callable[[GemmShape, SkinnyConfig | None], float]
"""Returns microseconds of a call; infinity where the device cannot run the configuration."""


class GemmChoices:
    """The choice for every shape: measured where it was, else `heuristic`.

    Args:
        file: where measurements are kept between processes. A file that is unreadable or cannot be written is
            reported in the log, and otherwise as if it were not there.
        clock: seconds, for the budget.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._chosen = _read(file)

    def choose(self, shape: GemmShape) -> SkinnyConfig | None:
        """Return the configuration for `shape`, any number of rows; None is cuBLAS."""
        bucketed = _bucketed(shape)
        if bucketed is None:
            return None
        key = _key(bucketed)
        return self._chosen[key] if key in self._chosen else heuristic(shape)

    def measure(self, shapes: Iterable[GemmShape], budget_s: float, measure_us: MeasureUs) -> int:
        """Measure the shapes that are not known yet until `budget_s` is spent; return how many are left.

        The first shapes come first. Runs on the device and must not overlap a graph capture. The budget is looked at
        before each configuration, so it is exceeded by one at most; a shape that was not finished counts as left.
        """
        bucketed = {_key(shape): shape for shape in map(_bucketed, shapes) if shape is not None}
        missing = {
            key: shape for key, shape in bucketed.items() if key not in self._chosen and len(candidates(shape)) > 1
        }
        deadline = self._clock() + budget_s
        num_measured = 0
        for key, shape in missing.items():
            times = self._times_us(shape, deadline, measure_us)
            if times is None:
                break
            self._chosen[key] = min(times, key=times.__getitem__)
            num_measured += 1
            _logger.debug("%s: %s", key, {str(config): round(us, 2) for config, us in times.items()})
        if num_measured:
            # What other processes have measured meanwhile stays.
            _write(self._file, _read(self._file) | self._chosen)
        left = len(missing) - num_measured
        if left:
            _logger.info("%d of %d matrix shapes were not measured in %.1f s", left, len(missing), budget_s)
        return left

    def _times_us(
        self, shape: GemmShape, deadline: float, measure_us: MeasureUs
    ) -> dict[SkinnyConfig | None, float] | None:
        """Return the microseconds of each candidate, None if the deadline came first."""
        times: dict[SkinnyConfig | None, float] = {}
        for config in candidates(shape):
            if self._clock() >= deadline:
                return None
            times[config] = measure_us(shape, config)
        return times


def cuda_choices(kernels: LinearKernels, device: torch.device) -> GemmChoices:
    """Return choices for `kernels` on `device`, kept in `cache_dir()`."""
    name = f"{torch.cuda.get_device_name(device)}-torch{torch.__version__}-triton{triton.__version__}"
    if kernels.pdl:
        name += "-pdl"
    file = cache_dir() / f"gemm-{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}.json"
    return GemmChoices(file)


def cache_dir() -> Path:
    """Return where measurements are kept: LLMENGINE_CACHE_DIR, else llmengine in the user's cache directory."""
    own = os.environ.get("LLMENGINE_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmengine"


class CudaTimer:
    """`MeasureUs` with random operands; the candidates of a shape are compiled together when the first is timed."""

    def __init__(self, kernels: LinearKernels, device: torch.device) -> None:
        self._kernels = kernels
        self._device = device
        self._compiled: set[GemmShape] = set()

    def __call__(self, shape: GemmShape, config: SkinnyConfig | None) -> float:
        with torch.cuda.device(self._device):
            if shape not in self._compiled:
                self._compile(shape)
                self._compiled.add(shape)
            weights = cold_weights(shape, self._device)
            try:
                return time_graph([random_call(self._kernels, shape, config, weight) for weight in weights])
            except triton.runtime.errors.OutOfResources:
                return float("inf")

    def _compile(self, shape: GemmShape) -> None:
        def compile_one(config: SkinnyConfig) -> None:
            with torch.cuda.device(self._device):
                self._kernels.compile(shape, config)

        with ThreadPoolExecutor(_COMPILE_THREADS) as pool:
            list(pool.map(compile_one, filter(None, candidates(shape))))


def heuristic(shape: GemmShape) -> SkinnyConfig | None:
    """Return a sensible configuration without measuring."""
    return candidates(shape)[0]


def candidates(shape: GemmShape) -> list[SkinnyConfig | None]:
    """Return what is worth measuring for a shape's bucket, the likeliest first; None is cuBLAS."""
    bucketed = _bucketed(shape)
    if bucketed is None or shape.dtype == torch.float32:
        return [None]
    names = _CANDIDATES[bucketed.num_rows].get(f"{_size(shape)} {shape.operation}", "cublas").split()
    return [None if name == "cublas" else _split(shape, SkinnyConfig.parse(name)) for name in names]


def _size(shape: GemmShape) -> Literal["small", "large", "wide"]:
    """Return "small" where latency counts more than the memory's speed: up to 8 MiB of weights; "wide" for LM heads."""
    if shape.n * shape.k <= 1 << 22:
        return "small"
    return "wide" if shape.operation == "norm_linear" and shape.n >= 6 * shape.k else "large"


def _split(shape: GemmShape, config: SkinnyConfig) -> SkinnyConfig:
    """Return `config` with as many splits of K as the shape needs, where the operation can split it."""
    if shape.operation != "linear_add" or config.block_m == 1:
        return config
    return replace(config, split_k=_num_splits(shape, config))


def _num_splits(shape: GemmShape, config: SkinnyConfig) -> int:
    """Return the splits, at most 4, that give an H100's 132 processors up to two programs each."""
    programs = -(-shape.n // config.block_n)
    splits = 1
    while splits < 4 and programs * splits * 2 <= 2 * 132 and shape.k // (splits * 2) >= 2 * config.block_k:
        splits *= 2
    return splits


def _bucketed(shape: GemmShape) -> GemmShape | None:
    """Return the shape with its bucket's number of rows; None if it has more than any bucket."""
    for rows in ROW_BUCKETS:
        if shape.num_rows <= rows:
            return replace(shape, num_rows=rows)
    return None


def _key(shape: GemmShape) -> str:
    dtypes = "->".join(str(dtype).removeprefix("torch.") for dtype in (shape.dtype, shape.out_dtype))
    return f"{shape.operation} {shape.num_rows}x{shape.n}x{shape.k} {dtypes}"


def random_call(
    kernels: LinearKernels, shape: GemmShape, config: SkinnyConfig | None, weight: Tensor
) -> Callable[[], None]:
    """Return a call of the shape's operation on random operands."""
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(shape.num_rows, shape.k, generator=generator, device=weight.device, dtype=shape.dtype)
    norm_weight = torch.ones(shape.k, device=weight.device, dtype=shape.dtype)
    out = torch.zeros(shape.num_rows, shape.n, device=weight.device, dtype=shape.out_dtype)
    if shape.operation == "linear_add":
        return lambda: kernels.linear_add(x, weight, None, out, config)
    if shape.operation == "norm_linear":
        return lambda: kernels.norm_linear(x, norm_weight, 1e-5, weight, None, out, config)
    return lambda: kernels.norm_linear_silu(x, norm_weight, 1e-5, weight, None, out, config)


def cold_weights(shape: GemmShape, device: torch.device) -> list[Tensor]:
    """Return as many random weights as together exceed `_COLD_BYTES`."""
    num_rows = shape.n * (2 if shape.operation == "norm_linear_silu" else 1)
    count = -(-_COLD_BYTES // (num_rows * shape.k * shape.dtype.itemsize))
    # Random, since zeros make the memory and the chip faster than they are; not from the program's own generator.
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(num_rows, shape.k, generator=generator, device=device, dtype=shape.dtype).mul_(0.02)
        for _ in range(count)
    ]


def _read(file: Path) -> dict[str, SkinnyConfig | None]:
    try:
        stored = json.loads(file.read_text())
        if stored["version"] != _FILE_VERSION:
            return {}
        return {
            str(key): None if fields is None else _config(fields) for key, fields in dict(stored["choices"]).items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("measured choices in %s are ignored: %r", file, error)
        return {}


def _config(fields: Mapping[str, Any]) -> SkinnyConfig:
    if not all(isinstance(value, int) and value >= 0 for value in fields.values()):
        raise ValueError(f"{fields} is no configuration")
    return SkinnyConfig(**fields)


def _write(file: Path, chosen: Mapping[str, SkinnyConfig | None]) -> None:
    choices = {key: None if config is None else asdict(config) for key, config in chosen.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that another process never reads half a file.
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
            json.dump({"version": _FILE_VERSION, "choices": choices}, temporary, indent=1)
        os.replace(temporary.name, file)
    except OSError as error:
        _logger.warning("measured choices could not be kept in %s: %r", file, error)
