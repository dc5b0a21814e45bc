"""Readers of what is written between the markers of tool calls, one character at a time.

A reader is a generator that is sent one character after the other and reports what it finds to a `CallSink`. It returns
after a character that is no longer its own, and raises `MalformedCallError` at one that does not fit. What it reports
depends on the characters only, never on how they arrived.

Arguments are reported as the model wrote them, except for what models get wrong so often that the call would be lost:
control characters in strings and unknown escapes are escaped, Python's `True`, `False` and `None` become JSON's, and
arguments written as a JSON string are the text in that string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol

from llmengine.chat.answers.formats import ToolFormat

Reader = Generator[None, str, None]
"""Reads characters until it returns."""
_Lookahead = Generator[None, str, str]
"""Reads characters and returns the first that is not its own."""
_Emit = Callable[[str], None]

_SPACE = " \t\r\n"
_MAX_DEPTH = 64
_SCALAR = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_NAME = re.compile(r"[\w.:/-]")
_BARE_KEYS = {"type", "id", "name", "function", "arguments", "parameters"}


class MalformedCallError(Exception):
    """The characters do not make a call."""


class CallSink(Protocol):
    """Where a reader reports what it finds; each report also confirms all characters so far."""

    def begin(self, name: str) -> None:
        """A call begins."""

    def arguments(self, text: str) -> None:
        """More of the arguments of the call."""

    def end(self) -> None:
        """The call is complete."""

    def confirm(self) -> None:
        """The characters so far belong to the calls."""


def call_reader(form: ToolFormat, marker: str, tools: Mapping[str, Any], sink: CallSink) -> Reader:
    """A reader of the calls that follow a marker of `form`, or that begin an answer if `marker` is "".

    `tools` has the JSON Schemas of the parameters of the tools, by name.
    """
    if form.body == "xml":
        reader = _xml_call(marker, tools, sink)
    else:
        reader = _json_calls(form.body == "named", None if marker else frozenset(tools), sink)
    next(reader)
    return reader


def _json_calls(may_be_named: bool, names: frozenset[str] | None, sink: CallSink) -> Reader:
    """A call, several one after the other, or a list of calls. With `names`, no other name is a call."""
    char = yield from _skip((yield))
    if char == "[":
        yield from _list_of_calls(names, sink)
        return
    if may_be_named and char != "{":
        yield from _named_call(char, sink)
        return
    if char != "{":
        raise MalformedCallError
    while char == "{":
        yield from _CallObject(names, sink).read()
        char = yield from _skip((yield))
        if char in ",;":
            char = yield from _skip((yield))


def _list_of_calls(names: frozenset[str] | None, sink: CallSink) -> Reader:
    char = ","
    while char == ",":
        char = yield from _skip((yield))
        if char != "{":
            raise MalformedCallError
        yield from _CallObject(names, sink).read()
        char = yield from _skip((yield))
    if char != "]":
        raise MalformedCallError
    sink.confirm()


def _named_call(char: str, sink: CallSink) -> Reader:
    """`name[ARGS]{...}`, `name[CALL_ID]id[ARGS]{...}` or `name{...}`."""
    name = ""
    while _NAME.match(char):
        name += char
        char = yield
    char = yield from _skip(char)
    if char == "[":
        tag = yield from _until("]")
        if tag == "CALL_ID":
            yield from _until("[")
            tag = yield from _until("]")
        if tag != "ARGS":
            raise MalformedCallError
        char = yield from _skip((yield))
    if not name or char != "{":
        raise MalformedCallError
    sink.begin(name)
    yield from _object(sink.arguments, 0)
    sink.end()


class _CallObject:
    """One call as a JSON object."""

    def __init__(self, names: frozenset[str] | None, sink: CallSink) -> None:
        self._names = names
        self._sink = sink
        self._name: str | None = None
        self._begun = False
        self._held: list[str] | None = None  # arguments that were read before the call could begin

    def read(self) -> Reader:
        """Read the call, whose first brace has been read, up to its last one."""
        yield from self._members()
        if self._name is None:
            raise MalformedCallError
        if self._begun:
            self._sink.confirm()
        else:
            self._finish("{}")

    def _members(self) -> Reader:
        char = yield from _skip((yield))
        if char == "}":
            return
        while True:
            key = yield from _text(char)
            char = yield from _skip((yield))
            if char != ":":
                raise MalformedCallError
            char = yield from _skip((yield))
            lookahead = yield from self._member(key, char)
            char = yield from _skip(lookahead or (yield))
            if char == "}":
                return
            if char != ",":
                raise MalformedCallError
            char = yield from _skip((yield))

    def _member(self, key: str, char: str) -> Generator[None, str, str | None]:
        """Read the value that begins with `char`; returns a character that was read after it, if one was."""
        if key == "function" and char == "{":
            yield from self._members()
            return None
        if key in ("name", "function"):
            name = yield from _text(char)
            self._set_name(name)
            return None
        if key in ("arguments", "parameters"):
            if self._begun or self._held is not None:
                raise MalformedCallError
            if self._name is not None and char == "{":
                self._begin()
                yield from _object(self._sink.arguments, 0)
                self._sink.end()
                return None
            self._held = []
            yield from _arguments(char, self._held.append)
            self._finish_held()
            return None
        if self._names is not None and key not in _BARE_KEYS:
            raise MalformedCallError
        return (yield from _value(char, _ignore, 0))

    def _set_name(self, name: str) -> None:
        if self._name is not None or not _is_name(name) or (self._names is not None and name not in self._names):
            raise MalformedCallError
        self._name = name
        self._finish_held()

    def _finish_held(self) -> None:
        if self._name is not None and self._held is not None:
            self._finish("".join(self._held))

    def _finish(self, arguments: str) -> None:
        self._begin()
        self._sink.arguments(arguments)
        self._sink.end()

    def _begin(self) -> None:
        assert self._name is not None
        self._begun = True
        self._sink.begin(self._name)


def _arguments(char: str, emit: _Emit) -> Reader:
    """An object, the JSON text of one, or null for an empty one."""
    if char == "{":
        yield from _object(emit, 0)
    elif char == '"':
        text = yield from _text(char)
        try:
            text.encode()  # an escape may have been half of a character
            is_object = isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise MalformedCallError
        emit(text)
    else:
        yield from _rest("null", char)
        emit("{}")


def _rest(word: str, char: str) -> Reader:
    """Read a word that begins with `char`."""
    for expected in word[1:]:
        if char != word[0] or (yield) != expected:
            raise MalformedCallError


def _value(char: str, emit: _Emit, depth: int) -> Generator[None, str, str | None]:
    """Read a JSON value that begins with `char`; returns the character after it if the value's end needed it."""
    if depth > _MAX_DEPTH:
        raise MalformedCallError
    if char == '"':
        yield from _string(emit)
    elif char == "{":
        yield from _object(emit, depth)
    elif char == "[":
        yield from _array(emit, depth)
    else:
        text = ""
        while char.isalnum() or char in "+-.":
            text += char
            char = yield
        text = _PYTHON.get(text, text)
        if not _SCALAR.fullmatch(text):
            raise MalformedCallError
        emit(text)
        return char
    return None


