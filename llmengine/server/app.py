"""create_app: the ASGI application around an `LLM`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import llmengine
from llmengine.errors import LLMEngineError
from llmengine.llm import LLM
from llmengine.observability.http_metrics import http_metrics_of
from llmengine.server import health, metrics
from llmengine.server.anthropic import messages
from llmengine.server.config import ServerConfig
from llmengine.server.errors import HttpError, error_response
from llmengine.server.middleware import Gate
from llmengine.server.openai import chat, completions, models, responses, tokens
from llmengine.server.playground import pages
from llmengine.server.service import Service


def create_app(
    llm: LLM | Callable[[], Awaitable[LLM]],
    config: ServerConfig | None = None,
    *,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """An ASGI application that serves a model. It works alone, and mounted in another application.

    Args:
        llm: a loaded model, which stays the caller's to close; or an async function that loads one, which the
            application's lifespan calls when it starts. It closes that model when it ends, after up to `drain_s`
            seconds for requests in progress. Applications that mount this one do not run its lifespan, so they pass a
            loaded model.
        config: None: `ServerConfig()`, which lets everybody in.
        registry: where metrics are registered and `/metrics` reads them; None: one of the application's own. Several
            applications may share one.

    Raises `ConfigError` for a setting out of range, and `UnsupportedModelError` for a model whose generation defaults
    ask for something that is not supported. No signal handlers are installed and no logging is set up.
    """
    settings = (config or ServerConfig()).resolve()
    shown = CollectorRegistry() if registry is None else registry

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if isinstance(llm, LLM):
            yield
            return
        loaded = await llm()
        try:
            metrics.observe(loaded, settings, shown)
            app.state.service = Service(loaded, settings)
            yield
        finally:
            app.state.service = None
            await loaded.aclose(drain=settings.drain_s)

    app = FastAPI(
        title="llmengine",
        version=llmengine.__version__,
        openapi_url="/openapi.json" if settings.openapi else None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.registry = shown
    app.state.service = None
    if isinstance(llm, LLM):
        metrics.observe(llm, settings, shown)
        app.state.service = Service(llm, settings)
    app.state.responses = responses.StoredResponses(settings.max_stored_bytes)
    _add_routes(app, settings, shown)
    return app


def _add_routes(app: FastAPI, settings: ServerConfig, registry: CollectorRegistry) -> None:
    """Add endpoints and the answers to errors, and what stands before them: measurement, CORS and the gate."""
    for module in (chat, completions, models, tokens, responses, messages, health):
        app.include_router(module.router)
    public_paths = {health.HEALTH_PATH, metrics.METRICS_PATH}
    if settings.playground:
        app.include_router(pages.router)
        public_paths |= pages.PUBLIC_PATHS
    for kind in (LLMEngineError, HttpError, RequestValidationError, HTTPException, Exception):
        app.exception_handler(kind)(_answer_error)
    if settings.metrics:
        app.include_router(metrics.router)
    app.add_middleware(Gate, config=settings, public_paths=frozenset(public_paths))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    if settings.metrics:
        app.add_middleware(metrics.Meter, http=http_metrics_of(registry))


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(request.scope, error)
