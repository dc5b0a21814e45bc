"""Messages and tools, converted from the forms that callers send to those that chat templates read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmengine.chat.flexible_values import FlexibleValue, JsonObject, TextParts, WrappedFunction
from llmengine.checks import requirement
from llmengine.errors import InvalidRequestError


class MessageObject(Protocol):
    """A message of a client library, such as OpenAI's."""

    def model_dump(self) -> dict[str, Any]:
        """The message as a dict."""


Messages = Sequence[Mapping[str, Any] | MessageObject]
"""A conversation: mappings with "role" and "content"."""

_MAX_DEPTH = 64
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_SPEAKERS = ("system", "developer", "user", "assistant")
_REASONING = ("reasoning_content", "thinking", "reasoning")
PART_SEPARATOR = "\n"
"""Separator of the text parts of a message for a template that reads text."""


def plain_value(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` in exact JSON types, so that a template cannot reach the methods of richer objects.

    Accepts mappings, sequences, dataclasses and objects with `model_dump()` (Pydantic models, such as those of OpenAI's
    client). Raises `InvalidRequestError` naming `where` for anything else.
    """
    if depth > _MAX_DEPTH:
        raise InvalidRequestError(f"{where} is nested too deeply; the limit is {_MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise requirement(InvalidRequestError, f"a key in {where}", "a string", key)
        return {
            str.__str__(key): plain_value(item, f"{where}[{json.dumps(key, ensure_ascii=False)}]", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain_value(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    if not isinstance(value, type):
        if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return plain_value(fields, where, depth + 1)
        if callable(getattr(value, "model_dump", None)):
            return plain_value(value.model_dump(), where, depth + 1)
    raise requirement(InvalidRequestError, where, "a JSON value", value)


def plain_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of a conversation in plain JSON types.

    Raises `InvalidRequestError` unless it is a non-empty list of messages, each with a "role".
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise requirement(InvalidRequestError, "messages", "a non-empty list of dicts", messages)
    copies = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        copy = plain_value(message, where)
        if not isinstance(copy, dict):
            raise requirement(InvalidRequestError, where, "a dict", message)
        if not isinstance(copy.get("role"), str):
            raise requirement(InvalidRequestError, f'{where}["role"]', "a string", copy.get("role"))
        copies.append(copy)
    return copies


def is_conversation(prompt: Any) -> bool:
    """True if `prompt` holds messages rather than token ids."""
    if not isinstance(prompt, Sequence) or not prompt:
        return False
    return isinstance(prompt[0], Mapping) or hasattr(prompt[0], "model_dump") or is_conversation_list(prompt)


def is_conversation_list(messages: Any) -> bool:
    """True if `messages` is a list of conversations rather than one conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        return False
    return isinstance(messages[0], Sequence) and not isinstance(messages[0], str | bytes)


def plain_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A copy of a list of tools in OpenAI's form; None for an empty list.

    A function without its wrapper, `{"name": ..., "parameters": ...}`, gets one. Raises `InvalidRequestError`.
    """
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise requirement(InvalidRequestError, "tools", "a list of dicts", tools)
    copies: list[dict[str, Any]] = []
    for index, tool in enumerate(tools):
        copy = plain_value(tool, f"tools[{index}]")
        if not isinstance(copy, dict):
            raise requirement(InvalidRequestError, f"tools[{index}]", "a dict", tool)
        if "function" not in copy and "name" in copy and copy.get("type", "function") == "function":
            copy = {"type": "function", "function": {key: item for key, item in copy.items() if key != "type"}}
        copies.append(WrappedFunction(copy))
    return copies or None


def plain_documents(documents: Any) -> list[dict[str, Any]] | None:
    """A copy of a list of documents; None for an empty list; raises `InvalidRequestError` unless they are dicts."""
    if documents is None:
        return None
    copy = plain_value(documents, "documents")
    if not isinstance(copy, list) or not all(isinstance(document, dict) for document in copy):
        allowed = 'a list of dicts such as {"title": ..., "text": ...}'
        raise requirement(InvalidRequestError, "documents", allowed, documents)
    return copy or None


class Conversation:
    """The messages of one rendering, and their values that have several forms.

    Raises `InvalidRequestError` for malformed messages and for parts that are not text.

    Attributes:
        messages: the messages for the template.
        flexible: their values with several forms, in the order of the messages.
        texts: the contents of the messages as text, None where there is none.
    """

    def __init__(self, messages: Any, message_type: type[dict[str, Any]] = dict, *, as_parts: bool = False) -> None:
        self._as_parts = as_parts
        self.messages: list[dict[str, Any]] = []
        self.flexible: list[FlexibleValue] = []
        for index, copy in enumerate(plain_messages(messages)):
            # Message objects of clients have None in fields that they did not fill.
            message = message_type({key: value for key, value in copy.items() if value is not None})
            self._set_reasoning(message)
            self._set_content(message, copy, f"messages[{index}]")
            if "tool_calls" in message:
                self._set_tool_calls(message, f"messages[{index}]")
            self.messages.append(message)

    @property
    def has_tool_calls(self) -> bool:
        """True if some message calls a tool."""
        return any("tool_calls" in message for message in self.messages)

    def _set_reasoning(self, message: dict[str, Any]) -> None:
        """Store reasoning under the name that most templates read and under that of gpt-oss."""
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is not None:
            message["reasoning_content"] = reasoning
            message.setdefault("thinking", reasoning)

    def _set_content(self, message: dict[str, Any], given: Mapping[str, Any], where: str) -> None:
        content, role = message.get("content"), message["role"]
        if content is None:
            may_lack = role not in _SPEAKERS or role == "assistant"
            if not may_lack or ("content" not in given and not message.get("tool_calls")):
                raise InvalidRequestError(f'{where} must have "content" or "tool_calls"')
        elif isinstance(content, list):
            self._set_content_list(message, content, where)
        elif isinstance(content, str):
            if self._as_parts:
                self.flexible.append(FlexibleValue(message, "content", [_text_parts([content]), content]))
        elif role in _SPEAKERS:
            raise requirement(InvalidRequestError, f'{where}["content"]', "a string or a list", content)
        elif isinstance(content, dict):
            text = _to_json(content)
            self.flexible.append(FlexibleValue(message, "content", [JsonObject(content, text), text]))
        else:
            message["content"] = _to_json(content)

    def _set_content_list(self, message: dict[str, Any], content: list[Any], where: str) -> None:
        """Set content in parts: as given, else as one part, else as text. Other lists from a tool become JSON."""
        is_data = not all(isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in content)
        if is_data and message["role"] not in _SPEAKERS:
            message["content"] = _to_json(content)
            return
        parts = [_as_text_part(part, f'{where}["content"][{index}]') for index, part in enumerate(content)]
        text = PART_SEPARATOR.join(part["text"] for part in parts)
        forms: list[Any] = [TextParts(parts), _text_parts([text]), text]
        self.flexible.append(FlexibleValue(message, "content", forms if len(parts) > 1 else [forms[0], text]))

    def _set_tool_calls(self, message: dict[str, Any], where: str) -> None:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise requirement(InvalidRequestError, f'{where}["tool_calls"]', "a list", calls)
        if not calls:  # to templates, an empty list is a call as well
            del message["tool_calls"]
            return
        message["tool_calls"] = [
            self._wrap_tool_call(call, f'{where}["tool_calls"][{index}]') for index, call in enumerate(calls)
        ]

    def _wrap_tool_call(self, call: Any, where: str) -> dict[str, Any]:
        if not isinstance(call, dict):
            raise requirement(InvalidRequestError, where, "a dict", call)
        if "function" not in call:
            if call.get("type", "function") != "function":
                return call
            outside = ("id", "type", "index")
            function = {key: value for key, value in call.items() if key not in outside}
            call = {key: call[key] for key in outside if key in call} | {"type": "function", "function": function}
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise requirement(InvalidRequestError, f'{where}["function"]', 'a dict with a string "name"', function)
        forms = _argument_forms(function.get("arguments"), f'{where}["function"]["arguments"]')
        self.flexible.append(FlexibleValue(function, "arguments", forms))
        return WrappedFunction(call)


def _argument_forms(given: Any, where: str) -> list[Any]:
    """The arguments of a call in two forms: an object, and JSON text (the caller's own if it gave text).

    Text that is not JSON is refused, because a template that encodes it again would write a form no model has seen.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        given = {}
    text = given if isinstance(given, str) else _to_json(given)
    try:
        value = plain_value(json.loads(given), where) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{where} must be valid JSON, not {given!r:.200}: {error}") from error
    if not isinstance(value, dict):
        raise requirement(InvalidRequestError, where, "an object or the JSON text of one", value)
    return [JsonObject(value, text), text]


def _as_text_part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise requirement(InvalidRequestError, where, "a string or a dict", part)
    kind = part.get("type", "text")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise InvalidRequestError(f"{where} has type {kind!r:.100}, which is not supported; supported: text only")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise requirement(InvalidRequestError, f'{where}["{_TEXT_PARTS[kind]}"]', "a string", text)
    return {**part, "type": "text", "text": text}


def _text_parts(texts: Sequence[str]) -> TextParts:
    return TextParts([{"type": "text", "text": text} for text in texts])


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
