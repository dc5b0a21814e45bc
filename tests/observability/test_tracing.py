"""Traces of requests, as OpenTelemetry's exporter receives them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import StatusCode

from llmengine import LLM
from llmengine.config import SchedulerConfig
from llmengine.errors import EngineDeadError, PromptTooLongError
from llmengine.observability import RequestTracing
from llmengine.testing import ChatByteTokenizer
from tests.engine.helpers import WAIT_S, StepGate, make_llm, timeout, tokens


class Tracing:
    """A provider that keeps its spans, and an engine that is traced by it."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("caller")
        self.llm: LLM = make_llm(**options)
        self.tracing = RequestTracing(self.llm, tracer_provider=self.provider, model_name="tiny")

    def spans(self) -> list[ReadableSpan]:
        assert self.tracing.flush(WAIT_S)
        return list(self.exporter.get_finished_spans())

    def span(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans() if span.name == name]
        return span


@pytest.fixture
def traced() -> Iterator[Tracing]:
    tracing = Tracing(tokenizer=ChatByteTokenizer())
    with tracing.llm:
        yield tracing


def parent_id(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def own_id(span: ReadableSpan) -> int:
    context = span.get_span_context()
    assert context is not None
    return context.span_id


def test_request_is_a_child_of_the_callers_span_with_its_phases_as_children(traced: Tracing) -> None:
    with traced.tracer.start_as_current_span("caller") as caller:
        output = traced.llm.generate("abcde", tokens(4, seed=7), request_id="mine", tenant="a")[0]
    request = traced.span("text_completion tiny")
    assert parent_id(request) == caller.get_span_context().span_id
    phases = [traced.span(name) for name in ("queue", "prefill", "decode")]
    assert [parent_id(phase) for phase in phases] == [own_id(request)] * 3
    moments = [request.start_time, *(phase.end_time for phase in phases)]
    assert [phase.start_time for phase in phases] == moments[:3]
    assert request.end_time == moments[3]
    assert moments == sorted(moments, key=lambda moment: moment or 0)
    timeline = output.timeline
    assert timeline.duration_s is not None
    assert (request.end_time or 0) - (request.start_time or 0) == pytest.approx(timeline.duration_s * 1e9, abs=1000)
    assert request.status.status_code is StatusCode.UNSET
    assert dict(request.attributes or {}) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "llmengine",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.id": "mine",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": timeline.time_to_first_token_s,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "llmengine.num_preemptions": 0,
        "llmengine.tenant": "a",
    }


def test_start_is_the_time_of_day(traced: Tracing) -> None:
    with traced.tracer.start_as_current_span("before"):
        pass
    traced.llm.generate([[1]], tokens(1))
    with traced.tracer.start_as_current_span("after"):
        pass
    before, request, after = (traced.span(name) for name in ("before", "text_completion tiny", "after"))
    slack_ns = 10_000_000_000  # the two clocks are read one after the other, perhaps with a long pause between
    assert (before.end_time or 0) - slack_ns <= (request.start_time or 0)
    assert (request.end_time or 0) <= (after.start_time or 0) + slack_ns


async def test_each_task_has_its_own_context(traced: Tracing) -> None:
    async def ask(name: str) -> None:
        with traced.tracer.start_as_current_span(name):
            messages = [{"role": "user", "content": name}]
            async for _ in traced.llm.chat_async(messages, tokens(3), streaming=True, request_id=name):
                pass

    async with timeout(), asyncio.TaskGroup() as group:
        for index in range(8):
            group.create_task(ask(f"caller {index}"))
    callers = {own_id(span): span.name for span in traced.spans() if span.name.startswith("caller")}
    requests = [span for span in traced.spans() if span.name == "chat tiny"]
    assert len(requests) == 8
    for request in requests:
        assert request.attributes is not None
        assert callers[parent_id(request) or 0] == request.attributes["gen_ai.response.id"]
        assert request.attributes["gen_ai.request.stream"] is True


def test_several_outputs_are_one_request(traced: Tracing) -> None:
    traced.llm.generate([[1, 2, 3]], tokens(5, n=3, temperature=1.0, ignore_eos=True))
    request = traced.span("text_completion tiny")
    assert request.attributes is not None
    assert request.attributes["gen_ai.request.choice.count"] == 3
    assert request.attributes["gen_ai.usage.output_tokens"] == 15
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length",) * 3
    assert len([span for span in traced.spans() if span.name == "decode"]) == 1


