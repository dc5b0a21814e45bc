"""`/v1/chat/completions`: answers to conversations, whole or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmengine.chat.answers import (
    Answer,
    AnswerEvent,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
)
from llmengine.outputs import GenerationOutput, Logprob
from llmengine.server.openai.chunks import Chunks, UsageCount, encode_error, json_string
from llmengine.server.openai.logprobs import chat_logprobs
from llmengine.server.openai.params import chat_params
from llmengine.server.openai.schemas import ChatRequest
from llmengine.server.service import ChatAnswer, ChatCall, Service, service_of
from llmengine.server.sse import EventStream, EventStreamResponse

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    service = service_of(request.app.state)
    service.check_model(body.model)
    call = ChatCall(
        messages=body.messages,
        params=chat_params(service, body),
        template=_template(body),
        tools=body.tools or (),
        tool_choice=body.tool_choice or "auto",
        parallel_tool_calls=body.parallel_tool_calls is not False,
        priority=body.priority or 0,
    )
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    answer = service.start_chat(request.scope, call, answer_id, streaming=bool(body.stream))
    headers = {"x-request-id": answer_id}
    if not body.stream:
        output = (await service.results(request.receive, [answer.handle]))[0]
        return JSONResponse(_completion(service, answer_id, output, body.top_logprobs or 0), headers=headers)
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    model = service.config.model_name
    chunks = Chunks(answer_id, "chat.completion.chunk", int(time.time()), model, include_usage=include_usage)
    writer = _ChatWriter(answer, chunks, body.top_logprobs or 0)
    return EventStreamResponse([answer.handle], writer.write, encode_error, headers)


def _template(body: ChatRequest) -> dict[str, Any]:
    names = ("chat_template_kwargs", "continue_final_message", "add_generation_prompt")
    template = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.reasoning_effort is not None:
        # A variable of templates that know it; others refuse it.
        template["chat_template_kwargs"] = {
            "reasoning_effort": body.reasoning_effort,
            **(body.chat_template_kwargs or {}),
        }
    return template


def _completion(service: Service, answer_id: str, output: GenerationOutput, num_top: int) -> dict[str, Any]:
    usage = UsageCount()
    choices = []
    for index, one in enumerate(output.outputs):
        usage.add(one)
        events = one.answer_delta  # of a final output, everything
        answer = Answer.of(events)
        choices.append(
            {
                "index": index,
                "message": _message(answer),
                "logprobs": _whole_logprobs(one, events, num_top),
                "finish_reason": _finish_reason(one, bool(answer.tool_calls)),
            }
        )
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.config.model_name,
        "choices": choices,
        "usage": usage.as_dict(),
    }


def _message(answer: Answer) -> dict[str, Any]:
    content = answer.content if answer.tool_calls or answer.reasoning else answer.content or ""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    return message


def _whole_logprobs(output: GenerationOutput, events: Sequence[AnswerEvent], num_top: int) -> dict[str, Any] | None:
    entries = output.decoded_logprobs
    if entries is None:
        return None
    positions = [at for event in events if isinstance(event, TextDelta) for at in event.tokens]
    return chat_logprobs([entries[at] for at in positions], num_top)


def _finish_reason(output: GenerationOutput, has_calls: bool) -> str:
    assert output.finish_reason is not None
    return "tool_calls" if has_calls and output.finish_reason == "stop" else output.finish_reason


class _ChatWriter:
    """Writes the chunks of one answer: the role with an output's first chunk, and one last chunk for each output."""

    def __init__(self, answer: ChatAnswer, chunks: Chunks, num_top: int) -> None:
        self._answer = answer
        self._chunks = chunks
        self._num_top = num_top
        self._has_logprobs = answer.call.params.logprobs is not None
        self._logprobs: defaultdict[int, list[Mapping[int, Logprob]]] = defaultdict(list)
        self._begun: set[int] = set()
        self._calling: set[int] = set()
        self._usage = UsageCount()

    async def write(self, stream: EventStream) -> None:
        """Send all events. What is new at one moment is sent at once."""
        remaining = self._answer.call.params.n
        async for piece in self._answer:
            output = piece.output
            if self._has_logprobs:
                self._logprobs[output.index] += output.decoded_logprobs_delta or ()
            events = [self._event(output.index, event) for event in piece.events]
            if output.finished:
                remaining -= 1
                events.append(self._finish(output))
                if not remaining:
                    events.append(self._chunks.last(self._usage.as_dict()))
            if data := b"".join(events):
                await stream.send(data, last=not remaining)

    def _event(self, index: int, event: AnswerEvent) -> bytes:
        """The chunk of an event; nothing for one that clients are not told of."""
        if isinstance(event, TextDelta):
            return self._delta(index, f'"content": {json_string(event.text)}', self._logprobs_of(index, event.tokens))
        if isinstance(event, ReasoningDelta):
            return self._delta(index, f'"reasoning_content": {json_string(event.text)}')
        if isinstance(event, ToolCallBegin):
            self._calling.add(index)
            function = f'{{"name": {json_string(event.name)}, "arguments": ""}}'
            call = (
                f'{{"index": {event.index}, "id": {json_string(event.id)}, "type": "function", "function": {function}}}'
            )
            return self._delta(index, f'"tool_calls": [{call}]')
        if isinstance(event, ToolArgumentsDelta):
            function = f'{{"arguments": {json_string(event.text)}}}'
            return self._delta(index, f'"tool_calls": [{{"index": {event.index}, "function": {function}}}]')
        return b""

    def _logprobs_of(self, index: int, tokens: range) -> str:
        if not self._has_logprobs:
            return "null"
        entries = self._logprobs[index][tokens.start : tokens.stop]
        return json.dumps(chat_logprobs(entries, self._num_top))

    def _delta(self, index: int, fields: str, logprobs: str = "null") -> bytes:
        if index not in self._begun:
            self._begun.add(index)
            fields = f'"role": "assistant", {fields}'
        choice = f'{{"index": {index}, "delta": {{{fields}}}, "logprobs": {logprobs}, "finish_reason": null}}'
        return self._chunks.chunk(choice)

    def _finish(self, output: GenerationOutput) -> bytes:
        index = output.index
        self._usage.add(output)
        # An answer without text still has a role.
        empty = b"" if index in self._begun else self._delta(index, '"content": ""')
        reason = f'"finish_reason": "{_finish_reason(output, index in self._calling)}"'
        return empty + self._chunks.chunk(f'{{"index": {index}, "delta": {{}}, "logprobs": null, {reason}}}')
