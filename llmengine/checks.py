"""What the plain data that callers pass has in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any


def none_means_default(data: Any, *, but: Collection[str] = ()) -> None:
    """Set each field of a dataclass that is None to its default: servers forward the nulls of the JSON they received.

    `but` names the fields for which None says something else than their default.
    """
    for field in dataclasses.fields(data):
        if getattr(data, field.name) is None and field.name not in but:
            object.__setattr__(data, field.name, field.default)
