"""Clients that leave, servers that stop, engines that die: what becomes of the requests, on real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.config import SchedulerConfig
from llmengine.server import ServerConfig, create_app
from tests.engine.helpers import StepGate
from tests.server.helpers import (
    RunningServer,
    eventually,
    fake_llm,
    read_all,
    request_bytes,
    scripted,
    serving,
    serving_llm,
)

PATH = "/v1/chat/completions"
ENDLESS: Any = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3000, "ignore_eos": True}
NUM_CLIENTS = 64


def letters(token_ids: Sequence[int]) -> int:
    return ord("a") + len(token_ids) % 26


def send(server: RunningServer, body: Any, path: str = PATH) -> socket.socket:
    """A connection on which a request was sent."""
    connection = server.connect()
    connection.sendall(request_bytes(path, body, headers="connection: close\r\n"))
    return connection


def read_begin(connection: socket.socket) -> bytes:
    """What a stream sends until its first event is there."""
    received = b""
    while b"data: " not in received:
        data = connection.recv(4096)
        assert data, received
        received += data
    return received


def let_server_notice(server: RunningServer) -> None:
    """Return once the server's event loop has handled what happened to other connections before."""
    for _ in range(3):
        assert server.get("/health").status_code in (200, 503)


def test_half_of_64_clients_leave_and_free_their_blocks_within_a_step() -> None:
    gate = StepGate()
    llm = fake_llm(letters, on_step=gate, backend={"num_blocks": NUM_CLIENTS * 20})
    with serving_llm(llm) as server, ExitStack() as stack:
        stack.callback(gate.open)
        kinds: list[dict[str, Any]] = [{"stream": True}, {"stream": True, "n": 1}, {"stream": False}, {"stream": True}]
        connections = [
            stack.enter_context(send(server, {**ENDLESS, **kinds[number % 4]})) for number in range(NUM_CLIENTS)
        ]
        gate.wait()
        # None may end before the last has come, however long the server takes to read and tokenize them all.
        eventually(lambda: sum(stats.num_prompt_tokens > 0 for stats in llm.requests()) == NUM_CLIENTS)
        while len(gate.batches[-1].rows) < NUM_CLIENTS:
            gate.step()
            time.sleep(0.01)
        gate.step()
        for number, connection in enumerate(connections):
            if kinds[number % 4]["stream"]:
                read_begin(connection)
        used = llm.stats().num_used_blocks
        leaving = [connection for number, connection in enumerate(connections) if number % 4 in (0, 2)]
        for connection in leaving:
            connection.close()
        let_server_notice(server)
        gate.step()
        assert len(gate.batches[-1].rows) == NUM_CLIENTS - len(leaving) == NUM_CLIENTS // 2
        assert llm.stats().num_used_blocks <= used // 2 + NUM_CLIENTS // 2, "each of the others may have taken a block"
        for connection in connections:
            connection.close()
        let_server_notice(server)
        gate.open()
        eventually(lambda: llm.stats().num_used_blocks == 0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_client_that_leaves_while_it_is_queued_is_forgotten(streaming: bool) -> None:
    gate = StepGate()
    llm = fake_llm(letters, on_step=gate, scheduler_config=SchedulerConfig(max_batch_size=1))
    with serving_llm(llm) as server, ExitStack() as stack:
        stack.callback(gate.open)
        stack.enter_context(send(server, ENDLESS))
        gate.wait()
        second = send(server, {**ENDLESS, "stream": streaming})
        eventually(lambda: llm.stats().num_queued == 1)
        second.close()
        let_server_notice(server)
        gate.step()
        eventually(lambda: llm.stats().num_queued == 0)
        assert len(llm.requests()) == 1


def test_one_of_two_pipelined_requests_is_running_when_the_client_leaves() -> None:
    gate = StepGate()
    llm = fake_llm(letters, on_step=gate)
    with serving_llm(llm) as server, ExitStack() as stack:
        stack.callback(gate.open)
        connection = server.connect()
        connection.sendall(request_bytes(PATH, ENDLESS) + request_bytes(PATH, ENDLESS))
        gate.wait()
        connection.close()
        let_server_notice(server)
        gate.let_go()
        eventually(lambda: llm.stats().num_used_blocks == 0)
        eventually(lambda: not llm.requests())


@pytest.mark.parametrize("streaming", [False, True])
def test_all_prompts_of_a_completion_end_with_their_client(streaming: bool) -> None:
    gate = StepGate()
    llm = fake_llm(letters, on_step=gate)
    body = {"prompt": ["a", "b", "c"], "max_tokens": 3000, "ignore_eos": True, "stream": streaming}
    with serving_llm(llm) as server, ExitStack() as stack:
        stack.callback(gate.open)
        connection = send(server, body, "/v1/completions")
        gate.wait()
        eventually(lambda: len(llm.requests()) == 3)
        connection.close()
        let_server_notice(server)
        gate.open()
        eventually(lambda: not llm.requests())


class FailingStep:
    """An `on_step` that raises in the third step."""

    def __init__(self) -> None:
        self.num_steps = 0

    def __call__(self, batch: Batch) -> None:
        self.num_steps += 1
        if self.num_steps == 3:
            raise RuntimeError("the device is on fire")


def test_a_dead_engine_ends_streams_with_an_error_and_is_unhealthy() -> None:
    with serving_llm(fake_llm(letters, on_step=FailingStep())) as server, server.client() as client:
        with pytest.raises(openai.APIError, match="on fire"):
            list(
                client.chat.completions.create(
                    model="default", stream=True, messages=ENDLESS["messages"], extra_body={"ignore_eos": True}
                )
            )
        assert server.get("/health").status_code == 503
        for streaming in (False, True):
            answer = server.post(PATH, {**ENDLESS, "stream": streaming})
            assert answer.status_code == 503
            assert answer.json()["error"]["type"] == "server_error"
            assert answer.json()["error"]["code"] == "engine_dead"


def test_the_error_event_is_the_last_but_one() -> None:
    with (
        serving_llm(fake_llm(letters, on_step=FailingStep())) as server,
        send(server, {**ENDLESS, "stream": True}) as connection,
    ):
        events = [line[6:] for line in read_all(connection).split(b"\n") if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "engine_dead"
    assert all("choices" in json.loads(event) for event in events[:-2])


def test_a_closed_engine_is_unavailable() -> None:
    llm = fake_llm(letters)
    with serving_llm(llm) as server:
        llm.close()
        answer = server.post(PATH, ENDLESS)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert server.get("/health").json() == {"state": "closed"}


@pytest.mark.parametrize("streaming", [False, True])
def test_requests_have_a_deadline(streaming: bool) -> None:
    config = ServerConfig(request_timeout_s=0.02)  # far less than 3000 steps take
    with serving_llm(fake_llm(letters), config) as server:
        answer = server.post(PATH, {**ENDLESS, "stream": streaming})
        assert "request_timeout_s" in answer.text
        assert answer.status_code == 504 or (streaming and answer.text.endswith("data: [DONE]\n\n"))


def test_shutting_down_waits_for_requests_and_closes_the_model_that_it_loaded() -> None:
    gate = StepGate()
    llm = fake_llm(scripted("Hello"), on_step=gate)

    async def load() -> LLM:
        return llm

    app = create_app(load, ServerConfig(drain_s=20))
    with ExitStack() as stack:
        server = stack.enter_context(serving(app))
        connection = stack.enter_context(send(server, {**ENDLESS, "stream": True, "max_tokens": 4}))
        gate.wait()
        server.stop()
        gate.open()
        assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert llm.health().state == "closed"


def test_the_application_can_be_mounted() -> None:
    parent = FastAPI()
    with fake_llm(scripted("Hello")) as llm:
        parent.mount("/llm", create_app(llm, ServerConfig(api_keys=["key"])))
        with serving(parent) as server:
            assert server.get("/llm/health").status_code == 200
            assert server.get("/llm/v1/models").status_code == 401
            with server.client(base_url=f"{server.url}/llm/v1", api_key="key") as client:
                assert [model.id for model in client.models.list()] == ["default"]
                answer = client.chat.completions.create(model="default", messages=ENDLESS["messages"])
                assert answer.choices[0].message.content == "Hello"
        assert llm.health().ok, "the model is the caller's"