def _object(emit: _Emit, depth: int) -> Reader:
    """Read an object whose first brace has been read, up to its last one."""
    emit("{")
    char = yield from _skip((yield), emit)
    while char != "}":
        if char != '"':
            raise MalformedCallError
        yield from _string(emit)
        char = yield from _skip((yield), emit)
        if char != ":":
            raise MalformedCallError
        emit(char)
        char = yield from _skip((yield), emit)
        char = yield from _item(char, emit, depth, "}")
    emit("}")


def _array(emit: _Emit, depth: int) -> Reader:
    emit("[")
    char = yield from _skip((yield), emit)
    while char != "]":
        char = yield from _item(char, emit, depth, "]")
    emit("]")


def _item(char: str, emit: _Emit, depth: int, end: str) -> _Lookahead:
    """Read a value and the comma after it; returns `end` or the first character of the next item."""
    lookahead = yield from _value(char, emit, depth + 1)
    char = yield from _skip(lookahead or (yield), emit)
    if char == end:
        return char
    if char != ",":
        raise MalformedCallError
    emit(char)
    char = yield from _skip((yield), emit)
    if char == end:
        raise MalformedCallError
    return char


def _string(emit: _Emit) -> Reader:
    """Read a string whose first quotation mark has been read."""
    emit('"')
    while (char := (yield)) != '"':
        if char == "\\":
            emit((yield from _escape()))
        else:
            emit(json.dumps(char)[1:-1] if char < " " else char)
    emit('"')


