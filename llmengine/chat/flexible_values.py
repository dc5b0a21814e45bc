"""Values of messages that notice whether a chat template read them, and that have several forms.

Templates differ in two ways that their source does not reliably show: whether a message's content is text or a list of
parts, and whether the arguments of a tool call are an object or JSON text. So such a value is passed in a form that
notices whether it was read. If it was not, or if the template failed, the template runs again with the next form
(`FlexibleValue`). An object also prints as JSON where a template writes it as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class ReadTracked:
    """A value of a message that knows whether the template read all of it."""

    __slots__ = ()

    def _was_read(self) -> bool:
        raise NotImplementedError

    def _forget(self) -> None:
        raise NotImplementedError


class JsonObject(dict[str, Any], ReadTracked):
    """An object that turns into `text`, its JSON, where a template prints it or adds it to a string."""

    __slots__ = ("_read", "_text")

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text
        self._read = False

    def _was_read(self) -> bool:
        return self._read

    def _forget(self) -> None:
        self._read = False

    def __str__(self) -> str:
        self._read = True
        return self._text

    def __repr__(self) -> str:
        self._read = True  # printed as part of its container
        return super().__repr__()

    def __add__(self, other: Any) -> str:
        return str(self) + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> str:
        return other + str(self) if isinstance(other, str) else NotImplemented

    def __bool__(self) -> bool:
        self._read |= len(self) == 0  # an empty object has nothing else to read
        return len(self) > 0

    def __iter__(self) -> Iterator[str]:
        self._read = True
        return super().__iter__()

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        self._read = True
        return value

    def get(self, key: str, default: Any = None) -> Any:
        self._read = True
        return super().get(key, default)

    def items(self) -> Any:
        self._read = True
        return super().items()

    def keys(self) -> Any:
        self._read = True
        return super().keys()

    def values(self) -> Any:
        self._read = True
        return super().values()


class _Part(dict[str, Any]):
    """A text part of a message's content."""

    __slots__ = ("_read",)

    def __init__(self, value: Mapping[str, Any]) -> None:
        super().__init__(value)
        self._read = False

    def __getitem__(self, key: str) -> Any:
        self._read |= key == "text"
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._read |= key == "text"
        return super().get(key, default)

    def items(self) -> Any:
        self._read = True
        return super().items()

    def values(self) -> Any:
        self._read = True
        return super().values()


class TextParts(list[_Part], ReadTracked):
    """Content as a list of text parts. A template that prints the list itself does not count as having read it."""

    __slots__ = ("_printed",)

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(map(_Part, parts))
        self._printed = False

    def _was_read(self) -> bool:
        return not self._printed and all(part._read for part in self)

    def _forget(self) -> None:
        self._printed = False
        for part in self:
            part._read = False

    def __str__(self) -> str:
        self._printed = True
        return super().__str__()


class WrappedFunction(dict[str, Any]):
    """A tool or tool call in OpenAI's form, whose "function" entries can also be read directly."""

    __slots__ = ()

    def __missing__(self, key: str) -> Any:
        return self["function"][key] if key != "function" else dict.__getitem__(self, key)


class FlexibleValue:
    """A value of a message in each form that templates may read; `advance` takes the next one."""

    __slots__ = ("_forms", "_holder", "_key")

    def __init__(self, holder: dict[str, Any], key: str, forms: Sequence[Any]) -> None:
        self._holder, self._key, self._forms = holder, key, list(forms)
        holder[key] = self._forms[0]

    def was_read(self) -> bool:
        """True if the template read the present form, or if that form is a string, whose reading cannot be noticed."""
        form = self._forms[0]
        return not isinstance(form, ReadTracked) or form._was_read()

    def forget(self) -> None:
        """Reset what is known about reading."""
        if isinstance(self._forms[0], ReadTracked):
            self._forms[0]._forget()

    def advance(self) -> bool:
        """Take the next form; False if there is none."""
        if len(self._forms) == 1:
            return False
        del self._forms[0]
        self._holder[self._key] = self._forms[0]
        return True


def mark_as_written(value: Any, nested: bool = False) -> None:
    """Note that the template wrote `value` as JSON, which reads everything in it except a top-level list of parts."""
    if isinstance(value, JsonObject):
        value._read = True
    elif isinstance(value, TextParts):
        value._printed |= not nested
        for part in value:
            part._read = True
    elif isinstance(value, dict):
        for item in value.values():
            mark_as_written(item, True)
    elif isinstance(value, list | tuple):
        for item in value:
            mark_as_written(item, True)
