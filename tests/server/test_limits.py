"""Who is let in, and what a hostile client cannot do: keys, sizes, times and numbers, on real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from llmengine.config import SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.server import ServerConfig, protocol
from tests.engine.helpers import StepGate
from tests.server.helpers import (
    WAIT_S,
    RunningServer,
    eventually,
    fake_llm,
    read_all,
    request_bytes,
    scripted,
    serving_llm,
)

CHAT: Any = {"messages": [{"role": "user", "content": "Hi"}]}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    config = ServerConfig(api_keys={"one": None, "two": "team"}, max_body_bytes=1000)
    with serving_llm(fake_llm(scripted("Hello")), config) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_paths_and_methods_that_there_are_not(server: RunningServer) -> None:
    headers = bearer("one")
    answer = server.get("/chat/completions", headers=headers)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"].startswith("there is no '/chat/completions' here; OpenAI's paths begin")
    answer = server.get(PATH, headers=headers)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == f"'{PATH}' takes POST, not GET"
    answer = server.request("HEAD", "/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_keys(server: RunningServer) -> None:
    for key in ("one", "two"):
        assert server.post(PATH, CHAT, headers=bearer(key)).status_code == 200
        assert server.post(PATH, CHAT, headers={"x-api-key": key}).status_code == 200
    for headers in ({}, bearer("three"), bearer("on"), {"authorization": "Bearer"}, {"authorization": "Basic one"}):
        answer = server.post(PATH, CHAT, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.post("/nowhere", {}).status_code == 401, "strangers do not learn which paths there are"
    assert server.get("/health").json() == {"state": "ready"}
    with server.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_keys_that_are_not_ascii_are_just_wrong(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(request_bytes(PATH, CHAT, headers="authorization: Bearer \xfc\xff\r\nconnection: close\r\n"))
        assert read_all(connection).startswith(b"HTTP/1.1 401 ")


def test_tenants_come_from_keys_and_from_a_trusted_header() -> None:
    gate = StepGate()
    config = ServerConfig(api_keys={"one": None, "two": "team"}, tenant_header="x-tenant")
    llm = fake_llm(scripted("Hello"), on_step=gate)
    with serving_llm(llm, config) as server, httpx.Client(base_url=server.url, timeout=WAIT_S) as client:
        streams = []
        for headers in ({}, {"x-tenant": "other"}):
            for key in ("one", "two"):
                body = {**CHAT, "stream": True}
                request = client.build_request("POST", PATH, json=body, headers={**bearer(key), **headers})
                connection = server.connect()
                head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items() if name[:1] in "ax")
                connection.sendall(request_bytes(PATH, body, headers=head + "connection: close\r\n"))
                streams.append(connection)
        eventually(lambda: len(llm.requests()) == 4)
        found = [stats.tenant for stats in llm.requests()]
        gate.open()
        for connection in streams:
            assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            connection.close()
    assert sorted(map(str, found)) == ["None", "other", "team", "team"]


def test_large_bodies_are_refused_unread(server: RunningServer) -> None:
    body = {**CHAT, "user": "x" * 1000}
    assert server.post(PATH, body, headers=bearer("one")).status_code == 413
    chunks = iter([json.dumps(body).encode()])  # without a content-length
    answer = server.request("POST", PATH, content=chunks, headers=bearer("one"))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the body exceeds 1000 bytes (max_body_bytes)"


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    config = ServerConfig(body_timeout_s=0.1)
    with serving_llm(fake_llm(scripted("Hello")), config) as server, server.connect() as connection:
        connection.sendall(request_bytes(PATH, CHAT)[:-5])
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_heads_have_limits(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        received = b""
        try:
            for number in range(100):
                connection.sendall(b"x-%d: %s\r\n" % (number, b"y" * 8192))
            received = read_all(connection)
        except ConnectionError:
            pass  # the server had closed before it was sent everything
        assert received in (b"",) or received.startswith(b"HTTP/1.1 431 ")
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.1)
    for begin in (b"", b"GET /hea"):
        with server.connect() as connection:
            connection.sendall(begin)
            assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_more_requests_than_allowed_are_told_to_wait() -> None:
    gate = StepGate()
    config = ServerConfig(max_concurrent_requests=1)
    with serving_llm(fake_llm(scripted("Hello"), on_step=gate), config) as server, server.connect() as first:
        first.sendall(request_bytes(PATH, CHAT, headers="connection: close\r\n"))
        gate.wait()
        answer = server.post(PATH, CHAT)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert "max_concurrent_requests" in answer.json()["error"]["message"]
        assert server.get("/health").status_code == 200
        gate.open()
        assert read_all(first).startswith(b"HTTP/1.1 200 ")
        assert server.post(PATH, CHAT).status_code == 200


def test_a_full_queue_is_told_to_wait() -> None:
    gate = StepGate()
    scheduler = SchedulerConfig(max_batch_size=1, max_queued_requests=1)
    llm = fake_llm(scripted("Hello"), on_step=gate, scheduler_config=scheduler)
    with serving_llm(llm) as server, server.connect() as first, server.connect() as second:
        first.sendall(request_bytes(PATH, CHAT))
        gate.wait()
        second.sendall(request_bytes(PATH, CHAT))
        eventually(lambda: llm.stats().num_queued == 1)
        for streaming in (False, True):
            answer = server.post(PATH, {**CHAT, "stream": streaming})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1"), answer.text
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        gate.open()


def test_web_pages_are_let_in_only_if_asked(server: RunningServer) -> None:
    headers = {"origin": "https://example.com", **bearer("one")}
    assert "access-control-allow-origin" not in server.post(PATH, CHAT, headers=headers).headers
    config = ServerConfig(api_keys=["one"], cors_origins=["https://example.com"])
    with serving_llm(fake_llm(scripted("Hello")), config) as open_server:
        answer = open_server.post(PATH, CHAT, headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.com"
        asking = {"origin": "https://example.com", "access-control-request-method": "POST"}
        assert open_server.request("OPTIONS", PATH, headers=asking).status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"api_keys": "secret"}, "api_keys must be"),
        ({"api_keys": [""]}, "each of api_keys"),
        ({"api_keys": ["schlüssel"]}, "each of api_keys"),
        ({"max_body_bytes": 0}, "max_body_bytes must be an integer of at least 1, not 0"),
        ({"request_timeout_s": 0}, "request_timeout_s must be"),
        ({"cors_origins": "*"}, "cors_origins must be"),
        ({"model_name": ""}, "model_name must be a non-empty string"),
    ],
)
def test_settings_are_checked(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServerConfig(**fields).resolve()
    assert "schlüssel" not in str(caught.value)
