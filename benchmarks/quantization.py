"""Every weight format beside bfloat16, on one model: size, perplexity, agreement, KL divergence and tokens/s.

    python -m benchmarks.quantization                          the table of docs/quantization.md
    python -m benchmarks.quantization --formats "int8;int4-rtn" --windows 8

A row is one format. Perplexity is that of the text that comes with the package (or `--text FILE`); agreement, KL
divergence and the increase of perplexity are against the same model with bfloat16 weights. Tokens/s are the short
measurement of `LLM.evaluate`: 1 request after another and 16 at once, with prompts of 128 tokens and 32 output tokens,
prompts included. Speed means something only on an otherwise idle machine; quality is the same on a busy one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import add_demo_model
from benchmarks.report import add_json, append_record, chosen_rows, format_table, machine, new_parser
from llmengine import LLM, ModelConfig, QualityReport, QuantConfig
from llmengine.checkpoints.saved_files import size_text
from llmengine.cli.demo import find_demo_model

REFERENCE = "bfloat16"

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


def evaluate(config: ModelConfig, reference: LLM, **options: Any) -> QualityReport:
    """Load a model and compare it with the reference. `options` are those of `LLM.evaluate`."""
    with LLM(config) as llm:
        return llm.evaluate(reference, **options)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the formats and print the table."""
    parser = new_parser("quantization", __doc__)
    add_demo_model(parser)
    add_json(parser)
    parser.add_argument(
        "--formats",
        type=partial(chosen_rows, rows=FORMATS),
        default=list(FORMATS),
        help='such as "int8;int4-rtn" (default: all)',
    )
    parser.add_argument("--windows", type=int, default=32, help="windows of 512 tokens (default: %(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="another text than the package's")
    parser.add_argument(
        "--calibration-samples", type=int, default=QuantConfig().num_calibration_samples, help="default: %(default)s"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--skip-speed", action="store_true", help="do not measure tokens/s")
    arguments = parser.parse_args(argv)
    arguments.model = arguments.model or find_demo_model()
    options = {
        "text": None if arguments.text is None else arguments.text.read_text(encoding="utf-8"),
        "windows": arguments.windows,
        "measure_speed": not arguments.skip_speed,
        "progress": True,
    }
    config = ModelConfig(arguments.model, dtype="bfloat16", num_threads=arguments.threads)
    reports: dict[str, QualityReport] = {}
    with LLM(config) as reference:
        for name in arguments.formats:
            if name == REFERENCE:
                reports[name] = reference.evaluate(**options)
            else:
                changed = replace(config, **FORMATS[name])
                changed.quant_config = replace(
                    changed.quant_config, num_calibration_samples=arguments.calibration_samples
                )
                reports[name] = evaluate(changed, reference, **options)
            append_record(arguments, "quantization", reports[name].to_json(), format=name)
            print(f"{name}: {reports[name].model.description}", file=sys.stderr, flush=True)
    last = reports[arguments.formats[-1]]
    print(
        f"{last.num_windows} windows of {last.window_tokens} tokens; {arguments.threads} threads, {machine()['cpu']}\n"
    )
    print(table(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
