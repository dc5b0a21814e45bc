"""Requests of OpenAI's API as `SamplingParams`."""

from __future__ import annotations

from typing import Any, cast

from llmengine.errors import InvalidRequestError
from llmengine.sampling_params import SamplingParams
from llmengine.server.errors import HttpError
from llmengine.server.openai.schemas import ChatRequest, CompletionRequest, ResponseFormat, Sampling
from llmengine.server.service import Service
from llmengine.structured_output import StructuredOutput

_COMPLETION_TOKENS = 16
"""What OpenAI's reference gives a completion that asks for no other number."""

_SAME = (
    *("n", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "stop"),
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "bad_words", "ignore_eos", "skip_special_tokens"),
)
"""Fields that are called the same in `SamplingParams`."""


def chat_params(service: Service, body: ChatRequest) -> SamplingParams:
    """The parameters of a chat. Without a limit, an answer may fill the context."""
    changes = common_changes(service, body, num_prompts=1)
    limits = [limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None]
    changes["max_new_tokens"] = min(limits, default=None)
    if body.logprobs:
        changes["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise HttpError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if body.response_format is not None:
        changes["structured"] = _structured(body.response_format)
    return replaced(service.default_params, changes)


def completion_prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, each text or token ids."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise HttpError(400, "prompt must not be an empty list", param="prompt", code="invalid_value")
    if isinstance(given[0], int):
        return [given]
    return cast(list[str | list[int]], given)


def completion_params(service: Service, body: CompletionRequest, num_prompts: int) -> SamplingParams:
    """The parameters of a completion, which has 16 tokens unless the request says otherwise."""
    if body.suffix:
        message = "suffix is not supported: the model continues text, and does not fill gaps"
        raise HttpError(400, message, param="suffix", code="unsupported_field")
    if body.stream and body.best_of is not None and body.best_of != (body.n or 1):
        message = f"best_of={body.best_of} cannot be streamed: the best outputs are known only when all are finished"
        raise HttpError(400, message, param="best_of", code="invalid_value")
    changes = common_changes(service, body, num_prompts, body.best_of)
    if body.max_tokens == 0 and not body.echo:
        raise HttpError(400, "max_tokens=0 needs echo: true", param="max_tokens", code="invalid_value")
    changes["max_new_tokens"] = _COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    if body.logprobs is not None:
        changes["logprobs"] = body.logprobs
        if body.echo:
            changes["prompt_logprobs"] = body.logprobs
    return replaced(service.default_params, changes)


def common_changes(service: Service, body: Sampling, num_prompts: int, best_of: int | None = None) -> dict[str, Any]:
    """The fields of `SamplingParams` that a request sets; raises `HttpError` for what the server does not allow."""
    if body.stream_options is not None and not body.stream:
        raise HttpError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
    changes = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    for name in ("stop", "stop_token_ids", "bad_words"):
        if isinstance(changes.get(name), list):
            changes[name] = tuple(changes[name])
    if body.min_tokens is not None:
        changes["min_new_tokens"] = body.min_tokens
    if body.logit_bias is not None:
        changes["logit_bias"] = _bias(body.logit_bias)
    num_outputs = max(body.n or 1, best_of or 1)
    if best_of is not None:
        changes["best_of"] = best_of
    limit, wanted = service.config.max_outputs, num_prompts * num_outputs
    if wanted > limit:
        what = "" if num_prompts == 1 else f"{num_prompts} prompts with "
        name = "n" if best_of is None else "best_of"
        message = f"{what}{name}={num_outputs} asks for {wanted} outputs; the limit is {limit} (max_outputs)"
        raise HttpError(400, message, param=name, code="invalid_value")
    return changes


def replaced(params: SamplingParams, changes: dict[str, Any]) -> SamplingParams:
    """`params` with `changes`; the error for a value out of range names the field at fault where the message does."""
    try:
        return params.replace(**changes)
    except InvalidRequestError as error:
        name = str(error).partition(" ")[0].partition("[")[0]
        param = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}.get(name, name)
        known = param if param in ChatRequest.model_fields else None
        raise HttpError(400, str(error), param=known, code="invalid_value") from error


def _bias(given: dict[str, Any]) -> dict[int, float]:
    try:
        return {int(token_id): amount for token_id, amount in given.items()}
    except ValueError as error:
        raise HttpError(400, f"a key in logit_bias must be a token id: {error}", param="logit_bias") from error


def _structured(given: ResponseFormat) -> StructuredOutput | None:
    if given.type == "text":
        return None
    if given.type == "json_object":
        return StructuredOutput(json_schema={"type": "object"})
    if given.json_schema is None or given.json_schema.schema_ is None:
        raise HttpError(400, "response_format.json_schema.schema is missing", param="response_format.json_schema")
    return StructuredOutput(json_schema=given.json_schema.schema_)
