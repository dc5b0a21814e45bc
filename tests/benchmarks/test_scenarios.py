"""The benchmarks' other loads run on a tiny shape and report what they measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scenarios, startup
from benchmarks.serving import Arrivals


def test_gaps_count_from_the_last_first_output_on() -> None:
    arrivals = [Arrivals(0.0, [1.0, 2.0, 4.0, 7.0], 4), Arrivals(0.0, [3.5, 4.0], 2)]
    assert scenarios.gaps_while_all_run(arrivals) == [3.0, 0.5]


def test_streams_that_never_ran_together_are_no_figure() -> None:
    arrivals = [Arrivals(0.0, [1.0, 2.0], 2), Arrivals(0.0, [2.5], 1)]
    with pytest.raises(SystemExit, match="smaller --scale"):
        scenarios.gaps_while_all_run(arrivals)


@pytest.mark.parametrize(
    ("arguments", "figure"),
    [
        (["mixed", "--requests", "6", "--scale", "64"], "output_tokens_per_s"),
        (["long", "--streams", "2", "--scale", "2"], "prompt_tokens_per_s"),
        (["arriving", "--streams", "2", "--scale", "2"], "itl_p99_ms"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_scenario_runs(arguments: list[str], figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "out.jsonl"
    scenarios.main([*arguments, "--shape", "tiny", "--device", "cpu", "--json", str(lines)])
    record = json.loads(lines.read_text())
    assert record["results"][figure] > 0
    assert figure in capsys.readouterr().out


def test_startup_of_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "out.jsonl"
    startup.main(["--shape", "tiny", "--device", "cpu", "--json", str(lines)])
    figures = json.loads(lines.read_text())["results"]
    assert 0 < figures["ready_s"] <= figures["first_token_s"]
    assert "first_token_s" in capsys.readouterr().out


def test_a_process_that_fails_to_start_is_no_figure(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="printed '' instead of 'ready'"):
        startup.measure({"model_dir": str(tmp_path / "nothing"), "device": "cpu"}, tmp_path)
