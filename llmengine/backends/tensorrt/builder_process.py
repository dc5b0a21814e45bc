"""The process that builds plans, started by `builder.py`.

`python -m llmengine.backends.tensorrt.builder_process LOG_LEVEL`

Reads one job a line from stdin until it ends, all JSON; writes lines {"log", "level"} and for each job one {"error",
"is_config"} or the facts of a `BuiltPlan`. After an error it ends: the library's state may be damaged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from llmengine.backends.tensorrt.builder import map_constants, serialize_segment
from llmengine.backends.tensorrt.library import load_library
from llmengine.backends.tensorrt.spec import BuildTarget, spec_from_dict
from llmengine.errors import ConfigError, LLMEngineError


class _Relay(logging.Handler):
    """Sends log records to the process that asked for the build."""

    def __init__(self, answers: IO[str]) -> None:
        super().__init__()
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        _send(self._answers, {"log": record.getMessage(), "level": record.levelno})


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    logger = logging.getLogger("llmengine.tensorrt")
    logger.setLevel(int(sys.argv[1]))
    logger.propagate = False
    logger.addHandler(_Relay(answers))
    for line in sys.stdin:
        try:
            answer = _build(json.loads(line))
        except (LLMEngineError, OSError) as failure:
            _send(answers, {"error": str(failure), "is_config": isinstance(failure, ConfigError)})
            return
        _send(answers, answer)


def _build(job: dict[str, Any]) -> dict[str, Any]:
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


def _send(answers: IO[str], content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


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
