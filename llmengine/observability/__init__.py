"""Metrics, traces, dashboards and KV events of engines. Works with the library alone; the server mounts it.

Names are imported when first used, since each needs a library of its own: `EngineMetrics` prometheus_client
(``llmengine[server]``), `RequestTracing` the OpenTelemetry API (``llmengine[otel]``),
`KvEventPublisher` pyzmq and msgpack (``llmengine[kv-events]``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.observability.engine_metrics import EngineMetrics
    from llmengine.observability.kv_events import KvEventPublisher
    from llmengine.observability.tracing import RequestTracing, is_tracing_set_up

_HOME_OF = {
    "EngineMetrics": "llmengine.observability.engine_metrics",
    "KvEventPublisher": "llmengine.observability.kv_events",
    "RequestTracing": "llmengine.observability.tracing",
    "is_tracing_set_up": "llmengine.observability.tracing",
}

__all__ = ["EngineMetrics", "KvEventPublisher", "RequestTracing", "is_tracing_set_up"]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'llmengine.observability' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
