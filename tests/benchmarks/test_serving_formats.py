"""Formats are served one after the other, and tables are made from the records of all runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving, serving_formats
from benchmarks.serving_formats import FORMATS

TINY = ["--shape", "tiny", "--prompt-tokens", "8", "--output-tokens", "4", "--runs", "1", "--device", "cpu"]


def make_record(quant: str | None, concurrency: int, speed: float, kv_cache: str = "none") -> dict[str, Any]:
    arguments = {"shape": "8b", "model": None, "dtype": "bfloat16", "quant": quant, "kv_cache": kv_cache}
    arguments |= {"prompt_tokens": 128, "output_tokens": 128, "tokens_per_step": None, "deterministic": False}
    arguments["device"] = "auto"
    return {
        "benchmark": "serving",
        "machine": {"gpu": "some GPU", "cpu": "some CPU"},
        "arguments": arguments,
        "engine": {"weight_bytes": 3 << 29, "load_s": 4.25, "peak_host_bytes": 3 << 30, "kv_tokens": 12345},
        "concurrency": concurrency,
        "results": {"output_tokens_per_s": speed, "ttft_p50_ms": 7.0, "tpot_p50_ms": 2.5},
    }


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_tables_have_medians_of_every_format() -> None:
    records = [make_record("fp8", 1, speed) for speed in (100.0, 300.0, 220.0)]
    records += [make_record(None, 1, 200.0), make_record(None, 8, 1000.0), make_record("int4-awq", 8, 990.0, "fp8")]
    text = serving_formats.tables(records)
    speeds, latencies = rows_of(text)[:4], rows_of(text)[4:]
    sizes = ["1.50", "4.2", "3.0", "12,345"]
    assert speeds[0] == ["output tokens/s", "weights GiB", "load s", "host GiB", "KV tokens", "N=1", "N=8"]
    assert speeds[1:] == [
        ["unquantized", *sizes, "200", "1,000"],
        ["fp8", *sizes, "220", ""],
        ["int4-awq, fp8 KV", *sizes, "", "990"],
    ]
    assert latencies[1] == ["unquantized", "7.0 / 2.50", "7.0 / 2.50"]
    assert text.endswith("Slower than unquantized: int4-awq, fp8 KV at N=8 (99.0% of its speed).")


def test_other_machines_and_lengths_have_tables_of_their_own() -> None:
    here, elsewhere = make_record("fp8", 1, 100.0), make_record("fp8", 1, 500.0)
    longer, on_cpu = copy.deepcopy(here), copy.deepcopy(here)
    elsewhere["machine"]["gpu"] = "another GPU"
    longer["arguments"]["prompt_tokens"] = 1024
    on_cpu["arguments"]["device"] = "cpu"
    text = serving_formats.tables([here, elsewhere, longer, on_cpu])
    headings = [part for part in text.split("\n\n") if part[0] != "|"]
    assert headings == [
        "8b, dtype bfloat16, 128 -> 128 tokens, some GPU",
        "8b, dtype bfloat16, 128 -> 128 tokens, another GPU",
        "8b, dtype bfloat16, 1024 -> 128 tokens, some GPU",
        "8b, dtype bfloat16, 128 -> 128 tokens, some CPU",
    ]


def test_formats_run_in_parts_and_one_report_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    chosen = ["--formats", "unquantized;int4 g32", "--concurrency", "1,2"]
    assert serving_formats.main([*TINY, *chosen, "--json", str(first)]) == 0
    serving.main([*TINY, "--concurrency", "1", "--quant", "fp8", "--dtype", "bfloat16", "--json", str(second)])
    capsys.readouterr()
    assert serving_formats.main(["--report", str(first), str(second)]) == 0
    text = capsys.readouterr().out
    assert [row[0] for row in rows_of(text)[1:4]] == ["unquantized", "int4 g32", "fp8"]
    assert [bool(cell) for cell in rows_of(text)[3]] == [True] * 6 + [False]
    description = json.loads(first.read_text().splitlines()[-1])["engine"]["description"]
    assert "int4(group_size=32" in description


def test_a_format_that_fails_does_not_end_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = ["--model", str(tmp_path / "nothing"), *TINY[2:], "--formats", "unquantized;fp8"]
    assert serving_formats.main([*missing, "--json", str(tmp_path / "out.jsonl")]) == 1
    printed = capfd.readouterr().out
    assert "fp8 failed: ModelLoadError" in printed
    assert printed.endswith("without result: unquantized; fp8\n")


def test_nothing_begins_after_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_formats.main([*TINY, "--formats", "mxfp4", "--budget", "-1"]) == 1
    assert "mxfp4 was not measured: --budget -1 is spent" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "{", "[]\n", '{"benchmark": "offline"}\n'])
def test_a_report_needs_results(content: str, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"out\.jsonl: no "):
        serving_formats.main(["--report", str(path)])


def test_no_format_calibrates() -> None:
    from benchmarks.models import parse_quant

    configs = [parse_quant(quant).resolve() for quant, _ in FORMATS.values() if quant is not None]
    assert {config.method for config in configs} == {"rtn"}
