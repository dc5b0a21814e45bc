"""Tool calls and reasoning of `/v1/chat/completions`, read by OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from llmengine.server import ServerConfig
from llmengine.testing import ChatByteTokenizer
from tests.server.helpers import fake_llm, scripted, serving_llm

TEMPLATE = """{% if tools %}<tools>{{ tools | tojson }}</tools> Write <tool_call>{"name": ...}</tool_call>
{% endif %}{% for message in messages %}<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls %}
<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}

{% endfor %}<assistant>{% if false %}<think></think>{% endif %}"""


def tool(name: str) -> Any:
    properties = {"city": {"enum": ["Rome", "Paris"]}}
    parameters = {"type": "object", "properties": properties, "required": ["city"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weather"), tool("time")]


def call(name: str, **arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def next_token(token_ids: Sequence[int]) -> int | None:
    """Say what the user wrote after "say "."""
    text = bytes(token_id if token_id < 256 else 0 for token_id in token_ids)
    wanted = re.search(rb"say (.*?)\n<assistant>", text, re.DOTALL)
    return scripted(wanted[1].decode() if wanted else "Well.")(token_ids)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    llm = fake_llm(next_token, tokenizer=ChatByteTokenizer(TEMPLATE))
    with serving_llm(llm, ServerConfig(model_name="fake")) as server, server.client() as client:
        yield client


def babble(token_ids: Sequence[int]) -> int:
    """A token that looks random, so that only a grammar gives the answer a form."""
    state = 7
    for token_id in token_ids:
        state = (state * 1_103_515_245 + token_id + 12_345) % 2_147_483_648
    return state // 7 % 258


@pytest.fixture(scope="module")
def babbler() -> Iterator[openai.OpenAI]:
    llm = fake_llm(babble, tokenizer=ChatByteTokenizer(TEMPLATE.partition("{% if false %}")[0]))  # no reasoning
    with serving_llm(llm, ServerConfig(model_name="fake")) as server, server.client() as client:
        yield client


def ask(client: openai.OpenAI, text: str, **given: Any) -> Any:
    messages: Any = [{"role": "user", "content": f"say {text}"}]
    return client.chat.completions.create(model="fake", messages=messages, **given)


def streamed(client: openai.OpenAI, text: str, **given: Any) -> tuple[dict[str, Any], str]:
    """The message that the chunks add up to, and the finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    for chunk in ask(client, text, stream=True, **given):
        (choice,) = chunk.choices
        assert reason is None, "the finish chunk is the last"
        delta, reason = choice.delta, choice.finish_reason
        assert reason is None or not (delta.content or delta.tool_calls), "the finish chunk has nothing else"
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
        for part in delta.tool_calls or ():
            if part.id:
                assert part.index == len(message["tool_calls"]), "id and name come once"
                message["tool_calls"].append({"id": part.id, "name": part.function.name, "arguments": ""})
            else:
                assert part.function.name is None
            message["tool_calls"][part.index]["arguments"] += part.function.arguments or ""
    assert reason is not None
    return message, reason


ANSWER = "<think>\nHm, wörld.\n</think>\n\nLet me look.\n" + call("weather", city="Paris") + call("time", city="Rome")


def test_reasoning_text_and_calls_whole_and_in_chunks(client: openai.OpenAI) -> None:
    choice = ask(client, ANSWER, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.reasoning_content, choice.message.content) == ("Hm, wörld.", "Let me look.")
    calls = [(found.function.name, json.loads(found.function.arguments)) for found in choice.message.tool_calls]
    assert calls == [("weather", {"city": "Paris"}), ("time", {"city": "Rome"})]
    message, reason = streamed(client, ANSWER, tools=TOOLS)
    assert reason == "tool_calls"
    assert (message["reasoning_content"], message["content"]) == ("Hm, wörld.", "Let me look.")
    assert [(found["name"], json.loads(found["arguments"])) for found in message["tool_calls"]] == calls
    assert len({found["id"] for found in message["tool_calls"]}) == 2


def test_the_content_of_an_answer_that_only_calls_is_null(client: openai.OpenAI) -> None:
    message = ask(client, call("weather", city="Rome"), tools=TOOLS).choices[0].message
    assert (message.content, len(message.tool_calls)) == (None, 1)


def test_stop_strings_cut_reasoning_and_arguments_as_well(client: openai.OpenAI) -> None:
    message, reason = streamed(client, ANSWER, tools=TOOLS, stop="wör")
    assert (message["reasoning_content"], message["content"], reason) == ("Hm, ", "", "stop")
    message, reason = streamed(client, ANSWER, tools=TOOLS, stop='ris"')
    assert message["tool_calls"][0]["arguments"] == '{"city": "Pa'
    assert ask(client, ANSWER, stop="wör").choices[0].message.reasoning_content == "Hm, "


def test_results_of_tools_go_back(client: openai.OpenAI) -> None:
    made = ask(client, call("weather", city="Rome"), tools=TOOLS).choices[0].message
    messages: Any = [
        {"role": "user", "content": "How is the weather?"},
        made.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "Fine."},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, tools=TOOLS)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Well.", "stop")


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "time"}}, {"time"})],
)
def test_a_choice_is_enforced(babbler: openai.OpenAI, choice: Any, names: set[str]) -> None:
    answer = ask(babbler, "no", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls"
    (made,) = answer.message.tool_calls
    assert made.function.name in names
    assert json.loads(made.function.arguments).keys() == {"city"}


def test_none_calls_nothing(client: openai.OpenAI) -> None:
    answer = ask(client, "Well.", tools=TOOLS, tool_choice="none").choices[0]
    assert (answer.message.content, answer.message.tool_calls, answer.finish_reason) == ("Well.", None, "stop")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "'fly'"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ],
)
def test_faults_of_choices_are_named(client: openai.OpenAI, given: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, "x", **given)


def test_templates_without_tools_take_them_in_a_form_that_the_server_chooses() -> None:
    asked: dict[str, Any] = {
        "model": "fake",
        "messages": [{"role": "user", "content": f"say {call('time')}"}],
        "tools": TOOLS,
    }
    for name in (None, "hermes"):
        llm = fake_llm(next_token, tokenizer=ChatByteTokenizer())
        config = ServerConfig(model_name="fake", tool_format=name)
        with serving_llm(llm, config) as server, server.client() as client:
            if name is None:
                with pytest.raises(openai.BadRequestError, match="does not use tools"):
                    client.chat.completions.create(**asked)
            else:
                answer = client.chat.completions.create(**asked).choices[0]
                assert answer.finish_reason == "tool_calls"
                assert [each.function.name for each in answer.message.tool_calls] == ["time"]
