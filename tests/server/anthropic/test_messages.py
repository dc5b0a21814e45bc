"""`/v1/messages` over a socket, read by Anthropic's own clients."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from pydantic import BaseModel

from llmengine import SchedulerConfig
from llmengine.server import ServerConfig
from tests.engine.helpers import StepGate
from tests.server.helpers import WAIT_S, RunningServer, eventually, fake_llm, scripted, serving_llm

ANSWER = "Hello, wörld!"
CONFIG = ServerConfig(model_name="fake", api_keys=["key"])
USER: Any = [{"role": "user", "content": "Hi"}]


def client_of(server: RunningServer, key: str = "key") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving_llm(fake_llm(scripted(ANSWER)), CONFIG) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_whole_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="fake", max_tokens=50, messages=USER, system="Be brief")
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    assert (text_of(message), message.stop_reason, message.stop_sequence) == (ANSWER, "end_turn", None)
    prompt = len("<system>Be brief\n<user>Hi\n<assistant>")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (prompt, 15)


def test_cached_tokens_are_not_counted_twice(client: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "long " * 20}]
    first, second = (client.messages.create(model="fake", max_tokens=5, messages=messages).usage for _ in range(2))
    cached = second.cache_read_input_tokens or 0
    assert cached > 50
    assert first.input_tokens + (first.cache_read_input_tokens or 0) == second.input_tokens + cached


def test_stream_has_events_in_order_and_adds_up(client: anthropic.Anthropic) -> None:
    with client.messages.create(model="fake", max_tokens=50, messages=USER, stream=True) as stream:
        events = list(stream)
    kinds = [event.type for event in events if event.type != "content_block_delta"]
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == ANSWER
    start, end = events[0], events[-2]
    assert start.type == "message_start"
    assert start.message.usage.input_tokens + (start.message.usage.cache_read_input_tokens or 0) == 20
    assert end.type == "message_delta"
    assert (end.delta.stop_reason, end.usage.output_tokens) == ("end_turn", 15)


def test_ping_follows_the_start(server: RunningServer) -> None:
    headers = {"x-api-key": "key", "anthropic-version": "2023-06-01"}
    body = {"model": "fake", "max_tokens": 5, "messages": USER, "stream": True}
    answer = httpx.post(f"{server.url}/v1/messages", json=body, headers=headers, timeout=WAIT_S)
    assert answer.headers["content-type"].startswith("text/event-stream")
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]


def test_helper_of_the_client_follows_the_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="fake", max_tokens=50, messages=USER) as stream:
        assert "".join(stream.text_stream) == ANSWER
        message = stream.get_final_message()
    assert (text_of(message), message.stop_reason) == (ANSWER, "end_turn")


async def test_async_client(server: RunningServer) -> None:
    async with anthropic.AsyncAnthropic(base_url=server.url, api_key="key", max_retries=0) as client:
        whole = await client.messages.create(model="fake", max_tokens=50, messages=USER)
        async with client.messages.stream(model="fake", max_tokens=50, messages=USER) as stream:
            streamed = await stream.get_final_message()
        count = await client.messages.count_tokens(model="fake", messages=USER)
    assert text_of(whole) == text_of(streamed) == ANSWER
    assert count.input_tokens == len("<user>Hi\n<assistant>")


def test_stop_sequence_is_cut_and_reported(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="fake", max_tokens=50, messages=USER, stop_sequences=["xyz", ", w"])
    assert (text_of(message), message.stop_reason, message.stop_sequence) == ("Hello", "stop_sequence", ", w")
    with client.messages.stream(model="fake", max_tokens=50, messages=USER, stop_sequences=[", w"]) as stream:
        message = stream.get_final_message()
    assert (text_of(message), message.stop_reason, message.stop_sequence) == ("Hello", "stop_sequence", ", w")


def test_limits_are_told_apart(client: anthropic.Anthropic) -> None:
    assert client.messages.create(model="fake", max_tokens=5, messages=USER).stop_reason == "max_tokens"
    long: Any = [{"role": "user", "content": "x" * 4070}]
    message = client.messages.create(model="fake", max_tokens=50, messages=long)
    assert message.stop_reason == "model_context_window_exceeded"


def test_answer_goes_on_from_its_beginning(server: RunningServer) -> None:
    with serving_llm(fake_llm(scripted(ANSWER)), CONFIG) as server, client_of(server) as client:
        messages: Any = [*USER, {"role": "assistant", "content": "Hello,"}]
        message = client.messages.create(model="fake", max_tokens=50, messages=messages)
        count = client.messages.count_tokens(model="fake", messages=messages)
    assert text_of(message) == " wörld!"
    assert count.input_tokens == len("<user>Hi\n<assistant>Hello,")


class Person(BaseModel):
    """A form for answers."""

    name: str


def test_answer_is_parsed_into_a_model() -> None:
    with serving_llm(fake_llm(scripted('{"name": "Ada"}')), CONFIG) as server, client_of(server) as client:
        message = client.messages.parse(model="fake", max_tokens=50, messages=USER, output_format=Person)
    assert message.parsed_output == Person(name="Ada")


def test_form_of_a_schema(client: anthropic.Anthropic) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": {"enum": ["Hello"]}}}
    message = client.messages.create(model="fake", max_tokens=50, messages=USER, output_config=config)
    assert text_of(message) == '"Hello"'


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "kind", "message"),
    [
        ({"nonsense": 1}, 400, "invalid_request_error", "field 'nonsense'"),
        ({"model": "claude"}, 404, "not_found_error", "the model 'claude' does not exist"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
            "type='image'",
        ),
        ({"temperature": -1}, 400, "invalid_request_error", "temperature"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "supported: custom"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 1024}},
            400,
            "invalid_request_error",
            "no switch for reasoning",
        ),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "invalid_request_error", "tokens"),
    ],
)
def test_mistakes(
    client: anthropic.Anthropic, fields: dict[str, Any], status: int, kind: str, message: str, stream: bool
) -> None:
    with pytest.raises(anthropic.APIStatusError) as caught:
        client.messages.create(model="fake", max_tokens=50, messages=USER, stream=stream, extra_body=fields)
    body: Any = caught.value.body
    assert caught.value.status_code == status
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert message in body["error"]["message"]


def test_keys_versions_and_paths(server: RunningServer, client: anthropic.Anthropic) -> None:
    with client_of(server, "wrong") as stranger, pytest.raises(anthropic.AuthenticationError) as caught:
        stranger.messages.create(model="fake", max_tokens=5, messages=USER)
    body: Any = caught.value.body
    assert body["error"]["type"] == "authentication_error"
    with pytest.raises(anthropic.BadRequestError, match="anthropic-version"):
        client.messages.create(
            model="fake", max_tokens=5, messages=USER, extra_headers={"anthropic-version": "2023-01-01"}
        )
    answer = httpx.get(f"{server.url}/v1/messages", headers={"x-api-key": "key"}, timeout=WAIT_S)
    assert (answer.status_code, answer.json()["type"]) == (405, "error")
    with_bearer = anthropic.Anthropic(base_url=server.url, auth_token="key", max_retries=0)
    with with_bearer as other:
        assert text_of(other.messages.create(model="fake", max_tokens=50, messages=USER)) == ANSWER


def test_thinking_that_cannot_be_switched_off_is_not_refused(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="fake", max_tokens=50, messages=USER, thinking={"type": "disabled"})
    assert text_of(message) == ANSWER


def test_request_that_takes_too_long() -> None:
    config = ServerConfig(model_name="fake", request_timeout_s=0.05)
    llm = fake_llm(lambda _: ord("a"), backend={"max_model_len": 32_768})
    with serving_llm(llm, config) as server, client_of(server) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(model="fake", max_tokens=30_000, messages=USER)
        body: Any = caught.value.body
        assert (caught.value.status_code, body["error"]["type"]) == (504, "timeout_error")


def test_full_queue_is_told_with_the_time_to_wait() -> None:
    go = threading.Event()
    begun = threading.Event()

    def wait(_: Any) -> None:
        begun.set()
        go.wait(WAIT_S)

    scheduler = SchedulerConfig(max_queued_requests=1, max_batch_size=1)
    llm = fake_llm(scripted("a"), on_step=wait, scheduler_config=scheduler)
    with serving_llm(llm, CONFIG) as server, client_of(server) as client:
        running = [llm.generate_async("<assistant>")]
        assert begun.wait(WAIT_S)
        running.append(llm.generate_async([97]))
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(model="fake", max_tokens=5, messages=USER)
        body: Any = caught.value.body
        assert body["error"]["type"] == "rate_limit_error"
        assert caught.value.response.headers["retry-after"]
        go.set()


def test_request_that_fails_in_its_stream() -> None:
    begun = threading.Event()
    num_chars = len("<user>Hi\n<assistant>") + 5

    def model(token_ids: Any) -> int | None:
        if len(token_ids) < num_chars:
            return ord("a")
        begun.wait(WAIT_S)
        return None

    with serving_llm(fake_llm(model), CONFIG) as server, client_of(server) as client:
        with client.messages.create(model="fake", max_tokens=50, messages=USER, stream=True) as stream:
            assert next(stream).type == "message_start"
            begun.set()
            with pytest.raises(anthropic.APIStatusError, match="not finite") as caught:
                list(stream)
        body: Any = caught.value.body
        assert body["error"]["type"] == "api_error"
        with pytest.raises(anthropic.InternalServerError, match="not finite"):
            client.messages.create(model="fake", max_tokens=50, messages=USER)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_blocks(stream: bool) -> None:
    gate = StepGate()  # so that the answer does not end before its client leaves
    with serving_llm(fake_llm(lambda _: ord("a"), on_step=gate), CONFIG) as server:
        gate.let_go()
        body = {"model": "fake", "max_tokens": 3000, "messages": USER, "stream": stream}
        with httpx.Client(base_url=server.url, headers={"x-api-key": "key"}, timeout=WAIT_S) as client:
            if stream:
                with client.stream("POST", "/v1/messages", json=body) as response:
                    assert next(response.iter_lines()) == "event: message_start"
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/messages", json=body, timeout=0.2)
        gate.open()
        stats = server.app.state.service.llm.stats
        eventually(lambda: stats().num_running == stats().num_used_blocks == 0)
