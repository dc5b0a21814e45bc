"""The other loads of the benchmarks run on a tiny shape and say what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import scenarios
from benchmarks.serving import Arrivals


def test_gaps_count_from_the_last_first_output_on() -> None:
    arrivals = [Arrivals(0.0, [1.0, 2.0, 4.0, 7.0], 4), Arrivals(0.0, [3.5, 4.0], 2)]
    assert scenarios.gaps_while_all_run(arrivals) == [3.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "figure"),
    [
        (["mixed", "--requests", "6"], "output_tokens_per_s"),
        (["long", "--streams", "2"], "prompt_tokens_per_s"),
        (["arriving", "--streams", "2"], "itl_p99_ms"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_scenario_runs(arguments: list[str], figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "out.jsonl"
    scenarios.main([*arguments, "--shape", "tiny", "--device", "cpu", "--scale", "64", "--json", str(lines)])
    record = json.loads(lines.read_text())
    assert record["results"][figure] > 0
    assert figure in capsys.readouterr().out
