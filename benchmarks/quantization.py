"""Every weight format beside bfloat16, on one model: size, perplexity, agreement, KL divergence and tokens/s.

    python -m benchmarks.quantization                          the table of docs/quantization.md
    python -m benchmarks.quantization --formats "int8;int4-rtn" --windows 8
    python -m benchmarks.quantization --device cuda --json cuda.jsonl --compare cpu.jsonl
    python -m benchmarks.quantization --report cuda.jsonl more.jsonl --compare cpu.jsonl

A row is one format; a format that the device does not run is named below the table. Perplexity is that of the text that
comes with the package (or `--text FILE`); agreement, KL divergence and the increase of perplexity are against the same
model with bfloat16 weights. Tokens/s are the short measurement of `LLM.evaluate`: 1 request after another and 16 at
once, with prompts of 128 tokens and 32 output tokens, prompts included. Speed means something only on an otherwise idle
machine; quality is the same on a busy one.

`--compare` sets perplexities beside those of other runs, such as a CPU's, and the exit code is 1 if one differs by more
than 0.2 %. `--report` measures nothing and makes the tables from the records of earlier runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import add_demo_model
from benchmarks.report import add_json, append_record, chosen_rows, format_table, machine, new_parser, read_records
from llmengine import LLM, ConfigError, KvCacheConfig, ModelConfig, QualityReport, QuantConfig
from llmengine.checkpoints.saved_files import size_text
from llmengine.cli.demo import find_demo_model

REFERENCE = "bfloat16"
BENCHMARK = "quantization"
MAX_DIFFERENCE = 0.002
"""Share by which the perplexity of a format may differ between devices."""

_MEMORY_FRACTION = 0.2
"""For the KV cache, on any device: two models are loaded."""

FORMATS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"dtype": "float32"},
    REFERENCE: {},
    "int8": {"quant": "int8"},
    "w8a8, rounded": {"quant_config": QuantConfig.preset("w8a8", method="rtn")},
    "w8a8": {"quant": "w8a8"},
    "fp8": {"quant": "fp8"},
    "fp8-gptq": {"quant": "fp8-gptq"},
    "fp8-gptq, weights only": {"quant_config": QuantConfig(weights="fp8", method="gptq")},
    "fp8-block": {"quant": "fp8-block"},
    "fp8-block-gptq": {"quant": "fp8-block-gptq"},
    **{
        f"{preset} g{size}": {"quant_config": QuantConfig.preset(preset, group_size=size)}
        for size in (128, 64, 32)
        for preset in ("int4-rtn", "int4-awq", "int4-gptq")
    },
    "mxfp4": {"quant": "mxfp4"},
    "mxfp4-gptq": {"quant": "mxfp4-gptq"},
    "stored": {"quant": "stored"},
    "KV cache int8": {"quant_config": QuantConfig(kv_cache="int8")},
    "KV cache fp8": {"quant_config": QuantConfig(kv_cache="fp8")},
}
"""The rows: what each changes in a `ModelConfig` with bfloat16 weights."""

HEADER = (
    *("format", "file", "memory", "perplexity", "increase", "same top token", "KL (nats)"),
    *("tokens/s, 1 request", "16 requests"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A format's report, and how many samples calibrated it; None if it is only rounded."""

    report: QualityReport
    num_samples: int | None

    def check_like(self, other: Row, name: str) -> None:
        """Raise `SystemExit` if the two perplexities are not of the same text, or not calibrated alike."""
        figures = [
            (one.report.text_sha256, one.report.num_windows, one.report.window_tokens, one.report.stride)
            for one in (self, other)
        ]
        if figures[0] != figures[1]:
            raise SystemExit(f"{name}: the compared results are of another text, or of other windows")
        if self.num_samples != other.num_samples:
            counts = f"{self.num_samples} samples, not {other.num_samples}"
            raise SystemExit(f"{name}: the compared results must have the same --calibration-samples: {counts}")


def measure(arguments: argparse.Namespace) -> dict[str, Row]:
    """Evaluate the formats that the device runs, and append a record of each."""
    options = {
        "text": None if arguments.text is None else arguments.text.read_text(encoding="utf-8"),
        "windows": arguments.windows,
        "measure_speed": not arguments.skip_speed,
        "progress": True,
    }
    config = ModelConfig(
        arguments.model,
        dtype="bfloat16",
        device=arguments.device,
        num_threads=arguments.threads,
        kv_cache_config=KvCacheConfig(free_memory_fraction=_MEMORY_FRACTION),
    )
    rows: dict[str, Row] = {}
    with LLM(config) as reference:
        for name in arguments.formats:
            changed = replace(config, **FORMATS[name])
            changed.quant_config = replace(changed.quant_config, num_calibration_samples=arguments.calibration_samples)
            try:
                report = reference.evaluate(**options) if name == REFERENCE else evaluate(changed, reference, **options)
            except ConfigError as error:  # the device does not run it
                print(f"{name} is left out: {error}", flush=True)
                continue
            is_calibrated = changed.quant_config.resolve().method not in (None, "rtn")
            num_samples = arguments.calibration_samples if is_calibrated else None
            rows[name] = Row(report, num_samples)
            results = report.to_json()
            append_record(arguments, BENCHMARK, results, format=name, num_samples=num_samples)
            print(f"{name}: {report.model.description}", file=sys.stderr, flush=True)
    return rows


