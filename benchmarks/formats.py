"""Speed of the weight formats on a CPU, beside llama.cpp and OpenVINO GenAI: workloads A to D of `benchmarks.offline`.

    taskset -c 0,1 python -m benchmarks.formats --threads 2
    python -m benchmarks.formats --formats "int8;int4 g128" --workloads A,B
    python -m benchmarks.formats --llama-python VENV/bin/python --openvino-python VENV/bin/python

Every contender runs in a process of its own, all take turns, and each runs briefly to warm up. The model must be a GGUF
file if another engine is to run it; that engine gets copies of it in its own block formats.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender, EngineRunner, WorkerProcess, llama_cpp, openvino, write_gguf_like
from benchmarks.models import add_demo_model
from benchmarks.offline import WORKLOADS
from benchmarks.report import add_json, append_record, chosen_rows, format_table, machine, median, new_parser
from benchmarks.workloads import Workload
from llmengine import QuantConfig
from llmengine.checkpoints.opening import open_model
from llmengine.cli.demo import find_demo_model


def _quantized(preset: str, **changes: Any) -> Mapping[str, Any]:
    return {"quant_config": QuantConfig.preset(preset, **changes)}  # type: ignore[arg-type]


FORMATS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": _quantized("int8"),
    "int8, int8 KV": _quantized("int8", kv_cache="int8"),
    "w8a8, int8 KV": _quantized("w8a8", method="rtn", kv_cache="int8"),
    "fp8": _quantized("fp8"),
    "int4 g128": _quantized("int4-rtn"),
    "int4 g128, int8 KV": _quantized("int4-rtn", kv_cache="int8"),
    "int4 g32, int8 KV": _quantized("int4-rtn", group_size=32, kv_cache="int8"),
    "mxfp4, int8 KV": _quantized("mxfp4", kv_cache="int8"),
    "stored": _quantized("stored"),
    "stored, int8 KV": _quantized("stored", kv_cache="int8"),
}
"""Rows of llmengine: options of `ModelConfig`. Rounding stands for AWQ, GPTQ and SmoothQuant, which are as fast."""

LLAMA_CPP_TYPES = ("Q4_0", "Q8_0", "Q4_1", "BF16")
OPENVINO_TYPES = ("Q4_1", "Q8_0")

_WARM_UP_DIVISOR = 4
"""Lengths of the run that warms a contender up, as a share of the workload's."""


def contenders(arguments: argparse.Namespace, copies: Path) -> dict[str, Callable[[], Contender]]:
    """Name -> what starts it; copies of the model are written to the directory `copies`."""
    model, threads = arguments.model, arguments.threads
    found: dict[str, Callable[[], Contender]] = {}
    for name in arguments.formats:
        found[name] = lambda name=name: WorkerProcess(EngineRunner, model, threads, FORMATS[name])  # type: ignore[misc]
    for engine, start, python, types in (
        ("llama.cpp", llama_cpp, arguments.llama_python, LLAMA_CPP_TYPES),
        ("OpenVINO", openvino, arguments.openvino_python, OPENVINO_TYPES),
    ):
        for tensor_type in types if python is not None else ():
            copy = copies / f"{tensor_type}.gguf"
            if not copy.exists():
                write_gguf_like(model, tensor_type, copies)
            found[f"{engine} {tensor_type}"] = lambda start=start, python=python, copy=copy: start(  # type: ignore[misc]
                python, copy, threads
            )
    return found


def compare(arguments: argparse.Namespace, workloads: Sequence[Workload]) -> dict[str, dict[str, list[float]]]:
    """Run all contenders on all workloads: contender -> workload -> tokens/s of each run."""
    vocab_size = open_model(arguments.model).arch.vocab_size
    speeds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as copies, ExitStack() as running:
        started = {}
        for name, start in contenders(arguments, Path(copies)).items():
            started[name] = running.enter_context(closing(start()))
            if isinstance(started[name], WorkerProcess):
                print(f"{name}: {started[name].call('describe')}", flush=True)
        for workload in workloads:
            rng = random.Random(workload.name)
            brief = workload.scaled(_WARM_UP_DIVISOR)
            for contender in started.values():
                contender.run(brief.prompts(rng, vocab_size), brief.output_tokens)
            for run in range(arguments.runs):
                prompts = workload.prompts(rng, vocab_size)
                for name, contender in started.items():
                    speed = workload.num_counted_tokens / contender.run(prompts, workload.output_tokens)
                    speeds.setdefault(name, {}).setdefault(workload.name, []).append(speed)
                    results = {"tokens_per_s": speed}
                    append_record(arguments, "formats", results, workload=asdict(workload), contender=name, run=run)
            for name, of_workload in speeds.items():
                listed = ", ".join(f"{speed:.1f}" for speed in of_workload[workload.name])
                print(f"{workload.name}: {name}: {listed} tokens/s", flush=True)
    return speeds


def table(speeds: Mapping[str, Mapping[str, Sequence[float]]], workloads: Sequence[Workload]) -> str:
    """A row for each contender: median tokens/s of each workload."""
    header = [f"{one.name}: {one.num_requests} x {one.prompt_tokens} -> {one.output_tokens}" for one in workloads]
    rows = [[name, *(f"{median(of[one.name]):.0f}" for one in workloads)] for name, of in speeds.items()]
    return format_table(["tokens/s", *header], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print the table."""
    parser = new_parser("formats", __doc__)
    add_demo_model(parser)
    add_json(parser)
    chosen = 'such as "int8;int4 g128" (default: all)'
    parser.add_argument(
        "--formats", type=partial(chosen_rows, rows=FORMATS), default=list(FORMATS), metavar="NAMES", help=chosen
    )
    parser.add_argument("--workloads", default="A,B,C,D", help="%(default)s")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every contender")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all lengths by N, for a quick try")
    parser.add_argument("--llama-python", type=Path, metavar="FILE", help="an interpreter that has xllamacpp")
    parser.add_argument("--openvino-python", type=Path, metavar="FILE", help="an interpreter that has openvino-genai")
    arguments = parser.parse_args(argv)
    arguments.model = arguments.model or find_demo_model()
    wanted = arguments.workloads.split(",")
    workloads = [workload.scaled(arguments.scale) for workload in WORKLOADS if workload.name in wanted]
    speeds = compare(arguments, workloads)
    print(f"\nmedians of {arguments.runs} runs, {arguments.threads} threads, {machine()['cpu']}\n")
    print(table(speeds, workloads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
