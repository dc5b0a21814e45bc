"""`/tokenize` and `/detokenize`, which OpenAI's API does not have: the model's token ids of a text or conversation."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from llmengine.errors import InvalidRequestError
from llmengine.server.errors import HttpError
from llmengine.server.openai.schemas import Body
from llmengine.server.service import service_of

router = APIRouter(tags=["tokens"])


class TokenizeRequest(Body):
    """Body of `/tokenize`: either a prompt, as of a completion, or messages, as of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[int]


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """The token ids that the model reads."""
    service = service_of(request.app.state)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "give either prompt or messages", param="prompt", code="invalid_value")
    names = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
    template: Any = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.prompt is not None and template:
        raise HttpError(400, f"{next(iter(template))} needs messages", param=next(iter(template)))

    def encode() -> list[int]:
        try:
            return service.llm.tokenize(body.messages or body.prompt or "", **template)
        except TypeError as error:
            raise InvalidRequestError(f"the chat template does not take that: {error}") from error

    token_ids = await asyncio.to_thread(encode)
    return {"count": len(token_ids), "max_model_len": service.llm.info.max_model_len, "tokens": token_ids}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
    """The text of token ids, special tokens included."""
    service = service_of(request.app.state)
    service.check_model(body.model)
    tokenizer, vocab_size = service.llm.tokenizer, service.llm.info.vocab_size
    if tokenizer is None:
        raise InvalidRequestError("the model was loaded without a tokenizer")
    wrong = next((token_id for token_id in body.tokens if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        message = f"tokens holds token id {wrong}, outside the vocabulary [0, {vocab_size})"
        raise HttpError(400, message, param="tokens", code="invalid_value")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)}
