"""A report about TensorRT on this machine's GPU: whether it builds, is correct, and is faster than torch.

    python -m benchmarks.tensorrt_report --shape 1b                    random weights of a model's shape
    python -m benchmarks.tensorrt_report --model DIRECTORY             a real model

It loads the model with each backend in turn, which takes a few minutes and about as much device memory as serving the
model. Exit codes: 0 if the report is complete, 1 if TensorRT cannot be used (the report says why), 2 if there is no
GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.models import add_model_or_shape, load_llm
from benchmarks.report import format_table, machine, new_parser
from benchmarks.serving import run_once
from benchmarks.shapes import write_shape
from benchmarks.workloads import StreamingLoad, exact_length
from llmengine import LLM, LLMEngineError, SchedulerConfig
from llmengine.saved_engines import measure_layer

_NUM_COMPARED = 32
"""Number of greedy tokens of each prompt that are compared between the backends."""


@dataclass(slots=True)
class Report:
    """Results so far; the report is written even if a later step fails.

    Attributes:
        notes: one line each.
        tables: title -> table.
    """

    notes: list[str] = field(default_factory=list)
    tables: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Add a line and print it, since the next step may take minutes."""
        print(text, flush=True)
        self.notes.append(text)

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = ["# llmengine with TensorRT", "", *(f"- {note}" for note in self.notes), ""]
        for title, table in self.tables.items():
            lines += [f"## {title}", "", "```", table, "```", ""]
        return "\n".join(lines)


def run(arguments: argparse.Namespace, model: Path, report: Report) -> None:
    """Fill the report. Raises `LLMEngineError` if TensorRT cannot be used."""
    with tempfile.TemporaryDirectory() as directory:
        engine = Path(directory) / "engine"
        figures, tokens = {}, {}
        with _open(arguments, model, "tensorrt", report, "builds, verifies and loads") as llm:
            figures["TensorRT"], tokens["TensorRT"] = _measure(llm, arguments)
            llm.save(engine)
        _add_plans(report, json.loads((engine / "engine.json").read_text())["plans"])
        with _open(arguments, engine, "tensorrt", report, "loads the saved engine"):
            pass
        with _open(arguments, model, "torch", report, "loads") as llm:
            figures["torch"], tokens["torch"] = _measure(llm, arguments)
        _add_figures(report, figures, arguments)
        report.note(_agreement(tokens["TensorRT"], tokens["torch"]))
        with _open(arguments, engine, "auto", report, "times both and chooses") as llm:
            report.note(f"auto chooses: {llm.info.description}")
            llm.save(engine)
        _add_step_times(report, json.loads((engine / "engine.json").read_text())["plans"])
        _add_layer_times(report, engine, SchedulerConfig(max_batch_size=max(arguments.concurrency)))


def _open(
    arguments: argparse.Namespace,
    model: Path,
    backend: Literal["auto", "torch", "tensorrt"],
    report: Report,
    what: str,
) -> LLM:
    began = time.perf_counter()
    llm = load_llm(
        model,
        SchedulerConfig(max_batch_size=max(arguments.concurrency)),
        backend=backend,
        dtype=arguments.dtype,
        device=arguments.device,
        load_format="dummy" if (model / "config.json").is_file() and arguments.shape else "auto",
    )
    report.note(f"backend={backend!r} {what}: {time.perf_counter() - began:.1f} s; {llm.info.description}")
    return llm


def _measure(llm: LLM, arguments: argparse.Namespace) -> tuple[dict[int, dict[str, float]], list[list[int]]]:
    """Figures of the second run by concurrency, and greedy tokens of a few prompts."""
    figures = {}
    for concurrency in arguments.concurrency:
        load = StreamingLoad(concurrency, concurrency, arguments.prompt_tokens, arguments.output_tokens)
        for seed in range(2):
            figures[concurrency] = run_once(llm, load, seed)
    params = exact_length(min(_NUM_COMPARED, arguments.output_tokens))
    length = min(16, arguments.prompt_tokens)
    prompts = [[(7 * row + place) % llm.info.vocab_size for place in range(length)] for row in range(4)]
    return figures, [list(output.token_ids) for output in llm.generate(prompts, params)]


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> str:
    """How long the greedy outputs are equal; near-ties make them diverge sooner or later."""
    total = sum(map(len, ours))
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        differing = [place for place, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]]
        same += differing[0] if differing else len(mine)
    return f"greedy tokens before the first difference between TensorRT and torch: {same} of {total}"


