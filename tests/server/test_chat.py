"""`/v1/chat/completions` over a socket, read by OpenAI's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from llmengine.server import ServerConfig
from tests.server.helpers import RunningServer, fake_llm, scripted, serving_llm

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def next_token(token_ids: Sequence[int]) -> int | None:
    """Answer "Hello, wörld!", or what the user wrote after "say "."""
    text = bytes(token_id if token_id < 256 else 0 for token_id in token_ids)
    wanted = re.search(rb"say (.*)\n<assistant>", text, re.DOTALL)
    return scripted(wanted[1].decode() if wanted else "Hello, wörld!")(token_ids)


def say(text: str) -> Any:
    """Messages whose answer is this text."""
    return [{"role": "user", "content": f"say {text}"}]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving_llm(fake_llm(next_token), ServerConfig(model_name="fake")) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
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
    options: Any = {"include_usage": True}
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
    with pytest.raises(openai.BadRequestError, match="unknown or unsupported field 'wisdom'") as caught:
        client.chat.completions.create(model="fake", messages=MESSAGES, extra_body={"wisdom": 11})
    assert (caught.value.param, caught.value.code) == ("wisdom", "unknown_field")


def test_each_of_several_outputs_has_one_role_one_text_and_one_finish(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=MESSAGES, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    for index in range(3):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(choice.delta.content or "" for choice in own) == "Hello, wörld!"
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 45
    assert chunks[-1].usage.prompt_tokens == len("<user>Hi\n<assistant>")
    whole = client.chat.completions.create(model="fake", messages=MESSAGES, n=3)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == [
        (index, "Hello, wörld!") for index in range(3)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_stop_strings_are_cut_and_nothing_empty_is_sent_while_text_is_held_back(
    client: openai.OpenAI, streaming: bool
) -> None:
    given: Any = {"model": "fake", "messages": say("aaabaaac"), "stop": ["aaac", "zzz"]}
    if not streaming:
        choice = client.chat.completions.create(**given).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("aaab", "stop")
        return
    chunks = list(client.chat.completions.create(**given, stream=True))
    contents = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(content or "" for content in contents) == "aaab"
    assert all(contents[:-1])
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_without_text_still_has_a_role(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=say(""), stream=True))
    assert [(chunk.choices[0].delta.role, chunk.choices[0].finish_reason) for chunk in chunks] == [
        ("assistant", None),
        (None, "stop"),
    ]
    assert client.chat.completions.create(model="fake", messages=say("")).choices[0].message.content == ""


def test_length_limits(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": 9, "max_completion_tokens": 4}):
        choice = client.chat.completions.create(model="fake", messages=MESSAGES, **limit).choices[0]  # type: ignore[call-overload]
        assert (choice.message.content, choice.finish_reason) == ("Hell", "length")


@pytest.mark.parametrize("stop", [None, "zz"])
def test_logprobs_are_those_of_the_text_whatever_the_chunks(client: openai.OpenAI, stop: str | None) -> None:
    given: Any = {"model": "fake", "messages": say("hözzle"), "logprobs": True, "top_logprobs": 2, "stop": stop}
    text = "höz" if stop is None else "hö"
    whole = client.chat.completions.create(**given).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content is not None
    assert [len(entry.top_logprobs) for entry in whole.logprobs.content] == [1] * len(whole.logprobs.content)
    expected = [97 + "abcdefghijklmnopqrstuvwxyz".index(c) for c in "hzzle"] if stop is None else [ord("h")]
    complete = [entry for entry in whole.logprobs.content if entry.bytes is not None]
    assert [entry.bytes for entry in complete] == [[value] for value in expected]
    assert len(whole.logprobs.content) == len(complete) + 2, "the two bytes of ö, and neither stop nor end"
    assert (whole.message.content or "").startswith(text)
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(**given, stream=True):
        choice = chunk.choices[0]
        entries = [] if choice.logprobs is None else choice.logprobs.content or []
        assert bool(entries) == bool(choice.delta.content)
        streamed += entries
    assert streamed == whole.logprobs.content


def test_content_in_parts_and_other_roles(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    messages: Any = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="fake", messages=messages)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("<system>Be kind\n<user>Hi\nyou\n<assistant>")
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    with pytest.raises(openai.BadRequestError, match=r"image_url.*not supported"):
        client.chat.completions.create(model="fake", messages=image)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 1000}, "temperature", "less than or equal to 100, not 1000"),
        ({"temperature": "0.5"}, "temperature", "valid"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 129}, "n", "n=129 asks for 129 outputs; the limit is 128"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logit_bias": {"word": 1}}, "logit_bias", "must be a token id"),
        ({"logit_bias": {"999": 1}}, None, "outside the vocabulary"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options.usage", "unknown"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "should be"),
        ({"chat_template_kwargs": {"style": "odd"}}, None, "style"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"content": "x"}]}, None, "role"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, None, "the limit is 4096"),
        ({"model": "gpt-9"}, "model", "'gpt-9' does not exist"),
    ],
)
def test_faults_of_requests_are_named(server: RunningServer, fields: Any, param: str | None, message: str) -> None:
    for streaming in (False, True):
        answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "stream": streaming, **fields})
        if "stream_options" in fields and "stream" not in fields and streaming:
            continue
        assert answer.status_code == (404 if "model" in fields else 400), answer.text
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert re.search(message, error["message"]), error
        assert error["param"] == param


def test_a_bias_decides(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="fake", messages=MESSAGES, logit_bias={"65": -100}).choices


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"type": "json_object"}, r"\{.*"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}, "strict": True}},
            '"(red|blue)"',
        ),
        ({"type": "text"}, "Hello.*"),
    ],
)
def test_response_formats_are_enforced(client: openai.OpenAI, form: Any, pattern: str) -> None:
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, response_format=form, max_tokens=20)
    assert re.fullmatch(pattern, answer.choices[0].message.content or "", re.DOTALL)
