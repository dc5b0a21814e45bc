"""`Settings`: the base of the configuration classes.

Each class is a slots dataclass, so a mistyped field raises `TypeError` in the constructor and `AttributeError` in an
assignment. `resolve()` checks every value and returns an independent frozen copy; from then on assignments raise.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from types import MappingProxyType
from typing import Any, Self

from llmengine import checks
from llmengine.errors import ConfigError

require_int = partial(checks.require_int, error=ConfigError)
require_number = partial(checks.require_number, error=ConfigError)
require_bool = partial(checks.require_bool, error=ConfigError)
require_choice = partial(checks.require_choice, error=ConfigError)
require_kind = partial(checks.require_kind, error=ConfigError)


class Settings:
    """How a configuration is copied, checked and frozen."""

    __slots__ = ("_frozen",)

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_frozen", False):
            raise ConfigError(f"{type(self).__name__} is in use by an LLM and cannot be changed: {name}={value!r}")
        object.__setattr__(self, name, value)

    def resolve(self) -> Self:
        """A checked, frozen copy; raises `ConfigError` naming the field, the value and the range."""
        values = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            values[item.name] = value.resolve() if isinstance(value, Settings) else value
        copy = type(self)(**values)
        copy._check()
        object.__setattr__(copy, "_frozen", True)
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        # Frozen mappings, which no pickle can hold, travel as dictionaries.
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]
        frozen = [name for name, value in values.items() if isinstance(value, MappingProxyType)]
        plain = {name: dict(value) if name in frozen else value for name, value in values.items()}
        return _restored, (type(self), plain, frozen, getattr(self, "_frozen", False))

    def _check(self) -> None:
        """Raise `ConfigError` for a value that is out of range."""


def _restored(kind: type[Settings], values: dict[str, Any], mappings: list[str], frozen: bool) -> Settings:
    """The configuration that a pickle or a copy holds, frozen if the original was."""
    settings = kind(**{name: MappingProxyType(value) if name in mappings else value for name, value in values.items()})
    object.__setattr__(settings, "_frozen", frozen)
    return settings
