"""The sandbox of chat templates: what a template may call, and limits on its output, loops and time.

Hugging Face's conventions: templates have `raise_exception`, `strftime_now` and a `tojson` that does not escape HTML;
blocks are trimmed; `{% generation %}`, `{% break %}` and `{% continue %}` are tags.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from llmengine.chat.flexible_values import mark_as_written
from llmengine.errors import InvalidRequestError

MAX_PROMPT_CHARS = 16_000_000
"""Most characters that a template may write."""

MAX_RANGE_ITEMS = 1_000_000
"""Most items of all `range()` calls in one rendering."""

MAX_STEPS = 1_000_000
"""Most loop iterations and calls in one rendering."""

_MAX_TOTAL_CHARS = 16 * MAX_PROMPT_CHARS
_MAX_INT_BITS = 1 << 16
_MAX_REPEATED_ITEMS = 1_000_000


class AbsentContent(jinja2.Undefined):
    """The content of a message that has none: a template may see it as undefined, none or an empty string."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr("", name)

    def __getitem__(self, key: Any) -> jinja2.Undefined:  # type: ignore[override]
        return jinja2.Undefined(name=str(key))

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class Message(dict[str, Any]):
    """A message; its content may be absent."""

    __slots__ = ()

    def __missing__(self, key: str) -> Any:
        if key != "content":
            raise KeyError(key)
        return AbsentContent(name="content")


def bounded_range_function() -> Callable[..., range]:
    """A `range` function whose calls share one limit on the number of items."""
    num_items = 0

    def bounded_range(*bounds: int) -> range:
        nonlocal num_items
        items = range(*bounds)
        num_items += len(items)
        if num_items > MAX_RANGE_ITEMS:
            raise InvalidRequestError(
                f"the chat template takes too many items from range(); the limit is {MAX_RANGE_ITEMS}"
            )
        return items

    return bounded_range


class RenderTime:
    """Computing time of the thread that makes this. A thread that stands still on a busy machine does not use it up.

    Attributes:
        limit_s: how much there is, in seconds.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._over_at = time.monotonic() + limit_s
        self._used_up_at = time.thread_time() + limit_s

    @property
    def is_over(self) -> bool:
        """Whether it is used up."""
        # The first clock is read in a tenth of the time.
        return time.monotonic() > self._over_at and time.thread_time() > self._used_up_at


class RenderBudget:
    """Steps and characters that one rendering has used, and its time."""

    def __init__(self, time_left: RenderTime | None = None) -> None:
        self._steps = 0
        self._chars = 0
        self._time_left = time_left

    def step(self) -> None:
        """Count a loop iteration or call; raises `InvalidRequestError` above the limit or when the time is over."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise InvalidRequestError(
                f"the chat template makes too many loop iterations and calls; the limit is {MAX_STEPS}"
            )
        if self._time_left is not None and self._time_left.is_over:
            raise InvalidRequestError(f"the chat template takes too long; the limit is {self._time_left.limit_s:g} s")

    def count_value(self, value: Any) -> Any:
        """Count the size of a new `value` and return it."""
        self.step()
        size = _size(value)
        _check_size(size)
        self._chars += size
        if self._chars > _MAX_TOTAL_CHARS:
            raise InvalidRequestError(
                f"the chat template creates too many values; the limit is {_MAX_TOTAL_CHARS} characters in all"
            )
        return value


RENDER_BUDGET: ContextVar[RenderBudget] = ContextVar("llmengine_chat_template_budget")


def _count_value(value: Any) -> Any:
    budget = RENDER_BUDGET.get(None)  # there is no budget while a template is compiled and its constants are evaluated
    return (RenderBudget() if budget is None else budget).count_value(value)


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_PROMPT_CHARS:
        raise InvalidRequestError(
            f"the chat template creates a value that is too large; the limit is {MAX_PROMPT_CHARS} characters"
        )


def _size(value: Any) -> int:
    """Approximate number of characters and items of `value` when it is written out."""
    return _nested_size(value, {})


def _nested_size(value: Any, known: dict[int, int]) -> int:
    """`known` has sizes by object id: an object that occurs twice is counted twice but walked once."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
        raise InvalidRequestError(
            f"the chat template creates an integer that is too large; the limit is {_MAX_INT_BITS} bits"
        )
    if not isinstance(value, list | tuple | dict):
        return 1
    if id(value) not in known:
        items: Iterable[Any] = value
        if isinstance(value, dict):
            items = itertools.chain(dict.keys(value), dict.values(value))  # counting must not mark values as read
        known[id(value)] = 1 + sum(_nested_size(item, known) for item in items)
    return known[id(value)]


class _CountedItems:
    """Iterates over `items` and counts each iteration as a step."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        budget = RENDER_BUDGET.get()
        for item in self._items:
            budget.step()
            yield item


class _CountedCollection(_CountedItems):
    def __len__(self) -> int:
        return len(self._items)


