"""RequestTracing: OpenTelemetry spans of requests, in the context of their callers."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.trace import ProxyTracerProvider, Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.util.types import AttributeValue

import llmengine
from llmengine.checks import require_text
from llmengine.errors import ConfigError
from llmengine.observer import EngineObserver, RequestEnd, SubmittedRequest
from llmengine.outputs import RequestTimeline

if TYPE_CHECKING:
    from llmengine.llm import LLM

logger = logging.getLogger(__name__)

_MAX_WAITING = 10_000
"""Requests whose spans are not made yet; beyond these, spans are dropped."""


def is_tracing_set_up() -> bool:
    """True if the program has set a tracer provider of OpenTelemetry."""
    return not isinstance(trace.get_tracer_provider(), ProxyTracerProvider)


@dataclass(slots=True)
class _Traced:
    """A request between its submission and the end of its last output."""

    context: Context
    epoch_ns: int
    """Nanoseconds since 1970 when `time.monotonic()` was 0."""
    ends: list[RequestEnd] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    """Counts the ends; taking a number is atomic, whichever threads the ends come on."""

    def at(self, moment: float) -> int:
        """A moment of `time.monotonic()` as OpenTelemetry counts, in nanoseconds since 1970."""
        return self.epoch_ns + int(moment * 1e9)


class RequestTracing(EngineObserver):
    """Makes a span of each request, a child of the span in whose context it was submitted, with children of its own.

    The span is named "chat MODEL" or "text_completion MODEL", and carries OpenTelemetry's attributes for generative AI
    (`gen_ai.*`). Its children are `queue`, `prefill` and `decode`; those that a request did not reach are missing. All
    of them are made when the request has ended, with their own times, on a thread of this object: the engine thread
    only hands over. Requests of a caller whose span is not sampled are not looked at again.

    Args:
        llm: the engine; referred to weakly.
        tracer_provider: None for the program's own, which it sets with `opentelemetry.trace.set_tracer_provider`.
        model_name: `gen_ai.request.model`.

    Raises:
        ConfigError: the program has set no tracer provider, so that all spans would be lost.
    """

    def __init__(self, llm: LLM, *, tracer_provider: TracerProvider | None = None, model_name: str = "default") -> None:
        require_text("model_name", model_name, error=ConfigError)
        if tracer_provider is None and not is_tracing_set_up():
            raise ConfigError(
                "no tracer provider is set, and spans would be lost; call opentelemetry.trace.set_tracer_provider() "
                "first, or pass tracer_provider"
            )
        provider = trace.get_tracer_provider() if tracer_provider is None else tracer_provider
        self._tracer = provider.get_tracer("llmengine", llmengine.__version__)
        self._model_name = model_name
        self._ended: queue.SimpleQueue[_Traced | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._make_spans, name="llmengine-tracing", daemon=True)
        self._thread.start()
        self._llm = weakref.ref(llm)
        llm.add_observer(self)

    def close(self) -> None:
        """Trace nothing more. Idempotent; the end of the `LLM` does the same."""
        if (llm := self._llm()) is not None:
            llm.remove_observer(self)
        self._ended.put(None)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Block until the spans of all requests that have ended are made; False after `timeout_s` seconds."""
        if not self._thread.is_alive():
            return True
        done = threading.Event()
        self._ended.put(done)
        return done.wait(timeout_s)

    def join(self, timeout_s: float | None = None) -> bool:
        """Block until all spans are made, which comes after the `LLM` was closed; False after `timeout_s` seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def request_submitted(self, request: SubmittedRequest) -> object:
        """Remember the caller's context."""
        context = get_current()
        parent = trace.get_current_span(context).get_span_context()
        if parent.is_valid and not parent.trace_flags.sampled:
            return None
        return _Traced(context, time.time_ns() - int(time.monotonic() * 1e9))

    def request_ended(self, end: RequestEnd) -> None:
        """Hand the request over once all of its outputs have ended."""
        traced = end.note
        if not isinstance(traced, _Traced):
            return
        traced.ends.append(end)
        if next(traced.numbers) == end.request.params.num_outputs and self._ended.qsize() < _MAX_WAITING:
            self._ended.put(traced)

    def engine_closed(self) -> None:
        """Let the thread end when it has made all spans."""
        self._ended.put(None)

    def _make_spans(self) -> None:
        while (item := self._ended.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                _make_span(self._tracer, self._model_name, item)
            except Exception:  # a processor of the program's; the next request is traced nevertheless
                logger.exception("llmengine: the spans of request %r were lost", item.ends[0].request.number)


def _make_span(tracer: Tracer, model_name: str, traced: _Traced) -> None:
    ends = sorted(traced.ends, key=lambda end: end.output.index)
    request, timeline = ends[0].request, ends[0].output.timeline
    operation = "chat" if request.is_chat else "text_completion"
    ended = max(end.ended for end in ends)
    span = tracer.start_span(
        f"{operation} {model_name}",
        context=traced.context,
        kind=SpanKind.INTERNAL,  # the model runs in this process
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.request.model": model_name,
            **_request_attributes(request),
            **_response_attributes(model_name, ends),
        },
        start_time=traced.at(timeline.queued),
    )
    if span.is_recording():
        _make_children(tracer, span, traced, timeline, ended)
        error = next((end.error for end in ends if end.error is not None), None)
        if error is not None:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end(traced.at(ended))


def _make_children(tracer: Tracer, span: Span, traced: _Traced, timeline: RequestTimeline, ended: float) -> None:
    """Make a span of each phase that the request reached; a phase that it did not leave ends with the request."""
    context = trace.set_span_in_context(span, traced.context)
    moments = [timeline.queued, timeline.first_scheduled, timeline.first_token]
    for name, began, left in zip(("queue", "prefill", "decode"), moments, [*moments[1:], None], strict=True):
        if began is not None:
            child = tracer.start_span(name, context=context, start_time=traced.at(began))
            child.end(traced.at(ended if left is None else left))


def _request_attributes(request: SubmittedRequest) -> Mapping[str, AttributeValue]:
    params, options = request.params, request.options
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.provider.name": "llmengine",
        "gen_ai.request.max_tokens": params.max_new_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        "gen_ai.request.presence_penalty": params.presence_penalty or None,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.request.stream": request.is_streaming,
        "llmengine.priority": options.priority or None,
        "llmengine.tenant": options.tenant,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _response_attributes(model_name: str, ends: list[RequestEnd]) -> Mapping[str, AttributeValue]:
    outputs = [end.output for end in ends]
    first, timeline = outputs[0], outputs[0].timeline
    attributes: dict[str, AttributeValue] = {
        "gen_ai.response.model": model_name,
        "gen_ai.response.id": str(first.request_id),
        "gen_ai.usage.input_tokens": first.num_prompt_tokens,
        "gen_ai.usage.output_tokens": sum(output.num_tokens for output in outputs),
        "gen_ai.usage.cache_read.input_tokens": first.num_cached_tokens,
        "llmengine.num_preemptions": sum(output.timeline.num_preemptions for output in outputs),
    }
    if reasons := [output.finish_reason for output in outputs if output.finish_reason is not None]:
        attributes["gen_ai.response.finish_reasons"] = reasons
    if timeline.first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = timeline.first_token - timeline.queued
    return attributes
