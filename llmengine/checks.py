"""Checks of the plain data that callers pass, and their messages: one wording for each kind of mistake."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from llmengine.errors import InvalidRequestError, LLMEngineError

_MAX_SHOWN_CHARS = 200
"""Most characters of a value's `repr` in a message."""


def set_none_to_default(data: Any, *, but: Collection[str] = ()) -> None:
    """Set each field of a dataclass that is None to its default: servers forward the nulls of the JSON they received.

    `but` names the fields in which None has a meaning of its own.
    """
    for field in dataclasses.fields(data):
        if getattr(data, field.name) is None and field.name not in but:
            object.__setattr__(data, field.name, field.default)


def require_int(
    name: str, value: Any, low: int, high: int | None = None, *, error: type[LLMEngineError] = InvalidRequestError
) -> None:
    """Raise `error` unless `value` is an integer, not a bool, in [low, high]; without `high`, of at least `low`."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise requirement(error, name, f"an integer {limits}", value)


def require_number(
    name: str,
    value: Any,
    low: float,
    high: float | None = None,
    *,
    low_open: bool = False,
    error: type[LLMEngineError] = InvalidRequestError,
) -> None:
    """Raise `error` unless `value` is a number, neither a bool nor NaN, in [low, high].

    `low_open` excludes `low` itself. Without `high` there is no upper limit.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    high_enough = is_number and (value > low if low_open else value >= low)
    if not high_enough or (high is not None and value > high):
        if high is None:
            limits = f"{'above' if low_open else 'of at least'} {low:g}"
        else:
            limits = f"in {'(' if low_open else '['}{low:g}, {high:g}]"
        raise requirement(error, name, f"a number {limits}", value)


def require_bool(name: str, value: Any, *, error: type[LLMEngineError] = InvalidRequestError) -> None:
    """Raise `error` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise requirement(error, name, "True or False", value)


def require_text(name: str, value: Any, *, error: type[LLMEngineError] = InvalidRequestError) -> None:
    """Raise `error` unless `value` is a string with at least one character."""
    if not isinstance(value, str) or not value:
        raise requirement(error, name, "a non-empty string", value)


def require_choice(
    name: str, value: Any, choices: Collection[str], *, error: type[LLMEngineError] = InvalidRequestError
) -> None:
    """Raise `error` unless `value` is one of `choices`."""
    if value not in choices:
        raise requirement(error, name, f"one of {', '.join(map(repr, choices))}", value)


def require_kind(name: str, value: Any, kind: type, *, error: type[LLMEngineError] = InvalidRequestError) -> None:
    """Raise `error` unless `value` is an instance of `kind`, one of our classes."""
    if not isinstance(value, kind):
        raise requirement(error, name, f"a {kind.__name__}", value)


def requirement(error: type[LLMEngineError], name: str, what: str, value: Any) -> LLMEngineError:
    """The error that says what `name` must be and what it is instead."""
    shown = repr(value)
    if len(shown) > _MAX_SHOWN_CHARS:
        shown = f"{shown[:_MAX_SHOWN_CHARS]}..."
    return error(f"{name} must be {what}, not {shown}")
