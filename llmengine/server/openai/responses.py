"""`/v1/responses`: answers to conversations in items, whole or as events, and those that were stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from llmengine.server.errors import HttpError
from llmengine.server.middleware import TENANT
from llmengine.server.openai.responses_answer import ResponseInProgress
from llmengine.server.openai.responses_background import BackgroundResponses
from llmengine.server.openai.responses_events import ResponseEvents, new_id
from llmengine.server.openai.responses_request import (
    Conversation,
    conversation,
    response_head,
    response_params,
)
from llmengine.server.openai.responses_schemas import InputRequest, ResponsesRequest
from llmengine.server.openai.responses_store import ResponseStore, StoredResponse
from llmengine.server.openai.responses_truncation import without_oldest_turns
from llmengine.server.parts import as_json, encode_events
from llmengine.server.service import Service, service_of
from llmengine.server.sse import EventStream, EventStreamResponse, aborted_on_disconnect

router = APIRouter(tags=["OpenAI"])


class StoredResponses:
    """What an application keeps of its responses: those that have ended, and those in the background.

    Attributes:
        keeper: a name of this process. Ids of responses end with it, so that whatever is in front of several processes
            can find the one that keeps a response (`keeper_of`). None: there is only one.
    """

    def __init__(self, max_bytes: int) -> None:
        self.store = ResponseStore(max_bytes)
        self.background = BackgroundResponses(self.store)
        self.keeper: str | None = None

    def new_id(self) -> str:
        """The id of a new response."""
        response_id = new_id("resp")
        return response_id if self.keeper is None else f"{response_id}_{self.keeper}"

    async def find(self, request: Request, response_id: str) -> StoredResponse:
        """A response of the request's tenant that has ended; raises `HttpError` if there is none."""
        tenant = request.scope.get(TENANT)
        if await self.background.find(tenant, response_id) is not None:
            raise HttpError(400, f"the response {response_id!r:.100} is still in progress", code="response_in_progress")
        stored = self.store.get(tenant, response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored


def keeper_of(response_id: str) -> str | None:
    """The name at the end of a response's id, of the process that keeps it if any does; None: it has no name."""
    parts = response_id.split("_", 2)
    return parts[2] if len(parts) == 3 else None


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation."""
    service, kept = service_of(request.app.state), _kept(request)
    stores = body.store is not False and service.config.max_stored_bytes > 0
    if body.store and not stores:
        message = "this server stores no responses (max_stored_bytes=0); leave out store: true"
        raise HttpError(400, message, param="store", code="unsupported_parameter")
    if body.background and (body.stream or not stores):
        message = "background: true needs store: true, and cannot be combined with stream: true; poll the response"
        raise HttpError(400, message, param="background", code="unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise HttpError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
    asked = await _conversation(request, service, body)
    params = response_params(service, body)
    response_id = kept.new_id()
    head = {"id": response_id, **response_head(service, body, params), "store": stores}
    events = ResponseEvents(head)
    call = replace(asked.call, params=params, priority=body.priority or 0)
    answer = service.start_chat(request.scope, call, response_id, streaming=bool(body.stream))
    response = ResponseInProgress(answer, events, asked.items)
    if body.background:
        await kept.background.add(request.scope.get(TENANT), response)
        return _json({**events.response, "status": "queued"})
    if body.stream:
        return _stream(request, kept, response, stores=stores)
    with aborted_on_disconnect(request.receive, [answer.handle]):
        await response.finish()
    if stores:
        kept.store.put(request.scope.get(TENANT), response_id, response.stored())
    return _json(events.response)


def _stream(request: Request, kept: StoredResponses, response: ResponseInProgress, *, stores: bool) -> Response:
    async def write(stream: EventStream) -> None:
        events = response.events.begin()
        async for piece in response.answer:
            events += response.add(piece)
            if piece.output.finished and stores:
                kept.store.put(request.scope.get(TENANT), response.events.response["id"], response.stored())
            if events:
                await stream.send(encode_events(events), last=piece.output.finished)
            events = []

    headers = {"x-request-id": response.events.response["id"]}
    return EventStreamResponse(
        [response.answer.handle], write, lambda fault: encode_events(response.fail(fault)), headers
    )


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(body: InputRequest, request: Request) -> Response:
    """The number of tokens that a response's prompt would have."""
    service = service_of(request.app.state)
    asked = await _conversation(request, service, body)
    return _json({"object": "response.input_tokens", "input_tokens": await service.count_tokens(asked.call)})


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    response_id: str, request: Request, stream: bool = False, starting_after: int | None = None
) -> Response:
    """A stored response, or one in the background, as it is now."""
    if stream or starting_after is not None:
        message = "a stored response cannot be streamed; poll it without stream: true"
        raise HttpError(400, message, param="stream", code="unsupported_parameter")
    kept = _kept(request)
    running = await kept.background.find(request.scope.get(TENANT), response_id)
    if running is not None:
        return _json(running)
    return Response((await kept.find(request, response_id)).response, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forget a stored response, or end one in the background."""
    kept, tenant = _kept(request), request.scope.get(TENANT)
    if not kept.background.drop(tenant, response_id) and not kept.store.delete(tenant, response_id):
        raise _unknown(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response in the background; one that has ended already stays as it is."""
    kept = _kept(request)
    await kept.background.cancel(request.scope.get(TENANT), response_id)
    stored = await kept.find(request, response_id)
    if not json.loads(stored.response)["background"]:
        message = f"the response {response_id!r:.100} was not made with background: true, so it cannot be cancelled"
        raise HttpError(400, message, code="invalid_value")
    return Response(stored.response, media_type="application/json")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The items of the conversation that a stored response answers, a page at a time."""
    stored = await _kept(request).find(request, response_id)
    items = [json.loads(item) for item in stored.input_items]
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise HttpError(400, f"after={after!r:.100} is not the id of an item", param="after", code="invalid_value")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
    return _json({"object": "list", "data": page, "has_more": len(items) > limit, **ends})


async def _conversation(request: Request, service: Service, body: InputRequest) -> Conversation:
    earlier: Sequence[dict[str, Any]] = ()
    if body.previous_response_id is not None:
        stored = await _kept(request).find(request, body.previous_response_id)
        earlier = [json.loads(item) for item in (*stored.input_items, *stored.output_items)]
    asked = conversation(service, body, earlier)
    if body.truncation == "auto":
        room = (body.max_output_tokens or 1) if isinstance(body, ResponsesRequest) else 1
        return replace(asked, call=await without_oldest_turns(service, asked.call, room))
    return asked


def _kept(request: Request) -> StoredResponses:
    kept: StoredResponses = request.app.state.responses
    return kept


def _unknown(response_id: str) -> HttpError:
    message = (
        f"there is no response {response_id!r:.100}: it was not stored, was deleted, made room for others "
        "(max_stored_bytes), or its process has ended"
    )
    return HttpError(404, message, code="response_not_found")


def _json(value: Mapping[str, Any]) -> Response:
    return Response(as_json(value), media_type="application/json")
