"""Typed reading of the key-value data that model files carry: config.json, index files, engine.json, GGUF metadata."""

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
"""Largest size of a model's dimension that is believed."""

_NO_TOKEN = (-1, (1 << 32) - 1)
"""What stands for no token in some files: -1, and the same as 32 bits without a sign."""

_Choice = TypeVar("_Choice", bound=str)


class Fields:
    """A string-keyed mapping whose getters raise `CorruptFileError` naming place, key, expectation and value.

    Null counts as absent, as it does for transformers. `where` names the file, and the key that holds a nested object.
    """

    __slots__ = ("values", "where")

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise CorruptFileError(f"{where}: expected an object with string keys, found {_shown(values)}")
        self.values: Mapping[str, Any] = values
        self.where = where

    def has(self, key: str) -> bool:
        """Return whether `key` is there and not null."""
        return self.values.get(key) is not None

    def error(self, key: str, expected: str) -> CorruptFileError:
        """Return the error that says that `key` is not what was expected."""
        found = _shown(self.values[key]) if key in self.values else "no such key"
        return CorruptFileError(f"{self.where}: {key}: expected {expected}, found {found}")

    def integer(self, key: str, default: int | None = None, *, low: int = 0, high: int = _MAX_INTEGER) -> int:
        """Return an integer in [low, high]; `default` is for an absent key."""
        value = _as_integer(self._value(key, default))
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, f"an integer in [{low}, {high}]")
        return value

    def optional_integer(self, key: str, *, low: int = 0, high: int = _MAX_INTEGER) -> int | None:
        """Return an integer in [low, high], or None for an absent key."""
        return self.integer(key, low=low, high=high) if self.has(key) else None

    def number(self, key: str, default: float | None = None, *, above: float = -math.inf) -> float:
        """Return a finite number > `above` as a float."""
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
        """Return a finite number > `above`, or None for an absent key."""
        return self.number(key, above=above) if self.has(key) else None

    def numbers(self, key: str, *, above: float = -math.inf) -> tuple[float, ...]:
        """Return a list of finite numbers > `above`, as a tuple."""
        value = self.values.get(key)
        if not isinstance(value, (list, tuple)) or not all(type(item) in (int, float) for item in value):
            raise self.error(key, "a list of numbers")
        if not all(above < item <= sys.float_info.max for item in value):
            raise self.error(key, f"a list of finite numbers > {above:g}")
        return tuple(float(item) for item in value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def choice(self, key: str, choices: tuple[_Choice, ...]) -> _Choice:
        """Return the one of `choices` that is there."""
        value = self.string(key)
        for choice in choices:
            if value == choice:
                return choice
        raise self.error(key, f"one of {', '.join(choices)}")

    def strings(self, key: str) -> list[str]:
        """Return a list of strings."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings")
        return value

    def sizes(self, key: str) -> tuple[int, ...]:
        """Return a list of integers >= 0, as a tuple."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= _MAX_INTEGER for item in value):
            raise self.error(key, "a list of integers >= 0")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return the ids under `key`, which may be one integer, a list, or absent (then empty); -1 is no id."""
        value = self.values.get(key)
        if value is None:
            return ()
        ids = [item for item in (value if isinstance(value, list) else [value]) if item not in _NO_TOKEN]
        if not all(type(item) is int and 0 <= item < 1 << 31 for item in ids):
            raise self.error(key, "a token id or a list of token ids")
        return tuple(ids)

    def fields(self, key: str) -> Fields:
        """Return the nested object under `key`."""
        value = self.values.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def objects(self, key: str) -> list[Fields]:
        """Return the list of nested objects under `key`."""
        value = self.values.get(key)
        if not isinstance(value, (list, tuple)):
            raise self.error(key, "a list of objects")
        return [Fields(item, f"{self.where}: {key}[{index}]") for index, item in enumerate(value)]

    def require_only(self, keys: frozenset[str] | set[str]) -> None:
        """Raise unless exactly `keys` are there."""
        missing, unknown = sorted(keys - self.values.keys()), sorted(self.values.keys() - keys)
        if missing or unknown:
            raise CorruptFileError(f"{self.where}: missing keys {missing}, unknown keys {unknown[:8]}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


def _as_integer(value: Any) -> Any:
    """Return a float without a fraction as the integer that was meant."""
    return int(value) if type(value) is float and value.is_integer() else value


def read_json_object(path: Path) -> Fields:
    """Return the object in a JSON file.

    Raises `CorruptFileError` for what is not one, `ModelLoadError` if the file is missing or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CorruptFileError(f"{path}: {size} bytes are too many for a JSON file, most are {_MAX_JSON_BYTES}")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return Fields(json.loads(raw.decode("utf-8-sig")), str(path))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: is not JSON: {error}") from error


def _shown(value: object) -> str:
    """Return a short form of a value for a message; long ones and containers are cut."""
    text = repr(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)} items"
    return text if len(text) <= 80 else text[:77] + "..."
