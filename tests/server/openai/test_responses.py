"""`/v1/responses` over a socket, read by OpenAI's own clients."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from llmengine import SchedulerConfig
from llmengine.server import ServerConfig
from tests.engine.helpers import StepGate
from tests.server.helpers import WAIT_S, RunningServer, eventually, fake_llm, scripted, serving_llm

ANSWER = "Hello, wörld!"
CONFIG = ServerConfig(model_name="fake", api_keys={"a": "tenant-a", "b": "tenant-b"})


def client_of(server: RunningServer, key: str = "a") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving_llm(fake_llm(scripted(ANSWER)), CONFIG) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def test_whole_response(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="fake", input="Hi", instructions="Be brief", temperature=0.5, metadata={"k": "v"}, max_output_tokens=50
    )
    assert (response.object, response.status, response.model) == ("response", "completed", "fake")
    assert response.output_text == ANSWER
    assert [item.type for item in response.output] == ["message"]
    assert (response.temperature, response.metadata, response.max_output_tokens) == (0.5, {"k": "v"}, 50)
    assert (response.instructions, response.error, response.incomplete_details) == ("Be brief", None, None)
    assert response.usage is not None
    prompt = len("<system>Be brief\n<user>Hi\n<assistant>")
    assert (response.usage.input_tokens, response.usage.output_tokens) == (prompt, 15)
    assert response.usage.total_tokens == prompt + 15
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_prompt_that_was_seen_before_is_cached(client: openai.OpenAI) -> None:
    usages = [client.responses.create(model="fake", input="long " * 20, store=False).usage for _ in range(2)]
    assert usages[1] is not None
    assert usages[1].input_tokens_details.cached_tokens > 50


def test_stream_has_typed_events_in_order_and_adds_up(client: openai.OpenAI) -> None:
    with client.responses.create(model="fake", input="Hi", stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == ANSWER
    assert all(deltas)
    final = events[-1]
    assert final.type == "response.completed"
    assert final.response.output_text == ANSWER
    assert final.response.usage is not None


def test_helper_of_the_client_follows_the_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake", input="Hi") as stream:
        response = stream.get_final_response()
    assert response.output_text == ANSWER


async def test_async_client(server: RunningServer) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="a", max_retries=0) as client:
        whole = await client.responses.create(model="fake", input="Hi")
        async with client.responses.stream(model="fake", input="Hi") as stream:
            streamed = await stream.get_final_response()
    assert whole.output_text == streamed.output_text == ANSWER


def test_answer_that_reaches_its_limit_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="Hi", max_output_tokens=5)
    assert (response.status, response.output_text) == ("incomplete", "Hello")
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    with client.responses.create(model="fake", input="Hi", max_output_tokens=5, stream=True) as stream:
        assert [event.type for event in stream][-1] == "response.incomplete"


def test_logprobs_of_the_text(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = client.responses.create(model="fake", input="Hi", include=include, top_logprobs=1)
    part = response.output[0].content[0]  # type: ignore[union-attr, index]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(entry.token for entry in part.logprobs[:5]) == "Hello"
    assert part.logprobs[0].top_logprobs[0].token == "H"
    with client.responses.create(model="fake", input="Hi", include=include, stream=True) as stream:
        entries = [entry for event in stream if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert len(entries) == len(part.logprobs)


def test_stored_response_can_be_read_continued_and_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(model="fake", input="Hi", instructions="Be brief")
    assert client.responses.retrieve(first.id) == first
    second = client.responses.create(model="fake", input="More", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert second.usage is not None
    prompt = f"<user>Hi\n<assistant>{ANSWER}\n<user>More\n<assistant>".replace("<user>Hi", "<user>Hi")
    assert second.usage.input_tokens == len(prompt.encode())
    items = client.responses.input_items.list(second.id, order="asc")
    assert [item.type for item in items] == ["message"] * 3
    pages = client.responses.input_items.list(second.id, limit=1)
    assert [item.id for item in pages] == [item.id for item in items][::-1]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="there is no response"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake", input="More", previous_response_id=first.id)
    assert client.responses.retrieve(second.id).output_text == ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_streamed_responses_are_stored_and_others_only_if_wanted(client: openai.OpenAI, stream: bool) -> None:
    with client.responses.stream(model="fake", input="Hi", store=stream) as events:
        response = events.get_final_response()
    if stream:
        assert client.responses.retrieve(response.id).output_text == ANSWER
        return
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_responses_belong_to_their_tenant(server: RunningServer, client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input="Hi")
    with client_of(server, "b") as other:
        for call in (other.responses.retrieve, other.responses.delete, other.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                call(response.id)
    assert client.responses.retrieve(response.id).id == response.id


def test_server_without_a_store() -> None:
    with serving_llm(fake_llm(scripted("a")), ServerConfig(max_stored_bytes=0)) as server, client_of(server) as client:
        response = client.responses.create(model="default", input="Hi")
        with pytest.raises(openai.NotFoundError, match="max_stored_bytes"):
            client.responses.retrieve(response.id)
        for fields in ({"store": True}, {"background": True}):
            with pytest.raises(openai.BadRequestError) as caught:
                client.responses.create(model="default", input="Hi", **fields)  # type: ignore[call-overload]
            assert caught.value.param in fields


def test_background_response_is_polled() -> None:
    go = threading.Event()
    with (
        serving_llm(fake_llm(scripted("abc"), on_step=lambda _: go.wait(WAIT_S) and None), CONFIG) as server,
        client_of(server) as client,
    ):
        response = client.responses.create(model="fake", input="Hi", background=True)
        assert response.status == "queued"
        assert client.responses.retrieve(response.id).status in ("queued", "in_progress")
        with pytest.raises(openai.BadRequestError, match="still in progress"):
            client.responses.create(model="fake", input="Hi", previous_response_id=response.id)
        go.set()
        eventually(lambda: client.responses.retrieve(response.id).status == "completed")
        assert client.responses.retrieve(response.id).output_text == "abc"
        assert client.responses.cancel(response.id).status == "completed"


def test_background_response_is_cancelled_or_deleted() -> None:
    # A step takes as long as one of a model: the answers take minutes, and are not complete before they are cancelled.
    llm = fake_llm(lambda _: ord("a"), on_step=lambda _: time.sleep(0.01), backend={"max_model_len": 32_768})
    with serving_llm(llm, CONFIG) as server:
        with client_of(server) as client:
            first, second = (client.responses.create(model="fake", input="Hi", background=True) for _ in range(2))
            assert client.responses.cancel(first.id).status == "cancelled"
            assert client.responses.retrieve(first.id).status == "cancelled"
            client.responses.delete(second.id)
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(second.id)
            whole = client.responses.create(model="fake", input="Hi", max_output_tokens=1)
            with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
                client.responses.cancel(whole.id)
        wait_until_idle(server)


def wait_until_idle(server: RunningServer) -> None:
    """Return when the engine has no request and uses no block."""
    stats = server.app.state.service.llm.stats
    eventually(lambda: stats().num_running == stats().num_used_blocks == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_blocks(stream: bool) -> None:
    gate = StepGate()  # so that the answer does not end before its client leaves
    with serving_llm(fake_llm(lambda _: ord("a"), on_step=gate), CONFIG) as server:
        gate.let_go()
        headers = {"authorization": "Bearer a"}
        body = {"input": "Hi", "stream": stream}
        with httpx.Client(base_url=server.url, headers=headers, timeout=WAIT_S) as client:
            if stream:
                with client.stream("POST", "/v1/responses", json=body) as response:
                    assert next(response.iter_lines()) == "event: response.created"
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/responses", json=body, timeout=0.2)
        gate.open()
        wait_until_idle(server)


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"nonsense": 1}, "field 'nonsense'", "nonsense"),
        ({"conversation": "c"}, "conversation", "conversation"),
        ({"input": []}, "input must be a non-empty string or list", "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type='input_image'",
            None,
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type='web_search' is not supported", None),
        ({"temperature": 101}, "temperature must be a number in", "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs needs include", "top_logprobs"),
        ({"reasoning": {"effort": "low"}}, "no switch for reasoning", "reasoning.effort"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "text.format.schema is missing",
            "text.format.schema",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "text.verbosity"),
        ({"background": True, "stream": True}, "cannot be combined with stream", "background"),
        ({"previous_response_id": "resp_1"}, "there is no response 'resp_1'", None),
        ({"model": "gpt"}, "the model 'gpt' does not exist", "model"),
        ({"input": "x" * 5000}, "", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_mistakes(client: openai.OpenAI, fields: dict[str, Any], message: str, param: str | None, stream: bool) -> None:
    body = {"model": "fake", "stream": stream, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(input="Hi", extra_body=body)  # type: ignore[call-overload]
    assert caught.value.status_code == (404 if "does not exist" in message or "there is no" in message else 400)
    assert message in caught.value.message
    assert caught.value.param == param


def test_full_queue_and_wrong_key() -> None:
    go = threading.Event()
    llm = fake_llm(
        scripted("a"),
        on_step=lambda _: go.wait(WAIT_S) and None,
        scheduler_config=SchedulerConfig(max_queued_requests=1, max_batch_size=1),
    )
    with serving_llm(llm, CONFIG) as server, client_of(server) as client, client_of(server, "c") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.responses.create(model="fake", input="Hi")
        with pytest.raises(openai.RateLimitError) as caught:  # noqa: PT012
            for _ in range(4):
                client.responses.create(model="fake", input="Hi", background=True)
        assert caught.value.response.headers["retry-after"]
        go.set()


def test_options_of_a_stream_need_one(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="needs stream: true"):
        client.responses.create(model="fake", input="Hi", stream_options={"include_obfuscation": False})
    options: Any = {"include_obfuscation": False}
    with client.responses.create(model="fake", input="Hi", stream=True, stream_options=options) as stream:
        assert list(stream)[-1].type == "response.completed"


def test_half_of_a_surrogate_pair_comes_back_as_it_was(server: RunningServer) -> None:
    body = {"input": "Hi", "metadata": {"k": "\ud800"}}
    for fields in ({}, {"stream": True}):
        data = json.dumps({**body, **fields})
        headers = {"authorization": "Bearer a", "content-type": "application/json"}
        answer = httpx.post(f"{server.url}/v1/responses", content=data, headers=headers, timeout=WAIT_S)
        assert answer.status_code == 200
        assert r"\ud800" in answer.text


def test_request_that_takes_too_long() -> None:
    config = ServerConfig(model_name="fake", request_timeout_s=0.05)
    with (
        serving_llm(fake_llm(lambda _: ord("a"), backend={"max_model_len": 32_768}), config) as server,
        client_of(server) as client,
    ):
        with pytest.raises(openai.InternalServerError) as caught:
            client.responses.create(model="fake", input="Hi")
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")


def test_request_that_fails_in_its_stream() -> None:
    begun = threading.Event()
    num_chars = len("<user>Hi\n<assistant>") + 5

    def model(token_ids: Any) -> int | None:
        if len(token_ids) < num_chars:
            return ord("a")
        begun.wait(WAIT_S)
        return None

    with serving_llm(fake_llm(model), CONFIG) as server, client_of(server) as client:
        with client.responses.create(model="fake", input="Hi", stream=True) as stream:
            kinds = [next(stream).type]
            begun.set()
            final = list(stream)[-1]
        assert kinds == ["response.created"]
        assert final.type == "response.failed"
        assert final.response.error is not None
        assert "not finite" in final.response.error.message
        assert final.response.output_text == "aaaaa"
        with pytest.raises(openai.InternalServerError, match="not finite"):
            client.responses.create(model="fake", input="Hi")


def test_oldest_turns_are_left_out_where_that_is_allowed(client: openai.OpenAI) -> None:
    turns: list[Any] = []
    for number in range(8):
        turns += [{"role": "user", "content": f"{number} " + "x" * 900}, {"role": "assistant", "content": "ok"}]
    turns.append({"role": "user", "content": "last"})
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.responses.create(model="fake", input=turns, instructions="Be brief")
    response = client.responses.create(model="fake", input=turns, instructions="Be brief", truncation="auto")
    assert response.usage is not None
    assert (response.status, response.truncation) == ("completed", "auto")
    turn = len("<user>0 \n<assistant>ok\n") + 900
    assert response.usage.input_tokens == len("<system>Be brief\n<user>last\n<assistant>") + 4 * turn
    whole = client.responses.create(model="fake", input=turns[-3:], truncation="auto")
    assert whole.usage is not None
    assert whole.usage.input_tokens == len("<user>last\n<assistant>") + turn


def test_tokens_of_the_input_are_counted(client: openai.OpenAI) -> None:
    count = client.responses.input_tokens.count(model="fake", input="Hi", instructions="Be brief")
    assert count.input_tokens == len("<system>Be brief\n<user>Hi\n<assistant>")


class Person(BaseModel):
    """A form for answers."""

    name: str


def test_answer_is_parsed_into_a_model() -> None:
    with serving_llm(fake_llm(scripted('{"name": "Ada"}')), CONFIG) as server, client_of(server) as client:
        response = client.responses.parse(model="fake", input="Who?", text_format=Person)
    assert response.output_parsed == Person(name="Ada")


def test_answer_has_the_form_of_a_schema() -> None:
    # The model wants to write nothing but "a", so that all else comes from the schema.
    with (
        serving_llm(fake_llm(lambda _: ord("a"), backend={"vocab_size": 258}), CONFIG) as server,
        client_of(server) as client,
    ):
        response = client.responses.create(
            model="fake",
            input="Who?",
            max_output_tokens=200,
            text={"format": {"type": "json_schema", "name": "p", "schema": {"enum": ["aa"]}, "strict": True}},
        )
        assert response.output_text == '"aa"'
        assert response.text is not None
        assert response.text.format is not None
        assert response.text.format.type == "json_schema"
