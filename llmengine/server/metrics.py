"""`/metrics`, what it counts of HTTP, and the traces of requests: the server's use of `llmengine.observability`."""

from __future__ import annotations

import functools
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmengine.llm import LLM
from llmengine.observability import EngineMetrics
from llmengine.observability.http_metrics import HttpMetrics
from llmengine.server.config import ServerConfig
from llmengine.server.middleware import local_path

METRICS_PATH = "/metrics"

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_OTHER = "other"
"""The label of methods and paths that clients made up: each value of a label costs memory for ever."""

_CLIENT_LEFT = 499

router = APIRouter(tags=["operation"])


@router.get(METRICS_PATH)
def metrics(request: Request) -> Response:
    """All metrics in the text format of Prometheus, or of OpenMetrics for clients that ask for it. Needs no key."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    # On a thread of the pool, since this is not a coroutine: some hundred series take a millisecond.
    return Response(encode(request.app.state.registry), headers={"content-type": content_type})


def observe(llm: LLM, config: ServerConfig, registry: CollectorRegistry) -> None:
    """Count what the engine does, and trace its requests if the program has set OpenTelemetry up."""
    if config.metrics:
        EngineMetrics(llm, registry=registry, model_name=config.model_name, names=config.metric_names)
    if has_tracing():
        from llmengine.observability import RequestTracing

        RequestTracing(llm, model_name=config.model_name)


def has_tracing() -> bool:
    """True if OpenTelemetry is installed, and the program has set a tracer provider."""
    if not _has_opentelemetry():
        return False
    from llmengine.observability import is_tracing_set_up

    return is_tracing_set_up()


@functools.cache
def _has_opentelemetry() -> bool:
    # Importing it is the only sure test: "opentelemetry" is a namespace that other packages have parts in.
    try:
        import opentelemetry.trace  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


class Meter:
    """Counts requests by route and status, and measures their times and the event loop's lag. Pure ASGI.

    A request that no route took, or that was refused before any could, is counted with the routes only if its path is
    known to be one of them.
    """

    def __init__(self, app: ASGIApp, http: HttpMetrics) -> None:
        self._app = app
        self._http = http
        self._paths: set[str] = set()
        """Declared paths that have been asked for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count it when its answer has ended."""
        self._http.watch_loop()
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outer_route = scope.get("route")  # of an application in which this one is mounted
        began = time.perf_counter()
        status, first_byte_s = _CLIENT_LEFT, None

        async def noted(message: Message) -> None:
            nonlocal status, first_byte_s
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first_byte_s is None and message.get("body"):
                first_byte_s = time.perf_counter() - began
            await send(message)

        self._http.began()
        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500 if status == _CLIENT_LEFT else status
            raise
        finally:
            method = scope["method"] if scope["method"] in _METHODS else _OTHER
            self._http.ended(method, self._route(scope, outer_route), status, first_byte_s, time.perf_counter() - began)

    def _route(self, scope: Scope, outer_route: object) -> str:
        """The request's route as the application declares it, such as `/v1/responses/{response_id}`."""
        route = scope.get("route")
        path = getattr(route, "path", None)
        if route is not outer_route and isinstance(path, str):
            self._paths.add(path)
            return path
        return path if (path := local_path(scope)) in self._paths else _OTHER


class CallersTrace:
    """Continues the trace that a client sends in the header `traceparent`, unless something else has done so already.

    Pure ASGI. What a program's own instrumentation of ASGI has put into the context stays.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on in the client's context."""
        token = _enter_context(scope) if scope["type"] == "http" and has_tracing() else None
        try:
            await self._app(scope, receive, send)
        finally:
            if token is not None:
                from opentelemetry import context

                context.detach(token)


def _enter_context(scope: Scope) -> Any:
    """Enter the context that the request's headers name; None if there is a span already."""
    from opentelemetry import context, propagate, trace

    if trace.get_current_span().get_span_context().is_valid:
        return None
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return context.attach(propagate.extract(headers))
