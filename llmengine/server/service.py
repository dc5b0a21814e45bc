"""Service: what all endpoints share. It turns checked requests of any API into requests of the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope

from llmengine.chat.answers.events import AnswerEvent, TextDelta
from llmengine.engine.handle import RequestHandle
from llmengine.errors import EngineClosedError, InvalidRequestError
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput
from llmengine.request_options import RequestKeywords
from llmengine.sampling_params import SamplingParams
from llmengine.server.config import ServerConfig
from llmengine.server.errors import HttpError
from llmengine.server.middleware import TENANT
from llmengine.server.sse import aborted_on_disconnect


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall:
    """A checked request for the answer to a conversation.

    Attributes:
        messages: the conversation, in the form that `LLM.chat` takes.
        params: how to sample the answer.
        template: further keywords of the chat template, see `TemplateKeywords`.
        tools, tool_choice, parallel_tool_calls: see `AnswerKeywords`.
        priority: see `RequestOptions`.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    template: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    priority: int = 0


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """What is new of one output of a chat: the engine's output, and what its text means."""

    output: GenerationOutput
    events: Sequence[AnswerEvent]


class ChatAnswer:
    """The answer to a conversation, in progress. Iterating gives its pieces as they come, those of all outputs mixed.

    The last piece of each output is `finished`. Raises what reading its `handle` raises, and the error of an output
    that failed. With `is_plain`, nothing in the text has a meaning of its own, and nobody asks which tokens it has.
    """

    def __init__(self, handle: RequestHandle, call: ChatCall, *, is_plain: bool = False) -> None:
        self.handle = handle
        self.call = call
        self._is_plain = is_plain

    async def __aiter__(self) -> AsyncIterator[AnswerPiece]:
        async for output in self.handle:
            if output.finished:
                require_success(output)
            if self._is_plain:  # saves half of what the event loop does for a token
                text = output.text_delta
                yield AnswerPiece(output, (TextDelta(text),) if text else ())
            else:
                yield AnswerPiece(output, output.answer_delta)


@dataclass(slots=True)
class Service:
    """A model and how it is served.

    Attributes:
        llm: the model. It belongs to whoever loaded it.
        config: the server's settings.
        created: when the server began, in seconds since 1970.
        default_params: parameters that a request changes: those of the model's files.
    """

    llm: LLM
    config: ServerConfig
    created: int = field(default_factory=lambda: int(time.time()))
    default_params: SamplingParams = field(init=False)

    def __post_init__(self) -> None:
        params = self.llm.get_default_sampling_params()
        # Clients of these APIs expect chance unless they ask for none, or the model's files do.
        self.default_params = params.replace(temperature=params.temperature or 1.0)

    def check_model(self, name: str | None) -> None:
        """Raise `HttpError` (404) unless this is the served model; None stands for it."""
        if name is not None and name != self.config.model_name:
            message = f"the model {name!r:.200} does not exist; this server has {self.config.model_name!r}"
            raise HttpError(404, message, param="model", code="model_not_found")

    def start_chat(self, scope: Scope, call: ChatCall, request_id: str, *, streaming: bool) -> ChatAnswer:
        """Begin to answer a conversation; never waits.

        Raises what `LLM.chat_async` raises, and `InvalidRequestError` for a variable that the template does not have.
        """
        try:
            handle = self.llm.chat_async(
                call.messages,
                self._limited(call.params),
                streaming,
                **self._options(scope, call.priority, request_id),
                **self._template(call),
                **_tool_keywords(call),
            )
        except TypeError as error:
            raise InvalidRequestError(f"the chat template does not take that: {error}") from error
        return ChatAnswer(handle, call, is_plain=self._is_plain(call))

    async def count_tokens(self, call: ChatCall) -> int:
        """Number of tokens of a chat's prompt. Raises what `start_chat` raises."""
        try:
            return await asyncio.to_thread(
                self.llm.count_tokens, call.messages, tools=call.tools or None, **self._template(call)
            )
        except TypeError as error:
            raise InvalidRequestError(f"the chat template does not take that: {error}") from error

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of a prompt and its output together."""
        limits = (self.config.max_total_tokens, self.llm.info.max_model_len)
        return min(limit for limit in limits if limit is not None)

    def start(
        self,
        scope: Scope,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        streaming: bool = False,
    ) -> RequestHandle:
        """Begin to continue a prompt; never waits. Raises what `LLM.generate_async` raises."""
        options = self._options(scope, priority, request_id)
        return self.llm.generate_async(prompt, self._limited(params), streaming, **options)

    async def results(self, receive: Receive, handles: Sequence[RequestHandle]) -> list[GenerationOutput]:
        """The final outputs of requests that do not stream; a client that leaves aborts them.

        Raises what reading raises, and the error of an output that failed.
        """
        with aborted_on_disconnect(receive, handles):
            outputs = [await handle for handle in handles]
        for output in outputs:
            for one in output.outputs:
                require_success(one)
        return outputs

    def _is_plain(self, call: ChatCall) -> bool:
        if call.tools or call.template or call.params.logprobs is not None:
            return False
        form = self.llm.answer_format(has_tools=False)
        return form.reasoning is None and not form.ignored

    def _template(self, call: ChatCall) -> dict[str, Any]:
        """The keywords of the chat template."""
        form = self.config.tool_format
        return {**call.template, "tool_format": form} if call.tools and form is not None else dict(call.template)

    def _limited(self, params: SamplingParams) -> SamplingParams:
        limit = self.config.max_total_tokens
        return params if limit is None else params.replace(max_total_tokens=limit)

    def _options(self, scope: Scope, priority: int, request_id: str) -> RequestKeywords:
        return {
            "priority": priority,
            "tenant": scope.get(TENANT),
            "deadline_s": self.config.request_timeout_s,
            "request_id": request_id,
        }


def _tool_keywords(call: ChatCall) -> dict[str, Any]:
    """The keywords of `LLM.chat_async` for a chat's tools; none if it has none and needs none."""
    if not call.tools and call.tool_choice in ("auto", "none"):
        return {}
    return {
        "tools": call.tools,
        "tool_choice": call.tool_choice,
        "parallel_tool_calls": call.parallel_tool_calls,
    }


def require_success(output: GenerationOutput) -> None:
    """Raise the error of an output that did not end by itself."""
    if output.finish_reason in ("stop", "length"):
        return
    if output.error is not None:
        raise output.error
    if output.finish_reason == "timeout":
        raise HttpError(504, "the request was not finished in time (request_timeout_s)", code="timeout")
    raise HttpError(499, "the request was aborted", code="aborted")


def service_of(state: Any) -> Service:
    """The service of an application; raises `EngineClosedError` before its lifespan has loaded a model."""
    service: Service | None = getattr(state, "service", None)
    if service is None:
        raise EngineClosedError("the model is not loaded; the application's lifespan loads it")
    return service
