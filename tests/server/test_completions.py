"""`/v1/completions`, `/tokenize` and `/detokenize` over a socket."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from llmengine.server import ServerConfig
from tests.server.helpers import RunningServer, fake_llm, serving_llm


def next_letter(token_ids: Sequence[int]) -> int:
    """The letter after the last one; the answer ends after "z"."""
    last = token_ids[-1]
    return 257 if last == ord("z") else last + 1


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving_llm(fake_llm(next_letter), ServerConfig(model_name="fake")) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def read(client: openai.OpenAI, **given: Any) -> tuple[list[str], list[str | None], Any]:
    """Texts and finish reasons of a stream's choices, and its usage; each choice has one finish chunk, the last."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    usage = None
    for chunk in client.completions.create(model="fake", stream=True, stream_options={"include_usage": True}, **given):
        assert usage is None, "the usage is last"
        usage = chunk.usage
        assert bool(chunk.choices) == (usage is None)
        for choice in chunk.choices:
            assert choice.index not in reasons
            assert bool(choice.text) != bool(choice.finish_reason), "text and end are chunks of their own"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return [texts[index] for index in sorted(texts)], [reasons[index] for index in sorted(reasons)], usage


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("w", ["xyz"]),
        (["a", "b", "w"], ["bcde", "cdef", "xyz"]),
        ([97], ["bcde"]),
        ([[97], [98]], ["bcde", "cdef"]),
    ],
)
def test_forms_of_prompts(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    reasons = ["stop" if text == "xyz" else "length" for text in texts]
    whole = client.completions.create(model="fake", prompt=prompt, max_tokens=4)
    assert whole.object == "text_completion"
    assert [(choice.text, choice.finish_reason) for choice in whole.choices] == list(zip(texts, reasons, strict=True))
    assert read(client, prompt=prompt, max_tokens=4)[:2] == (texts, reasons)


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
def test_echo(client: openai.OpenAI, prompt: Any) -> None:
    given: Any = {"prompt": prompt, "max_tokens": 2, "echo": True}
    assert client.completions.create(model="fake", **given).choices[0].text == "abcd"
    texts, _, usage = read(client, **given)
    assert texts == ["abcd"]
    assert (usage.prompt_tokens, usage.completion_tokens) == (2, 2)


def test_several_prompts_and_outputs_are_numbered(client: openai.OpenAI) -> None:
    texts, reasons, usage = read(client, prompt=["a", "bc"], n=2, max_tokens=3)
    assert (texts, reasons) == (["bcd", "bcd", "def", "def"], ["length"] * 4)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 12, 15)
    whole = client.completions.create(model="fake", prompt=["a", "bc"], n=2, max_tokens=3)
    assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(texts))


def test_the_length_is_16_by_default(client: openai.OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="a").choices[0].text == "bcdefghijklmnopq"


def test_logprobs_with_and_without_echo(client: openai.OpenAI) -> None:
    given: Any = {"model": "fake", "prompt": "ab", "max_tokens": 2, "logprobs": 1}
    found = client.completions.create(**given).choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.token_logprobs, found.text_offset) == (["c", "d"], [0.0, 0.0], [0, 1])
    assert found.top_logprobs == [{"c": 0.0}, {"d": 0.0}]
    whole = client.completions.create(**given, echo=True).choices[0].logprobs
    assert whole is not None
    assert (whole.tokens, whole.text_offset) == (["a", "b", "c", "d"], [0, 1, 2, 3])
    assert whole.token_logprobs == [None, 0.0, 0.0, 0.0]
    tokens: list[str] = []
    offsets: list[int] = []
    for chunk in client.completions.create(**given, echo=True, stream=True):
        if chunk.choices[0].text:
            logprobs = chunk.choices[0].logprobs
            assert logprobs is not None
            assert "".join(logprobs.tokens or []) == chunk.choices[0].text
            tokens += logprobs.tokens or []
            offsets += logprobs.text_offset or []
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)


def test_a_prompt_can_be_scored_without_a_continuation(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="abz", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert (choice.text, choice.logprobs.token_logprobs, choice.finish_reason) == ("abz", [None, 0.0, -1.0], "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert read(client, prompt="abz", max_tokens=0, echo=True)[0] == ["abz"]


def test_the_best_of_several(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="a", n=2, best_of=3, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "bc"), (1, "bc")]
    with pytest.raises(openai.BadRequestError, match="best_of=3 cannot be streamed"):
        client.completions.create(model="fake", prompt="a", n=2, best_of=3, stream=True)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "must not be an empty list"),
        ({"prompt": [[97], []]}, None, "no tokens"),
        ({"prompt": [1000]}, None, "outside the vocabulary"),
        ({"prompt": [97, "b"]}, "prompt", ""),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "needs echo"),
        ({"prompt": ["a"] * 10, "n": 13}, "n", "10 prompts with n=13 asks for 130 outputs; the limit is 128"),
        ({"prompt": ["a", "b" * 5000]}, None, "the limit is 4096"),
        ({}, "prompt", "missing"),
    ],
)
def test_faults_of_requests_are_named(server: RunningServer, fields: Any, param: str | None, message: str) -> None:
    for streaming in (False, True):
        answer = server.post("/v1/completions", {"stream": streaming, **fields})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert message in error["message"]
        assert (error["param"] or "").startswith(param or "")


def test_tokens_of_text_and_of_conversations(server: RunningServer) -> None:
    found = server.post("/tokenize", {"model": "fake", "prompt": "hé"}).json()
    assert found == {"count": 3, "max_model_len": 4096, "tokens": list("hé".encode())}
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hé"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False})
    assert bytes(chat.json()["tokens"]) == b"<user>hi\n"
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": "a", "tools": []}):
        assert server.post("/tokenize", body).status_code == 400
    headers = {"content-type": "application/json"}
    for text in (b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b'{"prompt"', b"[]", b"null", b"[" * 100_000):
        answer = server.request("POST", "/tokenize", content=text, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
    for body in ({"tokens": [-1]}, {"tokens": [258]}, {"tokens": ["a"]}, {"tokens": [2**70]}):
        assert server.post("/detokenize", body).status_code == 400
