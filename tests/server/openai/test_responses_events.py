"""Events of the Responses API: the client's own types accept them, and they add up to the response."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llmengine.server.openai.responses_events import Event, ResponseEvents

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
HEAD = {"id": "resp_1", "model": "m", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
USAGE = {
    **{"input_tokens": 5, "output_tokens": 3, "total_tokens": 8},
    "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 2},
}

Part = tuple[str, str]
"""("reasoning" | "text", content) or ("call NAME", arguments)."""

PARTS = st.lists(
    st.tuples(st.sampled_from(["reasoning", "text", "call f", "call g"]), st.text(max_size=12)), max_size=6
)


def play(answer: ResponseEvents, parts: Sequence[Part], cut: int = 0) -> list[Event]:
    """Put an answer through the encoder, in pieces of `cut` characters."""
    events = answer.begin()
    for number, (kind, content) in enumerate(parts):
        if kind.startswith("call "):
            events += answer.call(f"call_{number}", kind.removeprefix("call "))
        say = answer.arguments if kind.startswith("call ") else getattr(answer, kind)
        size = cut or max(len(content), 1)
        for at in range(0, len(content), size):
            events += say(content[at : at + size])
        if kind.startswith("call "):
            events += answer.end_call(True)
    return events + answer.end(USAGE)


def without_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict):
        return {
            key: without_ids(item) for key, item in value.items() if key not in ("id", "created_at", "completed_at")
        }
    return value


@settings(max_examples=50)
@given(PARTS, st.integers(1, 5))
def test_any_chunking_gives_the_same_response(parts: list[Part], cut: int) -> None:
    whole, pieces = ResponseEvents(HEAD), ResponseEvents(HEAD)
    play(whole, parts)
    events = play(pieces, parts, cut)
    assert without_ids(pieces.response) == without_ids(whole.response)
    assert events[-1]["response"] == pieces.response
    Response.model_validate(pieces.response)


@settings(max_examples=50)
@given(PARTS, st.integers(1, 5))
def test_events_are_those_of_the_client_in_order_and_add_up(parts: list[Part], cut: int) -> None:
    answer = ResponseEvents(HEAD)
    events = play(answer, parts, cut)
    for event in events:
        assert EVENT.validate_python(event).type == event["type"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for index, item in enumerate(answer.response["output"]):
        own = [event for event in events if event.get("output_index") == index]
        names = [name for name, _ in itertools.groupby(event["type"].removeprefix("response.") for event in own)]
        assert (names[0], names[-1]) == ("output_item.added", "output_item.done")
        assert {event["item_id"] for event in own if "item_id" in event} == {item["id"]}
        deltas = "".join(event["delta"] for event in own if "delta" in event)
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert deltas == text
        kind = {"message": "output_text", "reasoning": "reasoning_text"}.get(item["type"], "function_call_arguments")
        expected = [f"{kind}.delta"] * bool(text) + [f"{kind}.done"]
        if item["type"] != "function_call":
            expected = ["content_part.added", *expected, "content_part.done"]
        assert names[1:-1] == expected


def test_items_of_the_first_events_do_not_change_later() -> None:
    answer = ResponseEvents(HEAD)
    created = answer.begin()[0]
    added = answer.text("a")[0]
    answer.end(USAGE)
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert (added["item"]["status"], added["item"]["content"]) == ("in_progress", [])


def test_answer_without_anything_is_an_empty_message() -> None:
    answer = ResponseEvents(HEAD)
    play(answer, [])
    assert Response.model_validate(answer.response).output_text == ""
    assert [item["type"] for item in answer.response["output"]] == ["message"]


def test_answer_that_was_cut_off_is_incomplete() -> None:
    answer = ResponseEvents(HEAD)
    answer.reasoning("so")
    answer.text("half a sen")
    event = answer.end(USAGE, "max_output_tokens")[-1]
    assert event["type"] == "response.incomplete"
    assert event["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in event["response"]["output"]] == ["completed", "incomplete"]


def test_call_is_done_when_its_arguments_are_and_not_when_something_follows() -> None:
    answer = ResponseEvents(HEAD)
    answer.call("call_1", "f")
    answer.arguments('{"a": ')
    done = [event["type"] for event in answer.end_call(False)]
    assert done == ["response.function_call_arguments.done", "response.output_item.done"]
    assert answer.text("and then")[0]["type"] == "response.output_item.added"
    answer.end(USAGE)
    assert [item["status"] for item in answer.response["output"]] == ["incomplete", "completed"]


@pytest.mark.parametrize("started", [False, True])
def test_failure_keeps_what_there_is(started: bool) -> None:
    answer = ResponseEvents(HEAD)
    if started:
        answer.text("half")
    event = answer.fail("server_error", "logits are not finite")[-1]
    response = Response.model_validate(event["response"])
    assert (event["type"], response.status, response.output_text) == ("response.failed", "failed", "half" * started)
    assert response.error is not None
    assert response.error.message == "logits are not finite"


def test_logprobs_come_with_their_text_and_all_of_them_with_the_part() -> None:
    answer = ResponseEvents(HEAD)
    entries = [{"token": token, "logprob": -1.0, "bytes": [97], "top_logprobs": []} for token in "ab"]
    deltas = [answer.text(entry["token"], [entry])[-1] for entry in entries]  # type: ignore[arg-type]
    done = answer.end(USAGE)[0]
    assert [event["logprobs"] for event in deltas] == [[entry] for entry in entries]
    assert done["logprobs"] == entries
    assert answer.response["output"][0]["content"][0]["logprobs"] == entries
