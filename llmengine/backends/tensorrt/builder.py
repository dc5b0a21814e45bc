"""From specs to plans: the builder's settings, worker processes, and constant weights by way of files.

A plan is built in a worker process (`worker.py`): TensorRT holds the interpreter for seconds to minutes, and after a
failed build its state in a process is no longer sound. A worker runs one build at a time and ends after a failure.

Weights that become constants go through files: `spool_weights` writes them as they are streamed, and the worker maps
the file. So a build's own process holds one tensor at a time, and a worker the constants of one plan: a layer, or the
last layer and the head. Its memory peaks at about three times these (the file, the plan, one copy of TensorRT's) above
the 0.2 GB of the library; without constants, at that. See benchmarks/tensorrt_build.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from llmengine.backends.tensorrt.library import Library, accepted, not_none, quote
from llmengine.backends.tensorrt.network import DefinedSegment, RawArray, define_segment
from llmengine.backends.tensorrt.spec import BuildTarget, PlacedSegment, ProfileSpec, SegmentSpec, WeightSpec
from llmengine.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("llmengine.tensorrt")

_ALIGNMENT = 256
_MAX_WORKERS = 4
_PACKAGE_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True)
class PlanJob:
    """One plan to build.

    Attributes:
        name: for messages; see `PlacedSegment.plan_name`.
        output: where the plan goes; its directory exists.
        weights: file of `spool_weights`, exactly if the spec has constant weights; deleted when the plan is built.
        timing_cache: file of measurements, read and extended where the library keeps any.
        device_uuid: of the GPU to measure on, as CUDA_VISIBLE_DEVICES takes it, the same in all jobs; None: the first.
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
    """What building a plan took.

    Attributes:
        seconds: definition, build and writing; without the worker's start.
        size_bytes: of the plan.
        peak_host_bytes: the worker's largest resident memory during the build, mapped weights included; None where
            the system does not tell.
        library: name and version of what built it.
    """

    name: str
    path: Path
    seconds: float
    size_bytes: int
    peak_host_bytes: int | None
    library: str


def build_plan(job: PlanJob) -> BuiltPlan:
    """Build one plan in a worker process; see `build_plans`."""
    [built] = build_plans([job], 1)
    return built


