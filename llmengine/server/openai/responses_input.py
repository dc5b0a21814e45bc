"""Items of the Responses API, converted to the messages and tools of a chat.

A response's input is a list of items: messages, reasoning, calls of functions and their outputs. A chat has messages
only, so what the model did in one turn, its reasoning, text and calls, becomes one assistant message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmengine.checks import require_choice, require_text, requirement
from llmengine.errors import InvalidRequestError
from llmengine.server.fields import refuse_others

Item = Mapping[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_FIELDS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def as_items(given: str | Sequence[Item]) -> list[dict[str, Any]]:
    """The input of a request as items; a string is a message of the user."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"type": "message", **item} if item.get("type") is None else dict(item) for item in given]


def chat_messages(items: Sequence[Item], instructions: str | None = None, first: int = 0) -> list[dict[str, Any]]:
    """The messages of a conversation in items, of which errors call the first one ``input[first]``.

    Raises `InvalidRequestError` that names the item at fault.
    """
    messages = _Messages()
    if instructions is not None:
        messages.add({"role": "system", "content": instructions})
    for index, item in enumerate(items, first):
        messages.add_item(item, f"input[{index}]")
    messages.end_turn()
    return messages.messages if instructions is None else _with_one_system_message(messages.messages)


def chat_tools(tools: Sequence[Item]) -> list[dict[str, Any]]:
    """Functions in the form of the chat API. Raises `InvalidRequestError` for tools that are not functions."""
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def chat_tool_choice(
    choice: str | Item, tools: list[dict[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """The choice in the form of the chat API, and the tools that the model may call.

    Raises `InvalidRequestError` for a choice of another kind, or of a tool that is not there.
    """
    if isinstance(choice, str):
        require_choice("tool_choice", choice, ("none", "auto", "required"))
        return choice, tools
    kind = choice.get("type")
    if kind == "function":
        name = choice.get("name")
        _require_function(name, tools, "tool_choice.name")
        return {"type": "function", "function": {"name": name}}, tools
    if kind == "allowed_tools":
        mode = choice.get("mode")
        require_choice("tool_choice.mode", mode, ("auto", "required"))
        return str(mode), _allowed(choice.get("tools"), tools)
    raise InvalidRequestError(
        f"tool_choice.type={kind!r:.100} is not supported; supported: function, allowed_tools, or one of 'none', "
        "'auto', 'required'"
    )


class _Messages:
    """Messages under construction. The model's current turn is the last message until something else follows it."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._turn: dict[str, Any] | None = None

    def add(self, message: dict[str, Any]) -> None:
        self.end_turn()
        self.messages.append(message)

    def add_item(self, item: Item, where: str) -> None:
        kind = item.get("type")
        if kind == "message":
            self._add_message(item, where)
        elif kind == "reasoning":
            self._turn_without("reasoning_content", "content", "tool_calls")["reasoning_content"] = _reasoning(
                item, where
            )
        elif kind == "function_call":
            self._turn_without().setdefault("tool_calls", []).append(_tool_call(item, where))
        elif kind == "function_call_output":
            require_text(f"{where}.call_id", item.get("call_id"))
            content = _content(item.get("output"), f"{where}.output")
            self.add({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        else:
            supported = ", ".join(_ITEMS)
            raise InvalidRequestError(f"{where}.type={kind!r:.100} is not supported; supported: {supported}")

    def end_turn(self) -> None:
        if self._turn is not None:
            self._turn.setdefault("content", None if "tool_calls" in self._turn else "")
            self._turn = None

    def _add_message(self, item: Item, where: str) -> None:
        role = item.get("role")
        require_choice(f"{where}.role", role, _ROLES)
        content = _content(item.get("content"), f"{where}.content")
        if role == "assistant":
            self._turn_without("content", "tool_calls")["content"] = content
        else:
            self.add({"role": role, "content": content})

    def _turn_without(self, *fields: str) -> dict[str, Any]:
        """The model's turn, a new one if the current one has one of `fields` already."""
        if self._turn is not None and any(field in self._turn for field in fields):
            self.end_turn()
        if self._turn is None:
            self._turn = {"role": "assistant"}
            self.messages.append(self._turn)
        return self._turn


def _with_one_system_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with its instructions and the system messages after them in one: many templates take one."""
    end = next(
        (at for at, message in enumerate(messages) if message["role"] not in ("system", "developer")), len(messages)
    )
    if end < 2:
        return messages
    parts: list[dict[str, Any]] = []
    for message in messages[:end]:
        content = message["content"]
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"role": "system", "content": parts}, *messages[end:]]


def _content(given: Any, where: str) -> str | list[dict[str, Any]]:
    """The content of a message: a string, or text parts in the form of the chat API."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise requirement(InvalidRequestError, where, "a string or a list", given)
    return [{"type": "text", "text": _part_text(part, f"{where}[{index}]")} for index, part in enumerate(given)]


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise requirement(InvalidRequestError, where, "an object", part)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_FIELDS:
        supported = ", ".join(_TEXT_FIELDS)
        raise InvalidRequestError(f"{where}.type={kind!r:.100} is not supported; supported: {supported}")
    text = part.get(_TEXT_FIELDS[kind])
    if not isinstance(text, str):
        raise requirement(InvalidRequestError, f"{where}.{_TEXT_FIELDS[kind]}", "a string", text)
    return text


def _reasoning(item: Item, where: str) -> str:
    """The text of a reasoning item: its content, or its summary if the content was left out."""
    for field in ("content", "summary"):
        parts = item.get(field)
        if parts is not None and not (isinstance(parts, list) and all(isinstance(part, dict) for part in parts)):
            raise requirement(InvalidRequestError, f"{where}.{field}", "a list of objects", parts)
        texts = [part.get("text") for part in parts or ()]
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise requirement(InvalidRequestError, f"{where}.{field}[{index}].text", "a string", text)
        if texts:
            return "\n".join(map(str, texts))
    return ""


def _tool_call(item: Item, where: str) -> dict[str, Any]:
    for field in ("call_id", "name"):
        require_text(f"{where}.{field}", item.get(field))
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        raise requirement(InvalidRequestError, f"{where}.arguments", "a string", arguments)
    function = {"name": item["name"], "arguments": arguments}
    return {"id": item["call_id"], "type": "function", "function": function}


def _chat_tool(tool: Item, where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise InvalidRequestError(f"{where}.type={kind!r:.100} is not supported; supported: function")
    require_text(f"{where}.name", tool.get("name"))
    refuse_others(tool, ("type", *_FUNCTION_FIELDS), where)
    return {"type": "function", "function": {key: tool[key] for key in _FUNCTION_FIELDS if tool.get(key) is not None}}


def _allowed(given: Any, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools that `tool_choice` allows, in their own order."""
    if not isinstance(given, list) or not given:
        raise requirement(InvalidRequestError, "tool_choice.tools", "a non-empty list", given)
    names = set()
    for index, tool in enumerate(given):
        name = tool.get("name") if isinstance(tool, dict) and tool.get("type") == "function" else None
        _require_function(name, tools, f"tool_choice.tools[{index}]")
        names.add(name)
    return [tool for tool in tools if tool["function"]["name"] in names]


def _require_function(name: Any, tools: list[dict[str, Any]], where: str) -> None:
    names = [tool["function"]["name"] for tool in tools]
    if name not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise InvalidRequestError(f"{where} must name one of the request's functions ({known}), not {name!r:.100}")
