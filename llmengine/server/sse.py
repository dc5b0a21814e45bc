"""Server-sent events: streams that begin with the first output and end with their client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmengine.engine.handle import RequestHandle
from llmengine.errors import LLMEngineError
from llmengine.server.errors import HttpError, as_http_error


@contextmanager
def aborted_on_disconnect(receive: Receive, handles: Sequence[RequestHandle]) -> Iterator[None]:
    """While the block runs, the client's disconnect aborts the requests; their readers get the last output then.

    At its end, all requests are left, whether they have ended or not. The request's body must have been read.
    """

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for handle in handles:
            handle.abort()

    listener = asyncio.create_task(listen())  # not a task group, which would wrap the errors of the block
    try:
        yield
    finally:
        listener.cancel()
        for handle in handles:
            handle.abort()


class EventStream:
    """The open end of a response. Its headers are sent with the first events, so that errors before have a status."""

    __slots__ = ("_headers", "_send", "started")

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self.started = False

    async def send(self, events: bytes, *, last: bool = False) -> None:
        """Send encoded events; waits while the client is slow, so that what comes meanwhile becomes one event."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})


class EventStreamResponse(Response):
    """A response whose events come from requests in progress.

    Args:
        handles: the requests, which are aborted when the client leaves.
        write: sends all events of an answer, the last of them with `last=True`. What it raises before the first event
            becomes an ordinary error response.
        encode_error: the event that tells of an error, and whatever ends a stream.
        headers: further headers.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        handles: Sequence[RequestHandle],
        write: Callable[[EventStream], Awaitable[None]],
        encode_error: Callable[[HttpError], bytes],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._handles = handles
        self._write = write
        self._encode_error = encode_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the whole stream."""
        stream = EventStream(send, self.raw_headers)
        with aborted_on_disconnect(receive, self._handles):
            try:
                await self._write(stream)
            except (LLMEngineError, HttpError) as error:
                if not stream.started:
                    raise
                await stream.send(self._encode_error(as_http_error(error)), last=True)


def event(data: str, name: str | None = None) -> bytes:
    """One event, whose data is JSON and so has no line ends."""
    return (f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n").encode()


async def gather_events(writers: Sequence[Callable[[], Awaitable[Any]]]) -> None:
    """Run several writers of one stream at once; the first error ends them all, and is raised."""
    if len(writers) == 1:
        await writers[0]()
        return
    tasks: list[asyncio.Task[Any]] = []

    async def run(write: Callable[[], Awaitable[Any]]) -> None:
        await write()

    try:
        async with asyncio.TaskGroup() as group:
            tasks.extend(group.create_task(run(write)) for write in writers)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