def test_request_that_is_aborted_in_the_queue_has_one_phase() -> None:
    gate = StepGate()
    traced = Tracing(on_step=gate, scheduler=SchedulerConfig(max_batch_size=1))
    with traced.llm as llm:
        running = llm.generate_async([1], tokens(2), request_id="running")
        gate.wait()
        waiting = llm.generate_async([1], tokens(2), request_id="waiting")
        waiting.abort()
        gate.open()
        running.result(WAIT_S)
        assert waiting.result(WAIT_S).finish_reason == "abort"
        by_id = {
            span.attributes["gen_ai.response.id"]: span
            for span in traced.spans()
            if span.attributes and "gen_ai.response.id" in span.attributes
        }
        aborted = by_id["waiting"]
        assert aborted.attributes is not None
        assert aborted.attributes["gen_ai.response.finish_reasons"] == ("abort",)
        assert "gen_ai.response.time_to_first_chunk" not in aborted.attributes
        children = [span.name for span in traced.spans() if parent_id(span) == own_id(aborted)]
        assert children == ["queue"]


def test_errors_show_in_the_span(traced: Tracing) -> None:
    with pytest.raises(PromptTooLongError):
        traced.llm.generate_async("x" * 1000, tokens(2)).result(WAIT_S)
    request = traced.span("text_completion tiny")
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes is not None
    assert request.attributes["error.type"] == "PromptTooLongError"
    assert "gen_ai.response.finish_reasons" not in request.attributes


def test_death_of_the_engine_ends_all_spans() -> None:
    gate = StepGate()

    def fail(batch: Any) -> None:
        gate(batch)
        raise OSError("the device is gone")

    traced = Tracing(on_step=fail)
    handles = [traced.llm.generate_async([1, 2], tokens(4)) for _ in range(2)]
    gate.open()
    for handle in handles:
        with pytest.raises(EngineDeadError):
            handle.result(WAIT_S)
    requests = [span for span in traced.spans() if span.name == "text_completion tiny"]
    assert [span.attributes and span.attributes["error.type"] for span in requests] == ["EngineDeadError"] * 2
    traced.llm.close()


def test_requests_of_an_unsampled_trace_are_left_out() -> None:
    traced = Tracing()
    unsampled = TracerProvider(sampler=ParentBased(ALWAYS_OFF)).get_tracer("caller")
    with traced.llm as llm:
        with unsampled.start_as_current_span("caller"):
            llm.generate([[1]], tokens(2))
        assert not traced.spans()
        llm.generate([[1]], tokens(2))
        assert len(traced.spans()) == 4


def test_spans_of_requests_before_close_are_made_nevertheless() -> None:
    traced = Tracing()
    with traced.llm as llm:
        llm.generate([[1]] * 3, tokens(2))
    assert traced.tracing.join(WAIT_S)
    assert traced.tracing.flush(WAIT_S)
    assert len(traced.exporter.get_finished_spans()) == 12


def test_tracing_may_stop_before_the_engine() -> None:
    traced = Tracing()
    with traced.llm as llm:
        llm.generate([[1]], tokens(2))
        traced.tracing.close()
        traced.tracing.close()
        assert traced.tracing.join(WAIT_S)
        llm.generate([[1]], tokens(2))
    assert len(traced.exporter.get_finished_spans()) == 4


def test_processor_that_raises_loses_one_request_only(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(SpanProcessor):
        num_calls = 0

        def on_start(self, span: Any, parent_context: Any = None) -> None:
            self.num_calls += 1
            if self.num_calls == 1:
                raise OSError("no connection")

    traced = Tracing()
    traced.provider.add_span_processor(Broken())
    with traced.llm as llm:
        llm.generate_async([1], tokens(2), request_id="first").result(WAIT_S)
        llm.generate_async([1], tokens(2), request_id="second").result(WAIT_S)
        requests = [span for span in traced.spans() if span.name == "text_completion tiny"]
    assert [span.attributes and span.attributes["gen_ai.response.id"] for span in requests] == ["second"]
    assert "the spans of request 0 were lost" in caplog.text


NOT_SET_UP = """
from llmengine import ConfigError, LLM
from llmengine.observability import RequestTracing, is_tracing_set_up
from llmengine.testing import FakeBackend
from opentelemetry import trace
from opentelemetry.trace import NoOpTracerProvider

with LLM.from_backend(FakeBackend) as llm:
    assert not is_tracing_set_up()
    try:
        RequestTracing(llm)
    except ConfigError as error:
        assert "set_tracer_provider" in str(error)
    trace.set_tracer_provider(NoOpTracerProvider())
    assert is_tracing_set_up()
    RequestTracing(llm)
    llm.generate([[1]])
print("ok")
"""


def test_program_without_a_provider_is_told() -> None:
    command = [sys.executable, "-c", NOT_SET_UP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