def _add_plans(report: Report, plans: dict[str, Any]) -> None:
    report.note(f"plans of {plans['flavour']} {plans['version']} for SM {plans['compute_capabilities']}")
    rows = [
        [name, f"{plan['build_s']:.2f}", _mib(plan["peak_host_bytes"]), plan["fingerprint"][:12]]
        for name, plan in plans["plans"].items()
    ]
    report.tables["Plans"] = format_table(["plan", "build s", "peak host MiB", "network"], rows)
    checks = plans["verification"]["checks"]
    report.tables["Errors against torch, in units of the expected rounding, where they are largest"] = format_table(
        ["output", "T", "S", "rms", "limit", "column", "limit", "largest", "limit"],
        [
            [
                f"{check['plan']} {check['output']}",
                str(check["tokens"]),
                str(check["samples"]),
                *(f"{check[f'{of}_{what}']:.2f}" for of in ("rms", "column", "max") for what in ("error", "limit")),
            ]
            for check in checks
        ],
    )


def _add_figures(
    report: Report, figures: dict[str, dict[int, dict[str, float]]], arguments: argparse.Namespace
) -> None:
    rows = [
        [
            str(concurrency),
            backend,
            *(f"{by_load[concurrency][key]:.1f}" for key in ("output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")),
        ]
        for concurrency in arguments.concurrency
        for backend, by_load in figures.items()
    ]
    title = f"Streaming, {arguments.prompt_tokens} prompt tokens, {arguments.output_tokens} output tokens"
    report.tables[title] = format_table(["requests", "backend", "output tok/s", "TTFT p50 ms", "TPOT p50 ms"], rows)


def _add_step_times(report: Report, plans: dict[str, Any]) -> None:
    steps = plans["verification"]["step_us"]
    report.tables["Dense part of a decode step, us"] = format_table(
        ["requests", "TensorRT", "torch"],
        [[size, f"{ours:.0f}", f"{theirs:.0f}"] for size, (ours, theirs) in steps.items()],
    )


def _add_layer_times(report: Report, engine: Path, scheduler: SchedulerConfig) -> None:
    times = measure_layer(engine, scheduler)
    if times is None:
        return
    report.note(f"llmengine build --weights fastest takes {times.fastest}")
    report.tables["One layer of a decode step, us"] = format_table(
        ["requests", "weights as inputs", "as constants"],
        [[str(size), f"{inputs:.1f}", f"{constants:.1f}"] for size, (constants, inputs) in times.us.items()],
    )


def _mib(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes / 2**20:.0f}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("tensorrt_report", __doc__)
    add_model_or_shape(parser)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("tensorrt_report.md"), metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    facts = machine()
    if arguments.device != "cpu" and facts["gpu"] is None:
        print(
            f"TensorRT cannot run here: torch {facts['torch']} finds no CUDA device; TensorRT needs an NVIDIA GPU, its "
            "driver and a CUDA build of torch",
            file=sys.stderr,
        )
        return 2
    report = Report()
    report.note(", ".join(f"{key} {facts[key]}" for key in ("gpu", "torch", "python", "cpu", "time")))
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or write_shape(arguments.shape, Path(directory))
        report.note(f"model: {arguments.model or arguments.shape}")
        code = 0
        try:
            run(arguments, model, report)
        except LLMEngineError as failure:
            report.note(f"failed: {type(failure).__name__}: {failure}")
            code = 1
    arguments.output.write_text(report.markdown())
    print(f"\n{report.markdown()}\nwritten to {arguments.output}; please paste it into an issue")
    return code


if __name__ == "__main__":
    sys.exit(main())
