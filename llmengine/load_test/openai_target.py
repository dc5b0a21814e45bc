"""A load's target that is an OpenAI endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmengine.load_test.errors import EndpointError
from llmengine.load_test.http_client import HttpClient, Response
from llmengine.load_test.records import ENDED_EARLY, LoadRequest, RequestFailure, RequestRecord
from llmengine.load_test.sse import SseParser

Api = Literal["chat", "completions"]

_DELTA_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")
_EXCERPT = 200


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How requests are made.

    Attributes:
        body: further fields of each request's JSON body.
    """

    api: Api = "chat"
    api_key: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)


class HttpTarget:
    """Streams requests from an OpenAI endpoint. Made by `connect`; `aclose()` ends its connections."""

    def __init__(self, client: HttpClient, model: str, options: EndpointOptions) -> None:
        self._client = client
        self._options = options
        self.model = model
        self._path = "/chat/completions" if options.api == "chat" else "/completions"

    @classmethod
    async def connect(cls, base_url: str, model: str | None, options: EndpointOptions) -> HttpTarget:
        """A target for the model, or, for None, for the first one that the endpoint lists.

        `base_url` is the part before "/chat/completions". Raises `EndpointError` if the endpoint cannot be reached or
        lists no model, and `ConfigError` for an address or a key that cannot be sent.
        """
        headers = {} if options.api_key is None else {"authorization": f"Bearer {options.api_key}"}
        client = HttpClient(base_url, headers)
        try:
            return cls(client, model if model is not None else await _first_model(client), options)
        except BaseException:
            await client.aclose()
            raise

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
        """See `Target.serve`. Usage is asked for, since chunks are not tokens."""
        body = self._body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        stream = _Stream(record)
        response = await self._client.post(self._path, _encode(body), stream.feed)
        if not response.is_event_stream:
            raise _refusal(response)
        stream.require_end()

    async def count_prompt_tokens(self, request: LoadRequest) -> int:
        """See `Target.count_prompt_tokens`: the count of a request that is not streamed."""
        place = f"{self._client.base_url}{self._path}"
        try:
            response = await self._client.post(self._path, _encode(self._body(request)))
            if response.status != 200:
                raise _refusal(response)
        except RequestFailure as failure:
            raise EndpointError(f"{place}: {failure}") from failure
        answer = _decode(response)
        count = _usage(answer, "prompt_tokens") if isinstance(answer, dict) else None
        if count is None:
            raise EndpointError(f"{place}: the answer has no usage.prompt_tokens: {_excerpt(response)}")
        return count

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        prompt = {"prompt": request.prompt} if request.messages is None else {"messages": request.messages}
        return {"model": self.model, **prompt, "max_tokens": request.output_tokens, **self._options.body}


class _Stream:
    """Reads the chunks of one streamed answer into a record."""

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._sse = SseParser()
        self._is_done = False

    def feed(self, data: bytes, moment: float) -> None:
        for event in self._sse.feed(data):
            if event == b"[DONE]":
                self._is_done = True
                self._record.finished = moment
            else:
                self._read_chunk(event, moment)

    def require_end(self) -> None:
        """Raise `RequestFailure` unless the stream had an end, and tokens before it."""
        record = self._record
        if not self._is_done and record.finish_reason is None:
            raise RequestFailure(ENDED_EARLY, "the stream ended without a finish reason or [DONE]")
        if not record.arrivals and not record.num_output_tokens:
            raise RequestFailure("no tokens", f"the stream had no tokens; finish reason: {record.finish_reason!r}")

    def _read_chunk(self, event: bytes, moment: float) -> None:
        try:
            chunk = json.loads(event)
            if chunk.get("error") is not None:
                raise RequestFailure("error in stream", _message(chunk) or repr(chunk["error"]))
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta")
                if choice.get("text") or (delta and any(map(delta.get, _DELTA_FIELDS))):
                    self._record.arrived(moment)
                if choice.get("finish_reason") is not None:
                    self._record.finish_reason = choice["finish_reason"]
                    self._record.finished = moment
        except (ValueError, AttributeError, TypeError) as error:
            text = event[:_EXCERPT].decode(errors="replace")
            raise RequestFailure("not OpenAI", f"a chunk that is not of the OpenAI API: {text!r}") from error
        if chunk.get("usage"):
            self._record.num_prompt_tokens = _usage(chunk, "prompt_tokens")
            self._record.num_output_tokens = _usage(chunk, "completion_tokens")


async def _first_model(client: HttpClient) -> str:
    """Id of the first model that the endpoint lists."""
    place = f"{client.base_url}/models"
    try:
        response = await client.get("/models")
        if response.status != 200:
            raise _refusal(response)
    except RequestFailure as failure:
        raise EndpointError(f"{place}: {failure}") from failure
    answer = _decode(response)
    models = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        raise EndpointError(f"{place}: not a list of models: {_excerpt(response)}")
    ids = [model["id"] for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)]
    if not ids:
        raise EndpointError(f"{place}: lists no model; name one with --model")
    return str(ids[0])


def _refusal(response: Response) -> RequestFailure:
    """What an answer that is not the expected stream means."""
    if response.status == 200:
        kind = response.headers.get(b"content-type", b"none").decode("latin-1")
        return RequestFailure("not OpenAI", f"expected an event stream, not {kind}: {_excerpt(response)}")
    return RequestFailure(f"HTTP {response.status}", _message(_decode(response)) or _excerpt(response))


def _message(answer: Any) -> str | None:
    """The message in an error's JSON, in the shapes that servers give it; None if there is none."""
    error = answer.get("error", answer) if isinstance(answer, dict) else None
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return message if isinstance(message, str) else None


def _usage(answer: dict[str, Any], name: str) -> int | None:
    usage = answer.get("usage")
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if type(count) is int else None


def _decode(response: Response) -> Any:
    try:
        return json.loads(response.body)
    except ValueError:
        return None


def _excerpt(response: Response) -> str:
    return repr(bytes(response.body[:_EXCERPT]).decode(errors="replace"))


def _encode(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
