"""Loads on a real socket, whose other end behaves well, or badly in every way that a client meets."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.errors import ConfigError
from llmengine.load_test.arrivals import Clients
from llmengine.load_test.errors import EndpointError
from llmengine.load_test.figures import figures
from llmengine.load_test.openai_target import Api, EndpointOptions, HttpTarget
from llmengine.load_test.records import LoadRequest
from llmengine.load_test.runner import LoadResult, run_load
from llmengine.load_test.sse import SseParser
from llmengine.load_test.workload import Lengths, Synthetic, measure_scale
from tests.load_test.fake_endpoint import PROMPT_OVERHEAD, FakeEndpoint


def requests(api: Api, output_tokens: int = 8) -> Iterator[LoadRequest]:
    chat = [{"role": "user", "content": "one two three"}]
    one = LoadRequest(None, chat, output_tokens) if api == "chat" else LoadRequest("one two three", None, output_tokens)
    return itertools.repeat(one)


async def load(
    endpoint: FakeEndpoint, behaviour: str, *, clients: int = 2, count: int = 4, api: Api = "chat", **options: Any
) -> LoadResult:
    target = await HttpTarget.connect(endpoint.base_url(behaviour), "fake-1", EndpointOptions(api, **options))
    try:
        return await run_load(target, requests(api), Clients(clients), num_requests=count, timeout_s=60)
    finally:
        await target.aclose()


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("behaviour", ["good", "pairs", "dribble", "closing", "unlimited"])
async def test_tokens_are_counted_by_usage(endpoint: FakeEndpoint, behaviour: str, api: Api) -> None:
    result = await load(endpoint, behaviour, api=api)
    assert [(record.error, record.detail) for record in result.records] == [(None, "")] * 4
    for record in result.records:
        assert (record.num_prompt_tokens, record.num_output_tokens) == (6 + PROMPT_OVERHEAD, 8)
        assert sum(record.num_pieces) == (4 if behaviour == "pairs" else 8)
        assert record.finish_reason == "length"
        assert record.due <= record.sent <= record.arrivals[0] <= record.arrivals[-1] <= record.finished
    assert figures(result)["output_tokens"]["mean"] == 8
    assert all(warning.startswith("this client") for warning in figures(result)["warnings"])


async def test_connections_are_used_again(endpoint: FakeEndpoint) -> None:
    await load(endpoint, "good", clients=3, count=30)
    assert endpoint.num_connections == 3


async def test_a_server_without_usage_counts_chunks(endpoint: FakeEndpoint) -> None:
    result = await load(endpoint, "uncounted")
    assert figures(result)["output_tokens"]["mean"] == 8
    assert any("no usage" in warning for warning in figures(result)["warnings"])


@pytest.mark.parametrize(
    ("behaviour", "kind", "detail"),
    [
        ("cut", "disconnected", "the connection ended in the middle of the answer"),
        ("unfinished", "disconnected", "the stream ended without a finish reason or [DONE]"),
        ("broken", "error in stream", "out of memory"),
        ("garbled", "not OpenAI", "a chunk that is not of the OpenAI API: '{this is not JSON'"),
        ("empty", "no tokens", "the stream had no tokens; finish reason: 'length'"),
        ("html", "not OpenAI", "expected an event stream, not text/html: '<html>Welcome</html>'"),
        ("plain", "not OpenAI", "expected an event stream, not application/json"),
        ("busy", "HTTP 429", "the queue is full"),
        ("gibberish", "not HTTP", "the answer is not HTTP/1.1"),
    ],
)
async def test_failures_have_a_kind_and_a_reason(
    endpoint: FakeEndpoint, behaviour: str, kind: str, detail: str
) -> None:
    result = await load(endpoint, behaviour)
    assert [record.error for record in result.records] == [kind] * 4
    assert all(record.detail.startswith(detail) for record in result.records), result.records[0].detail


async def test_silence_is_a_timeout(endpoint: FakeEndpoint) -> None:
    target = await HttpTarget.connect(endpoint.base_url("silent"), "fake-1", EndpointOptions())
    result = await run_load(target, requests("chat"), Clients(2), num_requests=2, timeout_s=0.1)
    await target.aclose()
    assert [record.error for record in result.records] == ["timeout"] * 2


async def test_nobody_there_is_refused() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        base_url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"/v1/models: 127\.0\.0\.1:\d+: .*refused|Connect call failed"):
            await HttpTarget.connect(base_url, None, EndpointOptions())
        target = await HttpTarget.connect(base_url, "some-model", EndpointOptions())
        result = await run_load(target, requests("chat"), Clients(1), num_requests=2)
    assert [record.error for record in result.records] == ["refused"] * 2


async def test_the_first_model_listed_is_used(endpoint: FakeEndpoint) -> None:
    target = await HttpTarget.connect(endpoint.base_url(), None, EndpointOptions())
    await target.aclose()
    assert target.model == "fake-1"
    with pytest.raises(EndpointError, match=r"modelless/v1/models: lists no model; name one with --model"):
        await HttpTarget.connect(endpoint.base_url("modelless"), None, EndpointOptions())


async def test_requests_carry_key_model_and_further_fields(endpoint: FakeEndpoint) -> None:
    await load(endpoint, "good", count=1, api_key="s3cret", body={"ignore_eos": True})
    assert endpoint.keys == {"bearer s3cret"}
    assert endpoint.bodies == [
        {
            "model": "fake-1",
            "messages": [{"role": "user", "content": "one two three"}],
            "max_tokens": 8,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


@pytest.mark.parametrize(
    ("base_url", "key", "message"),
    [
        ("localhost:8000", None, "base_url must begin with http:// or https://, not 'localhost:8000'"),
        ("http://host:port/v1", None, "base_url has no valid port: 'http://host:port/v1'"),
        ("http://host/v1", "a\r\nx: b", "the header authorization must be printable ASCII"),
    ],
)
async def test_what_cannot_be_sent_is_refused(base_url: str, key: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await HttpTarget.connect(base_url, "m", EndpointOptions(api_key=key))
    assert str(caught.value) == message


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_prompts_have_the_length_that_the_endpoint_counts(endpoint: FakeEndpoint, api: Api) -> None:
    target = await HttpTarget.connect(endpoint.base_url(), "fake-1", EndpointOptions(api))
    scale = await measure_scale(target, chat=api == "chat")
    assert (scale.tokens, scale.tokens_per_word) == (PROMPT_OVERHEAD, 2)
    made = Synthetic(Lengths(101, 101), Lengths(4, 4), 40, 2).requests(scale, chat=api == "chat", seed=1)
    result = await run_load(target, made, Clients(1), num_requests=6)
    await target.aclose()
    assert {record.num_prompt_tokens for record in result.records} == {101}
    bodies = endpoint.bodies[2:]
    texts = [body["messages"][0]["content"] if api == "chat" else body["prompt"] for body in bodies]
    starts = [" ".join(text.split()[:20]) for text in texts]
    assert starts == [starts[0], starts[1]] * 3
    assert starts[0] != starts[1]
    assert len({text.split()[20] + text[-20:] for text in texts}) == 6


@given(st.data())
def test_events_do_not_depend_on_how_their_bytes_are_split(data: st.DataObject) -> None:
    payloads = data.draw(st.lists(st.text(alphabet="ab {}:é", min_size=1).map(str.strip), max_size=6))
    ending = data.draw(st.sampled_from(["\n", "\r\n"]))
    stream = "".join(f": ping{ending}event: x{ending}data: {one}{ending}{ending}" for one in payloads).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    parser = SseParser()
    found = [
        event for begin, end in itertools.pairwise([0, *cuts, len(stream)]) for event in parser.feed(stream[begin:end])
    ]
    assert found == [one.encode() for one in payloads]


def test_an_event_of_several_lines_is_one() -> None:
    assert SseParser().feed(b"data: a\ndata: b\n\ndata:c\n\n") == [b"a\nb", b"c"]
