"""A small HTTP/1.1 client for many concurrent streams: an asyncio protocol around httptools' parser.

General clients cost several times as much for each chunk (see docs/decisions.md), and a load test measures its own
client where that is the limit. What it leaves out, a load test does not need: redirects, cookies, proxies, HTTP/2,
compression.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from llmengine.errors import ConfigError
from llmengine.load_test.records import ENDED_EARLY, RequestFailure

_MAX_BODY_BYTES = 16 << 20

OnBody = Callable[[bytes, float], None]
"""Called with each piece of a body and the moment at which it was read from the socket."""


@dataclass(slots=True)
class Response:
    """An answer whose header has arrived. A body that was not streamed is in `body`."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is a successful stream of server-sent events."""
        return self.status == 200 and self.headers.get(b"content-type", b"").startswith(b"text/event-stream")


class _Exchange:
    """One request on a connection: collects the answer through the callbacks of httptools' parser."""

    def __init__(self, on_event_stream: OnBody | None, done: asyncio.Future[None]) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.response = Response()
        self.done = done
        self.began = False
        self.keep_alive = False
        self._on_event_stream = on_event_stream
        self._is_stream = False
        self._has_header = False
        self._moment = 0.0

    def feed(self, data: bytes, moment: float) -> None:
        self.began = True
        self._moment = moment
        if self.done.done():
            return
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            # An error of our callbacks comes wrapped.
            cause = error.__context__
            failure = cause if isinstance(cause, RequestFailure) else None
            self.fail(failure or RequestFailure("not HTTP", f"the answer is not HTTP/1.1: {error}"))

    def fail(self, failure: RequestFailure) -> None:
        if not self.done.done():
            self.done.set_exception(failure)

    def lost(self, cause: Exception | None) -> None:
        """The connection ended. That is the end of a body without a length, and a failure of any other."""
        has_length = {b"content-length", b"transfer-encoding"} & self.response.headers.keys()
        if self._has_header and not has_length and cause is None:
            self.on_message_complete()
        else:
            place = "in the middle of the answer" if self.began else "without an answer"
            reason = "" if cause is None else f": {cause}"
            self.fail(RequestFailure(ENDED_EARLY, f"the connection ended {place}{reason}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.response.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.response.status = self.parser.get_status_code()
        self._has_header = True
        self._is_stream = self._on_event_stream is not None and self.response.is_event_stream

    def on_body(self, data: bytes) -> None:
        if self._is_stream and self._on_event_stream is not None:
            self._on_event_stream(data, self._moment)
        elif len(self.response.body) + len(data) > _MAX_BODY_BYTES:
            raise RequestFailure("not OpenAI", f"the answer has more than {_MAX_BODY_BYTES} bytes")
        else:
            self.response.body += data

    def on_message_complete(self) -> None:
        if not self.done.done():
            self.keep_alive = self.parser.should_keep_alive()
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time; it is in `connections` from its start to its end."""

    def __init__(self, connections: set[_Connection]) -> None:
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None
        self.num_exchanges = 0
        self.lost = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data, time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._connections.discard(self)
        self.lost.set()
        if self._exchange is not None:
            self._exchange.lost(exc)

    async def exchange(self, request: bytes, on_event_stream: OnBody | None) -> tuple[_Exchange, RequestFailure | None]:
        """Send a request and return when the whole answer is there, or failed. Cancelling closes the connection."""
        assert self._transport is not None
        exchange = self._exchange = _Exchange(on_event_stream, asyncio.get_running_loop().create_future())
        self.num_exchanges += 1
        failure = None
        try:
            self._transport.write(request)
            await exchange.done
        except RequestFailure as error:
            failure = error
        finally:
            self._exchange = None
            if not exchange.keep_alive:
                self.close()
        return exchange, failure

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class HttpClient:
    """Posts to and gets from one origin, over as many connections as there are requests at once.

    Raises `ConfigError` for an address that is not of HTTP. `aclose()` ends its connections.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url must begin with http:// or https://, not {base_url!r}")
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ConfigError(f"base_url has no valid port: {base_url!r}") from error
        self.base_url = base_url.rstrip("/")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        fixed = {"host": parts.netloc.rpartition("@")[2], "accept": "*/*", "user-agent": "llmengine-bench", **headers}
        for name, value in fixed.items():
            if not value.isascii() or not value.isprintable():
                raise ConfigError(f"the header {name} must be printable ASCII")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fixed.items())
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def get(self, path: str) -> Response:
        """The answer to a GET. Raises `RequestFailure` if there is none."""
        return await self._send(f"GET {self._path}{path} HTTP/1.1\r\n{self._head}\r\n".encode(), None)

    async def post(self, path: str, body: bytes, on_event_stream: OnBody | None = None) -> Response:
        """The answer to a POST of JSON, at its end.

        `on_event_stream` receives the body if it is a successful event stream; what it raises, a `RequestFailure`, ends
        the request. Raises `RequestFailure` if there is no answer, or not all of it.
        """
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}content-type: application/json\r\n"
        return await self._send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body, on_event_stream)

    async def _send(self, request: bytes, on_event_stream: OnBody | None) -> Response:
        while True:
            connection = await self._connection()
            try:
                exchange, failure = await connection.exchange(request, on_event_stream)
            finally:
                self._give_back(connection)
            if failure is None:
                return exchange.response
            # A server may close an idle connection just as it is used again: that says nothing of the request.
            if exchange.began or connection.num_exchanges == 1:
                raise failure

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"ssl": True} if self._tls else {}
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._open), self._host, self._port, **options
            )
        except OSError as error:
            kind = "refused" if isinstance(error, ConnectionRefusedError) else "no connection"
            raise RequestFailure(kind, f"{self._host}:{self._port}: {error}") from error
        return connection

    def _give_back(self, connection: _Connection) -> None:
        if connection.is_open:
            self._idle.append(connection)

    async def aclose(self) -> None:
        """Close every connection; requests that still run fail."""
        self._idle.clear()
        for connection in list(self._open):
            connection.close()
            await connection.lost.wait()
