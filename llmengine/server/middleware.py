"""What happens to a request before an endpoint sees it: keys, the number of requests, and the whole body. Pure ASGI.

Responses pass by untouched, so streams cost nothing here.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmengine.server.config import ServerConfig
from llmengine.server.errors import RETRY_AFTER_S, HttpError, error_response

TENANT = "llmengine.tenant"
"""Key of a request's `scope` under which its tenant stands."""


def local_path(scope: Scope) -> str:
    """The request's path inside the application, wherever that is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


class Gate:
    """Lets requests in that bring a key and find room, and hands their bodies on in one piece.

    `public_paths` need no key, and are answered however many requests there are.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, public_paths: frozenset[str]) -> None:
        self._app = app
        self._config = config
        self._keys = {key.encode(): tenant for key, tenant in config.tenants.items()}
        self._public_paths = public_paths
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, or pass it on."""
        if scope["type"] != "http" or local_path(scope) in self._public_paths:
            await self._app(scope, receive, send)
            return
        self._num_requests += 1
        try:
            headers = Headers(scope=scope)
            scope[TENANT] = self._tenant(headers)
            self._check_room()
            whole = await self._read_body(headers, receive)
            if whole is not None:
                await self._app(scope, whole, send)
        except HttpError as error:
            await error_response(scope, error)(scope, receive, send)
        finally:
            self._num_requests -= 1

    def _tenant(self, headers: Headers) -> str | None:
        """The tenant of a request's key or header; raises `HttpError` for a wrong key."""
        tenant = _tenant_of_key(self._keys, _given_key(headers)) if self._keys else None
        if tenant is None and self._config.tenant_header is not None:
            tenant = headers.get(self._config.tenant_header)
        return tenant

    def _check_room(self) -> None:
        limit = self._config.max_concurrent_requests
        if self._num_requests > limit:
            message = f"the server answers {limit} requests at a time (max_concurrent_requests); try again later"
            headers = {"retry-after": str(RETRY_AFTER_S)}
            raise HttpError(429, message, code="rate_limit_exceeded", headers=headers)

    async def _read_body(self, headers: Headers, receive: Receive) -> Receive | None:
        """A `receive` that gives the whole body first; None if the client left. Raises `HttpError` past the limits."""
        limit, timeout_s = self._config.max_body_bytes, self._config.body_timeout_s
        length = headers.get("content-length", "0")
        too_large = HttpError(413, f"the body exceeds {limit} bytes (max_body_bytes)", code="body_too_large")
        too_large.headers = {"connection": "close"}
        if length.isdecimal() and int(length[:20]) > limit:
            raise too_large
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size, more = size + len(chunks[-1]), message.get("more_body", False)
                    if size > limit:
                        raise too_large
        except TimeoutError:
            late = f"the body did not arrive within {timeout_s:g} s (body_timeout_s)"
            raise HttpError(408, late, code="body_timeout", headers={"connection": "close"}) from None
        return _replay(b"".join(chunks), receive)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` whose first message is a whole body, and whose others are those of `receive`."""
    first: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replayed() -> Message:
        nonlocal first
        if first is None:
            return await receive()
        message, first = first, None
        return message

    return replayed


def _given_key(headers: Headers) -> bytes:
    """The key of a request: OpenAI's way to send it, or Anthropic's."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    given = value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    return given.encode("latin-1", "replace")


def _tenant_of_key(keys: Mapping[bytes, str | None], given: bytes) -> str | None:
    """The tenant of a key. Every key is compared, in a time that does not depend on where they differ."""
    found: list[str | None] = [tenant for key, tenant in keys.items() if hmac.compare_digest(key, given)]
    if not found:
        message = "this server needs an API key: send a valid one as 'Authorization: Bearer KEY'"
        raise HttpError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
    return found[0]
