"""`/metrics` of a running server, and the traces of its requests."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from llmengine.errors import ConfigError
from llmengine.observability.http_metrics import http_metrics_of
from llmengine.server import ServerConfig, create_app
from tests.engine.helpers import in_loop
from tests.observability.scrapes import Scrape, scrape
from tests.server.helpers import WAIT_S, RunningServer, fake_llm, scripted, serving, serving_llm

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def ask(server: RunningServer, path: str = CHAT, **fields: Any) -> httpx.Response:
    return server.post(path, {"messages": MESSAGES, **fields})


def scrape_server(server: RunningServer, path: str = "/metrics") -> Scrape:
    response = server.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return Scrape(response.text)


def test_engine_and_requests_are_counted() -> None:
    with serving_llm(fake_llm(scripted("Hello!")), ServerConfig(model_name="fake")) as server:
        assert ask(server).status_code == 200
        assert ask(server, stream=True).status_code == 200
        assert ask(server, temperature="hot").status_code == 400
        assert ask(server, path="/v1/secret/123").status_code == 404
        assert server.request("PROPFIND", "/coffee").status_code in (404, 405)
        seen = scrape_server(server)
        requests = "llmengine_http_requests_total"
        assert seen.value(requests, method="POST", route=CHAT, status="200") == 2
        assert seen.value(requests, method="POST", route=CHAT, status="400") == 1
        assert seen.value(requests, method="POST", route="other", status="404") == 1
        assert seen.label_values("method") <= {"GET", "POST", "other"}
        assert "/v1/secret/123" not in seen.label_values("route")
        assert seen.value("llmengine_http_time_to_first_byte_seconds_count", route=CHAT) == 3
        assert seen.value("llmengine_http_request_duration_seconds_count", route=CHAT) == 3
        assert seen.value("llmengine_http_requests_in_flight") == 1, "the scrape itself"
        assert seen.value("llmengine_requests_finished_total", model_name="fake", finished_reason="stop") == 2
        assert seen.value("llmengine_generation_tokens_total", engine="0", model_name="fake") == 14


def test_what_a_gateway_asks_for() -> None:
    """`/health` and three gauges, under vLLM's names if it knows only those."""
    config = ServerConfig(api_keys=["secret"], metric_names="vllm")
    with serving_llm(fake_llm(), config) as server:
        assert server.get("/health").status_code == 200
        seen = scrape_server(server)
        assert seen.value("vllm:num_requests_waiting") == 0
        assert seen.value("vllm:num_requests_running") == 0
        assert seen.value("vllm:kv_cache_usage_perc") == 0
        assert ask(server).status_code == 401
        seen = scrape_server(server)
        assert seen.value("llmengine_http_requests_total", method="POST", status="401") == 1


def test_openmetrics_for_those_who_ask() -> None:
    with serving_llm(fake_llm()) as server:
        accept = "application/openmetrics-text; version=1.0.0"
        response = server.get("/metrics", headers={"accept": accept})
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.text.endswith("# EOF\n")


def test_metrics_can_be_left_out() -> None:
    with serving_llm(fake_llm(), ServerConfig(metrics=False)) as server:
        assert server.get("/metrics").status_code == 404
        assert scrape(server.app.state.registry).names == set()


def test_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="metric_names must be one of"):
        ServerConfig(metric_names="sglang").resolve()  # type: ignore[arg-type]


def test_two_mounted_applications_share_a_registry() -> None:
    registry = CollectorRegistry()
    with fake_llm(scripted("a")) as first, fake_llm(scripted("bc")) as second:
        both = FastAPI()
        both.mount("/first", create_app(first, ServerConfig(model_name="one"), registry=registry))
        both.mount("/second", create_app(second, ServerConfig(model_name="two"), registry=registry))
        with serving(both) as server:
            assert ask(server, f"/first{CHAT}").status_code == 200
            assert ask(server, f"/second{CHAT}").status_code == 200
            seen = scrape_server(server, "/first/metrics")
        assert seen.value("llmengine_generation_tokens_total", model_name="one", engine="0") == 2
        assert seen.value("llmengine_generation_tokens_total", model_name="two", engine="1") == 3
        assert seen.value("llmengine_http_requests_total", route=CHAT, status="200") == 2


class ShiftedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock a test can put forward, as if the loop had stood still meanwhile."""

    shift_s = 0.0

    def time(self) -> float:
        return super().time() + self.shift_s


def test_loop_lag_is_how_late_a_timer_fires() -> None:
    registry = CollectorRegistry()
    metrics = http_metrics_of(registry)
    assert http_metrics_of(registry) is metrics

    async def main() -> None:
        metrics.watch_loop()
        metrics.watch_loop()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ShiftedLoop)
        loop.shift_s = 12.0
        measured = asyncio.Event()
        loop.call_later(0, measured.set)  # its turn comes after what was due earlier
        await measured.wait()

    in_loop(main, ShiftedLoop)
    seen = scrape(registry)
    assert seen.value("llmengine_event_loop_lag_seconds_count") >= 1
    assert seen.value("llmengine_event_loop_lag_seconds_bucket", le="10.0") + 1 == seen.value(
        "llmengine_event_loop_lag_seconds_count"
    )
    assert seen.value("llmengine_event_loop_lag_seconds_sum") > 10


TRACED = """
import json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
import httpx
from llmengine.observability.http_metrics import http_metrics_of
from llmengine.server import ServerConfig
from tests.server.helpers import fake_llm, scripted, serving_llm

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
with serving_llm(fake_llm(scripted("Hello!")), ServerConfig(model_name="fake")) as server:
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == 200
    assert httpx.post(url, json=body, timeout=60).status_code == 200
tracing_threads = [thread for thread in __import__("threading").enumerate() if thread.name == "llmengine-tracing"]
for thread in tracing_threads:
    thread.join(60)
spans = {span.context.span_id: span for span in exporter.get_finished_spans()}
found = []
for span in list(spans.values()):
    if span.name == "chat fake":
        while span.parent and span.parent.span_id in spans:  # FastAPI makes spans as well, from some version on
            span = spans[span.parent.span_id]
        found.append([format(span.context.trace_id, "032x"), span.parent and format(span.parent.span_id, "016x")])
print(json.dumps(found))
"""


def test_a_clients_trace_goes_on_in_the_engine() -> None:
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3 * WAIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (first, parent), (second, no_parent) = json.loads(done.stdout)
    assert (first, parent) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert second != first
    assert no_parent is None
