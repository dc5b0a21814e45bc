"""An OpenAI endpoint on 127.0.0.1 that behaves as the first part of its path says: well, or badly in one way."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PROMPT_OVERHEAD = 7
"""Tokens that this endpoint adds to a prompt, in which it counts two tokens a word."""

BEHAVIOURS = """
good        tokens one a chunk, usage in the last chunk
pairs       two tokens a chunk
uncounted   no usage
dribble     every byte in a write of its own
closing     every answer ends its connection
unlimited   the body ends with the connection, without a length or chunks
cut         the connection ends in the middle of a stream
unfinished  the stream ends without a finish reason and without [DONE]
broken      an error in the middle of a stream
garbled     chunks that are not JSON
empty       a stream without tokens
html        a page of HTML
plain       one JSON answer, although a stream was asked for
busy        429
modelless   an empty list of models
silent      no answer at all
gibberish   not HTTP
"""


class FakeEndpoint:
    """What the endpoint saw: the JSON of each POST, the keys, and how many connections were made."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.num_connections = 0
        self.port = 0

    def base_url(self, behaviour: str = "good") -> str:
        assert f"\n{behaviour} " in BEHAVIOURS
        return f"http://127.0.0.1:{self.port}/{behaviour}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; True if the connection can carry another."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        self.keys.add(headers.get("authorization"))
        _, behaviour, path = head[0].split(" ")[1].split("/", 2)
        body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))) or b"{}")
        if path == "v1/models":
            models = [] if behaviour == "modelless" else [{"id": "fake-1"}, {"id": "fake-2"}]
            return await _send_json(writer, {"object": "list", "data": models})
        self.bodies.append(body)
        return await _behave(behaviour, path == "v1/chat/completions", body, reader, writer)


async def _behave(
    behaviour: str, chat: bool, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    text = body["messages"][0]["content"] if chat else body["prompt"]
    usage = {"prompt_tokens": 2 * len(text.split()) + PROMPT_OVERHEAD, "completion_tokens": body["max_tokens"]}
    if behaviour == "silent":
        await reader.read()
        return False
    if behaviour == "gibberish":
        writer.write(b"220 smtp.example ESMTP\r\n")
        await writer.drain()
        return True
    if behaviour == "busy":
        return await _send_json(writer, {"error": {"message": "the queue is full"}}, "429 Too Many Requests")
    if behaviour == "html":
        return await _send(writer, b"<html>Welcome</html>", "text/html")
    if not body.get("stream") or behaviour == "plain":
        return await _send_json(writer, {"choices": [{"text": "x"}], "usage": usage})
    return await _send_stream(behaviour, list(_events(behaviour, chat, usage)), writer)


def _events(behaviour: str, chat: bool, usage: dict[str, int]) -> Iterator[str]:
    def chunk(text: str | None, finish_reason: str | None = None, **more: Any) -> str:
        choice = {"delta": {} if text is None else {"content": text}} if chat else {"text": text or ""}
        return json.dumps({"choices": [{"index": 0, **choice, "finish_reason": finish_reason}], **more})

    size = 2 if behaviour == "pairs" else 1
    if chat:
        yield json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    count = 0 if behaviour == "empty" else usage["completion_tokens"] // size
    for index in range(count):
        if index == count // 2 and behaviour == "broken":
            yield json.dumps({"error": {"message": "out of memory", "code": 500}})
            return
        if index == count // 2 and behaviour in ("cut", "unfinished"):
            return
        yield "{this is not JSON" if behaviour == "garbled" else chunk("x" * size)
    yield chunk(None, "length")
    if behaviour not in ("uncounted", "empty"):
        yield json.dumps({"choices": [], "usage": usage})
    yield "[DONE]"


async def _send_stream(behaviour: str, events: list[str], writer: asyncio.StreamWriter) -> bool:
    is_chunked = behaviour != "unlimited"
    kept = behaviour not in ("closing", "unlimited", "cut")
    header = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    header += "transfer-encoding: chunked\r\n" if is_chunked else ""
    header += "" if kept else "connection: close\r\n"
    parts = [f"{header}\r\n".encode()]
    for event in events:
        data = f": comment\r\nevent: x\r\ndata: {event}\r\n\r\n" if behaviour == "dribble" else f"data: {event}\n\n"
        parts.append(f"{len(data):x}\r\n{data}\r\n".encode() if is_chunked else data.encode())
    if is_chunked and behaviour != "cut":
        parts.append(b"0\r\n\r\n")
    if behaviour == "dribble":
        parts = [bytes([byte]) for byte in b"".join(parts)]
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(0)
    return kept


async def _send_json(writer: asyncio.StreamWriter, value: Any, status: str = "200 OK") -> bool:
    return await _send(writer, json.dumps(value).encode(), "application/json", status)


async def _send(writer: asyncio.StreamWriter, body: bytes, kind: str, status: str = "200 OK") -> bool:
    writer.write(f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return True


@contextmanager
def running_endpoint() -> Iterator[FakeEndpoint]:
    """An endpoint on a thread of its own."""
    endpoint = FakeEndpoint()
    ready, loop = threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(endpoint.handle, "127.0.0.1", 0)
        endpoint.port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        open_tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    try:
        yield endpoint
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