def build_plans(jobs: Iterable[PlanJob], num_workers: int) -> Iterator[BuiltPlan]:
    """Build plans in `num_workers` processes and yield each as it is done, not in order.

    `jobs` is advanced only as workers become free, so that a lazy one (`spool_weights`) keeps few weights on disk.
    Closing the iterator, an exception in it or Ctrl-C kills the workers; output files of unfinished builds may be left,
    incomplete. Raises `EngineError` naming plan and cause, `ConfigError` if no library can build for the target.
    """
    pool = _WorkerPool(num_workers)
    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="plan-build")
    remaining = iter(jobs)
    running: set[Future[BuiltPlan]] = set()
    try:
        while True:
            while len(running) < num_workers and (job := next(remaining, None)) is not None:
                running.add(threads.submit(pool.build, job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.close()
        threads.shutdown(cancel_futures=True)


def default_workers(library: Library) -> int:
    """Return how many plans are best built at once: one where building measures on the device."""
    if library.features.timing_cache:
        return 1
    return max(1, min(_MAX_WORKERS, os.cpu_count() or 1))


def constant_offsets(spec: SegmentSpec) -> dict[str, int]:
    """Return where each constant weight begins in the file of `spool_weights`."""
    offsets = {}
    end = 0
    for weight in _constants(spec):
        offsets[weight.name] = end
        end += math.ceil(weight.size_bytes / _ALIGNMENT) * _ALIGNMENT
    return offsets


def spool_weights(
    segments: Sequence[PlacedSegment], stream: Iterable[tuple[str, torch.Tensor]], directory: Path
) -> Iterator[tuple[PlacedSegment, Path]]:
    """Write the constants of each segment to a file in `directory` and yield it as soon as it is complete.

    Args:
        stream: canonical weights, in any order; those of another dtype than the spec says are refused.

    At most one tensor is in memory; on disk are the files being written (three with tied embeddings, else two) and
    those yielded and not deleted. Raises `EngineError` if the stream ends early.
    """
    wanted: dict[str, list[tuple[PlacedSegment, WeightSpec]]] = {}
    missing: dict[str, int] = {}
    for segment in segments:
        constants = _constants(segment.spec)
        missing[segment.plan_name] = len(constants)
        for weight in constants:
            wanted.setdefault(weight.canonical(segment.layer), []).append((segment, weight))
    for name, tensor in stream:
        for segment, weight in wanted.pop(name, []):
            path = directory / f"{segment.plan_name}.weights"
            _write_constant(path, constant_offsets(segment.spec)[weight.name], weight, tensor)
            missing[segment.plan_name] -= 1
            if not missing[segment.plan_name]:
                yield segment, path
        if not wanted:
            return
    raise EngineError(f"the weights ended before {', '.join(wanted)}")


def map_constants(spec: SegmentSpec, path: Path | None) -> dict[str, RawArray]:
    """Return the constants of a segment as views of the mapped file: name in the plan -> bytes."""
    constants = _constants(spec)
    if not constants:
        return {}
    assert path is not None, f"constant weights of {spec.kind!r} without a file"
    mapped = np.memmap(path, np.uint8, "r")
    offsets = constant_offsets(spec)
    return {
        weight.name: mapped[offsets[weight.name] : offsets[weight.name] + weight.size_bytes] for weight in constants
    }


def serialize_segment(
    library: Library,
    spec: SegmentSpec,
    target: BuildTarget,
    weights: Mapping[str, RawArray],
    timing_cache: Path | None = None,
) -> Any:
    """Build the plan of a segment in this process and return the library's `IHostMemory`.

    Raises `EngineError` quoting the library's messages; build nothing more in a process where it did.
    """
    builder = library.create_builder()
    with library.calls(f"{library} could not build {spec.kind!r} for {target}"):
        segment = define_segment(library, builder, spec, weights)
        config = _configure(library, segment, spec, target)
        cache = _attach_timing_cache(library, config, timing_cache)
    with library.calls(f"{library} could not build {spec.kind!r} for {target}", _is_of_a_candidate):
        plan = not_none(builder.build_serialized_network(segment.network, config), "build_serialized_network")
    if cache is not None and timing_cache is not None:
        _write_timing_cache(library, config, timing_cache)
    return plan


def _is_of_a_candidate(message: str) -> bool:
    """Say whether an error, in a build that gave a plan, is of a kernel that was tried and had too little memory."""
    return "OutOfMemory" in message or "out of memory" in message


def _configure(library: Library, segment: DefinedSegment, spec: SegmentSpec, target: BuildTarget) -> Any:
    flag = library.trt.BuilderFlag
    config = not_none(segment.builder.create_builder_config(), "create_builder_config")
    library.set_target(config, target)
    config.clear_flag(flag.TF32)
    config.max_aux_streams = 0
    if library.features.user_allocation_flag:
        config.set_flag(flag.REQUIRE_USER_ALLOCATION)
    for profile in spec.profiles:
        _add_profile(segment.builder, config, spec, profile)
    return config


def _add_profile(builder: Any, config: Any, spec: SegmentSpec, profile: ProfileSpec) -> None:
    made = not_none(builder.create_optimization_profile(), "create_optimization_profile")
    for tensor in spec.inputs:
        ranges = [profile.range_of(dim) for dim in ("T", "S")]
        shapes = [
            tensor.resolve(T=tokens, S=samples)
            for tokens, samples in zip(*[(item.min, item.opt, item.max) for item in ranges], strict=True)
        ]
        made.set_shape(tensor.name, *shapes)
    accepted(config.add_optimization_profile(made), f"the {profile.name} profile")


def _attach_timing_cache(library: Library, config: Any, path: Path | None) -> Any:
    if path is None or not library.features.timing_cache:
        return None
    content = path.read_bytes() if path.is_file() else b""
    with library.log.capture(pass_on=False):
        cache = config.create_timing_cache(content)
        is_ours = cache is not None and config.set_timing_cache(cache, False)
    if not is_ours:
        _logger.info("%s is of another library or device; timings are measured again", path)
        cache = not_none(config.create_timing_cache(b""), "create_timing_cache")
        accepted(config.set_timing_cache(cache, False), "set_timing_cache")
    return cache


def _write_timing_cache(library: Library, config: Any, path: Path) -> None:
    with library.log.capture(pass_on=False) as messages:
        content = config.get_timing_cache().serialize()
    if messages:
        _logger.warning("what the build has measured is not kept: %s", quote(messages))
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(name, path)


def _constants(spec: SegmentSpec) -> list[WeightSpec]:
    return [weight for weight in spec.weights if weight.source == "constant"]


def _write_constant(path: Path, offset: int, weight: WeightSpec, tensor: torch.Tensor) -> None:
    import torch

    streamed = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    if streamed != (weight.dtype, weight.shape):
        raise EngineError(f"weight {weight.role!r} is {streamed}, the plan needs {(weight.dtype, weight.shape)}")
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(offset)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


class _WorkerPool:
    """Worker processes that wait for jobs; used by several threads."""

    def __init__(self, num_workers: int) -> None:
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)
        self._lock = threading.Lock()
        self._started: list[_Worker] = []
        self._closed = False

    def build(self, job: PlanJob) -> BuiltPlan:
        """Build in an idle worker, a new one if there is none; the calling thread waits."""
        worker = self._idle.get()
        try:
            worker = worker or self._start()
            built = worker.build(job)
        except BaseException:
            if worker is not None:
                worker.kill()
            worker = None
            raise
        finally:
            self._idle.put(worker)
        if job.weights is not None:
            job.weights.unlink()
        return built

    def close(self) -> None:
        """Kill every worker; builds under way raise."""
        with self._lock:
            self._closed = True
            for worker in self._started:
                worker.kill()

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise EngineError("the build was stopped")
            self._started.append(_Worker())
            return self._started[-1]


class _Worker:
    """One process of `worker.py`: a line of JSON in for each job, lines with log messages and a result out."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
        level = str(_logger.getEffectiveLevel())
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmengine.backends.tensorrt.builder_process", level],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            start_new_session=True,  # Ctrl-C is ours to handle: we kill it
        )

    def build(self, job: PlanJob) -> BuiltPlan:
        """Have the job built; raises `EngineError`, after which the worker is no longer of use."""
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
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise EngineError(f"plan {job.name!r}: the process that built it {how}, perhaps out of memory")

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
