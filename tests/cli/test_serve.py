"""`llmengine serve`: a process that answers over HTTP, and finishes what it has begun when it is told to end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from benchmarks.ray_serve import free_port
from llmengine.cli.main import main
from llmengine.server.run import bound_sockets

WAIT_S = 60.0
"""Bound of every wait: a hang fails."""


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process of the command, and the port that it says it listens at."""
    command = [sys.executable, "-m", "llmengine", "serve", str(model), "--port", "0", *arguments]
    environment = {**os.environ, "LLMENGINE_API_KEY": "from-environment"}
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed) as process:
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
        (["no-such-model", "--port", "0"], 1, "no-such-model"),
        (["no-such-model", "--tenant-key", "team"], 2, "--tenant-key must be TENANT=KEY"),
        (["no-such-model", "--request-timeout", "0"], 2, "request_timeout_s"),
        (["no-such-model", "--max-stored-bytes", "-1", "--port", "0"], 2, "max_stored_bytes must be"),
        (["no-such-model", "--tool-format", "no-such-form"], 2, "tool_format must be one of"),
        (["no-such-model", "--kv-events-topic", "kv@here"], 2, "need --kv-events"),
        (["no-such-model", "--host", "no host"], 2, "cannot listen at no host, port 8000: "),
    ],
)
def test_faults_are_one_line(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("llmengine: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "argument --port: must be an integer in [0, 65535], not '65536'"),
        (["--port=-1"], "argument --port: must be an integer in [0, 65535], not '-1'"),
        (["--metric-names", "sglang"], "argument --metric-names: invalid choice"),
        (["--max-body-bytes", "0"], "argument --max-body-bytes: must be an integer of at least 1, not '0'"),
    ],
)
def test_wrong_options_end_the_program(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "no-such-model", *arguments])
    assert message in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"llmengine: cannot listen at 127.0.0.1, port {port}: Address already in use\n"


def test_a_host_with_two_addresses_has_one_free_port() -> None:
    with bound_sockets("localhost", 0) as sockets:
        assert len({bound.getsockname()[1] for bound in sockets}) == 1
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", sockets[0].getsockname()[1]))
    assert all(bound.fileno() == -1 for bound in sockets)


@pytest.mark.parametrize(
    ("arguments", "page_status", "prefixes"),
    [
        ([], 200, {"llmengine"}),
        (["--no-playground", "--metric-names", "both"], 404, {"llmengine", "vllm"}),
        (["--metric-names", "vllm"], 200, {"vllm"}),
    ],
)
def test_options_of_the_application(
    model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], page_status: int, prefixes: set[str]
) -> None:
    """The command with uvicorn replaced: the application that it would serve is asked in this process."""
    found: list[tuple[int, set[str]]] = []

    async def ask(app: Any) -> None:
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as it:
            scraped = (await it.get("/metrics")).text
            gauges = {"llmengine": "\nllmengine_requests_running{", "vllm": "\nvllm:num_requests_running{"}
            names = {prefix for prefix, gauge in gauges.items() if gauge in scraped}
            found.append(((await it.get("/")).status_code, names))

    def serve(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        asyncio.run(ask(server.config.app))

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    assert main(["serve", str(model), "--port", "0", *arguments]) == 0
    assert found == [(page_status, prefixes)]


def test_routers_can_follow_the_prefix_cache(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zmq = pytest.importorskip("zmq", reason="pyzmq is not installed")
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    received: list[bytes] = []

    def serve(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as past:
            past.rcvtimeo = int(WAIT_S * 1000)
            past.linger = 0
            past.connect(endpoint)
            while not received:  # the engine tells of its cache at some time after the publisher was made
                past.send_multipart([b"", bytes(8)])
                while (message := past.recv_multipart())[2]:
                    received.append(message[1])

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    options = ["--kv-events", "tcp://127.0.0.1:*", "--kv-events-replay", endpoint, "--kv-events-topic", "kv@here@tiny"]
    assert main(["serve", str(model), "--port", "0", *options]) == 0
    assert received[0] == bytes(8), "the number of the first message"
