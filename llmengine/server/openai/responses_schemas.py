"""Requests of the Responses API as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from llmengine.server.openai.schemas import MAX_TOP_LOGPROBS, Body, Number, PositiveInt

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class TextFormat(Body):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """What the answer's text is like."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """How the model reasons."""

    effort: Effort | None = None
    summary: Literal["auto"] | None = None


class ResponseStreamOptions(Body):
    """What a stream holds beside the answer: never an obfuscation."""

    include_obfuscation: bool | None = None


class InputRequest(Body):
    """What makes the prompt of a response: the body of `/v1/responses/input_tokens`."""

    model: str | None = None
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    truncation: Literal["auto", "disabled"] | None = None


class ResponsesRequest(InputRequest):
    """Body of `/v1/responses`. Those fields after `user` are not OpenAI's: they are `SamplingParams`' own."""

    background: bool | None = None
    background_options: None = None
    context_management: None = None
    conversation: None = None
    include: list[Includable] | None = None
    max_output_tokens: PositiveInt | None = None
    max_tool_calls: None = None
    moderation: None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    prompt: None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    safety_identifier: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    temperature: Number | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    top_p: Number | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: Number | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    priority: int | None = None
