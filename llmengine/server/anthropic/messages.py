"""`/v1/messages`: answers to conversations as the Anthropic API gives them, whole or as events."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from llmengine.errors import InvalidRequestError
from llmengine.outputs import GenerationOutput
from llmengine.sampling_params import SamplingParams
from llmengine.server.anthropic.messages_events import Event, MessageEvents
from llmengine.server.anthropic.messages_input import chat_messages, chat_tool_choice, chat_tools, continues_answer
from llmengine.server.anthropic.schemas import CountRequest, MessagesRequest
from llmengine.server.errors import HttpError, anthropic_error
from llmengine.server.parts import as_json, encode, encode_events, num_reasoning_tokens
from llmengine.server.reasoning import has_reasoning_switch, reasoning_variables
from llmengine.server.service import AnswerPiece, ChatAnswer, ChatCall, Service, service_of
from llmengine.server.sse import EventStream, EventStreamResponse, aborted_on_disconnect
from llmengine.structured_output import StructuredOutput

router = APIRouter(tags=["Anthropic"])

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_FIRST_VERSION = "2023-06-01"
"""The first version of the API whose streams have this form; clients of later versions read it as well."""


@router.post("/v1/messages")
async def create_message(body: MessagesRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request.app.state)
    call = replace(_chat_call(request, service, body), params=_params(service, body))
    show_thinking = body.thinking is None or body.thinking.display != "omitted"
    events = MessageEvents(service.config.model_name, show_thinking=show_thinking)
    answer = service.start_chat(request.scope, call, events.message["id"], streaming=bool(body.stream))
    message = _MessageInProgress(answer, events)
    headers = {"request-id": events.message["id"]}
    if body.stream:
        return EventStreamResponse([answer.handle], message.write, _encode_error, headers)
    with aborted_on_disconnect(request.receive, [answer.handle]):
        async for piece in answer:
            message.add(piece)
    return _json(events.message, headers)


@router.post("/v1/messages/count_tokens")
async def count_message_tokens(body: CountRequest, request: Request) -> Response:
    """The number of tokens that a message's prompt would have."""
    service = service_of(request.app.state)
    call = _chat_call(request, service, body)
    return _json({"input_tokens": await service.count_tokens(call)})


def _chat_call(request: Request, service: Service, body: CountRequest) -> ChatCall:
    """The chat that a request asks to answer, without parameters of sampling."""
    version = request.headers.get("anthropic-version", _FIRST_VERSION)
    if version < _FIRST_VERSION or not _DATE.fullmatch(version):
        message = f"anthropic-version: {version!r:.100} is not supported; supported: {_FIRST_VERSION} and later"
        raise HttpError(400, message, param="anthropic-version")
    service.check_model(body.model)
    template: dict[str, Any] = _reasoning(service, body)
    if continues_answer(body.messages):
        template["continue_final_message"] = True
    tools = chat_tools(body.tools or ())
    choice, parallel = chat_tool_choice(body.tool_choice or {"type": "auto"}, tools)
    return ChatCall(
        messages=chat_messages(body.messages, body.system),
        params=service.default_params,
        template=template,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )


def _reasoning(service: Service, body: CountRequest) -> dict[str, Any]:
    """The variables of the chat template that set how much the model thinks."""
    kind = None if body.thinking is None else body.thinking.type
    effort = None if body.output_config is None else body.output_config.effort
    if kind == "disabled":
        return reasoning_variables(service.llm, "none", "thinking") if has_reasoning_switch(service.llm) else {}
    if effort is not None:
        return reasoning_variables(service.llm, effort, "output_config.effort")
    if kind == "enabled":
        return reasoning_variables(service.llm, "high", "thinking")
    return {}


def _params(service: Service, body: MessagesRequest) -> SamplingParams:
    names = ("temperature", "top_k", "top_p")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
    changes |= {"max_new_tokens": body.max_tokens, "stop": tuple(body.stop_sequences or ())}
    if body.output_config is not None and body.output_config.format is not None:
        try:
            changes["structured"] = StructuredOutput(json_schema=body.output_config.format.schema_)
        except InvalidRequestError as error:
            raise HttpError(400, f"output_config.format.schema: {error}") from error
    return service.default_params.replace(**changes)


class _MessageInProgress:
    """A message while its answer comes."""

    def __init__(self, answer: ChatAnswer, events: MessageEvents) -> None:
        self._answer = answer
        self._events = events
        self._num_reasoning_tokens = 0

    async def write(self, stream: EventStream) -> None:
        """Send all events. What is new at one moment is sent at once."""
        events: list[Event] | None = None
        async for piece in self._answer:
            events = self._events.begin(self._usage(piece.output)) if events is None else []
            events += self.add(piece)
            if events:
                await stream.send(encode_events(events), last=piece.output.finished)

    def add(self, piece: AnswerPiece) -> list[Event]:
        """The events for a piece of the answer."""
        self._num_reasoning_tokens += num_reasoning_tokens(piece.events)
        events = [event for part in piece.events for event in encode(self._events, part)]
        if piece.output.finished:
            events += self._events.end(self._usage(piece.output), *self._stop(piece.output))
        return events

    def _stop(self, output: GenerationOutput) -> tuple[str, str | None]:
        """Why the answer ended, and the stop sequence if it was one."""
        params = self._answer.call.params
        if output.finish_reason == "length":
            full = params.max_new_tokens is None or output.num_tokens < params.max_new_tokens
            return "model_context_window_exceeded" if full else "max_tokens", None
        if isinstance(output.matched_stop, str) and output.matched_stop in params.stop:
            return "stop_sequence", output.matched_stop
        return ("tool_use" if self._events.has_tool_use else "end_turn"), None

    def _usage(self, output: GenerationOutput) -> dict[str, Any]:
        cached = output.num_cached_tokens
        return {
            "input_tokens": output.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": output.num_tokens,
            "output_tokens_details": {"thinking_tokens": self._num_reasoning_tokens},
        }


def _encode_error(fault: HttpError) -> bytes:
    return encode_events([anthropic_error(fault)])


def _json(value: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(value), headers=dict(headers or {}), media_type="application/json")
