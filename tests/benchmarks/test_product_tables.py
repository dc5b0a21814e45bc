"""Tables of products are made from the fastest right result of each, measured now or earlier."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import bench_packed
from benchmarks.kernels.product_tables import LAYER, Result, fastest, layer_speed, tables
from benchmarks.report import append_record
from llmengine.kernels.gemm_config import parse_config


def make_result(weight_format: str, product: str, us: float, config: str = "cublas0m1", rows: int = 1) -> Result:
    return Result("8b", weight_format, product, rows, config, us, 50_000_000, 1e9 * rows, 0.001, is_right=True)


def cells_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_fastest_right_result_counts() -> None:
    wrong = make_result("fp8", "o", 1.0)
    wrong = Result(**{**asdict(wrong), "is_right": False, "error": None})
    best = fastest([make_result("fp8", "o", 30.0), make_result("fp8", "o", 20.0, "packed-m8n64w4s4"), wrong])
    assert {key: (one.us, one.config) for key, one in best.items()} == {("fp8", "o", 1): (20.0, "packed-m8n64w4s4")}
    assert tables([wrong]).endswith("WRONG: 8b fp8 o M=1 cublas0m1")


def test_a_layer_is_the_sum_of_its_products() -> None:
    results = [make_result("bf16", product, 25.0) for product in LAYER]
    best = fastest([*results, make_result("bf16", "o", 10.0, rows=8)])
    layer = layer_speed(best, "bf16", 1)
    assert layer is not None
    assert layer.cells == ("100.0", "2.00", "40.0")
    assert layer_speed(best, "bf16", 8) is None


def test_tables_have_every_product_with_bf16_beside_it() -> None:
    results = [make_result("bf16", product, 25.0) for product in LAYER]
    results += [make_result("int4-128", product, 10.0, "packed-m8n64w4s4") for product in LAYER]
    results.append(make_result("int4-128", "o", 16.0, rows=64))
    rows = cells_of(tables(results))
    assert rows[0] == ["bf16", "M", "configuration", "error", "us", "TB/s", "TFLOP/s"]
    assert rows[5] == ["layer", "1", "", "", "100.0", "2.00", "40.0"]
    assert rows[7] == ["qkv", "1", "packed-m8n64w4s4", "1.0e-03", "10.0", "5.00", "100.0", "25.0", "2.50"]
    assert rows[9] == ["o", "64", "cublas0m1", "1.0e-03", "16.0", "3.12", "4,000.0", "", ""]
    assert rows[12] == ["layer", "1", "", "", "40.0", "5.00", "100.0", "100.0", "2.50"]
    assert rows[13:] == [
        ["8b layer: us / TB/s / TFLOP/s", "M=1", "M=64"],
        ["bf16", "100.0 / 2.00 / 40.0", ""],
        ["int4-128", "40.0 / 5.00 / 100.0", ""],
    ]


def test_records_of_earlier_runs_give_the_same_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    results = [make_result(name, product, 25.0) for name in ("bf16", "fp8") for product in LAYER]
    for result in results:
        path = first if result.weight_format == "bf16" else second
        arguments = Namespace(json=path, configs=[parse_config("packed-m8n64w4s4x2")])
        append_record(arguments, bench_packed.BENCHMARK, asdict(result))
    assert bench_packed.main(["--report", str(first), str(second)]) == 0
    assert capsys.readouterr().out == f"{tables(results)}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_products_are_measured_on_a_gpu() -> None:
    with pytest.raises(SystemExit, match="a GPU is needed"):
        bench_packed.main(["tiny"])
