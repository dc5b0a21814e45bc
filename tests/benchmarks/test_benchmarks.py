"""The benchmarks run on tiny shapes, and their figures mean what their names say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all_reduce, formats, offline, quantization, report, sampling, serving, soak
from benchmarks.shapes import SHAPES, write_shape
from llmengine.engine.stats import EngineCounters, EngineStats


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama checkpoint of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = write_shape("tiny", tmp_path_factory.mktemp("tiny"))
    LlamaForCausalLM(LlamaConfig.from_pretrained(directory, dtype="float32")).save_pretrained(directory)
    return directory


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_percentile_interpolates_between_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert report.percentile(values, 0) == 1.0
    assert report.percentile(values, 50) == 2.5
    assert report.percentile(values, 100) == 4.0
    assert report.percentile(values, 99) == pytest.approx(3.97)
    assert report.percentile([7.0], 99) == 7.0
    assert math.isnan(report.percentile([], 50))
    with pytest.raises(ValueError, match=r"percent must be in \[0, 100\], not 101"):
        report.percentile(values, 101)


def test_median_of_runs_takes_each_figure_alone() -> None:
    runs = [{"a": 1.0, "b": 30.0}, {"a": 5.0, "b": 10.0}, {"a": 3.0, "b": 20.0}]
    assert report.median_of_runs(runs) == {"a": 3.0, "b": 20.0}


def test_json_lines_hold_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    report.append_json(path, {"a": [math.nan, 1.0], "path": tmp_path})
    report.append_json(None, {"a": 1})
    assert read_lines(path) == [{"a": [None, 1.0], "path": str(tmp_path)}]


def test_format_table_aligns() -> None:
    assert report.format_table(["a", "bb"], [["long", "1"]]).splitlines() == [
        "| a    | bb |",
        "|------|---:|",
        "| long |  1 |",
    ]


def make_stats(num_steps: int, num_rows: int, step_s: float, forward_s: float) -> EngineStats:
    counters = EngineCounters(num_steps=num_steps, num_rows=num_rows, step_s=step_s, forward_s=forward_s)
    return EngineStats(0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0.0, counters)


def test_serving_figures_of_known_arrivals() -> None:
    arrivals = [
        serving.Arrivals(sent=10.0, times=[10.1, 10.2, 10.4], num_tokens=3),
        serving.Arrivals(sent=10.0, times=[10.3, 10.5], num_tokens=5),
    ]
    figures = serving.summarize(arrivals, 2.0, make_stats(10, 10, 1.0, 1.0), make_stats(14, 18, 3.0, 2.5))
    assert figures["output_tokens_per_s"] == pytest.approx(4.0)
    assert figures["ttft_p50_ms"] == pytest.approx(200.0)
    assert figures["itl_p50_ms"] == pytest.approx(200.0)
    assert figures["tpot_p50_ms"] == pytest.approx((150.0 + 50.0) / 2)
    assert figures["mean_batch_size"] == pytest.approx(2.0)
    assert figures["step_overhead"] == pytest.approx(0.25)


def test_goals_are_judged_by_ratio() -> None:
    speeds = {
        "A": {"llmengine": 18.0, "llmengine int8": 17.0, "generate": 10.0},
        "B": {"llmengine": 20.0, "llmengine int8": 30.0, "generate": 10.0, "continuous": 10.0},
    }
    passed = {(v.workload, v.engine, v.peer): v.passed for v in offline.judge(speeds)}
    assert passed == {
        ("A", "llmengine", "generate"): True,
        ("A", "llmengine int8", "generate"): False,
        ("B", "llmengine", "generate"): True,
        ("B", "llmengine int8", "generate"): True,
        ("B", "llmengine", "continuous"): False,
        ("B", "llmengine int8", "continuous"): True,
    }


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_size_of_their_name(name: str, tmp_path: Path) -> None:
    from llmengine.checkpoints.opening import open_model
    from llmengine.models.arch import canonical_shapes

    arch = open_model(write_shape(name, tmp_path), "dummy").arch
    num_weights = sum(math.prod(shape) for shape in canonical_shapes(arch).values())
    millions = {
        "tiny": 0.1068,
        "135m": 134.5,
        "1b": 1235.8,
        "7b": 6738.4,
        "8b": 8030.3,
        "70b": 70553.7,
        "405b": 405853.4,
    }[name]
    assert num_weights / 1e6 == pytest.approx(millions, rel=2e-3)


def test_serving_runs_on_a_tiny_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    lengths = ["--prompt-tokens", "8", "--output-tokens", "4", "--runs", "2", "--requests", "4"]
    serving.main(["--shape", "tiny", "--concurrency", "1,3", *lengths, "--json", str(lines), "--plot", str(picture)])
    records = read_lines(lines)
    assert [(record["concurrency"], record["run"]) for record in records] == [(1, 0), (3, 0), (1, 1), (3, 1)]
    for record in records:
        assert {"cpu", "num_cores", "torch", "num_threads"} <= record["machine"].keys()
        assert record["arguments"]["shape"] == "tiny"
        assert record["engine"]["description"]
        assert record["results"]["num_output_tokens"] == 16
        assert record["results"]["output_tokens_per_s"] > 0
        assert record["results"]["ttft_p50_ms"] <= record["results"]["ttft_p99_ms"]
    assert picture.stat().st_size > 1000
    assert "output tok/s" in capsys.readouterr().out


@pytest.mark.slow
def test_offline_compares_with_transformers(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    arguments = ["--model", str(tiny_model), "--scale", "32", "--runs", "1", "--workloads", "A,B"]
    offline.main([*arguments, "--json", str(lines), "--plot", str(picture)])
    records = read_lines(lines)
    runs = {(r["workload"]["name"], r["contender"]): r["results"] for r in records if r["benchmark"] == "offline"}
    engines = {"llmengine", "llmengine int8"}
    assert set(runs) == {("A", name) for name in engines | {"generate"}} | {
        ("B", name) for name in engines | {"generate", "continuous"}
    }
    assert all(results["tokens_per_s"] > 0 for results in runs.values())
    assert {r["contender"] for r in records if r["benchmark"] == "overhead"} == engines
    assert "transformers continuous" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_quantization_has_a_row_for_each_chosen_format(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    directory = tmp_path / "model"
    shutil.copytree(tiny_model, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    lines = tmp_path / "out.jsonl"
    arguments = ["--model", str(directory), "--windows", "1", "--json", str(lines), "--threads", "1"]
    quantization.main([*arguments, "--formats", "mxfp4;bfloat16"])
    printed = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed if line.startswith("|")]
    assert [row[0] for row in (rows[0], *rows[2:])] == ["format", "bfloat16", "mxfp4"]
    for name, *cells in rows[2:]:
        assert [bool(cell) for cell in cells] == [True] * 3 + [name != quantization.REFERENCE] * 3 + [True] * 2
    assert [r["format"] for r in read_lines(lines)] == ["bfloat16", "mxfp4"]
    assert quantization.main(["--report", str(lines), "--compare", str(lines)]) == 0
    reported = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("|")] == [line for line in reported if line.startswith("|")][:4]
    assert [line.split("|")[4].strip() for line in reported if line.startswith("|")][6:] == ["+0.000%"] * 2
    with pytest.raises(SystemExit):
        quantization.main(["--formats", "int1"])
    assert "'int1' begins the name of no row: float32; bfloat16" in capsys.readouterr().err


def test_startup_measures_a_process_that_generates(tiny_model: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {"<unk>": 0, **{char: index for index, char in enumerate("Onceupatim ", 1)}}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")).save(str(tiny_model / "tokenizer.json"))
    assert 0.1 < offline.measure_startup(tiny_model, {}, threads=1) < 300


def test_the_peer_has_the_same_weights(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from benchmarks.transformers_peer import load_model

    original = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32").state_dict()
    loaded = load_model(tiny_model).state_dict()
    assert original.keys() == loaded.keys()
    assert all(torch.equal(original[name], loaded[name]) for name in original)


def test_soak_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, picture = tmp_path / "out.jsonl", tmp_path / "out.png"
    code = soak.main(["--fake", "--minutes", "0.03", "--clients", "20", "--json", str(lines), "--plot", str(picture)])
    assert code == 0, capsys.readouterr().out
    (record,) = read_lines(lines)
    assert record["results"]["num_used_blocks"] == 0
    assert record["results"]["violations"] == []
    assert sum(record["results"]["endings"].values()) >= 20
    assert picture.stat().st_size > 1000


def test_soak_finds_growing_memory() -> None:
    samples = [soak.Sample(float(second), 0, 0, 0, second * 2**20) for second in range(31)]
    of_rss, _ = soak.MEMORY["RSS"]
    assert soak.memory_growth(samples, of_rss) == (14.5 * 2**20, 25.0 * 2**20)


def test_formats_are_timed_side_by_side(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "out.jsonl"
    arguments = ["--model", str(tiny_model), "--scale", "32", "--runs", "2", "--workloads", "A,D", "--threads", "1"]
    assert formats.main([*arguments, "--formats", "int8, int8", "--json", str(lines)]) == 0
    runs = [(r["workload"]["name"], r["contender"], r["results"]["tokens_per_s"] > 0) for r in read_lines(lines)]
    assert runs == [(workload, "int8, int8 KV", True) for workload in ("A", "A", "D", "D")]
    assert "| int8, int8 KV |" in capsys.readouterr().out


@pytest.mark.parametrize("vocab", [2, 32, 299, 3000])
def test_the_sampler_is_measured_with_vocabularies_of_any_size(vocab: int, capsys: pytest.CaptureFixture[str]) -> None:
    sampling.main(["--rows", "2", "--vocab", str(vocab)])
    header, names, figures = capsys.readouterr().out.splitlines()
    assert f"vocabulary of {vocab}" in header
    assert names.split()[-1] == "everything"
    assert float(figures.split()[-1]) > 0.0


def test_sums_are_checked_and_timed_between_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    all_reduce.main(["--ranks", "2", "--device", "cpu", "--largest", "16384"])
    printed = capsys.readouterr().out
    assert "2 ranks, us a call" in printed
    assert "16 KiB" in printed
