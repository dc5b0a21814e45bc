"""Tools for chat templates that know none: described in the conversation itself, in a form that the caller chose.

Instructions go to the end of the system message, or to the beginning of the first user message if there is none, since
some templates know no system message. Earlier calls become text of the assistant, results become text of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmengine.chat.answers.formats import ToolFormat


def describe_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], form: ToolFormat
) -> list[dict[str, Any]]:
    """A conversation that describes the tools and shows calls in `form`, for a template that knows no tools."""
    result: list[dict[str, Any]] = []
    for message in messages:
        copy = {key: value for key, value in message.items() if key != "tool_calls"}
        if message["role"] == "tool":
            text = f"<tool_response>\n{_as_text(message.get('content'))}\n</tool_response>"
            if result and result[-1].get("role") == "user" and messages[0] is not message:
                result[-1]["content"] = _joined(result[-1].get("content"), text)
                continue
            copy = {"role": "user", "content": text}
        elif message.get("tool_calls"):
            copy["content"] = _joined(message.get("content"), written_calls(form, message["tool_calls"]))
        result.append(copy)
    if tools:
        _add_instructions(result, _instructions(tools, form))
    return result


def written_calls(form: ToolFormat, calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls, in OpenAI's form, as a model writes them in `form`."""
    pairs = [_name_and_arguments(call) for call in calls]
    begin, end = form.begins[0], form.end
    if form.body == "xml":
        return "\n".join(f"{begin}\n{_xml_call(*pair)}\n{end}" for pair in pairs)
    if form.name == "mistral_args":
        return "".join(f"{begin}{name}[ARGS]{_json(arguments)}" for name, arguments in pairs)
    objects = [f'{{"name": {_json(name)}, "{form.arguments_key}": {_json(arguments)}}}' for name, arguments in pairs]
    if form.in_list:
        return f"{begin}[{', '.join(objects)}]{end}"
    if form.bare:
        return "; ".join(objects)
    return "\n".join(f"{begin}\n{text}\n{end}" for text in objects)


def _instructions(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> str:
    functions = "\n".join(_json(tool.get("function", tool)) for tool in tools)
    example = {"function": {"name": "function_name", "arguments": {"argument": "value"}}}
    return (
        "You can call functions to help with the user's request. These are their names and parameters:\n"
        f"<tools>\n{functions}\n</tools>\n\n"
        f"To call a function, answer with nothing but its call, in this form:\n{written_calls(form, [example])}\n\n"
        "The user then sends its result. If no function helps, answer as usual."
    )


def _add_instructions(messages: list[dict[str, Any]], text: str) -> None:
    first = messages[0]
    if first["role"] in ("system", "developer"):
        first["content"] = _joined(first.get("content"), text, "\n\n")
        return
    user = next((message for message in messages if message["role"] == "user"), None)
    if user is None:
        messages.insert(0, {"role": "user", "content": text})
    else:
        user["content"] = _joined(text, user.get("content"), "\n\n")


def _joined(first: Any, second: Any, separator: str = "\n") -> Any:
    """Two contents one after the other; lists of parts stay lists."""
    if not first or not second:
        return first or second
    if isinstance(first, list) or isinstance(second, list):
        return [*_as_parts(first), *_as_parts(second)]
    return f"{first}{separator}{second}"


def _as_parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _as_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return "\n".join(str(part["text"]) for part in content)
    return _json(content)


def _name_and_arguments(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") or {}
    return str(function.get("name")), json.loads(arguments) if isinstance(arguments, str) else arguments


def _xml_call(name: str, arguments: Mapping[str, Any]) -> str:
    values = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else _json(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<function={name}>\n{values}</function>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
