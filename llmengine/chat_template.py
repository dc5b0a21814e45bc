"""Chat messages to prompt text, through the Jinja templates that come with models.

Hugging Face's conventions: `messages`, `tools`, `documents`, `add_generation_prompt` and the special tokens are
variables; `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML are there; blocks are trimmed;
`{% generation %}`, `{% break %}` and `{% continue %}` are tags.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmengine.errors import InvalidRequestError, ModelLoadError

MAX_PROMPT_CHARS = 16_000_000
"""Most characters that a template may write."""

MAX_RANGE_ITEMS = 1_000_000
"""Most items of all `range()` calls of one rendering together."""

_MAX_REPEATED = 1_000_000
_MAX_DEPTH = 64
_RESERVED = ("messages", "documents", "continue_final_message", "tokenize", "chat_template", "return_dict")


class ChatTemplate:
    """A compiled template; `render` may run in several threads at once.

    The template is sandboxed: it sees plain JSON data only, cannot change it, and reaches no Python internals. What
    the caller's messages can make large is bounded: the text (`MAX_PROMPT_CHARS`), loops over `range`
    (`MAX_RANGE_ITEMS`), and what `*` and `**` make. Not bounded is what a hostile template does by itself, such as
    doubling a string in a loop: templates are trusted as much as the weights they come with.

    Raises `ModelLoadError` when `source` is no template.
    """

    def __init__(self, source: str, variables: Mapping[str, str] | None = None) -> None:
        self._variables = dict(variables or {})
        try:
            self._template = _Environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template does not compile: {error}; template: {source:.200}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt of `messages`, each a dict with "role" and "content" (or "tool_calls").

        Raises `InvalidRequestError` for malformed messages, for what the template itself rejects, quoting it, and
        for a text or loop above the limits.
        """
        check_messages(messages)
        context: dict[str, Any] = {**self._variables, "documents": None}
        for name, value in (variables or {}).items():
            if name in _RESERVED:
                raise InvalidRequestError(f"chat template variable {name!r} is reserved or not supported")
            context[name] = _plain(value, name)
        context["messages"] = _plain(messages, "messages")
        context["tools"] = None if tools is None else _plain(tools, "tools")
        context["add_generation_prompt"] = add_generation_prompt
        context["range"] = _range_with_budget()
        try:
            return self._write(context)
        except InvalidRequestError:
            raise
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRequestError(f"the chat template rejects the messages: {error}") from error
        except RecursionError as error:
            raise InvalidRequestError("the chat template recurses without end on these messages") from error

    def _write(self, context: Mapping[str, Any]) -> str:
        pieces = []
        num_chars = 0
        for piece in self._template.generate(context):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_PROMPT_CHARS:
                raise InvalidRequestError(f"the chat template wrote more than {MAX_PROMPT_CHARS} characters")
        return "".join(pieces)


def check_messages(messages: Any) -> None:
    """Raise `InvalidRequestError` unless `messages` is a non-empty list of dicts with "role" and "content"."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequestError(f"messages must be a non-empty list of dicts, not {messages!r:.100}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequestError(f"messages[{index}] is a {type(message).__name__}, not a dict")
        if not isinstance(message.get("role"), str):
            raise InvalidRequestError(f'messages[{index}] has no "role" string')
        content = message.get("content")
        if content is None and not message.get("tool_calls") and "content" not in message:
            raise InvalidRequestError(f'messages[{index}] has neither "content" nor "tool_calls"')
        if content is not None and not isinstance(content, str | list | tuple):
            raise InvalidRequestError(f'messages[{index}]["content"] is a {type(content).__name__}, not a str or list')


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Return a copy made of exact JSON types: methods of richer objects are out of the template's reach."""
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"{where} is nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidRequestError(f"{where} has a key that is not a string")
        return {str(key): _plain(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise InvalidRequestError(f"{where} is a {type(value).__name__}, which JSON does not have")


def _range_with_budget() -> Callable[..., range]:
    num_items = 0

    def bounded_range(*bounds: int) -> range:
        nonlocal num_items
        items = range(*bounds)
        num_items += len(items)
        if num_items > MAX_RANGE_ITEMS:
            raise InvalidRequestError(f"the chat template loops over more than {MAX_RANGE_ITEMS} range() items")
        return items

    return bounded_range


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControls])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Repeat and raise within limits; both are the cheap ways to make an enormous value."""
        if operator == "**":
            if not (isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 64):
                raise InvalidRequestError("the chat template raises to a power above 64")
        else:
            for items, count in ((left, right), (right, left)):
                is_repeat = isinstance(items, str | list | tuple) and isinstance(count, int)
                if is_repeat and len(items) * count > _MAX_REPEATED:
                    raise InvalidRequestError(f"the chat template repeats a value to above {_MAX_REPEATED} items")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; here its body is simply written."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