def _count_items(items: Any) -> _CountedItems:
    return (_CountedCollection if isinstance(items, Sized) else _CountedItems)(items)


class _Namespace(Namespace):
    """A namespace whose text omits its content, since namespaces may be nested."""

    def __repr__(self) -> str:
        return "<Namespace>"


_PADDING = ("center", "ljust", "rjust", "zfill", "batch", "slice", "truncate")
_SPREADING = ("expandtabs", "indent", "tojson")


def _check_result_size(name: str, value: Any, arguments: Sequence[Any]) -> None:
    """Raise `InvalidRequestError` if the filter or string method `name` would turn `value` into too large a value."""
    number = max((abs(item) for item in arguments if isinstance(item, int)), default=0)
    longest = max((len(item) for item in arguments if isinstance(item, str)), default=0)
    if name in _PADDING:
        _check_size(number)
    elif name in _SPREADING:
        _check_size(_size(value) * (1 + number + longest))
    elif name == "replace" and len(arguments) >= 2 and isinstance(value, str):
        _check_size(len(value) + value.count(str(arguments[0])) * longest)
    elif name == "join" and isinstance(value, list | tuple | str):
        _check_size(_size(value) + len(value) * longest)
    elif name == "format" and isinstance(value, str):
        _check_widths(_WIDE_PERCENT, value)
    elif name == "sum" and any(isinstance(item, list | tuple) for item in arguments):
        raise InvalidRequestError("the chat template adds lists with sum, which is not supported")


_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*[0-9]*\.?([0-9]{5}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*([0-9]{5}|\{)")


def _check_widths(wide: re.Pattern[str], pattern: str) -> None:
    if wide.search(pattern):
        raise InvalidRequestError(f"the chat template uses a format whose width may be too large: {pattern!r:.100}")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment comes first

    @functools.wraps(function)
    def bounded(*arguments: Any, **keywords: Any) -> Any:
        value, *given = arguments[skipped:]
        _check_result_size(name, value, [*given, *keywords.values()])
        return _count_value(function(*arguments, **keywords))

    return bounded


class SandboxedTemplates(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControls])
        self.filters["tojson"] = _tojson
        for name in ("urlize", "xmlattr", "wordwrap"):  # the size of their output cannot be predicted from the input
            del self.filters[name]
        self.filters = {name: _bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters |= {_COUNTED: _count_items, _CONCAT: _concat, _MADE: _count_value}
        self.tests["none"] = lambda value: value is None or isinstance(value, AbsentContent)
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Route loops, and values made without a filter, call or operator, through filters that count."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filter_node(loop.iter, _COUNTED)
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = _filter_node(block.filter, _MADE)
        return _ValuesCounted().visit(tree)  # type: ignore[no-any-return]

    def call(self, context: Any, called: Any, /, *arguments: Any, **keywords: Any) -> Any:
        """Call a function, macro or method: one step, and a value of bounded size."""
        if isinstance(called, LoopContext) and arguments:
            arguments = (_count_items(arguments[0]), *arguments[1:])
        value = getattr(called, "__self__", None)
        if isinstance(value, str):
            _check_result_size(called.__name__, value, [*arguments, *keywords.values()])
            if called.__name__ == "join" and arguments:
                _check_result_size("join", arguments[0], [value])
        return _count_value(super().call(context, called, *arguments, **keywords))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The replacement of `str.format`; None for any other function."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(_WIDE_BRACES, value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Limit repetition, powers and formatting, which can make an enormous value cheaply."""
        if operator == "**":
            if not (isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= 64):
                raise InvalidRequestError(
                    "the chat template raises a number to a power that is too large; the limit is 64"
                )
        elif operator == "*":
            for items, count in ((left, right), (right, left)):
                is_repeat = isinstance(items, str | list | tuple) and isinstance(count, int)
                if is_repeat and len(items) * count > _MAX_REPEATED_ITEMS:
                    raise InvalidRequestError(
                        f"the chat template repeats a value too often; the limit is {_MAX_REPEATED_ITEMS} items"
                    )
        elif operator == "%" and isinstance(left, str):
            _check_widths(_WIDE_PERCENT, left)
        return _count_value(super().call_binop(context, operator, left, right))


_COUNTED, _CONCAT, _MADE = "llmengine_counted", "llmengine_concat", "llmengine_made"


def _concat(items: Sequence[Any]) -> str:
    _check_size(_size(items))
    return "".join(map(str, items))


def _filter_node(node: nodes.Node | None, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


class _ValuesCounted(NodeTransformer):
    """Routes the values of `~` and of literals through counting filters."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter_node(_filter_node(nodes.List(node.nodes), _CONCAT), _MADE)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter_node(node, _MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filter_node(node, _MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter_node(node, _MADE) if node.ctx == "load" else node


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
    mark_as_written(value)
    value = None if isinstance(value, AbsentContent) else value
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
