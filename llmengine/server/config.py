"""ServerConfig: who may use the server, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from llmengine.chat.answers.formats import TOOL_FORMATS
from llmengine.checks import require_choice, require_text, requirement
from llmengine.errors import ConfigError
from llmengine.observability.metric_list import MetricNames
from llmengine.settings import Settings, require_bool, require_int, require_number

_MOST_S = 1e6


@dataclass(slots=True)
class ServerConfig(Settings):
    """Settings of `create_app`, which takes its own frozen copy and raises `ConfigError` for a value out of range.

    Attributes:
        model_name: the name by which clients ask for the model; another one is answered with 404.
        api_keys: keys, one of which each request must bring as ``Authorization: Bearer KEY``; as a mapping, with the
            tenant of each (None: no tenant). Empty: everybody may use the server.
        tenant_header: a header whose value names the tenant of requests whose key has none, such as "x-tenant". Only
            for servers behind a proxy that sets it, since clients can write what they like.
        cors_origins: origins whose web pages may call the server; empty: none.
        max_body_bytes: most bytes of a request's body; more are answered with 413.
        body_timeout_s: seconds within which a body must have arrived; later is answered with 408.
        max_concurrent_requests: most requests that are answered at the same time, except for `/health`; more are
            answered with 429. The engine's own queue has limits as well, see `SchedulerConfig`.
        max_outputs: most outputs of one request: its prompts times `n`.
        max_total_tokens: most tokens of a prompt and its output together; None: as many as the engine has room for.
        max_stored_bytes: bytes of memory for responses that `/v1/responses` stores, by default each one; the least
            recently used make room. 0: none is stored.
        request_timeout_s: seconds after which a request ends with 504, or with an error event in a stream; None: never.
        tool_format: the form of tool calls for all chats with tools, see `TemplateKeywords`; None: the chat template's.
            With it, models whose template does not use tools take them as well.
        drain_s: seconds that running requests have left when the application loaded the model and shuts down.
        metrics: count for Prometheus, and serve the counts at `/metrics`, which needs no key.
        metric_names: "llmengine" for `llmengine_*`, "vllm" for vLLM's names where it has the metric, "both" for all.
        openapi: serve the schema at `/openapi.json`. FastAPI's own pages about it load scripts from elsewhere, and are
            not served.
        playground: serve a page for trying the model at `/`.
    """

    model_name: str = "default"
    api_keys: Mapping[str, str | None] | Sequence[str] = ()
    tenant_header: str | None = None
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    max_concurrent_requests: int = 1024
    max_outputs: int = 128
    max_total_tokens: int | None = None
    max_stored_bytes: int = 64 * 2**20
    request_timeout_s: float | None = None
    tool_format: str | None = None
    drain_s: float = 20.0
    metrics: bool = True
    metric_names: MetricNames = "llmengine"
    openapi: bool = True
    playground: bool = True

    @property
    def tenants(self) -> Mapping[str, str | None]:
        """Key -> tenant, in whichever form the keys were given."""
        keys = self.api_keys
        return keys if isinstance(keys, Mapping) else dict.fromkeys(keys)

    def _check(self) -> None:
        require_text("model_name", self.model_name, error=ConfigError)
        keys = self.api_keys
        if isinstance(keys, str) or not isinstance(keys, (Mapping, Sequence)):
            raise requirement(ConfigError, "api_keys", "a mapping or a list of strings", keys)
        for key, tenant in self.tenants.items():
            # An error must not show a key.
            if not isinstance(key, str) or not key or not key.isascii():
                raise ConfigError("each of api_keys must be a non-empty string of ASCII characters")
            _require_optional_text("a tenant in api_keys", tenant)
        _require_optional_text("tenant_header", self.tenant_header)
        if isinstance(self.cors_origins, str) or not all(isinstance(origin, str) for origin in self.cors_origins):
            raise requirement(ConfigError, "cors_origins", "a list of strings", self.cors_origins)
        for name in ("max_body_bytes", "max_concurrent_requests", "max_outputs"):
            require_int(name, getattr(self, name), 1)
        if self.max_total_tokens is not None:
            require_int("max_total_tokens", self.max_total_tokens, 2)
        require_int("max_stored_bytes", self.max_stored_bytes, 0)
        if self.request_timeout_s is not None:
            require_number("request_timeout_s", self.request_timeout_s, 0.0, _MOST_S, low_open=True)
        if self.tool_format is not None:
            require_choice("tool_format", self.tool_format, tuple(TOOL_FORMATS), error=ConfigError)
        require_number("body_timeout_s", self.body_timeout_s, 0.0, _MOST_S, low_open=True)
        require_number("drain_s", self.drain_s, 0.0, _MOST_S)
        require_bool("metrics", self.metrics)
        require_choice("metric_names", self.metric_names, get_args(MetricNames), error=ConfigError)
        require_bool("openapi", self.openapi)
        require_bool("playground", self.playground)


def _require_optional_text(name: str, value: Any) -> None:
    if value is not None:
        require_text(name, value, error=ConfigError)
