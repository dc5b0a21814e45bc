"""Items and tools of the Responses API become messages and tools of a chat."""

from __future__ import annotations

from typing import Any

import pytest

from llmengine.chat.messages import Conversation
from llmengine.errors import InvalidRequestError
from llmengine.server.openai.responses_input import as_items, chat_messages, chat_tool_choice, chat_tools

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in "fgh"]


def test_string_is_a_message_of_the_user() -> None:
    messages = chat_messages(as_items("hi"), "be brief")
    assert messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]


def test_instructions_and_the_system_messages_after_them_are_one_message() -> None:
    items = [
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "q"},
        {"role": "system", "content": "c"},
    ]
    parts = [{"type": "text", "text": text} for text in "ab"]
    rest = [{"role": "user", "content": "q"}, {"role": "system", "content": "c"}]
    assert chat_messages(as_items(items), "a") == [{"role": "system", "content": parts}, *rest]
    assert chat_messages(as_items(items))[0] == {"role": "developer", "content": "b"}
    Conversation(chat_messages(as_items(items), "a"))


def test_turn_of_the_model_is_one_message() -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "q"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "so"}],
            "status": "completed",
        },
        CALL,
        {**CALL, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "one"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        CALL,
    ]
    messages = chat_messages(as_items(items))
    assert messages == [
        {"role": "user", "content": "q"},
        {
            **{"role": "assistant", "reasoning_content": "hm", "content": [{"type": "text", "text": "so"}]},
            "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "c2"}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "one"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "tool_calls": [CHAT_CALL], "content": None},
    ]
    Conversation(messages)


@pytest.mark.parametrize("again", ["message", "reasoning"])
def test_second_text_and_reasoning_after_text_begin_a_message(again: str) -> None:
    text = {"type": "message", "role": "assistant", "content": "a"}
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r"}]}
    messages = chat_messages([reasoning, text, text if again == "message" else reasoning])
    second = {"content": "a"} if again == "message" else {"reasoning_content": "r", "content": ""}
    assert messages == [
        {"role": "assistant", "reasoning_content": "r", "content": "a"},
        {"role": "assistant", **second},
    ]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]},
            "input[0].content[0].type='input_image' is",
        ),
        ({"role": "user", "content": [{"type": "input_text", "text": 1}]}, "input[0].content[0].text must be a string"),
        ({"role": "user", "content": ["a"]}, "input[0].content[0] must be an object"),
        ({"role": "user"}, "input[0].content must be a string or a list"),
        ({"role": "robot", "content": "a"}, "input[0].role must be one of"),
        ({"type": "web_search_call"}, "input[0].type='web_search_call' is not supported"),
        ({"type": 7}, "input[0].type=7 is not supported"),
        ({**CALL, "name": ""}, "input[0].name must be a non-empty string"),
        ({**CALL, "arguments": {}}, "input[0].arguments must be a string"),
        ({"type": "function_call_output", "output": "a"}, "input[0].call_id must be a non-empty string"),
        ({"type": "reasoning", "content": "a"}, "input[0].content must be a list of objects"),
        ({"type": "reasoning", "content": [{}]}, "input[0].content[0].text must be a string"),
    ],
)
def test_mistake_names_its_place(item: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat_messages(as_items([item]))
    assert message in str(caught.value)


def test_tools_are_functions() -> None:
    assert chat_tools(TOOLS[:1]) == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    with pytest.raises(InvalidRequestError, match=r"tools\[1\].type='web_search' is not supported"):
        chat_tools([TOOLS[0], {"type": "web_search"}])


def test_fields_of_tools_that_ask_for_nothing_are_left_out_and_others_refused() -> None:
    assert chat_tools([{**TOOLS[0], "strict": None, "defer_loading": False, "output_schema": None}]) == chat_tools(
        TOOLS[:1]
    )
    with pytest.raises(InvalidRequestError, match=r"tools\[0\].defer_loading is not supported; supported: type, name"):
        chat_tools([{**TOOLS[0], "defer_loading": True}])


def test_tool_choice() -> None:
    tools = chat_tools(TOOLS)
    assert chat_tool_choice("required", tools) == ("required", tools)
    named = {"type": "function", "function": {"name": "g"}}
    assert chat_tool_choice({"type": "function", "name": "g"}, tools) == (named, tools)
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": n} for n in "hf"]}
    assert chat_tool_choice(allowed, tools) == ("required", [tools[0], tools[2]])
    with pytest.raises(InvalidRequestError, match=r"tool_choice.name must name one of .*'f', 'g', 'h'.*, not 'z'"):
        chat_tool_choice({"type": "function", "name": "z"}, tools)
    with pytest.raises(InvalidRequestError, match=r"tool_choice\.type='mcp' is not supported"):
        chat_tool_choice({"type": "mcp"}, tools)
