"""Fields of nested objects that the schemas leave open."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmengine.errors import InvalidRequestError


def refuse_others(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise `InvalidRequestError` for a field of `given` that is not `known`, unless its value asks for nothing."""
    for name, value in given.items():
        if name not in known and value not in (None, False, [], {}):
            raise InvalidRequestError(f"{where}.{name:.100} is not supported; supported: {', '.join(known)}")
