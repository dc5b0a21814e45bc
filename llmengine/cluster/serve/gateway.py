"""Gateway: the deployment of a Serve application that HTTP requests arrive at. It has no model.

Serve's proxies choose a replica before they have read a request's body. So a gateway reads it, finds the prompt in it,
and has `PrefixRequestRouter` choose among the engines.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llmengine.cluster.serve.forwarded import ForwardedRequest
from llmengine.cluster.serve.merged_metrics import merged_metrics
from llmengine.errors import EngineClosedError, ReplicaDeadError
from llmengine.server.config import ServerConfig
from llmengine.server.errors import anthropic_error, as_http_error, error_response, error_shape
from llmengine.server.health import HEALTH_PATH
from llmengine.server.metrics import METRICS_PATH
from llmengine.server.middleware import Gate, local_path
from llmengine.server.openai.chunks import DONE
from llmengine.server.playground.pages import PUBLIC_PATHS
from llmengine.server.sse import event

_logger = logging.getLogger("llmengine.cluster.serve")

_SCRAPE_TIMEOUT_S = 5.0


class Gateway:
    """Forwards requests to engines, and their answers to clients.

    Args:
        engines: handle of the deployment of `EngineReplica`.
        config: settings of the replicas' ASGI application. Keys, the limits of bodies and `max_concurrent_requests`
            count here already.
    """

    def __init__(self, engines: Any, config: ServerConfig) -> None:
        self._engines = engines
        self._streams = engines.options(stream=True, method_name="answer")
        self._config = config
        self._public_paths = frozenset({HEALTH_PATH, METRICS_PATH, *(PUBLIC_PATHS if config.playground else ())})
        self._app: ASGIApp = Gate(self._forward, config, self._public_paths)
        if config.cors_origins:
            origins = list(config.cors_origins)
            self._app = CORSMiddleware(self._app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    async def __call__(self, request: Request) -> Response:
        """What Serve calls for a request: a response that is yet to be made."""
        return _AppResponse(self._app)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that the gate has let in."""
        path = local_path(scope)
        if path == METRICS_PATH and self._config.metrics:
            await (await self._metrics())(scope, receive, send)
            return
        body = b"" if path in self._public_paths else (await receive())["body"]
        answer = self._streams.remote(ForwardedRequest.of(scope, body))
        progress = _Progress(send)
        try:
            async for messages in answer:
                for message in messages:
                    await progress.send(message)
        except Exception as error:
            await progress.fail(scope, receive, error)
        finally:
            answer.cancel()

    async def _metrics(self) -> Response:
        """The metrics of all replicas that answer in time."""
        scrape = self._engines.broadcast("metrics")
        answers = await scrape.results_async(timeout_s=_SCRAPE_TIMEOUT_S, return_exceptions=True)
        texts = dict(answer for answer in answers if not isinstance(answer, BaseException))
        return Response(merged_metrics(texts), media_type="text/plain; version=0.0.4")


class _AppResponse(Response):
    """A response that an ASGI application makes."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Progress:
    """How far an answer has come, which decides how a client is told of an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_started = False
        self._has_ended = False
        self._is_event_stream = False

    async def send(self, message: Any) -> None:
        """Send a message of the replica's application."""
        if message["type"] == "http.response.start":
            self._has_started = True
            self._is_event_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def fail(self, scope: Scope, receive: Receive, error: Exception) -> None:
        """Tell the client that its answer ends here; raises the error where that cannot be said."""
        _logger.warning("%s: %r", scope["path"], error)
        fault = as_http_error(_as_own_error(error))
        if not self._has_started:
            await error_response(scope, fault)(scope, receive, self._send)
        elif self._is_event_stream and not self._has_ended:
            shape = error_shape(scope)
            data = json.dumps(shape(fault))
            body = event(data, "error") if shape is anthropic_error else event(data) + DONE
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        elif not self._has_ended:
            raise error


def _as_own_error(error: Exception) -> Exception:
    """What Ray says of a replica, in our words."""
    if isinstance(error, RayActorError):
        return ReplicaDeadError("the replica that ran the request has died")
    if isinstance(error, DeploymentUnavailableError):
        return EngineClosedError("there is no replica")
    return error
