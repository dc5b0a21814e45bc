"""Typed access to the metadata of model files: config.json, index files, engine.json, GGUF key-value pairs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llmengine.errors import CorruptFileError, ModelLoadError

_MAX_JSON_BYTES = 1 << 28
_MAX_INTEGER = (1 << 53) - 1

MAX_SIZE = (1 << 31) - 1
"""Largest plausible size of a dimension; anything above it counts as damage."""

_NO_TOKEN = (-1, (1 << 32) - 1)
"""Values that mean "no token" in some files: -1, and -1 as an unsigned 32-bit integer."""

_Choice = TypeVar("_Choice", bound=str)


class Fields:
    """A mapping with string keys whose getters raise `CorruptFileError` naming file, key, expectation and value.

    Null counts as absent, as it does in transformers. `where` names the file and, for a nested object, its key.
    """

    __slots__ = ("values", "where")

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise CorruptFileError(f"{where}: expected an object with string keys, found {_short_repr(values)}")
        self.values: Mapping[str, Any] = values
        self.where = where

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> CorruptFileError:
        """The error for a `key` whose value is not what was expected."""
        found = f"found {_short_repr(self.values[key])}" if key in self.values else "but the key is missing"
        return CorruptFileError(f"{self.where}: {key}: expected {expected}, {found}")

    def integer(self, key: str, default: int | None = None, *, low: int = 0, high: int = _MAX_INTEGER) -> int:
        """The integer under `key`, in [low, high]; `default` if the key is absent."""
        value = _as_integer(self._value(key, default))
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer in [{low}, {high}]")
        return value

    def optional_integer(self, key: str, *, low: int = 0, high: int = _MAX_INTEGER) -> int | None:
        """The integer under `key`, in [low, high]; None if the key is absent."""
        return self.integer(key, low=low, high=high) if self.has(key) else None

    def number(self, key: str, default: float | None = None, *, above: float = -math.inf) -> float:
        """The finite number > `above` under `key`, as a float; `default` if the key is absent."""
        value = self._value(key, default)
        if type(value) not in (int, float):
            raise self.error(key, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number <= above:
            raise self.error(key, "a finite number" if above == -math.inf else f"a finite number > {above:g}")
        return number

    def optional_number(self, key: str, *, above: float = -math.inf) -> float | None:
        """The finite number > `above` under `key`; None if the key is absent."""
        return self.number(key, above=above) if self.has(key) else None

    def numbers(self, key: str, *, above: float = -math.inf) -> tuple[float, ...]:
        """The list of finite numbers > `above` under `key`."""
        value = self.values.get(key)
        if not isinstance(value, (list, tuple)) or not all(type(item) in (int, float) for item in value):
            raise self.error(key, "a list of numbers")
        if not all(above < item <= sys.float_info.max for item in value):
            raise self.error(key, f"a list of finite numbers > {above:g}")
        return tuple(float(item) for item in value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """The truth value under `key`; `default` if the key is absent."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """The string under `key`; `default` if the key is absent."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def choice(self, key: str, choices: tuple[_Choice, ...]) -> _Choice:
        """The string under `key`, which must be one of `choices`."""
        value = self.string(key)
        for choice in choices:
            if value == choice:
                return choice
        raise self.error(key, f"one of {', '.join(choices)}")

    def strings(self, key: str) -> list[str]:
        """The list of strings under `key`."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        """The list of integers >= 0 under `key`."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= _MAX_INTEGER for item in value):
            raise self.error(key, "a list of integers >= 0")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """The ids under `key`: one integer, a list, or none if the key is absent. -1 stands for no id."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = [item for item in (value if isinstance(value, list) else [value]) if item not in _NO_TOKEN]
        if not all(type(item) is int and 0 <= item < 1 << 31 for item in ids):
            raise self.error(key, "a token id or a list of token ids")
        return tuple(ids)

    def fields(self, key: str) -> Fields:
        """The nested object under `key`."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def objects(self, key: str) -> list[Fields]:
        """The list of nested objects under `key`."""
        value = self.values.get(key)
        if not isinstance(value, (list, tuple)):
            raise self.error(key, "a list of objects")
        return [Fields(item, f"{self.where}: {key}[{index}]") for index, item in enumerate(value)]

    def require_only(self, keys: frozenset[str] | set[str]) -> None:
        """Raise `CorruptFileError` unless the keys are exactly `keys`."""
        differences = {"missing": sorted(keys - self.values.keys()), "unknown": sorted(self.values.keys() - keys)}
        problems = [f"{name} keys: {', '.join(map(repr, found[:8]))}" for name, found in differences.items() if found]
        if problems:
            raise CorruptFileError(f"{self.where}: {'; '.join(problems)}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def _as_integer(value: Any) -> Any:
    """An integer in place of a float without a fraction; any other value unchanged."""
    return int(value) if type(value) is float and value.is_integer() else value


def read_json_object(path: Path) -> Fields:
    """The object in a JSON file.

    Raises `CorruptFileError` if the file is not one JSON object, `ModelLoadError` if it is missing or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CorruptFileError(f"{path}: {size} bytes; the limit for a JSON file is {_MAX_JSON_BYTES}")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return Fields(json.loads(raw.decode("utf-8-sig")), str(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from error


def _short_repr(value: object) -> str:
    """A short form of a value for an error message."""
    text = repr(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)} items"
    return text if len(text) <= 80 else text[:77] + "..."
