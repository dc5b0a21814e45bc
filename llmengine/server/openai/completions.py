"""`/v1/completions`: continuations of prompts, which are texts or token ids."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmengine.chat.answers import AnswerFormat, AnswerParser, TextDelta
from llmengine.engine.handle import RequestHandle
from llmengine.outputs import GenerationOutput
from llmengine.sampling_params import SamplingParams
from llmengine.server.openai.chunks import Chunks, UsageCount, encode_error, json_string
from llmengine.server.openai.logprobs import CompletionLogprobs
from llmengine.server.openai.params import completion_params, completion_prompts
from llmengine.server.openai.schemas import CompletionRequest
from llmengine.server.service import Service, require_success, service_of
from llmengine.server.sse import EventStream, EventStreamResponse, gather_events

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions")
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one prompt or several."""
    service = service_of(request.app.state)
    service.check_model(body.model)
    prompts = completion_prompts(body)
    params = completion_params(service, body, len(prompts))
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    inputs = prompts
    if body.stream and len(prompts) > 1:
        # What is wrong with one of several prompts must be known before the others begin to stream.
        inputs = await asyncio.to_thread(_tokenized, service, prompts)
    handles = _start(service, request, inputs, params, body, answer_id)
    form = _Form(service, prompts, params.n, bool(body.echo), body.max_tokens == 0, body.logprobs)
    headers = {"x-request-id": answer_id}
    created, model = int(time.time()), service.config.model_name
    if body.stream:
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        chunks = Chunks(answer_id, "text_completion", created, model, include_usage=include_usage)
        return EventStreamResponse(handles, _CompletionWriter(handles, chunks, form).write, encode_error, headers)
    outputs = await service.results(request.receive, handles)
    head = {"id": answer_id, "object": "text_completion", "created": created, "model": model}
    return JSONResponse({**head, **_choices(outputs, form)}, headers=headers)


