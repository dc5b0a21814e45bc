"""The benchmark of the host's own cost: the null backend follows the protocol, and the figures mean what they say."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import host
from benchmarks.workloads import StreamingLoad
from llmengine.batch import Batch, BatchRow


def test_a_step_begins_when_its_predecessor_has_ended() -> None:
    backend = host.NullBackend(StreamingLoad(concurrency=1, num_requests=1), host.Device(step_s=0.01))
    for step in (1, 2):
        backend.launch(Batch(step, [BatchRow(0, step, 1, (), (), 1)]))
    assert [backend.collect().token_ids for _ in range(2)] == [{0: (1,)}, {0: (2,)}]
    assert backend.ended - backend.began == pytest.approx(0.02)


@pytest.mark.parametrize("busy_s", [0.0, 0.001])
def test_figures_of_one_run(busy_s: float) -> None:
    load = StreamingLoad(concurrency=3, num_requests=3, prompt_tokens=8, output_tokens=16, busy_s=busy_s)
    figures = host.run_once(load, host.Device(step_s=0.001))
    assert 0 < figures["tokens_per_s"] < 3 * 1000
    assert 0 < figures["steps_per_s"] <= 1001
    assert 0 <= figures["idle"] + 1e-6 < 1
    assert figures["us_per_token"] == pytest.approx(figures["engine_us_per_token"] + figures["loop_us_per_token"])
    assert figures["engine_us_per_token"] > 0
    assert figures["loop_us_per_token"] > 0
    assert 1 <= figures["batch"] <= 3
    assert 0 < figures["outputs_per_token"] <= 1


@pytest.mark.parametrize("text", ["0", "1,", "1,-8", "many"])
def test_a_bad_concurrency_is_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main([f"--concurrency={text}"])
    assert f"must be a list of integers >= 1 such as 1,8,64, not {text!r}" in capsys.readouterr().err


def test_prints_a_row_for_each_concurrency_and_profiles_both_threads(capsys: pytest.CaptureFixture[str]) -> None:
    interval = sys.getswitchinterval()
    try:
        host.main(["--concurrency", "1,4", "--output-tokens", "8", "--runs", "1", "--switch-ms", "1", "--profile"])
        assert sys.getswitchinterval() == pytest.approx(0.001)
    finally:
        sys.setswitchinterval(interval)
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (\d+) ", printed, re.MULTILINE) == ["1", "4"]
    for concurrency in (1, 4):
        assert f"engine thread, {concurrency} consumers" in printed
        assert f"consumers' loop, {concurrency} consumers" in printed
    assert printed.count(" function calls ") == 4


def test_metrics_have_a_row_beside_the_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    host.main(["--concurrency", "2", "--output-tokens", "4", "--runs", "1", "--metrics"])
    assert re.findall(r"^\| (\S.*?) +\|", capsys.readouterr().out, re.MULTILINE) == ["consumers", "2", "2 with metrics"]
