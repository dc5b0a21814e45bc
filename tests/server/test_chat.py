"""`/v1/chat/completions` over a socket, read by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from llmengine.server import ServerConfig
from tests.server.helpers import RunningServer, fake_llm, scripted, serving_llm

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving_llm(fake_llm(scripted("Hello, wörld!")), ServerConfig(model_name="fake")) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_whole_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "fake", "chatcmpl-")
    choice = answer.choices[0]
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, wörld!")
    prompt = len("<user>Hi\n<assistant>")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 15)
    assert answer.usage.total_tokens == prompt + 15


def test_chunks_add_up_with_one_role_and_one_finish(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True))
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "Hello, wörld!"
    assert all(delta.content for delta in deltas[:-1]), "no chunk is empty"
    assert (deltas[-1].content, chunks[-1].choices[0].finish_reason) == (None, "stop")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


def test_usage_comes_if_asked_in_one_last_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="fake", messages=MESSAGES, stream=True, stream_options=options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 15
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "llmengine"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_unknown_fields_are_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown field 'wisdom'") as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES, extra_body={"wisdom": 11})
    assert (caught.value.param, caught.value.code) == ("wisdom", "unknown_field")
