"""Chats: from a conversation and a call's keywords to the text that the tokenizer's chat template writes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmengine.chat.answers.described_tools import describe_tools
from llmengine.chat.answers.formats import PHI, TOOL_FORMATS, AnswerFormat, find_answer_format
from llmengine.chat.answers.tool_choice import TEXT_PLAN, AnswerPlan, as_tool_choice, function_of
from llmengine.chat.messages import plain_messages, plain_tools, plain_value
from llmengine.checks import require_choice
from llmengine.errors import InvalidRequestError
from llmengine.request_options import ANSWER_NAMES, TEMPLATE_NAMES, is_sampling_parameter, unknown_keyword
from llmengine.tokenizer.protocol import ChatTokenizer, Tokenizer

_PROBE = "llmengine_no_such_variable"
_TOOLS_OF_MESSAGE = re.compile(r"""message(\.tools\b|\[(['"])tools\2\])""")
"""Matches where a template reads tools from a message."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A copy of the caller's conversation, the keywords of `apply_chat_template`, and the plan of the answer."""

    messages: list[dict[str, Any]]
    keywords: dict[str, Any]
    plan: AnswerPlan = TEXT_PLAN


class ChatRenderer:
    """Renders conversations by a tokenizer's chat template. Safe to use from several threads.

    A keyword is refused unless it is known to reach the template. Known keywords are the variables that the tokenizer's
    `chat_template_variables()` names, and the parameters of its `apply_chat_template`. An `apply_chat_template` that
    takes any keyword is called with a wrong one, to see whether it refuses such keywords itself.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._checks_names: bool | None = None

    def prompt(self, function: Callable[..., Any], messages: Any, keywords: Mapping[str, Any]) -> ChatPrompt:
        """A copy of the conversation, with those keywords of a call of `function` that are for its template.

        Raises `InvalidRequestError` for malformed messages and for keywords that contradict each other, and `TypeError`
        for a keyword that neither `function` nor the template has.
        """
        tokenizer = self._chat_tokenizer()
        direct = {name: value for name, value in keywords.items() if name != "chat_template_kwargs"}
        given = keywords.get("chat_template_kwargs")
        if given is not None and not isinstance(given, Mapping):
            raise InvalidRequestError(f"chat_template_kwargs must be a dict, not a {type(given).__name__}")
        variables = plain_value(given or {}, "chat_template_kwargs")
        if twice := sorted(direct.keys() & variables.keys()):
            raise InvalidRequestError(f"{twice[0]!r} is given twice: as a keyword and in chat_template_kwargs")
        merged = {**variables, **direct}
        wanted = {name: merged.pop(name, None) for name in (*ANSWER_NAMES, "tool_format")}
        known = None
        for name in direct.keys() - TEMPLATE_NAMES - ANSWER_NAMES:
            if is_sampling_parameter(name):
                raise unknown_keyword(function, name)
            known = known or self._known(tokenizer, merged)
            if known is not None and name not in known:
                raise unknown_keyword(function, name, {*known, *TEMPLATE_NAMES, *ANSWER_NAMES})
        arguments = {name: plain_value(value, name) for name, value in merged.items() if value is not None}
        for name in ("tools", "documents"):
            if arguments.get(name) == []:
                del arguments[name]
        if arguments.get("continue_final_message"):
            if arguments.get("add_generation_prompt"):
                raise InvalidRequestError("continue_final_message and add_generation_prompt contradict each other")
            arguments["add_generation_prompt"] = False
        copies = plain_messages(messages)
        plan = self._plan(copies, arguments, wanted)
        copies = self._place_tools(copies, arguments, wanted["tool_format"], plan)
        _check_call(tokenizer.apply_chat_template, arguments)
        return ChatPrompt(copies, arguments, plan)

    def answer_format(self, chat_template: str | None = None, *, has_tools: bool = True) -> AnswerFormat:
        """The form of answers that the template for such a conversation shows."""
        return find_answer_format(self._source({"chat_template": chat_template, "tools": has_tools}))

    def _plan(
        self, messages: Sequence[Mapping[str, Any]], keywords: Mapping[str, Any], wanted: Mapping[str, Any]
    ) -> AnswerPlan:
        form, name = find_answer_format(self._source(keywords)), wanted["tool_format"]
        if field := keywords.get("continue_final_message"):
            form = _continued(form, messages[-1], field if isinstance(field, str) else "content")
        if name is not None:
            require_choice("tool_format", name, tuple(TOOL_FORMATS))
            form = replace(form, tools=TOOL_FORMATS[name])
        tools = tuple(plain_tools(keywords.get("tools")) or ())
        parallel = wanted["parallel_tool_calls"]
        choice = as_tool_choice(wanted["tool_choice"], tools)
        return AnswerPlan(form, tools, choice, True if parallel is None else parallel)

    def _source(self, keywords: Mapping[str, Any]) -> str:
        """The text of the template that such a call uses; "" if it is not known."""
        method = getattr(self._chat_tokenizer(), "chat_template_source", None)
        if method is None:
            return ""
        try:
            source: str | None = method(keywords.get("chat_template"), has_tools=bool(keywords.get("tools")))
        except InvalidRequestError:
            return ""  # rendering will raise it
        return source or ""

    def _place_tools(
        self, messages: list[dict[str, Any]], keywords: dict[str, Any], tool_format: str | None, plan: AnswerPlan
    ) -> list[dict[str, Any]]:
        """Put tools where the template finds them, if it has no variable for them."""
        variables = self._variables(self._chat_tokenizer(), keywords)
        if variables is None or "tools" in variables:
            return messages
        source = self._source(keywords)
        if plan.tools and plan.form.tools is PHI and _TOOLS_OF_MESSAGE.search(source):
            del keywords["tools"]
            return _with_tools_in_system_message(messages, plan)
        if tool_format is not None and plan.form.tools is not None:
            keywords.pop("tools", None)
            return describe_tools(messages, plan.tools, plan.form.tools)
        return messages

    def render(self, prompt: ChatPrompt) -> str:
        """The text of a conversation. Raises `InvalidRequestError` if the template rejects it."""
        apply, keywords = self._chat_tokenizer().apply_chat_template, prompt.keywords
        text = apply(prompt.messages, **keywords)
        if not isinstance(text, str):
            raise TypeError(f"apply_chat_template() must return a str, not a {type(text).__name__}")
        parameters = _parameters(apply)
        unnamed = [name for name in keywords if name not in parameters]
        if unnamed and self._variables(self._chat_tokenizer(), keywords) is None and not self._refuses_others(prompt):
            raise InvalidRequestError(
                f"the tokenizer's apply_chat_template() takes any keyword, so {unnamed[0]!r} may never reach the "
                "template; name it in the signature, or refuse keywords that the template does not read"
            )
        return text

    def _refuses_others(self, prompt: ChatPrompt) -> bool:
        """Whether the tokenizer raises for a keyword that it cannot know; it has just accepted the others."""
        if self._checks_names is None:
            try:
                keywords: dict[str, Any] = {**prompt.keywords, _PROBE: True}
                self._chat_tokenizer().apply_chat_template(prompt.messages, **keywords)
                self._checks_names = False
            except Exception:
                self._checks_names = True
        return self._checks_names

    def _known(self, tokenizer: ChatTokenizer, keywords: Mapping[str, Any]) -> frozenset[str] | None:
        """Names of all variables that can be given; None if they are unknown."""
        variables = self._variables(tokenizer, keywords)
        if variables is not None:
            return variables
        parameters = _parameters(tokenizer.apply_chat_template)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        return None if takes_any else frozenset(parameters)

    def _variables(self, tokenizer: ChatTokenizer, keywords: Mapping[str, Any]) -> frozenset[str] | None:
        method = getattr(tokenizer, "chat_template_variables", None)
        if method is None:
            return None
        names = method(keywords.get("chat_template"), has_tools=bool(keywords.get("tools")))
        return None if names is None else frozenset(names)

    def _chat_tokenizer(self) -> ChatTokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError("a chat needs a tokenizer, but there is none; pass token ids to generate()")
        if not isinstance(self._tokenizer, ChatTokenizer):
            raise InvalidRequestError("the tokenizer has no apply_chat_template(); render the prompt yourself")
        return self._tokenizer


def _continued(form: AnswerFormat, message: Mapping[str, Any], field: str) -> AnswerFormat:
    """The form of what continues a field of a message: reasoning goes on, and does not begin within content."""
    if form.reasoning is None:
        return form
    text = str(message.get(field))
    if field == "content" and (form.reasoning.begin not in text or form.reasoning.end in text):
        return replace(form, reasoning=None)
    return replace(form, reasoning=replace(form.reasoning, always=True))


def _with_tools_in_system_message(messages: list[dict[str, Any]], plan: AnswerPlan) -> list[dict[str, Any]]:
    """The conversation for a template that reads tools, as JSON, from the system message."""
    functions = json.dumps([function_of(tool) for tool in plan.tools], ensure_ascii=False)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": functions}, *messages[1:]]


def _check_call(apply: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Raise `InvalidRequestError` if `apply` cannot be called with the keywords."""
    if "self" in keywords:
        raise InvalidRequestError("'self' is not a variable of the chat template")
    try:
        signature = inspect.signature(apply)
    except (TypeError, ValueError):  # the function is not written in Python
        return
    try:
        signature.bind([], **keywords)
    except TypeError as error:
        raise InvalidRequestError(f"the tokenizer's apply_chat_template() {error}") from error


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # the function is not written in Python
        return {}
