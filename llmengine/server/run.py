"""Runs the application with uvicorn, which handles SIGTERM and Ctrl-C: running requests are finished first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llmengine.llm import LLM
from llmengine.server.app import create_app
from llmengine.server.config import ServerConfig
from llmengine.server.protocol import LimitedProtocol


def uvicorn_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """How uvicorn serves the application best; `settings` are uvicorn's, and replace those chosen here."""
    return uvicorn.Config(
        app, **{"http": LimitedProtocol, "ws": "none", "access_log": False, "server_header": False, **settings}
    )


def run(load: Callable[[], Awaitable[LLM]], config: ServerConfig, *, host: str, port: int, log_level: str) -> None:
    """Serve until a signal ends the process. Must run in the main thread.

    A first SIGTERM or Ctrl-C lets no new requests in and waits for those in progress, for at most `drain_s` seconds.
    """
    settings = uvicorn_config(
        create_app(load, config),
        host=host,
        port=port,
        log_level=log_level,
        access_log=log_level == "debug",
        timeout_graceful_shutdown=max(1, round(config.drain_s)),
    )
    uvicorn.Server(settings).run()
