"""Builds of plans, each in a process of its own kind (`builder_process.py`): jobs, processes, results.

TensorRT holds the interpreter for seconds to minutes, and after a failed build its state in a process is no longer
sound. So plans are built in other processes. Each runs one build at a time and ends after a failure. Its memory peaks
at about three times the weights that the plan contains (the mapped file, the plan, one copy of TensorRT's) above the
0.2 GB of the library. See benchmarks/tensorrt_build.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.spec import BuildTarget, SegmentSpec
from llmengine.checkpoints.saved_files import size_text
from llmengine.errors import ConfigError, EngineError

_logger = logging.getLogger("llmengine.tensorrt")

_MAX_PROCESSES = 4
_PACKAGE_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class PlanJob:
    """One plan to build.

    Attributes:
        name: for messages; see `PlacedSegment.plan_name`.
        output: file for the plan; its directory exists.
        weights: file of `spool_constants`, None for a spec without constants; deleted when the plan is built.
        timing_cache: file of measurements, read and extended where the library keeps any.
        device_uuid: the GPU to measure on, as CUDA_VISIBLE_DEVICES takes it, the same in all jobs; None: the first.
    """

    name: str
    spec: SegmentSpec
    target: BuildTarget
    output: Path
    weights: Path | None = None
    timing_cache: Path | None = None
    device_uuid: str | None = None


@dataclass(frozen=True, slots=True)
class BuiltPlan:
    """A plan on disk, and what building it took.

    Attributes:
        seconds: definition, build and writing, without the start of the process.
        peak_host_bytes: largest resident memory of the process during the build, mapped weights included; None where
            the system does not report it.
        library: name and version of the library that built the plan.
    """

    name: str
    path: Path
    seconds: float
    size_bytes: int
    peak_host_bytes: int | None
    library: str

    @property
    def cost(self) -> str:
        """For people: "0.84 s, peak memory 222 MB"."""
        peak = "" if self.peak_host_bytes is None else f", peak memory {size_text(self.peak_host_bytes)}"
        return f"{self.seconds:.2f} s{peak}"


def build_plan(job: PlanJob) -> BuiltPlan:
    """Build one plan; see `build_plans`."""
    [built] = build_plans([job], 1)
    return built


def build_plans(jobs: Iterable[PlanJob], num_processes: int) -> Iterator[BuiltPlan]:
    """Build plans in `num_processes` processes and yield each when it is done, in any order.

    `jobs` advances only when a process becomes free, so a lazy iterator (`spool_constants`) keeps few weights on disk.
    Closing the iterator, an exception in it or Ctrl-C kills the processes, and may leave incomplete output files.

    Raises:
        EngineError: a build failed; the message names the plan and the cause.
        ConfigError: no library here can build for the target.
    """
    pool = _ProcessPool(num_processes)
    threads = ThreadPoolExecutor(num_processes, thread_name_prefix="plan-build")
    remaining = iter(jobs)
    running: set[Future[BuiltPlan]] = set()
    try:
        while True:
            while len(running) < num_processes and (job := next(remaining, None)) is not None:
                running.add(threads.submit(pool.build, job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.close()
        threads.shutdown(cancel_futures=True)


def default_num_processes(library: Library) -> int:
    """The best number of simultaneous builds: one where builds measure on the device."""
    if library.features.timing_cache:
        return 1
    return max(1, min(_MAX_PROCESSES, os.cpu_count() or 1))


class _ProcessPool:
    """Building processes that wait for jobs; used by several threads."""

    def __init__(self, num_processes: int) -> None:
        self._idle: queue.SimpleQueue[_BuilderProcess | None] = queue.SimpleQueue()
        for _ in range(num_processes):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._started: list[_BuilderProcess] = []
        self._closed = False

    def build(self, job: PlanJob) -> BuiltPlan:
        """Build in an idle process, or in a new one if there is none; blocks."""
        process = self._idle.get()
        try:
            process = process or self._start()
            built = process.build(job)
        except BaseException:
            if process is not None:
                process.kill()
            process = None
            raise
        finally:
            self._idle.put(process)
        if job.weights is not None:
            job.weights.unlink()
        return built

    def close(self) -> None:
        """Kill every process; builds in progress raise."""
        with self._lock:
            self._closed = True
            for process in self._started:
                process.kill()

    def _start(self) -> _BuilderProcess:
        with self._lock:
            if self._closed:
                raise EngineError("the build was stopped")
            self._started.append(_BuilderProcess(_start_process()))
            return self._started[-1]


def _start_process() -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
    level = str(_logger.getEffectiveLevel())
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "llmengine.backends.tensorrt.builder_process", level],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        start_new_session=True,  # Ctrl-C must not reach it: the pool kills it
    )


class _BuilderProcess:
    """One process of `builder_process.py`: takes a line of JSON for each job, answers with log lines and a result."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def build(self, job: PlanJob) -> BuiltPlan:
        """Build the job's plan; raises `EngineError`, after which the process can no longer be used."""
        request = {
            "spec": job.spec.to_dict(),
            "target": list(job.target.compute_capabilities),
            "output": str(job.output),
            "weights": job.weights and str(job.weights),
            "timing_cache": job.timing_cache and str(job.timing_cache),
            "device_uuid": job.device_uuid,
        }
        stdin, stdout = self._pipes()
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        for line in stdout:
            answer = json.loads(line)
            if "log" in answer:
                _logger.log(answer["level"], "%s: %s", job.name, answer["log"])
            elif "error" in answer:
                error = ConfigError if answer["is_config"] else EngineError
                raise error(f"plan {job.name!r}: {answer['error']}")
            else:
                return BuiltPlan(name=job.name, path=job.output, **answer)
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        raise EngineError(f"plan {job.name!r}: the process that was building it {how}; memory may have run out")

    def kill(self) -> None:
        """End the process at once; idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes():
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout
