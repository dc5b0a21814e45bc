"""Share of its speed that an engine keeps beside programs that occupy the cores.

    python -m benchmarks.contention
    taskset -c 0,1 python -m benchmarks.contention --weights int8 --runs 5 --json FILE
    python -m benchmarks.contention --llama-python VENV/bin/python     beside llama.cpp, from the package xllamacpp

    1, 8, 16   that many streams at once, 16 -> 48 tokens     output tokens/s
    prefill    one prompt of 1024 tokens                      prompt tokens/s

A busy loop runs on each of the usable cores. Quiet and busy runs alternate. Two threads on two cores beside two loops
would get half of the cores if all four were always ready to run.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender, EngineRunner, WorkerProcess, llama_cpp, write_gguf_like
from benchmarks.models import add_demo_model
from benchmarks.report import add_json, append_record, format_table, machine, median, new_parser
from benchmarks.workloads import Workload
from llmengine.checkpoints.opening import open_model
from llmengine.cli.demo import find_demo_model

GOAL = 0.6
WEIGHTS: Mapping[str, Mapping[str, Any]] = {
    "int8": {"quant": "int8"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
}
PEER_TYPES = ("Q8_0", "Q4_1")
WORKLOADS = (
    Workload("1", 1, 16, 48),
    Workload("8", 8, 16, 48),
    Workload("16", 16, 16, 48),
    Workload("prefill", 1, 1024, 1),
)

_LOOP_CODE = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""
"""Ends soon after the benchmark, however that ended."""

_SETTLE_S = 0.3
"""Time until the loops run."""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keep `count` processes computing during the block, spread over the cores that this process may use."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    loops = []
    try:
        for index in range(count):
            core = cores[index % len(cores)]
            loops.append(subprocess.Popen([sys.executable, "-S", "-c", _LOOP_CODE, str(core)]))
        time.sleep(_SETTLE_S)
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens/s of one contender on one workload: of each quiet run, and of the busy run that followed it."""

    contender: str
    workload: str
    quiet: list[float]
    busy: list[float]

    @property
    def kept(self) -> float:
        """Median over the pairs of runs of the busy speed as a share of the quiet one."""
        return median([busy / quiet for quiet, busy in zip(self.quiet, self.busy, strict=True)])


def measure(name: str, contender: Contender, workload: Workload, vocab_size: int, runs: int, num_loops: int) -> Speeds:
    """Run a workload `runs` times alone and beside busy loops, alternating, after one run to warm up."""
    rng = random.Random(workload.name)

    def speed() -> float:
        seconds = contender.run(workload.prompts(rng, vocab_size), workload.output_tokens)
        return workload.num_counted_tokens / seconds

    speed()
    speeds = Speeds(name, workload.name, [], [])
    for _ in range(runs):
        speeds.quiet.append(speed())
        with busy_loops(num_loops):
            speeds.busy.append(speed())
    return speeds


def compare(arguments: argparse.Namespace, workloads: Sequence[Workload]) -> list[Speeds]:
    """Measure one contender after the other on all workloads."""
    vocab_size = open_model(arguments.model).arch.vocab_size
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for name in contender_names(arguments):
            contender = _start_contender(arguments, name, Path(directory))
            try:
                for workload in workloads:
                    speeds = measure(name, contender, workload, vocab_size, arguments.runs, arguments.loops)
                    found.append(speeds)
                    print(
                        f"{name}, {workload.name}: keeps {speeds.kept:.2f} of {median(speeds.quiet):.1f} tokens/s",
                        flush=True,
                    )
                    results = {"quiet": speeds.quiet, "busy": speeds.busy, "ratio": speeds.kept}
                    append_record(arguments, "contention", results, contender=name, workload=workload.name)
            finally:
                contender.close()
    return found


def contender_names(arguments: argparse.Namespace) -> list[str]:
    """Names such as "llmengine int8", and "llama.cpp Q8_0" if its interpreter is given."""
    names = [f"llmengine {weights}" for weights in arguments.weights.split(",")]
    if arguments.llama_python is not None:
        names += [f"llama.cpp {tensor_type}" for tensor_type in PEER_TYPES]
    return names


def _start_contender(arguments: argparse.Namespace, name: str, directory: Path) -> Contender:
    engine, weights = name.split(" ")
    if engine == "llama.cpp":
        model = write_gguf_like(arguments.model, weights, directory)
        return llama_cpp(arguments.llama_python, model, arguments.threads)
    worker = WorkerProcess(EngineRunner, arguments.model, arguments.threads, WEIGHTS[weights])
    print(f"{name}: {worker.call('describe')}", flush=True)
    return worker


def _passes(speeds: Speeds) -> bool:
    return not speeds.contender.startswith("llmengine") or speeds.kept >= GOAL


def table(found: Sequence[Speeds]) -> str:
    """A row for each contender and workload."""
    rows = []
    for speeds in found:
        verdict = ("PASS" if _passes(speeds) else "FAIL") if speeds.contender.startswith("llmengine") else "-"
        figures = f"{median(speeds.quiet):.1f}", f"{median(speeds.busy):.1f}", f"{speeds.kept:.2f}"
        rows.append([speeds.contender, speeds.workload, *figures, verdict])
    return format_table(["contender", "workload", "quiet tokens/s", "busy tokens/s", "kept", f"goal {GOAL:g}"], rows)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = new_parser("contention", __doc__)
    add_demo_model(parser)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="%(default)s")
    parser.add_argument("--loads", default=",".join(one.name for one in WORKLOADS), help="workloads: %(default)s")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every contender")
    parser.add_argument("--loops", type=int, default=usable, metavar="N", help="busy processes; default: one per core")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all lengths by N, for a quick try")
    parser.add_argument("--llama-python", type=Path, metavar="FILE", help="an interpreter that has xllamacpp")
    add_json(parser)
    arguments = parser.parse_args(argv)
    for option, known in (("weights", WEIGHTS), ("loads", [one.name for one in WORKLOADS])):
        for name in getattr(arguments, option).split(","):
            if name not in known:
                parser.error(f"--{option} must be among {', '.join(known)}, not {name!r}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table and return 1 if llmengine misses the goal anywhere."""
    arguments = _parse(argv)
    arguments.model = arguments.model or find_demo_model()
    chosen = arguments.loads.split(",")
    found = compare(arguments, [one.scaled(arguments.scale) for one in WORKLOADS if one.name in chosen])
    runs = f"medians of {arguments.runs} runs, {arguments.threads} threads beside {arguments.loops} busy loops"
    print(f"\n{runs}, {machine()['cpu']}\n\n{table(found)}")
    return 0 if all(map(_passes, found)) else 1


if __name__ == "__main__":
    sys.exit(main())
