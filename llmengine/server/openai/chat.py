"""`/v1/chat/completions`: answers to conversations, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmengine.outputs import GenerationOutput
from llmengine.server.openai.chunks import Chunks, UsageCount, as_json_text, encode_error
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
        priority=body.priority or 0,
    )
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    answer = service.start_chat(request.scope, call, answer_id, streaming=bool(body.stream))
    headers = {"x-request-id": answer_id}
    if not body.stream:
        output = (await service.results(request.receive, [answer.handle]))[0]
        return JSONResponse(_completion(service, answer_id, output, body), headers=headers)
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    model = service.config.model_name
    chunks = Chunks(answer_id, "chat.completion.chunk", int(time.time()), model, include_usage=include_usage)
    writer = _ChatWriter(chunks)

    async def write(stream: EventStream) -> None:
        await writer.write(answer, stream)

    return EventStreamResponse([answer.handle], write, encode_error, headers)


def _template(body: ChatRequest) -> dict[str, Any]:
    names = ("chat_template_kwargs", "continue_final_message", "add_generation_prompt")
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def _completion(service: Service, answer_id: str, output: GenerationOutput, body: ChatRequest) -> dict[str, Any]:
    usage = UsageCount()
    choices = []
    for one in output.outputs:
        usage.add(one)
        message = {"role": "assistant", "content": one.text, "refusal": None}
        choices.append({"index": one.index, "message": message, "logprobs": None, "finish_reason": one.finish_reason})
    return {
        "id": answer_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.config.model_name,
        "choices": choices,
        "usage": usage.as_dict(),
    }


class _ChatWriter:
    """Writes the chunks of one answer: the role with an output's first chunk, and one last chunk for each output."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._begun: set[int] = set()
        self._usage = UsageCount()

    async def write(self, answer: ChatAnswer, stream: EventStream) -> None:
        """Send all events. What is new at one moment is sent at once."""
        remaining = answer.call.params.n
        async for piece in answer:
            output = piece.output
            events = [self._delta(output.index, f'"content": {as_json_text(event.text)}') for event in piece.events]
            if output.finished:
                remaining -= 1
                events.append(self._finish(output))
                if not remaining:
                    events.append(self._chunks.last(self._usage.as_dict()))
            if events:
                await stream.send(b"".join(events), last=not remaining)

    def _delta(self, index: int, fields: str) -> bytes:
        if index not in self._begun:
            self._begun.add(index)
            fields = f'"role": "assistant", {fields}'
        return self._chunks.chunk(
            f'{{"index": {index}, "delta": {{{fields}}}, "logprobs": null, "finish_reason": null}}'
        )

    def _finish(self, output: GenerationOutput) -> bytes:
        index = output.index
        self._usage.add(output)
        # An answer without text still has a role.
        empty = b"" if index in self._begun else self._delta(index, '"content": ""')
        reason = f'"finish_reason": "{output.finish_reason}"'
        return empty + self._chunks.chunk(f'{{"index": {index}, "delta": {{}}, "logprobs": null, {reason}}}')
