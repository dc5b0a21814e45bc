"""Grammars for answers: reasoning, then calls of tools with arguments of their schemas, or text, or structured output.

They are written in llguidance's dialect of Lark: `<[7]>` is the token with id 7, `%json` a JSON Schema, `[suffix=...]`
text up to a suffix, `[lazy]` a lexeme that ends as soon as it can, and `%lark` a grammar of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmengine.chat.answers.formats import AnswerFormat, ToolFormat
from llmengine.errors import InvalidRequestError
from llmengine.structured_output import StructuredOutput

_ANY = "/(.|\\n)*/"
_GUIDANCE = {"whitespace_pattern": " ", "json_allowed_escapes": 'nrbtf\\"'}


def answer_grammar(
    form: AnswerFormat,
    functions: Sequence[Mapping[str, Any]],
    *,
    prompt: str = "",
    special_ids: Mapping[str, int] | None = None,
    required: bool = True,
    parallel: bool = True,
    content: StructuredOutput | None = None,
) -> str:
    """A grammar, for `StructuredOutput.grammar`, of the answers that a choice of tools allows.

    Args:
        form: how the model writes answers; without `tools`, answers are text only.
        functions: the functions that may be called, with "name", "parameters" and "strict". Where "strict" is true,
            keywords of the schema that cannot be enforced are refused later; else they are ignored.
        prompt: the text before the answer, which may begin or end the reasoning.
        special_ids: ids of the special tokens by their texts. Other markers are ordinary text.
        required: the answer consists of calls, instead of text that may be followed by calls.
        parallel: there may be several calls.
        content: the form of text without calls; None: any.

    Raises `InvalidRequestError` for content whose form cannot be combined with calls.
    """
    return _Writer(form, special_ids or {}).write(functions, prompt, required, parallel, content)


class _Writer:
    def __init__(self, form: AnswerFormat, special_ids: Mapping[str, int]) -> None:
        self._form = form
        self._special_ids = special_ids
        self._rules = ["%llguidance {}"]

    def write(
        self,
        functions: Sequence[Mapping[str, Any]],
        prompt: str,
        required: bool,
        parallel: bool,
        content: StructuredOutput | None,
    ) -> str:
        self._rules.append(f"ANY: {_ANY}")
        reasoning = self._reasoning(prompt)
        tools = self._form.tools
        options = []
        if tools is not None:
            calls = self._calls(tools, functions, parallel)
            if required:
                options.append(f"{self._marker(tools.begins[0])} {calls}" if not tools.bare else calls)
            else:
                options += self._calls_after_text(tools, calls, content is not None)
        if not required:
            options.append(_content(content, "TEXT" if tools is not None and tools.bare else "ANY"))
            if tools is not None and tools.bare:
                self._rules.append("TEXT: /([^{ \\n](.|\\n)*)?/")
        self._rules.append(f"start: {reasoning} ({' | '.join(options)})")
        return "\n".join(self._rules)

    def _marker(self, text: str) -> str:
        if text in self._special_ids:
            return f"<[{self._special_ids[text]}]>"
        return _quoted(text)

    def _reasoning(self, prompt: str) -> str:
        reasoning = self._form.reasoning
        if reasoning is None or self._form.ends_reasoning(prompt):
            return ""
        if reasoning.end in self._special_ids:
            self._rules.append(f"thought: ANY {self._marker(reasoning.end)}")
        else:
            self._rules.append(f"thought[suffix={_quoted(reasoning.end)}]: {_ANY}")
        thought = 'thought ("\\n" | "\\n\\n")?'
        if self._form.begins_reasoning(prompt):
            return thought
        return f"({self._marker(reasoning.begin)} {thought})?"

    def _calls_after_text(self, tools: ToolFormat, calls: str, only_calls: bool) -> list[str]:
        """Alternatives of text followed by calls; with `only_calls`, of calls alone."""
        begin = tools.begins[0]
        found = [calls] if tools.bare else []
        text = "TEXT" if tools.bare else "ANY"
        if only_calls:
            return [*found, f"{self._marker(begin)} {calls}"]
        if begin in self._special_ids:
            return [*found, f"{text} {self._marker(begin)} {calls}"]
        self._rules.append(f"until_call[lazy]: {text} {_quoted(begin)}")
        return [*found, f"until_call {calls}"]

    def _calls(self, tools: ToolFormat, functions: Sequence[Mapping[str, Any]], parallel: bool) -> str:
        """A rule of one call or several, without the marker before the first."""
        names = [self._call(tools, index, function) for index, function in enumerate(functions)]
        self._rules.append(f"call: {' | '.join(names)}")
        begin, end = self._marker(tools.begins[0]), self._marker(tools.end) if tools.end else ""
        if tools.in_list:
            more = '(", " call)*' if parallel else ""
            opening = '(" [" | "[")' if tools.name == "mistral" else '"["'
            return f'{opening} call {more} "]" {end}'
        if tools.bare:
            return f"call {'(' + _quoted('; ') + ' call)*' if parallel else ''}"
        if tools.body == "named":
            return f"call ({begin} call)*" if parallel else "call"
        one = f'"\\n" call "\\n" {end}'
        return f'{one} ("\\n" {begin} {one})*' if parallel else one

    def _call(self, tools: ToolFormat, index: int, function: Mapping[str, Any]) -> str:
        name = str(function.get("name"))
        rule = f"call_{index}"
        if tools.body == "xml":
            body = f'{_quoted(f"<function={name}>" + chr(10))} {self._xml_parameters(rule, function)} "</function>"'
        else:
            arguments = f"%json {json.dumps(_schema(function), ensure_ascii=False)}"
            if tools.name == "mistral_args":
                body = f"{_quoted(name)} {self._marker('[ARGS]')} {arguments}"
            else:
                opening = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{tools.arguments_key}": '
                body = f'{_quoted(opening)} {arguments} "}}"'
        self._rules.append(f"{rule}: {body}")
        return rule

    def _xml_parameters(self, rule: str, function: Mapping[str, Any]) -> str:
        """Rules of the parameters in the order of the schema, those that are not required being optional."""
        schema = _schema(function)
        properties, required = schema.get("properties"), schema.get("required")
        parts = []
        for index, (key, value) in enumerate(properties.items() if isinstance(properties, dict) else ()):
            opening = _quoted(f"<parameter={key}>\n")
            part = f"{rule}_{index}"
            kind = value.get("type") if isinstance(value, dict) else None
            choices = value.get("enum") if isinstance(value, dict) else None
            if kind in (None, "string") and isinstance(choices, list):
                texts = " | ".join(_quoted(str(choice)) for choice in choices)
                self._rules.append(f'{part}: {opening} ({texts}) "\\n</parameter>\\n"')
            elif kind in (None, "string"):
                self._rules.append(f'{part}_value[suffix="\\n</parameter>\\n"]: {_ANY}')
                self._rules.append(f"{part}: {opening} {part}_value")
            else:
                inner = {
                    **value,
                    **{name: schema[name] for name in ("$defs", "definitions", "x-guidance") if name in schema},
                }
                self._rules.append(
                    f'{part}: {opening} %json {json.dumps(inner, ensure_ascii=False)} "\\n</parameter>\\n"'
                )
            parts.append(part if isinstance(required, list) and key in required else f"{part}?")
        return " ".join(parts)


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of the arguments, an object, with the options by which it is enforced."""
    given = function.get("parameters")
    schema = dict(given) if isinstance(given, Mapping) else {}
    if not schema.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf"}:
        schema["type"] = "object"
    return {**schema, "x-guidance": {**_GUIDANCE, "lenient": function.get("strict") is not True}}


def _content(content: StructuredOutput | None, text: str) -> str:
    if content is None:
        return text
    if content.json_schema is not None:
        schema = json.loads(str(content.json_schema))
        schema = schema if isinstance(schema, dict) else {}
        guidance = {**_GUIDANCE, "lenient": False}
        return f"%json {json.dumps({**schema, 'x-guidance': guidance}, ensure_ascii=False)}"
    if content.choice is not None:
        return f"({' | '.join(map(_quoted, content.choice))})"
    if content.regex is not None:
        return "/" + content.regex.replace("/", "\\/") + "/"
    assert content.grammar is not None
    if "::=" in content.grammar:
        raise InvalidRequestError(
            "a GBNF grammar cannot be combined with tools or reasoning; write it in Lark's syntax"
        )
    return f"%lark {{\n{content.grammar}\n}}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
