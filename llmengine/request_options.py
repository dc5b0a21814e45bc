"""Request options: how a request is run, as opposed to what it generates (`SamplingParams`).

Everything that submits requests takes these options as keywords. A new one is a field of `RequestOptions` and its key
in `RequestKeywords`, which type checkers read; a test compares the two.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, get_args

from llmengine.checks import (
    require_bool,
    require_choice,
    require_int,
    require_number,
    require_text,
    requirement,
    set_none_to_default,
)
from llmengine.errors import InvalidRequestError
from llmengine.sampling_params import SamplingParams

SlowConsumer = Literal["coalesce", "pause", "abort"]
"""What happens to a request with too many unread tokens: it goes on, it pauses until they are read, or it ends."""

MAX_PRIORITY = 1_000_000
"""Largest `RequestOptions.priority`; the smallest is -MAX_PRIORITY."""

MAX_REQUEST_ID_CHARS = 256
"""Most characters of `RequestOptions.request_id`."""
_STRUCTURED = "sampling_params=SamplingParams(structured=StructuredOutput(...))"
_ELSEWHERE = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "sampling_params=SamplingParams(max_new_tokens=...)"),
    **dict.fromkeys(("response_format", "guided_json", "structured_outputs"), _STRUCTURED),
    "stream": "streaming=True of the methods that end in _async",
    "timeout": "deadline_s",
}
"""Keyword of another engine -> what it is called here."""

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """The options of one request, checked. None stands for an option's default.

    Raises `InvalidRequestError` for a value of the wrong type or range.

    Attributes:
        priority: higher is scheduled first and preempted last, among the requests of its tenant; in [-1e6, 1e6].
        tenant: the tenant that the request belongs to. Tenants share the engine by `SchedulerConfig.tenant_weights`,
            whatever their priorities. They share prefix blocks only with `share_prefixes_across_tenants`.
        deadline_s: seconds from now after which the request ends with finish reason "timeout".
        first_token_deadline_s: the same for a request that has no token yet.
        cache_salt: the request shares cached prefix blocks only with requests of an equal salt.
        wait_for_admission: if the queue is full, wait for room (tenants take turns) instead of raising
            `QueueFullError`. The request is tokenized once it is admitted; reading, cancelling, `abort()` and deadlines
            work as usual. The default is False for a single request, and True for `generate`, `stream` and beam search.
        slow_consumer: what to do while `SchedulerConfig.max_unread_tokens` tokens are unread. "coalesce": go on;
            they arrive as one longer delta. "pause": compute no more until they are read; the KV blocks stay until
            others need them, and beyond `max_queued_requests` paused requests the oldest is aborted. "abort": end the
            request with finish reason "abort"; the output's `error` says why. A caller that waits for the final output
            counts as having read everything.
        request_id: the caller's own name for the request, at most 256 characters. Outputs, errors, logs and statistics
            show it instead of the engine's number. It is a label: it need not be unique, and all requests of one call
            share it.
        metadata: any object; each output and the request's statistics carry it unchanged.
    """

    priority: int = 0
    tenant: str | None = None
    deadline_s: float | None = None
    first_token_deadline_s: float | None = None
    cache_salt: Hashable = None
    wait_for_admission: bool = False
    slow_consumer: SlowConsumer = "coalesce"
    request_id: str | None = None
    metadata: object = None

    def __post_init__(self) -> None:
        set_none_to_default(self)
        require_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.tenant is not None and not isinstance(self.tenant, str):
            raise requirement(InvalidRequestError, "tenant", "a string", self.tenant)
        for name in ("deadline_s", "first_token_deadline_s"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0.0, low_open=True)
        try:
            hash(self.cache_salt)
        except TypeError as error:
            raise requirement(InvalidRequestError, "cache_salt", "hashable", self.cache_salt) from error
        require_bool("wait_for_admission", self.wait_for_admission)
        require_choice("slow_consumer", self.slow_consumer, get_args(SlowConsumer))
        if self.request_id is not None:
            require_text("request_id", self.request_id)
            if len(self.request_id) > MAX_REQUEST_ID_CHARS:
                raise InvalidRequestError(
                    f"request_id {self.request_id[:20]!r}... has {len(self.request_id)} characters; "
                    f"the limit is {MAX_REQUEST_ID_CHARS}"
                )

    @property
    def has_deadline(self) -> bool:
        """True if the request may end with "timeout"."""
        return self.deadline_s is not None or self.first_token_deadline_s is not None

    def replace(self, **changes: Any) -> RequestOptions:
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)


class RequestKeywords(TypedDict, total=False):
    """The keywords that `RequestOptions` documents, for ``**options: Unpack[RequestKeywords]``."""

    priority: int | None
    tenant: str | None
    deadline_s: float | None
    first_token_deadline_s: float | None
    cache_salt: Hashable
    wait_for_admission: bool | None
    slow_consumer: SlowConsumer | None
    request_id: str | None
    metadata: object


class TemplateKeywords(TypedDict, total=False):
    """The keywords of what makes a prompt of a conversation.

    Attributes:
        tools: functions as JSON Schema, in OpenAI's form or without its wrapper. Like the other keywords, refused if
            the chat template does not use it.
        tool_format: the form of tool calls, a name in `llmengine.chat.answers.TOOL_FORMATS`, instead of the one that
            the chat template shows. If the template does not use tools, messages describe them in this form.
        documents: sources for the answer; mappings with "title" and "text" for most templates.
        add_generation_prompt: end the prompt with the header of an answer. The default is True, unless the final
            message is continued.
        continue_final_message: True: the answer continues the final message; a string: it continues that field of it.
        chat_template: the name of another template of the model, or the text of a template.
        chat_template_kwargs: variables of the template itself, such as ``{"enable_thinking": False}``. They may also be
            passed as keywords, but type checkers do not know those.
    """

    tools: Sequence[Any] | None
    tool_format: str | None
    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | str | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None


class AnswerKeywords(TypedDict, total=False):
    """The keywords of what the answer to a conversation may be.

    Attributes:
        tool_choice: "auto": call tools or not, the default if there are tools; "none": the tools are described, but not
            called; "required": call at least one; ``{"type": "function", "function": {"name": ...}}``: call this one.
            Calls that must be made fit the schemas of the functions.
        parallel_tool_calls: if False, the answer has at most one call. The default is True.
    """

    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None


class ChatKeywords(RequestKeywords, TemplateKeywords, AnswerKeywords, total=False):
    """The keywords of chats: those of requests, of the chat template, and of the answer."""


TEMPLATE_NAMES = frozenset(TemplateKeywords.__annotations__)
ANSWER_NAMES = frozenset(AnswerKeywords.__annotations__)


def split_options(keywords: Mapping[str, Any], **defaults: Any) -> tuple[RequestOptions, dict[str, Any]]:
    """The request options among `keywords`, and the remaining keywords.

    `defaults` replace the defaults of some options.
    """
    rest = dict(keywords)
    given = {name: rest.pop(name) for name in OPTION_NAMES if name in rest}
    for name, default in defaults.items():
        if given.get(name) is None:
            given[name] = default
    return RequestOptions(**given), rest


def as_options(function: Callable[..., Any], keywords: Mapping[str, Any], **defaults: Any) -> RequestOptions:
    """The request options in the `keywords` of `function`; raises `TypeError` for any other keyword."""
    options, rest = split_options(keywords, **defaults)
    for name in rest:
        raise unknown_keyword(function, name)
    return options


def unknown_keyword(function: Callable[..., Any], name: str, known: Iterable[str] = ()) -> TypeError:
    """Python's own error for a keyword that `function` does not have, with the name that was probably meant.

    `known` are keywords beside those of the function's signature.
    """
    message = f"{function.__qualname__}() got an unexpected keyword argument {name!r}"
    own = [*inspect.signature(function).parameters, *known]
    params = [field.name for field in dataclasses.fields(SamplingParams)] if "sampling_params" in own else []
    if name in _ELSEWHERE and "sampling_params" in own:
        return TypeError(f"{message}. Did you mean {_ELSEWHERE[name]!r}?")
    if name in params:
        return TypeError(f"{message}; it is a field of sampling_params=SamplingParams({name}=...)")
    if close := difflib.get_close_matches(name, [*own, *params], 1):
        where = close[0] if close[0] in own else f"sampling_params=SamplingParams({close[0]}=...)"
        return TypeError(f"{message}. Did you mean {where!r}?")
    return TypeError(message)


def is_sampling_parameter(name: str) -> bool:
    """True if a keyword belongs to `SamplingParams` or to the requests of other engines."""
    return name in _ELSEWHERE or any(name == field.name for field in dataclasses.fields(SamplingParams))


def takes_options(keywords: type = RequestKeywords, **defaults: Any) -> Callable[[_F], _F]:
    """Show the options in the signature and the documentation of a function that has them as ``**options``.

    `defaults` are the function's own, as for `as_options`. `TemplateKeywords` come with variables of the template.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        known = {field.name: field.default for field in dataclasses.fields(RequestOptions)} | defaults
        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=known.get(name), annotation=kind.__forward_arg__
            )
            for name, kind in keywords.__annotations__.items()
        ]
        if keywords is not RequestKeywords:
            parameters.append(inspect.Parameter("template_variables", inspect.Parameter.VAR_KEYWORD, annotation="Any"))
        function.__signature__ = signature.replace(parameters=[*own, *parameters])  # type: ignore[attr-defined]
        sources: list[type] = [] if keywords is TemplateKeywords else [RequestOptions]
        if keywords is not RequestKeywords:
            sources.append(TemplateKeywords)
        if keywords is ChatKeywords:
            sources.append(AnswerKeywords)
        if function.__doc__:
            listed = "".join(_attributes(source.__doc__ or "") for source in sources)
            function.__doc__ = f"{function.__doc__.rstrip()}\n\n        Options:\n{listed}"
        return function

    return decorate


OPTION_NAMES = frozenset(field.name for field in dataclasses.fields(RequestOptions))


def _attributes(documentation: str) -> str:
    """The attributes section of a docstring, indented for a method's docstring."""
    text = inspect.cleandoc(documentation).partition("Attributes:\n")[2]
    return "".join(f"{line and '        '}{line}\n" for line in text.splitlines())
