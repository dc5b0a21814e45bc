"""Quality of formats on one device is set beside that on another, if both were measured alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import quantization
from benchmarks.quantization import Row, comparison, differing
from llmengine import QualityReport
from llmengine.quantization.quality_report import ModelFigures


def make_row(perplexity: float, num_samples: int | None = None, num_windows: int = 32) -> Row:
    figures = ModelFigures("a model", "none", perplexity, 1000, 1000, 10, {})
    report = QualityReport("built-in", "abc", 512, 512, num_windows, 1000, figures, figures, 0.99, 0.0015)
    return Row(report, num_samples)


def write_row(path: Path, name: str, row: Row, device: str) -> None:
    record = {
        "benchmark": "quantization",
        "machine": {"cpu": "some CPU", "gpu": "some GPU"},
        "arguments": {"device": device, "threads": 2},
        "format": name,
        "num_samples": row.num_samples,
        "results": row.report.to_json(),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def test_perplexities_are_compared_format_by_format() -> None:
    rows = {"int8": make_row(35.40), "fp8": make_row(36.0), "mxfp4": make_row(51.0)}
    others = {"int8": make_row(35.35), "fp8": make_row(35.9), "w8a8": make_row(36.0)}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in comparison(rows, others).splitlines()]
    assert cells[2:] == [
        ["int8", "35.400", "35.350", "+0.141%", "0.00150", "0.00150"],
        ["fp8", "36.000", "35.900", "+0.279%", "0.00150", "0.00150"],
    ]
    assert differing(rows, others) == ["fp8"]
    assert differing({"int8": make_row(float("nan"))}, others) == ["int8"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_row(35.0, num_windows=8), "int4-gptq g128: .*other windows"),
        (make_row(35.0, num_samples=128), "int4-gptq g128: .*same --calibration-samples: 32 samples, not 128"),
        (Row(replace(make_row(35.0).report, text_sha256="def"), 32), "another text"),
    ],
)
def test_only_what_was_measured_alike_is_compared(other: Row, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        comparison({"int4-gptq g128": make_row(35.0, num_samples=32)}, {"int4-gptq g128": other})


def test_a_comparison_needs_a_format_of_both() -> None:
    with pytest.raises(SystemExit, match="none of these formats"):
        comparison({"int8": make_row(35.0)}, {"fp8": make_row(35.0)})


def test_a_report_of_a_gpu_beside_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu, more, cpu = (tmp_path / name for name in ("gpu.jsonl", "more.jsonl", "cpu.jsonl"))
    write_row(gpu, "int8", make_row(35.40), "cuda")
    write_row(more, "bfloat16", make_row(35.32), "cuda")
    for name, perplexity in (("int8", 35.0), ("bfloat16", 35.32)):
        write_row(cpu, name, make_row(perplexity), "cpu")
    assert quantization.main(["--report", str(gpu), str(more)]) == 0
    printed = capsys.readouterr().out
    assert "32 windows of 512 tokens; some GPU" in printed
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][1:] == [
        *("bfloat16", "int8")
    ]
    assert quantization.main(["--report", str(gpu), str(more), "--compare", str(cpu)]) == 1
    printed = capsys.readouterr().out
    assert "compared with some CPU, 2 threads" in printed
    assert printed.endswith("more than 0.2% apart: int8\n")
