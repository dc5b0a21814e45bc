"""Shared by the server's tests: an application on a real socket, and models whose answers are known."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.server import ServerConfig, create_app
from llmengine.server.run import uvicorn_config
from llmengine.testing import ChatByteTokenizer, FakeBackend, NextToken

WAIT_S = 60.0
"""Bound of every wait: a hang fails."""


def scripted(answer: str, *, end: int = 257) -> NextToken:
    """A model whose answer to any chat is this text, one byte a token, and then the end token."""
    data = answer.encode()
    marker = b"<assistant>"

    def next_token(token_ids: Sequence[int]) -> int:
        text = bytes(token_id if token_id < 256 else 0 for token_id in token_ids)
        place = len(text) - text.rindex(marker) - len(marker)
        return data[place] if place < len(data) else end

    return next_token


def fake_llm(
    next_token: NextToken | None = None,
    *,
    on_step: Callable[[Batch], None] | None = None,
    backend: dict[str, Any] | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> LLM:
    """An `LLM` on a `FakeBackend` with a chat template, whose answers end at token 257."""
    size = {"num_blocks": 2049, "block_size": 16, "max_model_len": 4096, **(backend or {})}
    return LLM.from_backend(
        lambda: FakeBackend(next_token, on_step=on_step, **size),
        tokenizer=tokenizer or ChatByteTokenizer(),
        eos_token_ids=(257,),
        **options,
    )


@dataclass(frozen=True)
class RunningServer:
    """An application that uvicorn serves on a thread of its own; `stop` does what SIGTERM does."""

    app: FastAPI
    port: int
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        """The address, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, **settings: Any) -> openai.OpenAI:
        """OpenAI's own client of this server, which does not try again."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **settings})

    def request(self, method: str, path: str, **settings: Any) -> httpx.Response:
        """The answer to a request; httpx by itself would wait no longer than 5 s for it."""
        return httpx.request(method, self.url + path, timeout=WAIT_S, **settings)

    def get(self, path: str, **settings: Any) -> httpx.Response:
        """The answer to a GET."""
        return self.request("GET", path, **settings)

    def post(self, path: str, body: Any, **settings: Any) -> httpx.Response:
        """The answer to a POST with a JSON body."""
        return self.request("POST", path, json=body, **settings)

    def connect(self) -> socket.socket:
        """A new connection, with a bound on every wait."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)


class _ThreadServer(uvicorn.Server):
    """A server that says when it is ready, or that it failed."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.ready.set()


@contextmanager
def serving(app: FastAPI, **settings: Any) -> Iterator[RunningServer]:
    """Serve an application on a free port while the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        server = _ThreadServer(uvicorn_config(app, log_level="critical", **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            assert server.ready.wait(WAIT_S)
            assert server.started
            yield RunningServer(app, listener.getsockname()[1], lambda: setattr(server, "should_exit", True))
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive(), "the server did not stop"


def eventually(condition: Callable[[], bool]) -> None:
    """Return once something is so that other threads bring about; fails if it never is."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "it never came about"
        time.sleep(0.001)


def request_bytes(path: str, body: Any, *, method: str = "POST", headers: str = "") -> bytes:
    """An HTTP request as it is on the wire."""
    content = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n{headers}"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


@contextmanager
def serving_llm(llm: LLM, config: ServerConfig | None = None) -> Iterator[RunningServer]:
    """Serve a model, and close it afterwards."""
    with llm, serving(create_app(llm, config)) as server:
        yield server
