"""ForwardedRequest: an HTTP request on its way from a gateway to a replica."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from llmengine.cluster.router import PrefixKeys, prefix_keys
from llmengine.server.middleware import local_path
from llmengine.server.openai.responses import keeper_of

_SCOPE_KEYS = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server"),
)
_RESPONSES = "/v1/responses/"
_PROMPT_FIELDS = ("tools", "system", "instructions", "messages", "input")
"""Fields of the chat APIs that a prompt is made of, in the order in which templates write them."""


@dataclass(frozen=True, slots=True)
class ForwardedRequest:
    """A request with its whole body.

    Attributes:
        scope: of the ASGI call, without what other processes cannot read.
        body: all of it.
        keys: the prompt's beginnings. Only equal in requests of one process, see `prefix_keys`.
        keeper: the replica that keeps a response which the request names, if it names one.
    """

    scope: Mapping[str, Any]
    body: bytes
    keys: PrefixKeys
    keeper: str | None

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> ForwardedRequest:
        """The request of an ASGI call."""
        fields = body_fields(body)
        sent = {key: scope[key] for key in _SCOPE_KEYS if key in scope}
        return cls(sent, body, prompt_keys(fields), _keeper(local_path(scope), fields))


def body_fields(body: bytes) -> Mapping[str, Any]:
    """The fields of a JSON object, which the bodies of all the server's APIs are; none if it is something else."""
    try:
        fields = json.loads(body) if body else None
    except ValueError:  # the replica says what is wrong with it
        fields = None
    return fields if isinstance(fields, dict) else {}


def prompt_keys(fields: Mapping[str, Any]) -> PrefixKeys:
    """The beginnings of the prompt in a body; none if there is no prompt in it."""
    return prefix_keys(_prompt(fields), json.dumps(fields.get("cache_salt"))) if fields else prefix_keys("")


def _keeper(path: str, fields: Mapping[str, Any]) -> str | None:
    """The replica that keeps the response which a request goes on from, or asks for."""
    named = path.removeprefix(_RESPONSES).partition("/")[0] if path.startswith(_RESPONSES) else None
    earlier = fields.get("previous_response_id")
    return keeper_of(earlier if isinstance(earlier, str) else named or "")


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
