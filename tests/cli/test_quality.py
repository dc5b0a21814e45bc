"""`llmengine eval`, and building an engine whose quality is measured, checked and shown."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmengine import saved_engines
from llmengine.cli.main import main
from tests.terminal import interrupt

FEW = ["--windows", "2", "--window-tokens", "64"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def test_a_model_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, report = tmp_path / "own.txt", tmp_path / "report.json"
    text.write_text("It was a dark and stormy night. " * 20)
    assert main(["eval", str(model), *FEW, "--text", str(text), "--json", str(report)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        *("weights", "perplexity", "weights in memory", "weights in files", "KV cache", "KV cache a token"),
        *("tokens/s, 1 request", "tokens/s, 16 requests"),
    ]
    assert lines[-1] == "on 'own.txt': 2 windows of 64 tokens, stride 64, 126 tokens scored"
    values = json.loads(report.read_text())
    assert values["reference"] is None
    assert values["num_tokens"] == 126


def test_one_window_is_one_window(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), "--windows", "1", "--window-tokens", "2", "--skip-speed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["weights", "not", "quantized"]
    assert lines[-1] == "on the built-in text: 1 window of 2 tokens, stride 2, 1 token scored"


def test_quantized_beside_itself(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), *FEW, "--quant", "int8", "--skip-speed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "reference", "change"]
    assert lines[1].split() == ["weights", "int8", "not", "quantized"]
    assert lines[2].endswith("%")
    assert {line.partition("  ")[0] for line in lines} >= {"top-1 agreement", "KL divergence"}
    assert lines[-1].startswith("on the built-in text: 2 windows")


def test_the_kv_cache_alone_is_quantized(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), *FEW, "--kv-cache", "int8", "--skip-speed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["KV", "cache", "int8", "float32"] in [line.split() for line in lines]
    size = next(line for line in lines if line.startswith("KV cache a token"))
    assert -75 < float(size.split()[-1].removesuffix("%")) < -50


def test_against_another_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), *FEW, "--against", str(model), "--skip-speed"]) == 0
    printed = capsys.readouterr().out
    assert "100.00%" in printed
    assert "0.00000 nats" in printed


def test_build_keeps_the_report(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "engine"
    arguments = ["build", str(model), "-o", str(engine), "--quant", "int8", *FEW]
    assert main([*arguments, "--max-perplexity-increase", "0.5"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main([*arguments, "--max-perplexity-increase", "0.5", "--skip-speed"]) == 0
    built = capsys.readouterr().out.splitlines()
    assert not any("tokens/s" in line for line in built)
    assert built[-1].startswith(f"{engine}: ")
    assert main(["inspect", str(engine)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-len(built) + 1 :] == built[:-1]
    assert main(["inspect", str(engine), "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["quality"]
    assert quality["reference"]["weight_format"] == "none"
    assert saved_engines.verify(engine).sound
    assert main(["eval", str(engine), *FEW, "--skip-speed"]) == 0
    assert f"{quality['model']['perplexity']:.4f}" in capsys.readouterr().out


def test_an_altered_report_is_found_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = tmp_path / "engine"
    assert main(["build", str(model), "-o", str(engine), "--quant", "int8", *FEW]) == 0
    manifest = engine / "engine.json"
    manifest.write_text(manifest.read_text().replace('"num_windows": 2', '"num_windows": 3'))
    capsys.readouterr()
    assert main(["inspect", str(engine)]) == 1
    assert "altered after saving" in capsys.readouterr().err


def test_an_engine_without_a_report_has_no_key_for_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    assert main(["build", str(model), "-o", str(engine), "--quant", "int8", "--skip-evaluation"]) == 0
    assert "quality" not in json.loads((engine / "engine.json").read_text())
    capsys.readouterr()
    assert main(["inspect", str(engine)]) == 0
    assert "perplexity" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quant", "int8", "--sm", "89"], "--quant excludes --sm, which is about TensorRT plans"),
        (["--quant", "int8", "--max-batch-size", "4"], "--quant excludes --max-batch-size"),
        (["--quant", "int8", "--dummy"], "--quant excludes --dummy"),
        (["--tp", "2", "--weights", "inputs"], "--tp without --backend tensorrt excludes --weights, which is about"),
        (["--backend", "torch", "--sm", "89"], "--backend torch excludes --sm, which is about TensorRT plans"),
        (["--quant", "int8", "--backend", "tensorrt"], "--quant excludes --backend"),
        (["--max-perplexity-increase", "0.1"], "--max-perplexity-increase needs --quant"),
        (["--windows", "3"], "--windows needs --quant"),
        (["--skip-evaluation"], "--skip-evaluation needs --quant"),
        (["--quant", "int8", "--stride", "600"], "stride must be an integer in [1, 512], not 600"),
        (["--quant", "int8", "--max-perplexity-increase", "-1"], "quant_config.max_perplexity_increase must be"),
        (
            ["--quant", "int8", "--max-perplexity-increase", "1", "--skip-evaluation"],
            "--skip-evaluation excludes --max-perplexity-increase",
        ),
    ],
)
def test_arguments_that_exclude_each_other(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", "no-such-model", "-o", str(tmp_path / "engine"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_read_or_written(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(model), "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: cannot be read: No such file" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"abc\xff")
    assert main(["eval", str(model), "--text", str(tmp_path / "binary")]) == 2
    assert "binary: not UTF-8: invalid start byte at byte 3" in capsys.readouterr().err
    assert main(["eval", str(model), *FEW, "--skip-speed", "--json", str(tmp_path / "none" / "x")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--stride", "600"], 2, "stride must be an integer in [1, 512], not 600"),
        (["--window-tokens", "1"], 2, "window_tokens must be an integer of at least 2, not 1"),
        (["--against", "nowhere"], 1, "model_dir='nowhere' does not exist"),
        (["--json", "nowhere/report.json"], 2, "nowhere/report.json: cannot be written: No such file"),
    ],
)
def test_wrong_arguments_are_found_before_a_model_is_loaded(
    arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's directory is empty, which would be found next."""
    assert main(["eval", str(tmp_path), *arguments]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bar", "options"),
    [("evaluating", ["--quant", "int8", "--windows", "9999"]), ("calibrating", ["--quant", "int4-awq"])],
    ids=["evaluating", "calibrating"],
)
def test_ctrl_c_while_building_leaves_nothing(model: Path, tmp_path: Path, bar: str, options: list[str]) -> None:
    """Interrupted when the bar on the terminal has begun, with thousands of windows or texts to go."""
    target = tmp_path / "out" / "engine"
    target.parent.mkdir()
    arguments = ["build", str(model), "-o", str(target), *options, *FEW[2:]]
    ended = interrupt([sys.executable, "-m", "llmengine", *arguments], bar)
    assert ended.return_code == 130
    assert "Traceback" not in ended.shown
    assert ended.shown.rstrip().endswith("Interrupted.")
    assert ended.shows_cursor
    assert not list(target.parent.iterdir())