def _tokenized(service: Service, prompts: Sequence[str | list[int]]) -> list[str | list[int]]:
    return [service.llm.tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _start(
    service: Service,
    request: Request,
    prompts: Sequence[str | list[int]],
    params: SamplingParams,
    body: CompletionRequest,
    answer_id: str,
) -> list[RequestHandle]:
    """Begin all prompts, or none: the error of one ends the others."""
    handles: list[RequestHandle] = []
    options: dict[str, Any] = {"priority": body.priority or 0, "streaming": bool(body.stream)}
    try:
        handles.extend(service.start(request.scope, prompt, params, answer_id, **options) for prompt in prompts)
    except BaseException:
        for handle in handles:
            handle.abort()
        raise
    return handles


@dataclass(frozen=True, slots=True)
class _Form:
    """What the choices of a request show.

    Attributes:
        prompts: texts or token ids, as the client sent them.
        num_outputs: choices of each prompt.
        echo: the prompt is part of the text.
        prompt_only: nothing else is (`max_tokens` of 0; the engine generates one token, which is left out).
        num_top: likeliest tokens to show for each token; None: no log-probabilities.
    """

    service: Service
    prompts: Sequence[str | list[int]]
    num_outputs: int
    echo: bool
    prompt_only: bool
    num_top: int | None

    def text(self, token_ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        tokenizer = self.service.llm.tokenizer
        return "" if tokenizer is None else tokenizer.decode(token_ids)

    def prompt_text(self, number: int) -> str:
        """The text of a prompt, also if it was given as token ids."""
        prompt = self.prompts[number]
        return prompt if isinstance(prompt, str) else self.text(prompt)


class _ChoiceWriter:
    """Turns the outputs of one choice into the fields of its chunks, or all at once into those of a whole choice."""

    def __init__(self, form: _Form, prompt: int) -> None:
        self._form = form
        self._prompt = prompt
        self._parser = AnswerParser(AnswerFormat())
        """Finds the tokens that the text is made of: neither the end token, nor those that a stop string cut off."""
        self._logprobs = None if form.num_top is None else CompletionLogprobs(form.num_top)
        self._entries: list[Any] = []
        self._has_echoed = not form.echo

    def add(self, output: GenerationOutput) -> tuple[str, dict[str, Any] | None]:
        """New text, and the log-probabilities of its tokens."""
        texts = []
        logprobs = self._logprobs
        if not self._has_echoed:
            self._has_echoed = True
            texts.append(self._form.prompt_text(self._prompt))
            if logprobs is not None:
                self._echo(logprobs, output)
        if not self._form.prompt_only:
            texts.append(output.text_delta)
            if logprobs is not None:
                self._add_logprobs(logprobs, output)
        text = "".join(texts)
        return text, logprobs.take() if logprobs is not None and text else None

    def _add_logprobs(self, logprobs: CompletionLogprobs, output: GenerationOutput) -> None:
        self._entries += output.decoded_logprobs_delta or ()
        num_tokens = len(output.token_ids_delta)
        events = []
        for place, piece in enumerate(output.text_pieces_delta):
            events += self._parser.feed(piece, is_token=place < num_tokens)
        if output.finished:
            events += self._parser.finish()
        for event in events:
            assert isinstance(event, TextDelta), "all of a completion is text"
            logprobs.add(self._entries[event.tokens.start : event.tokens.stop])

    def _echo(self, logprobs: CompletionLogprobs, output: GenerationOutput) -> None:
        first, *others = output.decoded_prompt_logprobs or [None]
        assert first is None, "a prompt's first token has no log-probability"
        logprobs.add_unknown(self._form.text(output.prompt_token_ids[:1]))
        logprobs.add([entry for entry in others if entry is not None])


def _choices(outputs: Sequence[GenerationOutput], form: _Form) -> dict[str, Any]:
    """`choices` and `usage` of a whole answer."""
    usage = UsageCount()
    choices: list[dict[str, Any]] = []
    for prompt, output in enumerate(outputs):
        for one in output.outputs:
            usage.add(one, prompt, prompt_only=form.prompt_only)
            text, logprobs = _ChoiceWriter(form, prompt).add(one)
            reason = "length" if form.prompt_only else one.finish_reason
            choices.append({"index": len(choices), "text": text, "logprobs": logprobs, "finish_reason": reason})
    return {"choices": choices, "usage": usage.as_dict()}


class _CompletionWriter:
    """Writes the chunks of all prompts and outputs into one stream."""

    def __init__(self, handles: Sequence[RequestHandle], chunks: Chunks, form: _Form) -> None:
        self._handles = handles
        self._chunks = chunks
        self._form = form
        self._usage = UsageCount()

    async def write(self, stream: EventStream) -> None:
        """Send all events. What is new of a prompt at one moment is sent at once."""
        await gather_events([partial(self._write, stream, prompt) for prompt in range(len(self._handles))])
        await stream.send(self._chunks.last(self._usage.as_dict()), last=True)

    async def _write(self, stream: EventStream, prompt: int) -> None:
        form = self._form
        writers = [_ChoiceWriter(form, prompt) for _ in range(form.num_outputs)]
        async for output in self._handles[prompt]:
            if output.finished:
                require_success(output)
            index = prompt * form.num_outputs + output.index
            text, logprobs = writers[output.index].add(output)
            events = [self._chunk(index, text, logprobs, None)] if text else []
            if output.finished:
                self._usage.add(output, prompt, prompt_only=form.prompt_only)
                reason = "length" if form.prompt_only else output.finish_reason
                events.append(self._chunk(index, "", None, reason))
            if events:
                await stream.send(b"".join(events))

    def _chunk(self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> bytes:
        shown = "null" if logprobs is None else json.dumps(logprobs)
        ended = "null" if reason is None else f'"{reason}"'
        return self._chunks.chunk(
            f'{{"index": {index}, "text": {json_string(text)}, "logprobs": {shown}, "finish_reason": {ended}}}'
        )
