"""The same load at the project's own server and at the library under it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmengine import SamplingParams
from llmengine.load_test.arrivals import Arrivals, Clients, Rate
from llmengine.load_test.figures import figures
from llmengine.load_test.library_target import LibraryTarget
from llmengine.load_test.openai_target import Api, EndpointOptions, HttpTarget
from llmengine.load_test.records import LoadRequest, RequestRecord
from llmengine.load_test.runner import run_load
from llmengine.load_test.workload import Lengths, Synthetic, WordScale, measure_scale
from llmengine.server import ServerConfig
from tests.server.helpers import fake_llm, serving_llm

LOAD = Synthetic(Lengths(150, 300), Lengths(3, 9), shared_prefix_tokens=80)
IGNORE_EOS = {"ignore_eos": True, "temperature": 0}


def requests(scale: WordScale, api: Api) -> Iterator[LoadRequest]:
    return LOAD.requests(scale, chat=api == "chat", seed=5)


def counts(records: list[RequestRecord]) -> list[tuple[int | None, int | None, str | None]]:
    return sorted((one.num_prompt_tokens, one.num_output_tokens, one.finish_reason) for one in records)


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("arrivals", [Clients(4), Rate(500.0)], ids=str)
async def test_server_and_library_serve_the_same_load(api: Api, arrivals: Arrivals) -> None:
    llm = fake_llm()
    with serving_llm(llm, ServerConfig(model_name="fake", api_keys=["secret"])) as server:
        options = EndpointOptions(api, "secret", IGNORE_EOS)
        endpoint = await HttpTarget.connect(f"{server.url}/v1", None, options)
        library = LibraryTarget(llm, SamplingParams(ignore_eos=True))
        scale = await measure_scale(library, chat=api == "chat")
        assert await measure_scale(endpoint, chat=api == "chat") == scale
        remote = await run_load(endpoint, requests(scale, api), arrivals, num_requests=12)
        local = await run_load(library, requests(scale, api), arrivals, num_requests=12)
        await endpoint.aclose()
    assert endpoint.model == "fake"
    assert [record.detail for record in remote.records + local.records] == [""] * 24
    assert counts(remote.records) == counts(local.records)
    for result in (remote, local):
        found = figures(result)
        assert 3 <= found["output_tokens"]["p50"] <= 9
        assert 130 <= found["prompt_tokens"]["mean"] <= 320


async def test_refusals_of_the_server_are_kinds_of_failures() -> None:
    config = ServerConfig(model_name="fake", max_total_tokens=100)
    with serving_llm(fake_llm(), config) as server:
        target = await HttpTarget.connect(f"{server.url}/v1", "another", EndpointOptions())
        result = await run_load(target, requests(WordScale(0, 5), "chat"), Clients(1), num_requests=1)
        target.model = "fake"
        longer = await run_load(target, requests(WordScale(0, 5), "chat"), Clients(1), num_requests=1)
        await target.aclose()
    assert result.records[0].error == "HTTP 404"
    assert "the model 'another' does not exist" in result.records[0].detail
    assert longer.records[0].error == "HTTP 400"
