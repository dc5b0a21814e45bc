"""Bodies in which something was replaced by something else: an answer or a refusal, never a fault of the server."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine.server import ServerConfig, create_app
from tests.server.tool_chats import tool_llm

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
RESPONSE: dict[str, Any] = {
    "model": "default",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ],
    **{
        "instructions": "a",
        "max_output_tokens": 4,
        "metadata": {"k": "v"},
        "truncation": "auto",
        "tool_choice": "none",
    },
    **{"tools": [FUNCTION], "text": {"format": {"type": "text"}}, "include": [], "temperature": 1, "top_p": 0.5},
}
MESSAGE: dict[str, Any] = {
    **{"model": "default", "max_tokens": 4, "system": [{"type": "text", "text": "a"}], "tool_choice": {"type": "none"}},
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]},
    ],
    **{"tools": [{"name": "f", "input_schema": {}}], "metadata": {"user_id": "u"}, "stop_sequences": ["x"], "top_k": 2},
}
INPUT_FIELDS = ("model", "input", "instructions", "tools", "tool_choice", "truncation", "text")
COUNT_FIELDS = ("model", "messages", "system", "tools", "tool_choice")
BODIES = {
    "/v1/responses": RESPONSE,
    "/v1/responses/input_tokens": {name: RESPONSE[name] for name in INPUT_FIELDS},
    "/v1/messages": MESSAGE,
    "/v1/messages/count_tokens": {name: MESSAGE[name] for name in COUNT_FIELDS},
}
LEAVES = (
    *(st.none(), st.booleans(), st.integers(-2, 10), st.integers(-(2**70), 2**70), st.floats(allow_nan=False)),
    *(st.text(max_size=5), st.sampled_from(["auto", "user", "text", "function", "message", "\ud800", "\0"])),
)
VALUES = st.recursive(
    st.one_of(*LEAVES),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside of `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(BODIES)))
    body = copy.deepcopy(BODIES[path])
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from(list(places(body))))
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = draw(VALUES)
    if draw(st.booleans()) and path in ("/v1/responses", "/v1/messages"):
        body["stream"] = True
    return path, body


@pytest.fixture(scope="module")
def post() -> Iterator[Any]:
    with tool_llm("a") as llm, asyncio.Runner() as runner:
        transport = httpx.ASGITransport(create_app(llm, ServerConfig()), raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://server")

        def post(path: str, body: Any) -> httpx.Response:
            data = json.dumps(body).encode()
            headers = {"content-type": "application/json"}
            return runner.run(client.post(path, content=data, headers=headers))

        yield post
        runner.run(client.aclose())


@settings(max_examples=100)
@given(request=mutated())
def test_answer_or_refusal(post: Any, request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    answer = post(path, body)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200:
        return
    error = answer.json()["error"]
    assert error["message"]
    assert (answer.json().get("type") == "error") == path.startswith("/v1/messages")


@pytest.mark.parametrize("path", sorted(BODIES))
def test_bodies_are_right_before_they_are_changed(post: Any, path: str) -> None:
    answer = post(path, BODIES[path])
    assert answer.status_code == 200, answer.text
