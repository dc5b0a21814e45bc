"""Generator of the Grafana dashboard: `python -m llmengine.observability.dashboard > llmengine-dashboard.json`.

The package holds what it prints, as `grafana_dashboard.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_SELECT = 'engine=~"$engine",model_name=~"$model"'
_RATE = "$__rate_interval"
_WIDTH, _HEIGHT = 8, 8


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph.

    Attributes:
        unit: Grafana's name of the unit.
        queries: (expression, legend).
    """

    title: str
    unit: str
    queries: Sequence[tuple[str, str]]


def _gauge(name: str) -> str:
    return f"llmengine_{name}{{{_SELECT}}}"


def _rate(name: str, by: str = "engine") -> str:
    return f"sum by ({by}) (rate(llmengine_{name}{{{_SELECT}}}[{_RATE}]))"


def _mean(name: str) -> str:
    return f"{_rate(f'{name}_sum')} / {_rate(f'{name}_count')}"


def _quantiles(name: str, select: str = _SELECT, by: str = "engine") -> list[tuple[str, str]]:
    def query(quantile: float) -> str:
        buckets = f"rate(llmengine_{name}_bucket{{{select}}}[{_RATE}])"
        return f"histogram_quantile({quantile}, sum by (le, {by}) ({buckets}))"

    return [(query(quantile), f"p{quantile * 100:g} {{{{{by}}}}}") for quantile in (0.5, 0.9, 0.99)]


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    (
        "Now",
        (
            Panel(
                "Requests",
                "short",
                [
                    (_gauge("requests_running"), "running {{engine}}"),
                    (_gauge("requests_waiting"), "waiting {{engine}}"),
                    (_gauge("requests_paused"), "paused {{engine}}"),
                    (_gauge("requests_queued"), "queued {{engine}}"),
                ],
            ),
            Panel("KV cache in use", "percentunit", [(_gauge("kv_cache_usage_ratio"), "{{engine}}")]),
            Panel(
                "Tokens per second",
                "short",
                [(_rate("generation_tokens_total"), "out {{engine}}"), (_rate("prompt_tokens_total"), "in {{engine}}")],
            ),
        ),
    ),
    (
        "Latency",
        (
            Panel("Time to first token", "s", _quantiles("time_to_first_token_seconds")),
            Panel("Time between tokens", "s", _quantiles("inter_token_latency_seconds")),
            Panel("Time of a request", "s", _quantiles("request_duration_seconds")),
            Panel("Time in the queue", "s", _quantiles("request_queue_seconds")),
            Panel("Time of prefill", "s", _quantiles("request_prefill_seconds")),
            Panel("Time of decode", "s", _quantiles("request_decode_seconds")),
            Panel("Mean time per output token", "s", _quantiles("request_time_per_output_token_seconds")),
        ),
    ),
    (
        "Work",
        (
            Panel("Time of a step", "s", _quantiles("step_seconds")),
            Panel("Requests in a step", "short", [(_mean("step_requests"), "mean {{engine}}")]),
            Panel("Tokens in a step", "short", [(_mean("step_tokens"), "mean {{engine}}")]),
            Panel(
                "Prefix cache hits",
                "percentunit",
                [(f"{_rate('prefix_cache_hits_total')} / {_rate('prefix_cache_queries_total')}", "{{engine}}")],
            ),
            Panel(
                "KV blocks",
                "short",
                [(_gauge("kv_cache_blocks"), "{{state}} {{engine}}")],
            ),
            Panel("Preemptions", "cps", [(_rate("preemptions_total"), "{{engine}}")]),
            Panel(
                "Time of the device",
                "percentunit",
                [(_rate("forward_seconds_total"), "forward passes {{engine}}")],
            ),
            Panel(
                "Tokens computed per second",
                "short",
                [(_rate("computed_tokens_total"), "{{engine}}")],
            ),
            Panel(
                "Tokens of a request",
                "short",
                [
                    (_mean("request_prompt_tokens"), "prompt {{engine}}"),
                    (_mean("request_generation_tokens"), "output {{engine}}"),
                ],
            ),
        ),
    ),
    (
        "Ends and faults",
        (
            Panel(
                "Ends by reason",
                "cps",
                [(_rate("requests_finished_total", "engine, finished_reason"), "{{finished_reason}} {{engine}}")],
            ),
            Panel(
                "Failures and refusals",
                "cps",
                [
                    (_rate("requests_failed_total", "engine, error"), "{{error}} {{engine}}"),
                    (_rate("requests_refused_total"), "queue full {{engine}}"),
                ],
            ),
            Panel("State", "short", [(f"{_gauge('engine_state')} == 1", "{{state}} {{engine}}")]),
            Panel(
                "Seconds since the latest step, while requests run",
                "s",
                [(f"{_gauge('engine_idle_seconds')} and {_gauge('requests_running')} > 0", "{{engine}}")],
            ),
        ),
    ),
    (
        "Server",
        (
            Panel(
                "Answers per second",
                "reqps",
                [(f"sum by (route, status) (rate(llmengine_http_requests_total[{_RATE}]))", "{{route}} {{status}}")],
            ),
            Panel("Answers in progress", "short", [("llmengine_http_requests_in_flight", "{{instance}}")]),
            Panel("Time to first byte", "s", _quantiles("http_time_to_first_byte_seconds", "", "route")),
            Panel("Time of an answer", "s", _quantiles("http_request_duration_seconds", "", "route")),
            Panel("Event loop lag", "s", _quantiles("event_loop_lag_seconds", "", "instance")),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model; importing it asks for the Prometheus data source."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "gridPos": _place(0, top, 24, 1), "id": len(panels) + 1})
        for index, panel in enumerate(row):
            place = _place(index % 3 * _WIDTH, top + 1 + index // 3 * _HEIGHT, _WIDTH, _HEIGHT)
            panels.append(_graph(panel, place, len(panels) + 1))
        top += 1 + -(-len(row) // 3) * _HEIGHT
    return {
        "title": "llmengine",
        "uid": "llmengine",
        "tags": ["llm"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _variable("model", "model_name"), _variable("engine", "engine")]},
        "panels": panels,
    }


def dashboard_text() -> str:
    """The dashboard's file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def _graph(panel: Panel, place: dict[str, int], number: int) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    targets = [
        {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": source}
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": source,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": targets,
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _variable(name: str, label: str) -> dict[str, Any]:
    query = f"label_values(llmengine_engine_state, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": query, "refId": name},
        "definition": query,
        "includeAll": True,
        "multi": True,
        "refresh": 2,
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    print(dashboard_text(), end="")
