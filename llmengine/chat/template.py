"""Chat messages to prompt text, through the Jinja templates that come with models.

Hugging Face's conventions: `messages`, `tools`, `documents`, `add_generation_prompt` and the special tokens are
variables; a template may read further variables of its own. A value that the template does not read is refused, since
it would be lost silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes

from llmengine.chat.messages import Conversation, plain_documents, plain_messages, plain_tools, plain_value
from llmengine.chat.sandbox import (
    MAX_PROMPT_CHARS,
    MAX_RANGE_ITEMS,
    MAX_STEPS,
    RENDER_BUDGET,
    Message,
    RenderBudget,
    RenderTime,
    SandboxedTemplates,
    bounded_range_function,
)
from llmengine.checks import requirement
from llmengine.errors import InvalidRequestError, ModelLoadError

__all__ = ["MAX_PROMPT_CHARS", "MAX_RANGE_ITEMS", "MAX_RENDER_S", "MAX_STEPS", "ChatTemplate", "ChatTemplates"]

MAX_RENDER_S = 5.0
"""Most computing time of one rendering in seconds, checked in every step."""

_OURS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
_RESERVED = (*_OURS, "tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask")
_FAULTS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)
_MAX_SINGLE_STEPS = 8
_MAX_KNOWN_ROLES = 64
_NEEDLE = "needle-7f3a"
_CONTINUES = "CONTINUES-HERE-7f3a "
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled template; `render` may run in several threads at once.

    The template is sandboxed: it sees plain JSON data only, cannot change it, and reaches no Python internals. There
    are limits on the text and on every value that operators, filters, calls and blocks create (`MAX_PROMPT_CHARS` each,
    16 times that in all), on loop iterations and calls (`MAX_STEPS`, `MAX_RANGE_ITEMS`), and on time (`MAX_RENDER_S`).

    Raises `ModelLoadError` if `source` is not a valid template.

    Attributes:
        variables: the names that it reads and does not define, `messages` and special tokens among them.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, where: str = "tokenizer") -> None:
        self._special_tokens = dict(variables or {})
        environment = SandboxedTemplates()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree)) - environment.globals.keys()
            self._reads_messages = "messages" in self.variables
            self._mentioned = frozenset(_mentioned_names(tree))
            code = environment.compile(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(
                f"{where}: the chat template does not compile: {error}; template: {source:.200}"
            ) from error
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        self._takes_text: bool | None = None
        self._knows_role: dict[str, bool] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`, each a dict with "role" and "content" (or "tool_calls").

        Args:
            messages: content is text, or a list of text parts; arguments of tool calls are objects or JSON text. The
                template gets the form that it reads, whichever was given.
            add_generation_prompt: end with the header of an answer. None: True unless the final message is continued.
            tools: functions as JSON Schema, in OpenAI's form or without its wrapper.
            variables: `documents`; `continue_final_message`, True or the name of the field to continue, as in
                transformers; and variables of the template itself.

        Raises `InvalidRequestError` for malformed messages; for messages that the template rejects, quoting its
        message; for tools, tool calls, roles and variables that the template ignores; and for exceeded limits.
        """
        given = {name: value for name, value in (variables or {}).items() if value is not None}
        documents = plain_documents(given.pop("documents", None))
        field = _field_to_continue(given.pop("continue_final_message", False), add_generation_prompt)
        tools = plain_tools(tools)
        self._check_variables(given, tools=tools, documents=documents)
        context = {**self._special_tokens, **{name: plain_value(value, name) for name, value in given.items()}}
        context |= {"tools": tools, "documents": documents}
        context["add_generation_prompt"] = not field if add_generation_prompt is None else add_generation_prompt
        time_left = RenderTime(MAX_RENDER_S)
        plainly = plain_messages(messages)
        ending = _mark_ending(plainly, field) if field else ""
        conversation = self._conversation(plainly, time_left)
        try:
            text = self._write_in_forms(conversation, context, time_left)
        except InvalidRequestError:
            raise
        except RecursionError as error:
            raise InvalidRequestError("the chat template recurses too deeply on these messages") from error
        except _FAULTS as error:
            raise InvalidRequestError(f"the chat template rejects the messages: {error}") from error
        return _cut_ending(text, ending, field) if field else text

    def _check_variables(self, given: Iterable[str], **ours: object) -> None:
        for name in given:
            if name in _RESERVED:
                raise InvalidRequestError(f"{name!r} is reserved and cannot be a variable of the chat template")
            if name not in self.variables:
                own = self.variables.difference(_OURS, self._special_tokens)
                raise InvalidRequestError(unknown_variable(name, own))
        for name, value in ours.items():
            if value is not None and name not in self.variables and self._reads_messages:
                hint = ', describe them in the messages with tool_format="hermes"' if name == "tools" else ""
                raise InvalidRequestError(
                    f"the chat template does not use {name}, so they would be lost; omit them{hint}, or choose another "
                    "template with chat_template="
                )

    def _conversation(self, messages: list[dict[str, Any]], time_left: RenderTime) -> Conversation:
        for message in messages:
            if message["role"] == "developer" and "developer" not in self._mentioned:
                message["role"] = "system"  # "developer" is OpenAI's newer name
        if self._takes_text is None:
            self._takes_text = self._can_take_text(time_left)
        conversation = Conversation(messages, Message, as_parts=not self._takes_text)
        if not self._reads_messages:
            return conversation
        for index, message in enumerate(conversation.messages):
            role = message["role"]
            if message.get("content") and not self._is_role_known(role, time_left):
                raise InvalidRequestError(
                    f"messages[{index}] would be lost, because the chat template ignores the role {role!r:.100}"
                )
            if "function_call" in message and "function_call" not in self._mentioned:
                raise InvalidRequestError(
                    f'the chat template does not use messages[{index}]["function_call"], so it would be lost; '
                    'send "tool_calls" instead'
                )
        if conversation.has_tool_calls and not self._can_write_tool_calls(time_left):
            raise InvalidRequestError('the chat template does not use "tool_calls", so they would be lost')
        return conversation

    def _write_in_forms(self, conversation: Conversation, context: dict[str, Any], time_left: RenderTime) -> str:
        """Write the prompt with the first forms of values that the template reads.

        A value that a complete rendering did not read gets its next form. If the rendering failed, values that it did
        not reach may already have the right form, so only one value is changed at a time, the earliest first.
        """
        num_faults = 0
        while True:
            for value in conversation.flexible:
                value.forget()
            text, fault = "", None
            try:
                text = self._write({**context, "messages": conversation.messages}, time_left)
            except InvalidRequestError:
                raise
            except _FAULTS as error:
                fault = error
            unread = [value for value in conversation.flexible if not value.was_read()]
            if fault is not None:
                num_faults += 1
                unread = unread or conversation.flexible
            if fault is not None and num_faults <= _MAX_SINGLE_STEPS:
                changed = any(value.advance() for value in unread)
            else:
                changed = sum([value.advance() for value in unread]) > 0
            if not changed:
                if fault is not None:
                    raise fault
                return text

    def _write(self, context: Mapping[str, Any], time_left: RenderTime) -> str:
        pieces = []
        num_chars = 0
        token = RENDER_BUDGET.set(RenderBudget(time_left))
        try:
            for piece in self._template.generate({**context, "range": bounded_range_function()}):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS:
                    raise InvalidRequestError(
                        f"the chat template writes too much text; the limit is {MAX_PROMPT_CHARS} characters"
                    )
        finally:
            RENDER_BUDGET.reset(token)
        return "".join(pieces)

    def _probe(self, messages: Sequence[Mapping[str, Any]], time_left: RenderTime) -> str | None:
        """The text that the template writes for `messages`; None if it fails."""
        context = {**self._special_tokens, "tools": None, "documents": None, "add_generation_prompt": False}
        try:
            return self._write({**context, "messages": list(map(Message, messages))}, time_left)
        except InvalidRequestError:
            raise
        except _FAULTS:
            return None

    def _can_take_text(self, time_left: RenderTime) -> bool:
        """True if content may be text: it may unless the template writes only content that is given in parts."""
        part = {"type": "text", "text": _NEEDLE}
        if "text" not in self._mentioned or _NEEDLE in (self._probe([_message("user", _NEEDLE)], time_left) or ""):
            return True
        return _NEEDLE not in (self._probe([_message("user", [part])], time_left) or "")

    def _is_role_known(self, role: str, time_left: RenderTime) -> bool:
        """True if the template writes or rejects messages of `role`, or does not even write those of a user."""
        if role in self._mentioned or role == "user":
            return True
        known = self._knows_role.get(role)
        if known is None:
            known = self._can_write(role, time_left) or not self._can_write("user", time_left)
            if len(self._knows_role) < _MAX_KNOWN_ROLES:
                self._knows_role[role] = known
        return known

    def _can_write(self, role: str, time_left: RenderTime) -> bool:
        written = [self._probe(messages, time_left) for messages in self._conversations_with(role)]
        return written.count(None) == len(written) or any(_NEEDLE in text for text in written if text is not None)

    def _conversations_with(self, role: str) -> Iterator[list[Mapping[str, Any]]]:
        def text(string: str) -> Any:
            return string if self._takes_text else [{"type": "text", "text": string}]

        user, answer = _message("user", text("a")), _message("assistant", text("b"))
        probe = _message(role, text(_NEEDLE))
        yield [probe]
        yield [probe, user]
        yield [user, probe]
        yield [user, answer, probe]

    def _can_write_tool_calls(self, time_left: RenderTime) -> bool:
        if "tool_calls" in self._mentioned:
            return True
        call = {"type": "function", "function": {"name": _NEEDLE, "arguments": {}}}
        written = self._probe([_message("user", "a"), {**_message("assistant", "b"), "tool_calls": [call]}], time_left)
        return written is not None and _NEEDLE in written


