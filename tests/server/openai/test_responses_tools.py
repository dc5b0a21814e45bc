"""Tools and reasoning in `/v1/responses`, over a socket and read by OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from llmengine.server import ServerConfig
from tests.server.helpers import WAIT_S, serving_llm
from tests.server.tool_chats import tool_llm

TOOLS: Any = [
    {
        "type": "function",
        "name": name,
        "description": "a function",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": False,
    }
    for name in ("weather", "time")
]
ARGUMENTS = '{"city": "Zürich"}'


def call_text(name: str, arguments: str = ARGUMENTS) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@contextmanager
def client_for(answer: str, *, reasons: bool = True) -> Iterator[openai.OpenAI]:
    with (
        serving_llm(tool_llm(answer, reasons=reasons), ServerConfig(model_name="fake")) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client,
    ):
        yield client


def summary(items: Any) -> list[tuple[str, str]]:
    """What is in the items of an output."""
    result = []
    for item in items:
        if item.type == "function_call":
            result.append((item.name, item.arguments))
        else:
            result.append((item.type, item.content[0].text))
    return result


def test_reasoning_text_and_calls_whole_and_streamed() -> None:
    with client_for(f"<think>Hm.</think>I look.{call_text('weather')}{call_text('time')}") as client:
        whole = client.responses.create(model="fake", input="Hi", tools=TOOLS)
        with client.responses.stream(model="fake", input="Hi", tools=TOOLS) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    expected = [("reasoning", "Hm."), ("message", "I look."), ("weather", ARGUMENTS), ("time", ARGUMENTS)]
    assert summary(whole.output) == summary(streamed.output) == expected
    calls = [item for item in whole.output if item.type == "function_call"]
    assert len({call.call_id for call in calls}) == 2
    assert whole.usage is not None
    assert whole.usage.output_tokens_details.reasoning_tokens == 3
    assert streamed.usage is not None
    assert streamed.usage.output_tokens_details == whole.usage.output_tokens_details
    for index, (_, text) in enumerate(expected):
        kinds = (
            "response.reasoning_text.delta",
            "response.output_text.delta",
            "response.function_call_arguments.delta",
        )
        assert "".join(event.delta for event in events if event.type in kinds and event.output_index == index) == text


def test_conversation_goes_on_after_a_call() -> None:
    with client_for(f"<think>Hm.</think>{call_text('weather')}") as client:
        first = client.responses.create(model="fake", input="Hi", tools=TOOLS)
        call = next(item for item in first.output if item.type == "function_call")
        output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        chained = client.responses.create(model="fake", input=[output], tools=TOOLS, previous_response_id=first.id)
        items: Any = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output], output]
        repeated = client.responses.create(model="fake", input=items, tools=TOOLS)
        count = client.responses.input_tokens.count(model="fake", input=items, tools=TOOLS)
    assert chained.usage is not None
    assert repeated.usage is not None
    assert chained.usage.input_tokens == repeated.usage.input_tokens == count.input_tokens


def test_stop_string_cuts_reasoning_and_arguments() -> None:
    with client_for(f"<think>Hm, well.</think>{call_text('weather')}") as client:
        options: Any = {"model": "fake", "input": "Hi", "tools": TOOLS}
        reasoning = client.responses.create(**options, extra_body={"stop": ", well"})
        arguments = client.responses.create(**options, extra_body={"stop": "rich"})
    assert summary(reasoning.output) == [("reasoning", "Hm")]
    assert arguments.output[-1].status == "incomplete"
    assert summary(arguments.output) == [("reasoning", "Hm, well."), ("weather", '{"city": "Zü')]


@pytest.mark.parametrize("stream", [False, True])
def test_demanded_call_is_made_and_fits_its_schema(stream: bool) -> None:
    with client_for("No, I do not want to call anything.", reasons=False) as client:
        tool: Any = {
            **TOOLS[0],
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        }
        options: Any = {"model": "fake", "input": "Hi", "tools": [tool, TOOLS[1]], "max_output_tokens": 200}
        options["tool_choice"] = {"type": "function", "name": "weather"}
        options["parallel_tool_calls"] = False
        if stream:
            with client.responses.stream(**options) as events:
                response = events.get_final_response()
        else:
            response = client.responses.create(**options)
    [(name, arguments)] = summary(response.output)
    assert (name, json.loads(arguments)) == ("weather", {"city": "Rome"})
    assert response.tool_choice.name == "weather"  # type: ignore[union-attr]


def test_no_calls_if_none_are_wanted() -> None:
    with client_for("Just text.") as client:
        response = client.responses.create(model="fake", input="Hi", tools=TOOLS, tool_choice="none")
        assert summary(response.output) == [("message", "Just text.")]
        with pytest.raises(openai.BadRequestError, match="needs tools"):
            client.responses.create(model="fake", input="Hi", tool_choice="required")


def test_reasoning_is_switched_off() -> None:
    with client_for("Text.") as client:
        options: Any = {"model": "fake", "input": "Hi"}
        with_switch = client.responses.create(**options, reasoning={"effort": "none"})
        without = client.responses.create(**options, reasoning={"effort": "high"})
    assert with_switch.usage is not None
    assert without.usage is not None
    assert with_switch.usage.input_tokens == without.usage.input_tokens + len("<think></think>")
    assert with_switch.reasoning is not None
    assert with_switch.reasoning.effort == "none"
