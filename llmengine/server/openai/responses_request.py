"""A request of the Responses API, checked and turned into a chat, and what the response repeats of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmengine.errors import InvalidRequestError
from llmengine.sampling_params import SamplingParams
from llmengine.server.errors import HttpError
from llmengine.server.openai.params import replaced
from llmengine.server.openai.responses_input import Item, as_items, chat_messages, chat_tool_choice, chat_tools
from llmengine.server.openai.responses_schemas import InputRequest, ResponsesRequest, TextConfig
from llmengine.server.reasoning import reasoning_variables
from llmengine.server.service import ChatCall, Service
from llmengine.structured_output import StructuredOutput

LOGPROBS = "message.output_text.logprobs"
"""The value of `include` that asks for log-probabilities."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The items of a request, those of earlier responses first, and the chat that they are."""

    items: Sequence[Item]
    call: ChatCall


def conversation(service: Service, body: InputRequest, earlier: Sequence[Item]) -> Conversation:
    """The chat that a request asks to answer, without parameters of sampling."""
    service.check_model(body.model)
    if body.input is None:
        raise HttpError(400, "'input' is missing", param="input", code="missing_field")
    items = [*earlier, *as_items(body.input)]
    if not items:
        raise HttpError(400, "input must be a non-empty string or list", param="input", code="invalid_value")
    messages = chat_messages(items, body.instructions, first=-len(earlier))
    tools = chat_tools(body.tools or ())
    choice, tools = chat_tool_choice("auto" if body.tool_choice is None else body.tool_choice, tools)
    effort = None if body.reasoning is None else body.reasoning.effort
    call = ChatCall(
        messages=messages,
        params=service.default_params,
        template=reasoning_variables(service.llm, effort, "reasoning.effort"),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    return Conversation(items, call)


def response_params(service: Service, body: ResponsesRequest) -> SamplingParams:
    """How to sample a response. Without a limit, it may fill the context."""
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "stop")
    changes: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) is not None}
    changes["max_new_tokens"] = body.max_output_tokens
    if LOGPROBS in (body.include or ()):
        changes["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        message = f"top_logprobs needs include: [{LOGPROBS!r}]"
        raise HttpError(400, message, param="top_logprobs", code="invalid_value")
    changes["structured"] = _structured(body.text)
    return replaced(service.default_params, changes)


def response_head(service: Service, body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """The fields of a response that repeat its request, with the values that were used."""
    reasoning = body.reasoning
    text_format = body.text.format if body.text is not None else None
    return {
        "background": body.background is True,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "model": service.config.model_name,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "temperature": params.temperature,
        "text": {
            "format": {"type": "text"}
            if text_format is None
            else text_format.model_dump(by_alias=True, exclude_none=True)
        },
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _structured(text: TextConfig | None) -> StructuredOutput | None:
    if text is None or text.format is None or text.format.type == "text":
        return None
    if text.format.type == "json_object":
        return StructuredOutput(json_schema={"type": "object"})
    if text.format.schema_ is None:
        raise HttpError(400, "text.format.schema is missing", param="text.format.schema", code="missing_field")
    try:
        return StructuredOutput(json_schema=text.format.schema_)
    except InvalidRequestError as error:
        raise HttpError(400, f"text.format.schema: {error}", param="text.format.schema") from error