class ChatTemplates:
    """The templates of one model, one of which renders a conversation.

    Args:
        sources: templates by name: "default", "tool_use" for conversations with tools, and others that `chat_template=`
            chooses.
        special_tokens: variables such as "bos_token".
        where: the file that messages name.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, Any], where: str) -> None:
        self.sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._where = where
        self._compiled: dict[str, ChatTemplate] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Like `ChatTemplate.render`; in `variables`, `chat_template` is the name or the text of a template.

        Also raises `InvalidRequestError` for an unknown name and for a given template that does not compile, and
        `ModelLoadError` if the model's own template does not compile.
        """
        others = dict(variables)
        template = self.choose(others.pop("chat_template", None), has_tools=bool(tools))
        return template.render(messages, add_generation_prompt, tools, others)

    def choose(self, chat_template: str | None = None, *, has_tools: bool = False) -> ChatTemplate:
        """The template that `chat_template` names or contains; for None, the model's own for such a conversation."""
        if chat_template is None:
            return self._compiled_template(self._default_name(has_tools))
        if not isinstance(chat_template, str):
            raise requirement(InvalidRequestError, "chat_template", "a string", chat_template)
        if chat_template in self.sources:
            return self._compiled_template(chat_template)
        if "{" not in chat_template:
            names = f" or the name of one ({', '.join(map(repr, self.sources))})" if self.sources else ""
            raise requirement(InvalidRequestError, "chat_template", f"the text of a template{names}", chat_template)
        try:
            return ChatTemplate(chat_template, self._special_tokens, "chat_template")
        except ModelLoadError as error:
            raise InvalidRequestError(str(error)) from error

    def source(self, chat_template: str | None = None, *, has_tools: bool = False) -> str:
        """The text of the template that `choose` chooses. Raises `InvalidRequestError` if there is none."""
        if chat_template is None:
            return self.sources[self._default_name(has_tools)]
        return self.sources.get(chat_template, chat_template)

    def _default_name(self, has_tools: bool) -> str:
        if has_tools and "tool_use" in self.sources:
            return "tool_use"
        if "default" in self.sources:
            return "default"
        if not self.sources:
            raise InvalidRequestError(
                "the model has no chat template; send a prompt, or put a chat_template.jinja beside its tokenizer"
            )
        if len(self.sources) > 1:
            raise InvalidRequestError(
                "the model has several chat templates, and none is the default; pass chat_template=, one of "
                f"{', '.join(map(repr, self.sources))}"
            )
        return next(iter(self.sources))

    def _compiled_template(self, name: str) -> ChatTemplate:
        template = self._compiled.get(name)
        if template is None:
            template = self._compiled[name] = ChatTemplate(self.sources[name], self._special_tokens, self._where)
        return template


