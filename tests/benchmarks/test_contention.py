"""`benchmarks.contention` on a tiny model: it ends its busy loops and reports every contender and workload."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from benchmarks import contention
from tests.backends.helpers import save_tiny


def loops() -> list[psutil.Process]:
    """Busy loops that this process started."""
    return [child for child in psutil.Process().children() if "sched_setaffinity" in " ".join(child.cmdline())]


def stop_among_loops() -> None:
    with contention.busy_loops(2):
        assert len(loops()) == 2
        raise ValueError("stop")


def test_busy_loops_run_meanwhile_and_end_with_an_error() -> None:
    with pytest.raises(ValueError, match="stop"):
        stop_among_loops()
    assert loops() == []


def test_reports_every_contender_and_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path)
    lines = tmp_path / "lines.jsonl"
    arguments = ["--model", str(tmp_path), "--weights", "int8", "--loads", "1,prefill", "--runs", "1", "--loops", "1"]
    assert contention.main([*arguments, "--threads", "1", "--scale", "16", "--json", str(lines)]) in (0, 1)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["workload"] for record in records] == ["1", "prefill"]
    assert all(record["results"]["ratio"] > 0 for record in records)
    assert "| llmengine int8 |" in capsys.readouterr().out
    assert loops() == []


def test_unknown_workloads_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        contention.main(["--loads", "1,2"])
    assert "--loads must be among 1, 8, 16, prefill, not '2'" in capsys.readouterr().err