def _escape() -> _Lookahead:
    """Read what follows a backslash, and return both as JSON."""
    char = yield
    if char == "u":
        digits = ""
        for _ in range(4):
            char = yield
            if char not in "0123456789abcdefABCDEF":
                raise MalformedCallError
            digits += char
        return "\\u" + digits
    if char in '"\\/bfnrt':
        return "\\" + char
    return "\\\\" + json.dumps(char, ensure_ascii=False)[1:-1]  # as in a regex: the backslash itself was meant


def _is_name(text: str) -> bool:
    return text != "" and text.isprintable()


def _text(char: str) -> _Lookahead:
    """The text of the string that begins with `char`."""
    if char != '"':
        raise MalformedCallError
    parts: list[str] = []
    yield from _string(parts.append)
    text: str = json.loads("".join(parts))
    return text


def _skip(char: str, emit: _Emit | None = None) -> _Lookahead:
    """The first character from `char` on that is not whitespace."""
    while char in _SPACE:
        if emit is not None:
            emit(char)
        char = yield
    return char


def _until(end: str) -> _Lookahead:
    """The characters before `end`."""
    text = ""
    while (char := (yield)) != end:
        text += char
    return text


def _ignore(text: str) -> None:
    pass


def _xml_call(marker: str, tools: Mapping[str, Any], sink: CallSink) -> Reader:
    """`<function=name>`, parameters as `<parameter=key>value</parameter>`, `</function>`."""
    if marker != "<function=":
        yield from _literal("<function=", skip=True)
    name = (yield from _until(">")).strip()
    if not _is_name(name) or "<" in name:
        raise MalformedCallError
    sink.begin(name)
    properties = _properties(tools.get(name))
    before = "{"
    while True:
        tag = (yield from _tag()).strip()
        if tag == "/function":
            break
        if not tag.startswith("parameter="):
            raise MalformedCallError
        key = tag.removeprefix("parameter=").strip()
        value = yield from _until_text("</parameter>")
        value = value.removeprefix("\n").removesuffix("\n")
        sink.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: {_as_json(value, properties.get(key))}")
        before = ", "
    sink.arguments("{}" if before == "{" else "}")
    sink.end()


def _literal(text: str, skip: bool = False) -> Reader:
    for index, expected in enumerate(text):
        char = yield
        if skip and index == 0:
            char = yield from _skip(char)
        if char != expected:
            raise MalformedCallError


def _tag() -> _Lookahead:
    """What is between the next `<` and `>`."""
    yield from _literal("<", skip=True)
    return (yield from _until(">"))


def _until_text(end: str) -> _Lookahead:
    """The characters before the text `end`."""
    text = ""
    while not text.endswith(end):
        text += yield
    return text.removesuffix(end)


def _properties(schema: Any) -> Mapping[str, Any]:
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _as_json(value: str, schema: Any) -> str:
    """A parameter's text as JSON: as it is where its schema does not want a string and it is JSON; else a string."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind not in (None, "string") or (isinstance(schema, Mapping) and kind is None and "anyOf" in schema):
        text = _PYTHON.get(value.strip(), value.strip())
        try:
            json.loads(text, parse_constant=_refuse)
            return text
        except (ValueError, RecursionError):
            pass
    return json.dumps(value, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)