def unknown_variable(name: str, known: Iterable[str]) -> str:
    """A message about a variable that the template does not read, with the closest name among those that it reads."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, [*names, *_OURS], n=1)
    others = f"its variables: {', '.join(names)}" if names else "it has no variables"
    hint = f"did you mean {nearest[0]}?" if nearest else others
    return f"{name!r:.100} is not a variable of the chat template, so it would be lost; {hint}"


def _mentioned_names(tree: nodes.Template) -> Iterator[str]:
    """All attribute names and string constants in a template."""
    for node in tree.find_all((nodes.Getattr, nodes.Const)):
        name = node.attr if isinstance(node, nodes.Getattr) else node.value if isinstance(node, nodes.Const) else None
        if isinstance(name, str):
            yield name


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _field_to_continue(given: bool | str, add_generation_prompt: bool | None) -> str:
    """Name of the field of the final message that the answer continues; "" if it continues none."""
    if not isinstance(given, bool | str):
        raise requirement(InvalidRequestError, "continue_final_message", "True, False or the name of a field", given)
    if given and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other: an answer either continues the final "
            "message or begins after it"
        )
    return given if isinstance(given, str) else "content" if given else ""


def _mark_ending(messages: list[dict[str, Any]], field: str) -> str:
    """Mark the end of the final message's `field` and return its text."""
    final = messages[-1]
    value = final.get(field)
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if parts:
            text: str = parts[-1]["text"]
            parts[-1]["text"] = text + _CONTINUES
            return text
    elif isinstance(value, str):
        # Reasoning has several names; the template reads one of them.
        for name in {field, *(_REASONING if field in _REASONING else ())}:
            if final.get(name) == value:
                final[name] = value + _CONTINUES
        return value
    raise InvalidRequestError(f'continue_final_message needs text in "{field}" of the final message, which has none')


def _cut_ending(text: str, ending: str, field: str) -> str:
    """Cut the text at the mark that `_mark_ending` set."""
    at = text.rfind(_CONTINUES.strip())
    if at < 0 or ending.strip() not in text:
        raise InvalidRequestError(
            f'continue_final_message is not possible, because the chat template changes "{field}" of the final '
            f"message: {ending!r:.100}"
        )
    # If the template trimmed the mark, the text before it must be trimmed as well.
    return text[:at] if text.startswith(_CONTINUES, at) else text[:at].rstrip()
