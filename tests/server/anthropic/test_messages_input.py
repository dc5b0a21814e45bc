"""Messages and tools of the Anthropic API become those of a chat."""

from __future__ import annotations

from typing import Any

import pytest

from llmengine.chat.messages import Conversation
from llmengine.errors import InvalidRequestError
from llmengine.server.anthropic.messages_input import chat_messages, chat_tool_choice, chat_tools

TOOL_USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": "é"}}
TEXT = {"type": "text", "text": "a"}


def test_system_is_a_string_or_blocks() -> None:
    user = {"role": "user", "content": "hi"}
    assert chat_messages([user], "be brief") == [{"role": "system", "content": "be brief"}, user]
    assert chat_messages([user], [TEXT]) == [{"role": "system", "content": "a"}, user]
    parts = [{"type": "text", "text": text} for text in "ab"]
    given = [{**part, "cache_control": {"type": "ephemeral"}} for part in parts]
    assert chat_messages([user], given) == [{"role": "system", "content": parts}, user]
    assert chat_messages([{"role": "system", "content": [TEXT]}, user]) == [{"role": "system", "content": "a"}, user]


def test_conversation_with_tools() -> None:
    messages = chat_messages(
        [
            {"role": "user", "content": [TEXT]},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, TEXT, TOOL_USE],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [TEXT]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "no", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "t3"},
                    {"type": "text", "text": "go on"},
                ],
            },
        ]
    )
    call = {"id": "t1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    assert messages == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "a"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "go on"},
    ]
    Conversation(messages)


def test_call_without_text_and_redacted_thinking() -> None:
    blocks = [{"type": "redacted_thinking", "data": "x"}, TOOL_USE]
    assert chat_messages([{"role": "assistant", "content": blocks}])[0]["content"] is None
    assert chat_messages([{"role": "assistant", "content": blocks[:1]}]) == [{"role": "assistant", "content": ""}]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"role": "robot", "content": "a"},
            "messages[0].role must be one of 'user', 'assistant', 'system', not 'robot'",
        ),
        ({"role": "user"}, "messages[0].content must be a string or a list of blocks"),
        ({"role": "user", "content": []}, "messages[0].content must be a non-empty"),
        ({"role": "user", "content": ["a"]}, "messages[0].content[0] must be an object"),
        ({"role": "user", "content": [{"type": "image"}]}, "messages[0].content[0].type='image' is not supported"),
        ({"role": "user", "content": [TOOL_USE]}, "messages[0].content[0].type='tool_use' is not supported"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text must be a string"),
        (
            {"role": "user", "content": [{"type": "tool_result"}]},
            "messages[0].content[0].tool_use_id must be a non-empty",
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}]},
            "messages[0].content[0].content[0].type='image' is not supported; supported: text",
        ),
        (
            {"role": "assistant", "content": [{**TOOL_USE, "input": "{}"}]},
            "messages[0].content[0].input must be an object",
        ),
        (
            {"role": "assistant", "content": [{**TOOL_USE, "id": 1}]},
            "messages[0].content[0].id must be a non-empty string",
        ),
        ({"role": "system", "content": [{"type": "image"}]}, "messages[0].content[0].type='image' is not supported"),
    ],
)
def test_mistake_names_its_place(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_messages([message])
    assert problem in str(caught.value)


def test_tools() -> None:
    schema = {"type": "object", "properties": {}}
    tools = chat_tools([{"name": "f", "description": "d", "input_schema": schema, "cache_control": None}])
    assert tools == [{"type": "function", "function": {"name": "f", "parameters": schema, "description": "d"}}]
    with pytest.raises(
        InvalidRequestError, match=r"tools\[0\].type='bash_20250124' is not supported; supported: custom"
    ):
        chat_tools([{"type": "bash_20250124", "name": "bash"}])
    with pytest.raises(InvalidRequestError, match=r"tools\[0\].input_examples is not supported"):
        chat_tools([{"name": "f", "input_schema": {}, "input_examples": [{"x": 1}]}])
    with pytest.raises(InvalidRequestError, match=r"tools\[0\].input_schema must be an object"):
        chat_tools([{"name": "f"}])


def test_tool_choice() -> None:
    tools = chat_tools([{"name": "f", "input_schema": {}}])
    assert chat_tool_choice({"type": "auto"}, tools) == ("auto", True)
    assert chat_tool_choice({"type": "any", "disable_parallel_tool_use": True}, tools) == ("required", False)
    assert chat_tool_choice({"type": "none"}, tools) == ("none", True)
    named = {"type": "function", "function": {"name": "f"}}
    assert chat_tool_choice({"type": "tool", "name": "f"}, tools) == (named, True)
    with pytest.raises(
        InvalidRequestError, match=r"tool_choice.name must name one of the request's tools \('f'\), not 'g'"
    ):
        chat_tool_choice({"type": "tool", "name": "g"}, tools)
    with pytest.raises(InvalidRequestError, match=r"tool_choice.type must be one of 'auto', 'any', 'none', 'tool'"):
        chat_tool_choice({"type": "function"}, tools)
