"""ForwardedRequest: an HTTP request on its way from a gateway to a replica."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from llmengine.cluster.router import PrefixKeys, prefix_keys

_SCOPE_KEYS = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server"),
)
_PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "input")
"""Fields of the chat APIs that a prompt is made of, in the order in which templates write them."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A request with its whole body.

    Attributes:
        scope: of the ASGI call, without what other processes cannot read.
        body: all of it.
        keys: the prompt's beginnings. Only equal in requests of one process, see `prefix_keys`.
    """

    scope: Mapping[str, Any]
    body: bytes
    keys: PrefixKeys

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> ForwardedRequest:
        """The request of an ASGI call."""
        return cls({key: scope[key] for key in _SCOPE_KEYS if key in scope}, body, body_keys(body))


def body_keys(body: bytes) -> PrefixKeys:
    """The beginnings of the prompt in a body of any of the server's APIs; none if there is no prompt in it."""
    try:
        fields = json.loads(body) if body else None
    except ValueError:  # the replica says what is wrong with it
        fields = None
    if not isinstance(fields, dict):
        return prefix_keys("")
    return prefix_keys(_prompt(fields), json.dumps(fields.get("cache_salt")))


def _prompt(fields: Mapping[str, Any]) -> str | Sequence[int]:
    """What stands for the prompt: its text, its token ids, or the messages as they were sent."""
    prompt = fields.get("prompt")
    while isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts the first
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(token_id, int) for token_id in prompt):
        return prompt
    return "\n".join(json.dumps(fields[name]) for name in _PROMPT_FIELDS if fields.get(name))
