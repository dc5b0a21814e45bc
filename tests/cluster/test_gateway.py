"""The Serve application without Serve: a gateway over engine replicas in this process, through real HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import pickle
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.server import ServerConfig
from tests.cluster.serve_helpers import make_replica
from tests.engine.helpers import StepGate
from tests.server.helpers import WAIT_S, RunningServer, eventually, fake_llm, scripted, serving

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python"),
    # Ray's, when it is imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

KEY, TEXT = "sesame", "All is well that ends well."
CHAT: dict[str, Any] = {"model": "default", "messages": [{"role": "user", "content": "How is it?"}]}
STREAM = {**CHAT, "stream": True}


def slow_step(batch: Batch) -> None:
    """Take about as long as a step of a model does."""
    time.sleep(0.01)


class FakeEngines:
    """Serve's handle of the engines, over replicas in this process. What passes is pickled, as between processes.

    Attributes:
        requests: paths that replicas have heard of.
        error: what Ray raises in place of an answer's next message, from that with the number `at` on.
    """

    def __init__(self, llms: list[LLM], config: ServerConfig) -> None:
        self.requests: list[str] = []
        self.error: Exception | None = None
        self.at = 0
        self._llms, self._config = llms, config
        self._replicas: dict[str, Any] = {}

    async def start(self) -> None:
        """Make the replicas."""
        for number, llm in enumerate(self._llms):
            self._replicas[f"r{number}"] = await make_replica(llm, self._config, f"r{number}")

    def options(self, *, stream: bool, method_name: str) -> FakeEngines:
        """See Serve's `DeploymentHandle`."""
        assert (stream, method_name) == (True, "answer")
        return self

    def remote(self, request: Any) -> FakeAnswer:
        """See Serve's `DeploymentHandle`; replicas take turns with what is not one's own."""
        turn = list(self._replicas)[len(self.requests) % len(self._replicas)]
        replica = self._replicas.get(request.keeper, self._replicas[turn])
        self.requests.append(request.scope["path"])
        return FakeAnswer(self._answer(replica, pickle.loads(pickle.dumps(request))))

    async def _answer(self, replica: Any, request: Any) -> AsyncGenerator[Any, None]:
        number = 0
        async for messages in replica.answer(request):
            for message in messages:
                if self.error is not None and number >= self.at:
                    raise self.error
                yield pickle.loads(pickle.dumps([message]))
                number += 1

    def broadcast(self, method_name: str) -> FakeEngines:
        """See Serve's `DeploymentHandle`."""
        assert method_name == "metrics"
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        """What replicas answer; after them one that does not."""
        return [*[await replica.metrics() for replica in self._replicas.values()], TimeoutError()]


class FakeAnswer:
    """Serve's streaming response."""

    def __init__(self, messages: AsyncGenerator[Any, None]) -> None:
        self._messages = messages

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages

    def cancel(self) -> None:
        """See Serve's `DeploymentResponseGenerator`."""
        self._closing = asyncio.get_running_loop().create_task(self._messages.aclose())


