"""StructuredOutput: the form that a request's output must have, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmengine.checks import require_text, requirement
from llmengine.errors import InvalidRequestError

MAX_GRAMMAR_CHARS = 262_144
"""Most characters of a schema (as JSON), a regex, a grammar, or all choices together."""

_WRAPPER_KEYS = {"name", "description", "schema", "strict", "type"}
_KINDS = ("json_schema", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """One form, given by exactly one of the four fields; a text that ends with "stop" satisfies it.

    Raises `InvalidRequestError` for a malformed form, or one longer than `MAX_GRAMMAR_CHARS`. Whether a schema, regex
    or grammar can be used is checked once a request is submitted.

    Attributes:
        json_schema: a JSON Schema: a mapping (a Pydantic model's `model_json_schema()`, say) or JSON text, kept as JSON
            text; True: any JSON. JSON tokens are separated by at most one space. Keywords that cannot be enforced are
            refused. OpenAI's `response_format` is accepted for the schema inside it, with its `type` or without:
            ``{"name": ..., "schema": {...}}``.
        regex: a pattern for the whole text, in the syntax of Rust's `regex` crate: no look-around, no references.
        choice: strings, one of which becomes the text.
        grammar: a context-free grammar in EBNF: Lark's syntax with a rule `start`, or llama.cpp's GBNF with `root ::=`.
    """

    json_schema: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InvalidRequestError(f"StructuredOutput must have exactly one of {', '.join(_KINDS)}, not {found}")
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _as_json_text(self.json_schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", _as_choices(self.choice))
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None:
                require_text(name, getattr(self, name))
        size = sum(map(len, self.choice)) if self.choice is not None else len(getattr(self, given[0]))
        if size > MAX_GRAMMAR_CHARS:
            raise InvalidRequestError(f"{given[0]} has {size} characters; the limit is {MAX_GRAMMAR_CHARS}")


def _as_json_text(schema: Any) -> str:
    if isinstance(schema, str) and len(schema) > MAX_GRAMMAR_CHARS:
        return schema  # refused later for its length, without being parsed
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        if value is True:
            return "{}"
        if isinstance(value, Mapping):
            value = _schema_inside(value)
            # Property order is the order of the output, so keys are not sorted.
            return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"json_schema must be valid JSON, not {schema!r:.200}: {error}") from error
    raise requirement(InvalidRequestError, "json_schema", "an object or True", schema)


def _schema_inside(given: Mapping[str, Any]) -> Any:
    """The schema inside OpenAI's response format; `given` itself if it is a schema.

    A schema itself never has the keys "schema" and "json_schema", since names of properties are one level deeper. So a
    mapping with one of them, and otherwise only keys of OpenAI's form, is of that form.
    """
    if given.get("type") == "json_schema" and isinstance(given.get("json_schema"), Mapping):
        given = given["json_schema"]
    elif given.get("type") == "json_object" and given.keys() == {"type"}:
        return {"type": "object"}
    if "schema" in given and given.keys() <= _WRAPPER_KEYS and given.get("type", "json_schema") == "json_schema":
        inside = given["schema"]
        if inside is True:
            return {}
        if not isinstance(inside, Mapping):
            raise requirement(InvalidRequestError, 'json_schema["schema"]', "an object or True", inside)
        return inside
    return given


def _as_choices(choices: Any) -> tuple[str, ...]:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise requirement(InvalidRequestError, "choice", "a non-empty list of strings", choices)
    for index, text in enumerate(choices):
        require_text(f"choice[{index}]", text)
    return tuple(choices)
