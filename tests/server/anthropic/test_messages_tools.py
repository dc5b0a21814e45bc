"""Tools and thinking in `/v1/messages`, over a socket and read by Anthropic's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest

from llmengine.server import ServerConfig
from tests.server.helpers import WAIT_S, serving_llm
from tests.server.tool_chats import tool_llm

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"name": name, "description": "a tool", "input_schema": SCHEMA} for name in ("weather", "time")]
USER: Any = [{"role": "user", "content": "Hi"}]
ARGUMENTS = '{"city": "Zürich"}'
OPTIONS: Any = {"model": "fake", "max_tokens": 500, "messages": USER, "tools": TOOLS}


def call_text(name: str, arguments: str = ARGUMENTS) -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


@contextmanager
def client_for(answer: str, *, reasons: bool = True) -> Iterator[anthropic.Anthropic]:
    with (
        serving_llm(tool_llm(answer, reasons=reasons), ServerConfig(model_name="fake")) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=WAIT_S) as client,
    ):
        yield client


def summary(message: anthropic.types.Message) -> list[tuple[str, Any]]:
    """What is in the blocks of a message."""
    result: list[tuple[str, Any]] = []
    for block in message.content:
        if block.type == "tool_use":
            result.append((block.name, block.input))
        else:
            result.append((block.type, getattr(block, block.type)))
    return result


def test_thinking_text_and_calls_whole_and_streamed() -> None:
    with client_for(f"<think>Hm.</think>I look.{call_text('weather')}{call_text('time')}") as client:
        whole = client.messages.create(**OPTIONS)
        with client.messages.stream(**OPTIONS) as stream:
            events = list(stream)
            streamed = stream.get_final_message()
        with client.messages.create(**OPTIONS, stream=True) as raw:
            deltas = [event for event in raw if event.type == "content_block_delta"]
    city = json.loads(ARGUMENTS)
    assert summary(whole) == [("thinking", "Hm."), ("text", "I look."), ("weather", city), ("time", city)]
    assert summary(streamed) == summary(whole)
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    assert whole.usage.output_tokens_details is not None
    assert whole.usage.output_tokens_details.thinking_tokens == 3
    assert [event.type for event in events].count("content_block_stop") == 4
    for index in (2, 3):
        texts = [
            event.delta.partial_json
            for event in deltas
            if event.index == index and event.delta.type == "input_json_delta"
        ]
        assert "".join(texts) == ARGUMENTS


def test_conversation_goes_on_after_a_call() -> None:
    with client_for(f"<think>Hm.</think>{call_text('weather')}") as client:
        first = client.messages.create(**OPTIONS)
        call = first.content[-1]
        assert call.type == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        messages: Any = [*USER, first.to_param(), {"role": "user", "content": [result]}]
        second = client.messages.create(**{**OPTIONS, "messages": messages})
        count = client.messages.count_tokens(model="fake", messages=messages, tools=TOOLS)
    cached = second.usage.cache_read_input_tokens or 0
    assert second.usage.input_tokens + cached == count.input_tokens
    assert count.input_tokens > first.usage.input_tokens
    assert cached > 100


def test_stop_sequence_cuts_thinking_and_arguments() -> None:
    with client_for(f"<think>Hm, well.</think>{call_text('weather')}") as client:
        thinking = client.messages.create(**OPTIONS, stop_sequences=[", well"])
        arguments = client.messages.create(**OPTIONS, stop_sequences=["rich"])
    assert (summary(thinking), thinking.stop_sequence) == ([("thinking", "Hm")], ", well")
    assert (arguments.stop_reason, arguments.stop_sequence) == ("stop_sequence", "rich")
    assert [name for name, _ in summary(arguments)] == ["thinking", "weather"]


def test_demanded_call_is_made() -> None:
    with client_for("No, I do not want to call anything.", reasons=False) as client:
        schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
        tools: Any = [{"name": "weather", "input_schema": {**schema, "additionalProperties": False}}]
        choice: Any = {"type": "any", "disable_parallel_tool_use": True}
        message = client.messages.create(**{**OPTIONS, "tools": tools}, tool_choice=choice)
        named = client.messages.create(**{**OPTIONS, "tools": tools}, tool_choice={"type": "tool", "name": "weather"})
    assert summary(message) == [("weather", {"city": "Rome"})]
    assert summary(named)[0] == ("weather", {"city": "Rome"})
    assert message.stop_reason == "tool_use"


def test_thinking_is_switched_and_hidden() -> None:
    with client_for("<think>Hm.</think>Text.") as client:
        options: Any = {"model": "fake", "max_tokens": 50, "messages": USER}
        shown = client.messages.create(**options, thinking={"type": "enabled", "budget_tokens": 1024})
        hidden = client.messages.create(**options, thinking={"type": "adaptive", "display": "omitted"})
        off = client.messages.create(**options, thinking={"type": "disabled"})
    assert summary(shown) == [("thinking", "Hm."), ("text", "Text.")]
    assert summary(hidden) == [("thinking", ""), ("text", "Text.")]
    sizes = [one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in (shown, off)]
    assert sizes[1] == sizes[0] + len("<think></think>")


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_text_alone(choice: str) -> None:
    with client_for("Just text.") as client:
        message = client.messages.create(**OPTIONS, tool_choice={"type": choice})
    assert (summary(message), message.stop_reason) == ([("text", "Just text.")], "end_turn")
