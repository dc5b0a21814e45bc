"""Whatever a client sends, the server neither fails nor hangs: requests from its own schema, and raw bytes."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from llmengine.server import ServerConfig
from tests.server.helpers import RunningServer, fake_llm, read_all, request_bytes, serving_llm

CHAT: Any = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
WHOLE = request_bytes("/v1/chat/completions", CHAT)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    size = {"max_model_len": 64, "num_blocks": 257, "block_size": 16}
    config = ServerConfig(max_outputs=4, max_body_bytes=10_000, body_timeout_s=60)
    with serving_llm(fake_llm(lambda token_ids: 97 + len(token_ids) % 26, backend=size), config) as running:
        yield running
        assert running.get("/health").json() == {"state": "ready"}


@pytest.fixture(scope="module")
def cases(server: RunningServer) -> st.SearchStrategy[Any]:
    """Requests of all endpoints, those that their schema allows and those that it does not."""
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/health"} <= {operation.path for operation in operations}
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    made = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]
    return st.sampled_from(made).flatmap(lambda strategy: strategy)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_requests_made_from_the_schema_are_answered(
    server: RunningServer, cases: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    try:
        case = data.draw(cases)
    except Unsatisfiable:
        return  # an endpoint without parameters has no wrong ones
    answer = case.call(base_url=server.url, timeout=20)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


def exchange(server: RunningServer, data: bytes) -> bytes:
    """What the server answers to some bytes, after which the client sends nothing more."""
    with server.connect() as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)
        except ConnectionError:
            return b""


def assert_no_fault(received: bytes) -> None:
    for status in re.findall(rb"HTTP/1\.1 (\d+)", received):
        assert int(status) < 500, received


@st.composite
def damaged_requests(draw: st.DrawFn) -> bytes:
    """A request with parts cut out, doubled, replaced and swapped."""
    data = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), begin + draw(st.integers(1, 40)))
        data[begin:end] = draw(
            st.sampled_from([b"", bytes(data[begin:end]) * 2, b"\x00", b"\r\n", b"\r\n\r\n", b"\xff\xfe", b"0", b'"'])
            | st.binary(max_size=20)
        )
    return bytes(data)


@given(data=damaged_requests() | st.binary(max_size=300))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_requests_are_answered_or_dropped(server: RunningServer, data: bytes) -> None:
    assert_no_fault(exchange(server, data))


@given(cuts=st.lists(st.integers(1, len(WHOLE) - 1), max_size=6))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_may_arrive_in_any_pieces(server: RunningServer, cuts: list[int]) -> None:
    data = request_bytes("/v1/chat/completions", CHAT, headers="connection: close\r\n")
    edges = [0, *sorted(set(cuts)), len(data)]
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in itertools.pairwise(edges):
            connection.sendall(data[begin:end])
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    last = request_bytes("/v1/chat/completions", CHAT, headers="connection: close\r\n")
    bad = request_bytes("/v1/completions", {"prompt": 1})
    with server.connect() as connection:
        connection.sendall(WHOLE + bad + WHOLE + last)
        received = read_all(connection)
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"200", b"400", b"200", b"200"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"CONNECT example.com:80 HTTP/1.1\r\n\r\n",
        b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    ],
)
def test_odd_bytes(server: RunningServer, data: bytes) -> None:
    assert_no_fault(exchange(server, data))
