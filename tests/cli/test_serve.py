"""`llmengine serve`: a process that answers over HTTP, and finishes what it has begun when it is told to end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmengine.cli.main import main

WAIT_S = 60.0
"""Bound of every wait: a hang fails."""


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process of the command, and the port that it says it listens at."""
    command = [sys.executable, "-m", "llmengine", "serve", str(model), "--port", "0", *arguments]
    environment = {**os.environ, "LLMENGINE_API_KEY": "from-environment"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"running on http://127\.0\.0\.1:(\d+)", line):
                    yield process, int(found[1])
                    return
            pytest.fail("".join(lines))
        finally:
            process.kill()


def test_a_request_in_progress_is_finished_after_sigterm(model: Path) -> None:
    with serving(model, "--served-model-name", "tiny") as (process, port):
        url = f"http://127.0.0.1:{port}"
        headers = {"authorization": "Bearer from-environment"}
        assert httpx.get(f"{url}/v1/models", timeout=WAIT_S).status_code == 401
        models = httpx.get(f"{url}/v1/models", headers=headers, timeout=WAIT_S).json()
        assert [found["id"] for found in models["data"]] == ["tiny"]
        body: Any = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "ignore_eos": True}
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, headers=headers, timeout=WAIT_S
        ) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            events = [first, *filter(None, lines)]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(WAIT_S) == -signal.SIGTERM


@pytest.mark.slow
def test_the_model_is_named_after_its_file(model: Path) -> None:
    with serving(model, "--tenant-key", "team=a=b") as (process, port):
        headers = {"authorization": "Bearer a=b"}
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers=headers, timeout=WAIT_S).json()
        assert [found["id"] for found in models["data"]] == [model.name]
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) in (130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-model"], 1, "no-such-model"),
        (["no-such-model", "--tenant-key", "team"], 2, "--tenant-key must be TENANT=KEY"),
        (["no-such-model", "--request-timeout", "0"], 2, "request_timeout_s"),
    ],
)
def test_faults_are_one_line(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("llmengine: ")
    assert message in error