def evaluate(config: ModelConfig, reference: LLM, **options: Any) -> QualityReport:
    """Load a model and compare it with the reference. `options` are those of `LLM.evaluate`."""
    with LLM(config) as llm:
        return llm.evaluate(reference, **options)


def device_name(facts: Mapping[str, Any], device: str, threads: int) -> str:
    """The name of a device for people; `facts` are those of `report.machine`."""
    return f"{facts['cpu']}, {threads} threads" if device == "cpu" else str(facts["gpu"])


def read_rows(paths: Sequence[Path]) -> dict[str, dict[str, Row]]:
    """Device -> format -> row, from the records of earlier runs; of the same format the last one counts."""
    found: dict[str, dict[str, Row]] = {}
    for record in read_records(paths, BENCHMARK):
        report = QualityReport.from_json(record["results"], "results")
        if report is None:
            raise SystemExit("results of another version of the package; measure them again")
        name = device_name(record["machine"], record["arguments"]["device"], record["arguments"]["threads"])
        found.setdefault(name, {})[record["format"]] = Row(report, record["num_samples"])
    order = list(FORMATS)
    return {device: dict(sorted(rows.items(), key=lambda row: order.index(row[0]))) for device, rows in found.items()}


def table(reports: Mapping[str, QualityReport]) -> str:
    """A row for each report."""
    return format_table(HEADER, [_row(name, report) for name, report in reports.items()])


def _row(name: str, report: QualityReport) -> list[str]:
    model = report.model
    assert model.file_bytes is not None
    differences = [""] * 3
    if report.reference is not None:
        differences = [f"{report.perplexity_increase:+.2%}", f"{report.top1_agreement:.2%}", f"{report.mean_kl:.5f}"]
    speeds = [f"{speed:.0f}" for speed in model.tokens_per_s.values()] or [""] * 2
    sizes = map(size_text, (model.file_bytes, model.weight_bytes))
    return [name, *sizes, f"{model.perplexity:.3f}", *differences, *speeds]


def comparison(rows: Mapping[str, Row], others: Mapping[str, Row]) -> str:
    """Perplexities and KL divergences beside those of other results of the same formats.

    Raises `SystemExit` if they were not measured alike, or have no format in common.
    """
    lines = []
    for name in _in_both(rows, others):
        rows[name].check_like(others[name], name)
        here, there = rows[name].report, others[name].report
        kl = ["" if one.mean_kl is None else f"{one.mean_kl:.5f}" for one in (here, there)]
        perplexities = [f"{one.model.perplexity:.3f}" for one in (here, there)]
        lines.append([name, *perplexities, f"{difference(here, there):+.3%}", *kl])
    return format_table(["format", "perplexity", "compared", "difference", "KL (nats)", "compared"], lines)


def difference(here: QualityReport, there: QualityReport) -> float:
    """By which share the first perplexity is higher."""
    return here.model.perplexity / there.model.perplexity - 1


def differing(rows: Mapping[str, Row], others: Mapping[str, Row]) -> list[str]:
    """The formats whose perplexities differ by more than `MAX_DIFFERENCE`."""
    return [
        name
        for name in _in_both(rows, others)
        if not abs(difference(rows[name].report, others[name].report)) <= MAX_DIFFERENCE
    ]


def _in_both(rows: Iterable[str], others: Mapping[str, Row]) -> list[str]:
    common = [name for name in rows if name in others]
    if not common:
        raise SystemExit("the compared results have none of these formats")
    return common


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("quantization", __doc__)
    add_demo_model(parser)
    add_json(parser)
    parser.add_argument(
        "--formats",
        type=partial(chosen_rows, rows=FORMATS),
        default=list(FORMATS),
        help='such as "int8;int4-rtn" (default: all)',
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="another text than the package's")
    parser.add_argument(
        "--calibration-samples", type=int, default=QuantConfig().num_calibration_samples, help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--skip-speed", action="store_true", help="do not measure tokens/s")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: tables of these results"
    )
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="set perplexities beside these results")
    arguments = parser.parse_args(argv)
    if arguments.report is None:
        arguments.model = arguments.model or find_demo_model()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the formats, or read earlier results, and print the tables; 1 if a perplexity differs too much."""
    arguments = _parse(argv)
    if arguments.report is not None:
        devices = read_rows(arguments.report)
    else:
        devices = {device_name(machine(), arguments.device, arguments.threads): measure(arguments)}
    others = {} if arguments.compare is None else read_rows(arguments.compare)
    code = 0
    for device, rows in devices.items():
        if not rows:
            raise SystemExit("no format has a result")
        last = list(rows.values())[-1].report
        print(f"\n{last.num_windows} windows of {last.window_tokens} tokens; {device}\n")
        print(table({name: row.report for name, row in rows.items()}))
        for other, compared in others.items():
            print(f"\ncompared with {other}\n\n{comparison(rows, compared)}")
            if names := differing(rows, compared):
                print(f"\nmore than {MAX_DIFFERENCE:.1%} apart: {'; '.join(names)}")
                code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