def gateway_app(engines: FakeEngines, config: ServerConfig) -> Callable[..., Coroutine[Any, Any, None]]:
    """What Serve makes of a gateway."""
    from llmengine.cluster.serve.gateway import Gateway

    gateway: Any = Gateway(engines, config)
    starting: list[asyncio.Task[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not starting:
            starting.append(asyncio.get_running_loop().create_task(engines.start()))
        await starting[0]
        response = await gateway(Request(scope, receive))
        await response(scope, receive, send)

    return app


@contextmanager
def application(
    config: Mapping[str, Any] = {}, **settings: Any
) -> Iterator[tuple[RunningServer, FakeEngines, list[LLM]]]:
    """A gateway over two fake engines behind uvicorn."""
    server_config = ServerConfig(**{"drain_s": 0.0, **config}).resolve()
    with fake_llm(scripted(TEXT), **settings) as one, fake_llm(scripted(TEXT), **settings) as other:
        engines = FakeEngines([one, other], server_config)
        with serving(gateway_app(engines, server_config), lifespan="off") as server:  # type: ignore[arg-type]
            yield server, engines, [one, other]


def test_answers_whole_and_streamed() -> None:
    with application() as (server, engines, _), server.client() as client:
        whole = client.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == TEXT
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**STREAM)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == TEXT
        assert chunks[-1].finish_reason == "stop"
        assert [model.id for model in client.models.list()] == ["default"]
        assert engines.requests == ["/v1/chat/completions"] * 2 + ["/v1/models"]


def test_what_is_refused_reaches_no_replica() -> None:
    with application({"api_keys": [KEY], "max_body_bytes": 2000}) as (server, engines, _):
        with server.client() as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with server.client(api_key=KEY) as client, pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(model="default", prompt="x" * 3000)
        assert refused.value.status_code == 413
        assert engines.requests == []
        assert httpx.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200


def test_responses_are_found_where_they_are_stored() -> None:
    with application() as (server, _, llms), server.client() as client:
        first = client.responses.create(model="default", input="How is it?")
        ids = [first.id]
        for _ in range(4):
            ids.append(client.responses.create(model="default", input="Go on.", previous_response_id=ids[-1]).id)
        assert [llm.stats().counters.num_generated_tokens for llm in llms] == [5 * (len(TEXT) + 1), 0]
        assert len(client.responses.input_items.list(ids[-1]).data) == 9
        assert client.responses.retrieve(first.id).output_text == TEXT
        waiting = client.responses.create(model="default", input="Take your time.", background=True)
        while waiting.status in ("queued", "in_progress"):
            waiting = client.responses.retrieve(waiting.id)
        assert waiting.output_text == TEXT
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_a_replica_that_dies_before_it_answers() -> None:
    from ray.exceptions import RayActorError

    with application() as (server, engines, _), server.client() as client:
        engines.error = RayActorError()
        for body in (CHAT, STREAM):
            with pytest.raises(openai.InternalServerError, match="replica that ran the request has died") as failed:
                client.chat.completions.create(**body)
            assert failed.value.status_code == 503
        engines.error = None
        assert client.chat.completions.create(**CHAT).choices[0].message.content == TEXT


def test_a_replica_that_dies_in_its_stream() -> None:
    from ray.exceptions import RayActorError

    gate = StepGate()
    with application(on_step=gate) as (server, engines, _), server.client() as client:
        gate.let_go()
        chunks = iter(client.chat.completions.create(**STREAM))
        text = ""
        while not text:
            text = next(chunks).choices[0].delta.content or ""
        engines.error = RayActorError()
        gate.open()
        with pytest.raises(openai.APIError, match="replica that ran the request has died"):
            list(chunks)
        assert TEXT.startswith(text)


def test_a_replica_that_dies_in_a_stream_of_messages() -> None:
    from ray.exceptions import RayActorError

    gate = StepGate()
    body = {"model": "default", "max_tokens": 50, "messages": CHAT["messages"], "stream": True}
    with application(on_step=gate) as (server, engines, _):
        gate.let_go()
        with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=WAIT_S) as answer:
            lines = answer.iter_lines()
            assert "event: message_start" in lines
            engines.error = RayActorError()
            gate.open()
            assert "event: error" in lines
            assert json.loads(next(lines).removeprefix("data: "))["error"]["type"] == "api_error"


def test_a_whole_answer_that_stays_incomplete_breaks_the_connection() -> None:
    from ray.exceptions import RayActorError

    with application() as (server, engines, _):
        engines.error, engines.at = RayActorError(), 1
        with pytest.raises(httpx.RemoteProtocolError):
            server.post("/v1/chat/completions", CHAT)


def test_without_a_replica_the_status_says_so() -> None:
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import DeploymentUnavailableError

    with application() as (server, engines, _):
        engines.error = DeploymentUnavailableError(DeploymentID("engine"))
        answer = server.post("/v1/chat/completions", CHAT)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "there is no replica"
        assert "retry-after" in answer.headers


def test_metrics_are_those_of_the_replicas_that_answer() -> None:
    with application() as (server, _, _), server.client() as client:
        client.chat.completions.create(**CHAT)
        lines = httpx.get(f"{server.url}/metrics", timeout=WAIT_S).text.splitlines()
        found = [line for line in lines if line.startswith("llmengine_generation_tokens_total{")]
        num_tokens = len(TEXT) + 1  # the end token is one
        assert sorted(line.partition('replica="')[2] for line in found) == [f'r0"}} {num_tokens}.0', 'r1"} 0.0']


async def test_a_request_that_serve_cancels_ends_in_the_engine() -> None:
    config = ServerConfig().resolve()
    with fake_llm(lambda token_ids: 97, on_step=slow_step) as llm:
        app = gateway_app(FakeEngines([llm], config), config)
        body = json.dumps({**STREAM, "max_tokens": 3000}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope: Scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}
        has_begun = asyncio.Event()

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                has_begun.set()

        request = asyncio.create_task(app({**scope, "query_string": b"", "raw_path": b""}, receive, send))
        async with asyncio.timeout(WAIT_S):
            await has_begun.wait()
        assert llm.stats().num_running == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await asyncio.to_thread(eventually, lambda: llm.stats().num_running == 0)
        assert llm.stats().counters.num_generated_tokens < 3000
