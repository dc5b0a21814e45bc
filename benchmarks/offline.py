"""`LLM.generate` beside transformers: the same weights, the same machine, the same run, repeats interleaved.

    python -m benchmarks.offline                 workloads A, B, C, D on SmolLM2-135M
    python -m benchmarks.offline --startup       seconds from process start to the first token

    A   1 stream   128 -> 128 tokens     output tokens/s
    B  16 at once  128 -> 128            output tokens/s
    C  64 at once   64 ->  64            output tokens/s
    D   1 prompt  1024 ->   1            prompt tokens/s

Every contender gets the same random prompts, decodes greedily and generates exactly the requested number of tokens.
Each is warmed up in a process of its own. transformers uses the attention implementation and step size that were
fastest in its warm-up.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import PEERS, EngineRunner, TransformersRunner, WorkerProcess
from benchmarks.models import add_demo_model
from benchmarks.report import (
    add_json,
    append_record,
    format_table,
    machine,
    median,
    new_parser,
    new_plot,
    save_plot,
)
from benchmarks.startup import time_lines
from benchmarks.workloads import Workload
from llmengine.checkpoints.opening import open_model
from llmengine.cli.demo import find_demo_model

ENGINES: Mapping[str, Mapping[str, Any]] = {"llmengine": {"dtype": "float32"}, "llmengine int8": {"quant": "int8"}}
"""Name -> options of `EngineRunner`."""

STARTUP_GOAL_S = 5.0
OVERHEAD_GOAL = 0.05

WORKLOADS = (
    Workload("A", 1, 128, 128),
    Workload("B", 16, 128, 128),
    Workload("C", 64, 64, 64),
    Workload("D", 1, 1024, 1),
)
GOALS: Mapping[str, Mapping[str, float]] = {
    "A": {"generate": 1.8},
    "B": {"generate": 2.0, "continuous": 3.0},
    "C": {"generate": 2.0, "continuous": 3.0},
    "D": {"generate": 1.0},
}
"""Workload -> transformers contender -> least ratio of llmengine's speed to its."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One goal, and the ratio that was reached."""

    workload: str
    engine: str
    peer: str
    ratio: float
    goal: float

    @property
    def passed(self) -> bool:
        """Whether the goal was reached."""
        return self.ratio >= self.goal


def peers_of(workload: Workload) -> Sequence[str]:
    """Contenders of transformers: `generate`, and continuous batching if there is a batch."""
    return PEERS if workload.num_requests > 1 else PEERS[:1]


def judge(speeds: Mapping[str, Mapping[str, float]], goals: Mapping[str, Mapping[str, float]] = GOALS) -> list[Verdict]:
    """A verdict for each goal and engine; `speeds` is workload -> contender -> tokens/s."""
    return [
        Verdict(workload, engine, peer, contenders[engine] / contenders[peer], goal)
        for workload, contenders in speeds.items()
        for peer, goal in goals.get(workload, {}).items()
        for engine in ENGINES
        if engine in contenders and peer in contenders
    ]


def compare(arguments: argparse.Namespace, workloads: Sequence[Workload]) -> dict[str, dict[str, float]]:
    """Run every contender on every workload, interleaved; return the medians in tokens/s."""
    needed = {kind for workload in workloads for kind in peers_of(workload)}
    common = arguments.model, arguments.threads
    contenders = {name: WorkerProcess(EngineRunner, *common, options) for name, options in ENGINES.items()}
    contenders |= {kind: WorkerProcess(TransformersRunner, *common, kind) for kind in PEERS if kind in needed}
    try:
        speeds = {workload.name: _compare_one(arguments, workload, contenders) for workload in workloads}
        if not arguments.skip_overhead:
            _report_overhead(arguments, {name: contenders[name] for name in ENGINES})
    finally:
        for contender in contenders.values():
            contender.close()
    return speeds


def _compare_one(
    arguments: argparse.Namespace, workload: Workload, contenders: Mapping[str, WorkerProcess]
) -> dict[str, float]:
    """Each contender's median tokens/s on one workload."""
    rng = random.Random(workload.name)
    vocab_size = open_model(arguments.model).arch.vocab_size
    names = (*ENGINES, *peers_of(workload))
    for name in names:
        description = contenders[name].call("warm_up", workload.prompts(rng, vocab_size), workload.output_tokens)
        print(f"{workload.name}: {name}: {description}", flush=True)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for run in range(arguments.runs):
        prompts = workload.prompts(rng, vocab_size)
        for name in names:
            seconds = contenders[name].run(prompts, workload.output_tokens)
            speeds[name].append(workload.num_counted_tokens / seconds)
            results = {"tokens_per_s": speeds[name][-1], "seconds": seconds}
            append_record(arguments, "offline", results, workload=asdict(workload), contender=name, run=run)
    for name, values in speeds.items():
        print(f"{workload.name}: {name}: {', '.join(f'{value:.1f}' for value in values)} tokens/s", flush=True)
    return {name: median(values) for name, values in speeds.items()}


