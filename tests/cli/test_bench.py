"""`llmengine bench`, at an endpoint and in process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmengine.cli.main import main
from tests.load_test.fake_endpoint import FakeEndpoint, running_endpoint

QUICK = ["--output-tokens", "4", "--prompt-tokens", "60", "--requests", "3", "--warm-up", "1"]


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with running_endpoint() as endpoint:
        yield endpoint


def test_an_endpoint_is_reported_in_tables_and_plots(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "plot.png"
    options = ["--concurrency", "1,3", "--slo", "ttft:60000,e2e:60000", "--plot", str(plot)]
    assert main(["bench", "--base-url", endpoint.base_url(), *options, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"fake-1 at {endpoint.base_url()}, 60 -> 4 tokens\n")
    for text in (
        "1 client ",
        "3 clients ",
        "TTFT",
        "ITL",
        "TPOT",
        "end to end",
        "p99",
        "within objectives/s",
        "(100%)",
    ):
        assert text in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_json_has_every_figure(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rate", "500,600", "--arrivals", "constant", "--api", "completions", "--model", "fake-2", "--json"]
    assert main(["bench", "--base-url", endpoint.base_url(), "--ignore-eos", *options, *QUICK]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == f"fake-2 at {endpoint.base_url()}"
    assert [run["arrivals"] for run in report["runs"]] == ["500/s", "600/s"]
    for run in report["runs"]:
        assert (run["num_requests"], run["num_successful"], run["errors"]) == (3, 3, {})
        assert run["output_tokens"]["mean"] == 4
        assert run["ttft_ms"]["p50"] <= run["e2e_ms"]["max"]
    streamed = [body for body in endpoint.bodies if body.get("stream")]
    assert len(streamed) == 2 * (3 + 1)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in streamed)
    assert len({body["prompt"] for body in streamed}) == len(streamed)


def test_the_key_is_taken_from_the_environment(endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_API_KEY", "from-environment")
    assert main(["bench", "--base-url", endpoint.base_url(), "--concurrency", "1", *QUICK]) == 0
    assert endpoint.keys == {"bearer from-environment"}


def test_a_load_that_fails_entirely_is_a_failure(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}', "utf-8")
    arguments = ["--base-url", endpoint.base_url("busy"), "--prompts", str(prompts), "--concurrency", "2"]
    assert main(["bench", *arguments, *QUICK]) == 1
    assert "failed: 3 x HTTP 429: the queue is full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--base-url", "nowhere"], 2, "base_url must begin with http:// or https://, not 'nowhere'"),
        (["--library", "no-such-model"], 1, "no-such-model"),
        (["--library", "no-such-model", "--body", '{"a": 1}'], 2, "--library excludes --body"),
        (["--prompt-tokens", "10", "--shared-prefix", "10"], 2, "shared_prefix_tokens=10 leaves nothing"),
    ],
)
def test_what_cannot_run_is_one_line(
    endpoint: FakeEndpoint, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--base-url", endpoint.base_url(), *arguments]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--concurrency", "0"], ["--rate", "0"], ["--rate", "nan"], ["--rate", "1", "--concurrency", "1"]),
        *(["--prompt-tokens", "9-5"], ["--body", "[]"], ["--slo", "ttft"], ["--slo", "itl:3"], ["--warm-up", "-1"]),
    ],
)
def test_bad_arguments_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments])
    assert exit_info.value.code == 2
    assert "usage: llmengine bench" in capsys.readouterr().err


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_model_in_process_is_reported_the_same(model: Path, api: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--library", str(model), "--api", api, "--ignore-eos", "--concurrency", "2", "--json"]
    assert main(["bench", *options, *QUICK]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"] == f"{model}, in process"
    (run,) = report["runs"]
    assert (run["num_successful"], run["output_tokens"]["mean"]) == (3, 4)
    assert 50 <= run["prompt_tokens"]["mean"] <= 75
