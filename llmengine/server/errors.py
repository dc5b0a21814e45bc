"""Errors as HTTP answers: our error tree and the server's own refusals, in the shape that the client's API expects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from llmengine.errors import LLMEngineError

RETRY_AFTER_S = 1
"""What clients are told to wait before they try again."""

_CODES = {
    "PromptTooLongError": "context_length_exceeded",
    "QueueFullError": "rate_limit_exceeded",
    "EngineClosedError": "engine_closed",
    "EngineDeadError": "engine_dead",
}


@dataclass(eq=False)
class HttpError(Exception):
    """A request that the server itself refuses or gives up.

    Attributes:
        status: the HTTP status.
        message: what to tell the client.
        param: the field at fault.
        code: a short name of the fault, for programs.
        headers: further headers of the answer.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def as_http_error(error: Exception) -> HttpError:
    """Any exception as an `HttpError`; one that is not known says nothing about its cause, which may be private."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, LLMEngineError):
        headers = {"retry-after": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
        return HttpError(error.status, str(error), code=_CODES.get(type(error).__name__), headers=headers)
    if isinstance(error, RequestValidationError):
        return _validation_fault(error)
    if isinstance(error, HTTPException):
        return HttpError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    return HttpError(500, "the server failed; its log says why")


def _validation_fault(error: RequestValidationError) -> HttpError:
    """The first fault that pydantic found, with the path of the field, such as `stream_options.include_usage`."""
    faults = error.errors()
    # Of a union, pydantic lists what is wrong with each of its members.
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    place = [part for part in first["loc"][1:] if not _names_union_member(part)]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if first["type"] == "json_invalid":
        return HttpError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if not path:
        return HttpError(400, "the body must be a JSON object, sent with content-type: application/json")
    if first["type"] == "extra_forbidden":
        return HttpError(400, f"unknown or unsupported field {path!r:.200}", param=path[:200], code="unknown_field")
    if first["type"] == "missing":
        return HttpError(400, f"{path!r:.200} is missing", param=path[:200], code="missing_field")
    shown = repr(first.get("input"))
    message = first["msg"][:1].lower() + first["msg"][1:]
    return HttpError(400, f"{path:.200}: {message}, not {shown:.200}", param=path[:200], code="invalid_value")


def _names_union_member(part: Any) -> bool:
    """True for what pydantic puts into a path to say which member of a union it tried, such as `list[str]`."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part or "(" in part)


def openai_error(fault: HttpError) -> dict[str, Any]:
    """The body of an error in OpenAI's API."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(fault.status, "server_error" if fault.status >= 500 else "invalid_request_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.param, "code": fault.code}}


_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_ANTHROPIC_PATH = re.compile(r"/v1/messages(/|$)")


def anthropic_error(fault: HttpError) -> dict[str, Any]:
    """The body of an error in Anthropic's API, and the data of its event in a stream."""
    kind = _ANTHROPIC_KINDS.get(fault.status, "api_error" if fault.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": fault.message}}


ErrorShape = Callable[[HttpError], dict[str, Any]]


def error_shape(scope: Scope) -> ErrorShape:
    """How errors look in the API that a request's path belongs to."""
    return anthropic_error if _ANTHROPIC_PATH.search(scope["path"]) else openai_error


def _routing_message(scope: Scope, fault: HttpError) -> str:
    """What to say of a path or a method that there is not; the framework's own words name neither."""
    asked = f"{scope['path']:.200}"
    if fault.status == 404 and fault.message == "Not Found":
        return f"there is no {asked!r} here; OpenAI's paths begin with '/v1', as in '/v1/chat/completions'"
    allowed = {name.lower(): value for name, value in fault.headers.items()}.get("allow")
    if fault.status == 405 and allowed is not None:
        return f"{asked!r} takes {allowed}, not {scope['method']}"
    return fault.message


def error_response(scope: Scope, error: Exception) -> Response:
    """The answer that tells a client of an error."""
    fault = as_http_error(error)
    if isinstance(error, HTTPException):
        fault.message = _routing_message(scope, fault)
    # json escapes what UTF-8 cannot hold, such as half of a surrogate pair in the name of a field.
    content = json.dumps(error_shape(scope)(fault))
    return Response(content, fault.status, dict(fault.headers), "application/json")
