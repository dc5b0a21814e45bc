"""The native library's threads: results while spare threads help, and the end of a pool in any state.

A pool calls its spare threads when its threads wait for cores. Threads that are pinned to one core wait for each other,
whatever else the machine does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from llmengine.backends.cpu.native import NativeLinear
from llmengine.backends.cpu.native_library import (
    NATIVE_DIRECTORY,
    NativeLibrary,
    NativeUnavailableError,
    load_native_library,
)
from llmengine.quantization.int8 import INT8
from llmengine.quantization.matrix import Matrix
from tests import ROOT

NUM_THREADS = 4
WORKER, SPARE = "llmengine-cpu", "llmengine-spare"
DEADLINE_S = 120.0

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of threads are read in /proc")
needs_run_delay = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="this kernel does not say how long threads wait for cores"
)


def thread_names() -> Counter[str]:
    """Names of this process's threads -> how many have it."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # that thread has just ended
            continue
    return Counter(names)


def await_threads(expected: Counter[str]) -> None:
    """Wait until as many workers and spare threads as expected exist: a thread leaves /proc just after it is joined."""
    deadline = time.monotonic() + DEADLINE_S
    while any(thread_names()[name] != expected[name] for name in (WORKER, SPARE)):
        assert time.monotonic() < deadline, f"found {thread_names()}, expected {expected}"


@contextmanager
def pool(num_threads: int, *, pinned: bool = False) -> Iterator[NativeLibrary]:
    """A library with this many threads, optionally pinned to one core; closed and without threads after the block.

    Within the block torch has one thread: OpenMP's would inherit the pinning and keep it.
    """
    num_torch_threads, cores, before = torch.get_num_threads(), os.sched_getaffinity(0), thread_names()
    try:
        if pinned:
            os.sched_setaffinity(0, {min(cores)})
        torch.set_num_threads(num_threads)
        library = load_native_library(NATIVE_DIRECTORY)
        torch.set_num_threads(1)
        try:
            yield library
        finally:
            library.close()
        await_threads(before)
    except NativeUnavailableError as error:
        pytest.skip(f"no native decoder: {error}")
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(num_torch_threads)


@cache
def random_matrix(rows: int, columns: int) -> Matrix:
    random = torch.Generator().manual_seed(rows)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=random)
    return Matrix(INT8, (rows, columns), {"weight": weight, "weight_scale": torch.rand(rows, generator=random)})


def make_linear(library: NativeLibrary, rows: int = 1024, columns: int = 1024) -> NativeLinear:
    return NativeLinear(library, random_matrix(rows, columns), None)


@cache
def inputs(num_tokens: int, columns: int = 1024) -> torch.Tensor:
    return torch.randn(num_tokens, columns, generator=torch.Generator().manual_seed(num_tokens))


@cache
def expected_product(num_tokens: int, rows: int = 1024, columns: int = 1024) -> torch.Tensor:
    """The product on one thread."""
    with pool(1) as library:
        return make_linear(library, rows, columns)(inputs(num_tokens, columns))


def call_spares(linear: NativeLinear) -> None:
    """Multiply until the pool has called its spare threads; every product must be right."""
    x, expected = inputs(64), expected_product(64)
    before, deadline = thread_names()[SPARE], time.monotonic() + DEADLINE_S
    while thread_names()[SPARE] == before:
        assert torch.equal(linear(x), expected)
        assert time.monotonic() < deadline, "threads on one core called no spare threads"


@needs_run_delay
def test_spare_threads_do_not_change_a_bit() -> None:
    with pool(NUM_THREADS, pinned=True) as library:
        linear = make_linear(library)
        call_spares(linear)
        for _ in range(50):
            assert torch.equal(linear(inputs(64)), expected_product(64))


@needs_run_delay
@pytest.mark.parametrize("num_tokens", [64, 1])
def test_a_pool_with_spare_threads_ends_right_behind_a_job(num_tokens: int) -> None:
    """After a job that spare threads share, and after one that is too small for them."""
    with pool(NUM_THREADS, pinned=True) as library:
        linear = make_linear(library)
        call_spares(linear)
        linear(inputs(num_tokens))


def test_threads_of_an_idle_pool_end_with_it() -> None:
    before = thread_names()
    with pool(NUM_THREADS) as library:
        await_threads(before + Counter({WORKER: NUM_THREADS - 1}))
    library.close()  # a second time, without effect


_MANY_ENDS_CODE = """
from tests.backends.cpu.test_native_pool import expected_product, inputs, make_linear, pool

for index in range(1000):
    with pool(2 + index % 3) as library:
        product = make_linear(library, 512, 512)(inputs(64, 512))
    assert product.equal(expected_product(64, 512, 512))
print("done", flush=True)
"""


def test_a_pool_that_ends_right_behind_a_job_ends_all_of_its_threads() -> None:
    """In another process, since a thread that misses the end would hold this one up forever."""
    with pool(2):
        pass  # skips where there is no library
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _MANY_ENDS_CODE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (process.returncode, process.stdout) == (0, "done\n"), process.stderr
