"""Events of the Messages API: the client's own types accept them, and they add up to the message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from llmengine.server.anthropic.messages_events import Event, MessageEvents

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USAGE = {"input_tokens": 4, "output_tokens": 3, "cache_read_input_tokens": 1, "cache_creation_input_tokens": 0}

Part = tuple[str, str]
"""("reasoning" | "text", content) or ("call NAME", arguments)."""

TEXTS = st.tuples(st.sampled_from(["reasoning", "text"]), st.text(min_size=1, max_size=12))
ARGUMENTS = st.dictionaries(st.text(max_size=3), st.text(max_size=4) | st.integers() | st.none(), max_size=3)
CALLS = st.tuples(st.sampled_from(["call f", "call g"]), ARGUMENTS.map(json.dumps))
PARTS = st.lists(TEXTS | CALLS, max_size=6)


def play(answer: MessageEvents, parts: Sequence[Part], cut: int = 0) -> list[Event]:
    """Put an answer through the encoder, in pieces of `cut` characters."""
    events = answer.begin(USAGE)
    for number, (kind, content) in enumerate(parts):
        if kind.startswith("call "):
            events += answer.call(f"toolu_{number}", kind.removeprefix("call "))
        say = answer.arguments if kind.startswith("call ") else getattr(answer, kind)
        size = cut or max(len(content), 1)
        for at in range(0, len(content), size):
            events += say(content[at : at + size])
        if kind.startswith("call "):
            events += answer.end_call(True)
    return events + answer.end(USAGE, "end_turn")


def comparable(answer: MessageEvents) -> Any:
    text = json.dumps(answer.message)
    return json.loads(text.replace(answer.message["id"], "ID"))


@settings(max_examples=50)
@given(PARTS, st.integers(1, 5))
def test_any_chunking_gives_the_same_message(parts: list[Part], cut: int) -> None:
    whole, pieces = MessageEvents("m"), MessageEvents("m")
    play(whole, parts)
    play(pieces, parts, cut)
    assert comparable(pieces) == comparable(whole)
    Message.model_validate(pieces.message)


@settings(max_examples=50)
@given(PARTS, st.integers(1, 5))
def test_events_are_those_of_the_client_in_order_and_add_up(parts: list[Part], cut: int) -> None:
    answer = MessageEvents("m")
    events = play(answer, parts, cut)
    for event in events:
        if event["type"] != "ping":
            assert EVENT.validate_python(event).type == event["type"]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = events[2:-2]
    assert [event["index"] for event in blocks] == sorted(event["index"] for event in blocks)
    for index, block in enumerate(answer.message["content"]):
        own = [event for event in blocks if event["index"] == index]
        names = [event["type"].removeprefix("content_block_") for event in own]
        assert names == ["start", *["delta"] * (len(own) - 2), "stop"]
        deltas = [event["delta"] for event in own[1:-1] if event["delta"]["type"] != "signature_delta"]
        text = "".join(next(value for key, value in delta.items() if key != "type") for delta in deltas)
        if block["type"] == "tool_use":
            assert json.loads(text) == block["input"]
        else:
            assert text == block[block["type"]]


def test_first_characters_of_arguments_are_not_lost() -> None:
    answer = MessageEvents("m")
    events = play(answer, [("call f", '{"city": "Paris"}')], cut=1)
    deltas = [event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(deltas) == '{"city": "Paris"}'
    assert events[2]["content_block"] == {"type": "tool_use", "id": "toolu_0", "name": "f", "input": {}}


def test_arguments_that_were_cut_off_are_what_there_is_of_them() -> None:
    answer = MessageEvents("m")
    play(answer, [("call f", '{"a": 1, "b": [2, 3')])
    assert answer.message["content"][0]["input"] == {"a": 1, "b": [2, 3]}


@pytest.mark.parametrize("arguments", ["", "[1]", "nonsense"])
def test_arguments_that_are_no_object_are_empty(arguments: str) -> None:
    answer = MessageEvents("m")
    play(answer, [("call f", arguments)])
    assert answer.message["content"][0]["input"] == {}


def test_thinking_can_be_left_out() -> None:
    answer = MessageEvents("m", show_thinking=False)
    events = play(answer, [("reasoning", "secret"), ("text", "hi")])
    assert "secret" not in json.dumps(events)
    assert [block["type"] for block in answer.message["content"]] == ["thinking", "text"]
    assert answer.message["content"][0]["signature"]


def test_start_does_not_change_later() -> None:
    answer = MessageEvents("m")
    start = answer.begin(USAGE)[0]
    block = answer.text("a")[0]
    answer.end(USAGE, "end_turn")
    assert (start["message"]["content"], start["message"]["stop_reason"]) == ([], None)
    assert block["content_block"] == {"type": "text", "text": ""}
