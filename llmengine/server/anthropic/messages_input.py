"""Messages of the Anthropic API, converted to the messages and tools of a chat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmengine.checks import require_choice, require_text, requirement
from llmengine.errors import InvalidRequestError
from llmengine.server.fields import refuse_others

Block = Mapping[str, Any]

_ROLES = ("user", "assistant", "system")
_USER_BLOCKS = ("text", "tool_result")
_ASSISTANT_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use")
_TOOL_FIELDS = ("name", "description", "input_schema", "strict", "type", "cache_control", "eager_input_streaming")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
FAILED_TOOL_PREFIX = "Error: "
"""What the model reads before the result of a tool that failed, since chat templates have no other place for that."""


def chat_messages(messages: Sequence[Block], system: str | Sequence[Block] | None = None) -> list[dict[str, Any]]:
    """The messages of a conversation. Raises `InvalidRequestError` that names the block at fault."""
    converted: list[dict[str, Any]] = []
    if system:
        converted.append({"role": "system", "content": _text_content(system, "system")})
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, content = message.get("role"), message.get("content")
        require_choice(f"{where}.role", role, _ROLES)
        blocks = _blocks(content, f"{where}.content")
        if role == "user":
            converted += _user_messages(blocks, f"{where}.content")
        elif role == "assistant":
            converted.append(_assistant_message(blocks, f"{where}.content"))
        else:
            converted.append({"role": "system", "content": _text_content(blocks, f"{where}.content")})
    return converted


def continues_answer(messages: Sequence[Block]) -> bool:
    """True if the final message is the beginning of the model's answer, which the model is to continue."""
    return bool(messages) and messages[-1].get("role") == "assistant"


def chat_tools(tools: Sequence[Block]) -> list[dict[str, Any]]:
    """Tools in the form of the chat API. Raises `InvalidRequestError` for tools that the API itself would run."""
    return [_chat_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]


def chat_tool_choice(choice: Block, tools: Sequence[Mapping[str, Any]]) -> tuple[str | dict[str, Any], bool]:
    """The choice in the form of the chat API, and whether the model may call several tools at once."""
    kind = choice.get("type")
    parallel = not choice.get("disable_parallel_tool_use", False)
    if kind == "tool":
        names = [tool["function"]["name"] for tool in tools]
        if choice.get("name") not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise InvalidRequestError(
                f"tool_choice.name must name one of the request's tools ({known}), not {choice.get('name')!r:.100}"
            )
        return {"type": "function", "function": {"name": choice["name"]}}, parallel
    require_choice("tool_choice.type", kind, (*_CHOICES, "tool"))
    return _CHOICES[str(kind)], parallel


def _blocks(content: Any, where: str) -> list[Block]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise requirement(InvalidRequestError, where, "a string or a list of blocks", content)
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise requirement(InvalidRequestError, f"{where}[{index}]", "an object", block)
    return content


def _user_messages(blocks: Sequence[Block], where: str) -> list[dict[str, Any]]:
    """The results of tools, each a message of its own, and the user's text between them, in order."""
    messages: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] | None = None
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if _kind(block, _USER_BLOCKS, place) == "tool_result":
            texts = None
            require_text(f"{place}.tool_use_id", block.get("tool_use_id"))
            messages.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": _result(block, place)})
            continue
        if texts is None:
            texts = []
            messages.append({"role": "user", "content": texts})
        texts.append(_text_part(block, place))
    if not messages:
        raise requirement(InvalidRequestError, where, "a non-empty string or list of blocks", list(blocks))
    return [_plain(message) for message in messages]


def _assistant_message(blocks: Sequence[Block], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": []}
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        kind = _kind(block, _ASSISTANT_BLOCKS, place)
        if kind == "text":
            message["content"].append(_text_part(block, place))
        elif kind == "thinking":
            reasoning.append(_string(block, "thinking", place))
        elif kind == "tool_use":
            calls.append(_tool_call(block, place))
        # Redacted thinking is encrypted by the server that wrote it, and no model here could read it.
    if reasoning:
        message["reasoning_content"] = "\n".join(reasoning)
    if calls:
        message["tool_calls"] = calls
        message["content"] = message["content"] or None
    return _plain(message)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """The message with content of a single part as a string, and no content as an empty one."""
    content = message["content"]
    if content is not None and len(content) <= 1 and not isinstance(content, str):
        message["content"] = content[0]["text"] if content else ""
    return message


def _result(block: Block, where: str) -> str | list[dict[str, Any]]:
    """The content of a tool's result."""
    content = block.get("content")
    result = _text_content("" if content is None else content, f"{where}.content")
    if not block.get("is_error"):
        return result
    if isinstance(result, str):
        return FAILED_TOOL_PREFIX + result
    return [{"type": "text", "text": FAILED_TOOL_PREFIX}, *result]


def _text_content(given: Any, where: str) -> str | list[dict[str, Any]]:
    """Content that has text only, as a string or as text parts."""
    if isinstance(given, str):
        return given
    parts = []
    for index, block in enumerate(_blocks(given, where)):
        _kind(block, ("text",), f"{where}[{index}]")
        parts.append(_text_part(block, f"{where}[{index}]"))
    return parts[0]["text"] if len(parts) == 1 else parts or ""


def _text_part(block: Block, where: str) -> dict[str, Any]:
    return {"type": "text", "text": _string(block, "text", where)}


def _string(block: Block, field: str, where: str) -> str:
    text = block.get(field)
    if not isinstance(text, str):
        raise requirement(InvalidRequestError, f"{where}.{field}", "a string", text)
    return text


def _kind(block: Block, supported: Sequence[str], where: str) -> str:
    kind = block.get("type")
    if not isinstance(kind, str) or kind not in supported:
        raise InvalidRequestError(f"{where}.type={kind!r:.100} is not supported; supported: {', '.join(supported)}")
    return kind


def _tool_call(block: Block, where: str) -> dict[str, Any]:
    for field in ("id", "name"):
        require_text(f"{where}.{field}", block.get(field))
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise requirement(InvalidRequestError, f"{where}.input", "an object", arguments)
    text = json.dumps(arguments, ensure_ascii=False)
    return {"id": block["id"], "type": "function", "function": {"name": block["name"], "arguments": text}}


def _chat_tool(tool: Block, where: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise InvalidRequestError(f"{where}.type={kind!r:.100} is not supported; supported: custom")
    require_text(f"{where}.name", tool.get("name"))
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise requirement(InvalidRequestError, f"{where}.input_schema", "an object", schema)
    refuse_others(tool, _TOOL_FIELDS, where)
    function = {"name": tool["name"], "parameters": schema}
    for field in ("description", "strict"):
        if tool.get(field) is not None:
            function[field] = tool[field]
    return {"type": "function", "function": function}
