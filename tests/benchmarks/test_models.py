"""The benchmarks' options choose a model and the format of its weights and of its KV cache."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from benchmarks import scenarios, serving, startup
from benchmarks.models import add_model_or_shape, add_quantization, parse_quant, quant_config
from llmengine import QuantConfig

BRIEF = ["--concurrency", "2", "--prompt-tokens", "8", "--output-tokens", "4", "--runs", "1", "--device", "cpu"]


def parse(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    add_model_or_shape(parser)
    add_quantization(parser)
    return parser.parse_args(arguments)


def test_a_preset_has_options() -> None:
    assert parse_quant("fp8-block") == QuantConfig.preset("fp8-block")
    changed = parse_quant("int4-rtn,group_size=64,symmetric=true,skip_layers=lm_head,skip_layers=*.down")
    skipped = ("lm_head", "*.down")
    assert changed == QuantConfig.preset("int4-rtn", group_size=64, symmetric=True, skip_layers=skipped)
    assert parse_quant("w8a8,method=rtn").method == "rtn"


def test_weights_and_kv_cache_are_chosen_apart() -> None:
    assert quant_config(parse("--shape", "tiny")) == QuantConfig()
    assert quant_config(parse("--shape", "tiny", "--kv-cache", "fp8")) == QuantConfig(kv_cache="fp8")
    both = quant_config(parse("--shape", "tiny", "--quant", "fp8", "--kv-cache", "int8"))
    assert both == QuantConfig.preset("fp8", kv_cache="int8")


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("int5", "quant must be one of 'stored', 'int8'"),
        ("int4-rtn,group_size=63", "group_size must be one of 16, 32, 64, 128, not 63"),
        ("fp8,kv_cache=fp8", "'kv_cache=fp8' is no option of a preset: name=value, with group_size, scales,"),
        ("int4-rtn,group_size", "'group_size' is no option of a preset"),
        ("mxfp4,method=awq", "method='awq' is not available with weights='mxfp4'"),
    ],
)
def test_a_wrong_format_is_a_usage_error(quant: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--shape", "tiny", "--quant", quant)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_random_weights_are_only_rounded() -> None:
    with pytest.raises(SystemExit, match=r"calibrates \(smoothquant\).*random weights.*--quant w8a8,method=rtn"):
        quant_config(parse("--shape", "tiny", "--quant", "w8a8"))
    with pytest.raises(SystemExit, match=r"--quant int4-gptq,group_size=64,method=rtn"):
        quant_config(parse("--shape", "tiny", "--quant", "int4-gptq,group_size=64"))
    assert quant_config(parse("--model", "somewhere", "--quant", "int4-gptq")) == QuantConfig.preset("int4-gptq")


def test_serving_runs_in_the_chosen_format(tmp_path: Path) -> None:
    lines = tmp_path / "out.jsonl"
    quant = ["--quant", "int4-rtn,group_size=32", "--kv-cache", "int8"]
    serving.main(["--shape", "tiny", *BRIEF, *quant, "--json", str(lines)])
    record = json.loads(lines.read_text())
    assert record["arguments"]["quant"] == "int4-rtn,group_size=32"
    assert "int4(group_size=32" in record["engine"]["description"]
    assert "KV cache in int8" in record["engine"]["description"]


def test_scenarios_run_in_the_chosen_format(tmp_path: Path) -> None:
    lines = tmp_path / "out.jsonl"
    load = ["mixed", "--requests", "4", "--scale", "64", "--shape", "tiny", "--device", "cpu"]
    scenarios.main([*load, "--quant", "fp8", "--json", str(lines)])
    assert "fp8" in json.loads(lines.read_text())["engine"]["description"]


def test_startup_quantizes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    startup.main(["--shape", "tiny", "--device", "cpu", "--quant", "mxfp4,skip_layers=lm_head"])
    assert "mxfp4 weights" in capfd.readouterr().err
