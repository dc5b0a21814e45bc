"""The process that builds plans with the library; `builder.py` starts it.

`python -m llmengine.backends.tensorrt.builder_process LOG_LEVEL`

Everything on its pipes is JSON. It reads one job a line from stdin until stdin ends. It writes lines {"log", "level"}
and, for each job, one line {"error", "is_config"} or the facts of a `BuiltPlan`. After an error it ends, because the
library's state may be damaged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from llmengine.backends.tensorrt.constant_weights import map_constants
from llmengine.backends.tensorrt.graph import RawArray
from llmengine.backends.tensorrt.library import (
    Library,
    load_library,
    quote_messages,
    require_accepted,
    require_result,
)
from llmengine.backends.tensorrt.network import DefinedSegment, define_segment
from llmengine.backends.tensorrt.spec import BuildTarget, ProfileSpec, SegmentSpec, spec_from_dict
from llmengine.errors import ConfigError, LLMEngineError
from llmengine.user_cache import replace_file

_logger = logging.getLogger("llmengine.tensorrt")


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what the library prints out of the answers
    _logger.setLevel(int(sys.argv[1]))
    _logger.propagate = False
    _logger.addHandler(_LogRelay(answers))
    for line in sys.stdin:
        try:
            answer = _run_job(json.loads(line))
        except (LLMEngineError, OSError) as failure:
            _send(answers, {"error": str(failure), "is_config": isinstance(failure, ConfigError)})
            return
        _send(answers, answer)


class _LogRelay(logging.Handler):
    """Sends log records to the process that asked for the build."""

    def __init__(self, answers: IO[str]) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._answers, {"log": record.getMessage(), "level": record.levelno})


def _send(answers: IO[str], content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    _reset_peak()
    begin = time.perf_counter()
    if job["device_uuid"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job["device_uuid"]  # read when the library first looks for a device
    library = load_library()
    spec = spec_from_dict(job["spec"])
    weights = map_constants(spec, job["weights"] and Path(job["weights"]))
    target = BuildTarget(tuple(job["target"]))
    plan = serialize_segment(library, spec, target, weights, job["timing_cache"] and Path(job["timing_cache"]))
    Path(job["output"]).write_bytes(memoryview(plan))
    return {
        "seconds": time.perf_counter() - begin,
        "size_bytes": plan.nbytes,
        "peak_host_bytes": _peak_bytes(),
        "library": str(library),
    }


def serialize_segment(
    library: Library,
    spec: SegmentSpec,
    target: BuildTarget,
    weights: Mapping[str, RawArray],
    timing_cache: Path | None = None,
) -> Any:
    """Build the plan of a segment in this process and return the library's `IHostMemory`.

    Raises `EngineError` quoting the library's messages; nothing more may be built in a process after that.
    """
    builder = library.create_builder()
    what = f"{library} could not build {spec.kind!r} for {target}"
    with library.checked_calls(what):
        segment = define_segment(library, builder, spec, weights)
        config = _build_config(library, segment, spec, target)
        cache = _attach_timing_cache(library, config, timing_cache)
    with library.checked_calls(what, _concerns_a_candidate):
        plan = require_result(builder.build_serialized_network(segment.network, config), "build_serialized_network")
    if cache is not None and timing_cache is not None:
        _write_timing_cache(library, config, timing_cache)
    return plan


def _concerns_a_candidate(message: str) -> bool:
    """Whether an error, in a build that gave a plan, concerns a kernel that was tried and had too little memory."""
    return "OutOfMemory" in message or "out of memory" in message


def _build_config(library: Library, segment: DefinedSegment, spec: SegmentSpec, target: BuildTarget) -> Any:
    flag = library.trt.BuilderFlag
    config = require_result(segment.builder.create_builder_config(), "create_builder_config")
    library.set_target(config, target)
    config.clear_flag(flag.TF32)
    config.max_aux_streams = 0
    if library.features.user_allocation_flag:
        config.set_flag(flag.REQUIRE_USER_ALLOCATION)
    for profile in spec.profiles:
        _add_profile(segment.builder, config, spec, profile)
    return config


def _add_profile(builder: Any, config: Any, spec: SegmentSpec, profile: ProfileSpec) -> None:
    optimization = require_result(builder.create_optimization_profile(), "create_optimization_profile")
    for tensor in spec.inputs:
        optimization.set_shape(tensor.name, *profile.shapes_of(tensor))
    require_accepted(config.add_optimization_profile(optimization), f"the {profile.name} profile")


def _attach_timing_cache(library: Library, config: Any, path: Path | None) -> Any:
    if path is None or not library.features.timing_cache:
        return None
    content = path.read_bytes() if path.is_file() else b""
    with library.log.capture(pass_on=False):
        cache = config.create_timing_cache(content)
        is_usable = cache is not None and config.set_timing_cache(cache, False)
    if not is_usable:
        _logger.info("%s belongs to another library or device, so kernels are timed again", path)
        cache = require_result(config.create_timing_cache(b""), "create_timing_cache")
        require_accepted(config.set_timing_cache(cache, False), "set_timing_cache")
    return cache


def _write_timing_cache(library: Library, config: Any, path: Path) -> None:
    with library.log.capture(pass_on=False) as messages:
        content = config.get_timing_cache().serialize()
    if messages:
        _logger.warning("the timings of this build could not be kept: %s", quote_messages(messages))
        return
    replace_file(path, content)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak is then that of all jobs so far


def _peak_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