def _report_overhead(arguments: argparse.Namespace, engines: Mapping[str, WorkerProcess]) -> None:
    for name, engine in engines.items():
        figures = [engine.call("overhead", 16, 64) for _ in range(arguments.runs)]
        share, ms = median([figure[0] for figure in figures]), median([figure[1] for figure in figures])
        print(
            f"{name}: {share:.1%} of a step at batch size 16 is outside of the forward pass ({ms:.2f} ms); "
            f"goal < {OVERHEAD_GOAL:.0%}: {'PASS' if share < OVERHEAD_GOAL else 'FAIL'}"
        )
        results = {"step_overhead": share, "overhead_ms_per_step": ms}
        append_record(arguments, "overhead", results, contender=name)


_STARTUP_CODE = """
import json, sys
from llmengine import LLM, ModelConfig, SamplingParams
config = ModelConfig(sys.argv[1], device="cpu", num_threads=int(sys.argv[3]), **json.loads(sys.argv[2]))
llm = LLM(config)
print(llm.generate("Once upon a time", SamplingParams(max_new_tokens=1))[0].num_tokens, flush=True)
llm.close()
"""


def measure_startup(model: Path, options: Mapping[str, Any], threads: int) -> float:
    """Seconds from the start of a Python process to its first token, tokenizer included."""
    return time_lines(_STARTUP_CODE, [str(model), json.dumps(options), str(threads)], ["1"])[0]


def report_startup(arguments: argparse.Namespace) -> bool:
    """Print the median start-up times; return whether all are below the goal."""
    passed = True
    for name, options in ENGINES.items():
        measure_startup(arguments.model, options, arguments.threads)  # fills the file cache
        times = [measure_startup(arguments.model, options, arguments.threads) for _ in range(arguments.runs)]
        seconds = median(times)
        good = seconds < STARTUP_GOAL_S
        passed &= good
        verdict = "PASS" if good else "FAIL"
        print(f"{name}: {seconds:.2f} s from process start to first token; goal < {STARTUP_GOAL_S:g} s: {verdict}")
        append_record(arguments, "startup", {"seconds": times, "median_s": seconds}, contender=name)
    return passed


def table(speeds: Mapping[str, Mapping[str, float]]) -> str:
    """The contenders' speeds, one row per workload."""
    names = {workload.name: workload for workload in WORKLOADS}
    rows = []
    for name, contenders in speeds.items():
        workload = names[name]
        what = f"{name}: {workload.num_requests} x {workload.prompt_tokens} -> {workload.output_tokens}"
        columns = (*ENGINES, *PEERS)
        rows.append([what, *(f"{contenders[column]:.1f}" if column in contenders else "-" for column in columns)])
    return format_table(["tokens/s", *ENGINES, "transformers generate", "continuous batching"], rows)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Each goal, the ratio that was reached, and PASS or FAIL."""
    rows = [
        [
            v.workload,
            v.engine,
            f"transformers {v.peer}",
            f"{v.ratio:.2f}x",
            f"{v.goal:g}x",
            "PASS" if v.passed else "FAIL",
        ]
        for v in verdicts
    ]
    return format_table(["workload", "engine", "against", "ratio", "goal", ""], rows)


def plot(speeds: Mapping[str, Mapping[str, float]], model: str, path: Path) -> None:
    """Draw one panel per workload, with one bar per contender."""
    figure, panels = new_plot(len(speeds), f"{model}, {machine()['cpu']}, {torch.get_num_threads()} threads")
    for panel, (name, contenders) in zip(panels, speeds.items(), strict=True):
        labels = [contender if contender in ENGINES else f"transformers\n{contender}" for contender in contenders]
        colors = ["tab:blue" if contender in ENGINES else "tab:gray" for contender in contenders]
        panel.bar(labels, list(contenders.values()), color=colors)
        panel.set_title(f"workload {name}", fontsize=10)
        panel.set_ylabel("prompt tokens/s" if name == "D" else "output tokens/s")
        panel.tick_params(axis="x", labelsize=7)
    save_plot(figure, path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("offline", __doc__)
    add_demo_model(parser)
    parser.add_argument("--workloads", default="A,B,C,D", help="%(default)s")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every contender")
    parser.add_argument("--startup", action="store_true", help="measure the start-up time instead")
    parser.add_argument("--skip-overhead", action="store_true", help="do not measure the engine's own overhead")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all lengths by N, for a quick try")
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print the tables and return 1 if a goal was missed."""
    arguments = _parse(argv)
    arguments.model = arguments.model or find_demo_model()
    torch.set_num_threads(arguments.threads)
    if arguments.startup:
        return 0 if report_startup(arguments) else 1
    wanted = arguments.workloads.split(",")
    workloads = [workload.scaled(arguments.scale) for workload in WORKLOADS if workload.name in wanted]
    speeds = compare(arguments, workloads)
    verdicts = judge(speeds)
    print(f"\nmedians of {arguments.runs} runs, {arguments.threads} threads, {machine()['cpu']}\n")
    print(table(speeds))
    print()
    print(verdict_table(verdicts))
    if arguments.plot is not None:
        plot(speeds, arguments.model.name, arguments.plot)
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
