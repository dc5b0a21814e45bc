"""Generator of the table in docs/observability.md: `python -m llmengine.observability.doc`."""

from __future__ import annotations

from llmengine.observability.http_metrics import HTTP_METRICS
from llmengine.observability.metric_list import METRICS, Metric


def table() -> str:
    """All metrics, with their types, labels and vLLM's names."""
    lines = ["| metric | type | label | vLLM's name | meaning |", "|---|---|---|---|---|"]
    for metric in METRICS:
        alias = metric.vllm_name
        lines.append(_row(metric, metric.label, "" if alias is None else _code(_full(alias, metric))))
    for metric in HTTP_METRICS:
        labels = {"http_requests": "method`, `route`, `status"}.get(metric.name, metric.label and "method`, `route")
        lines.append(_row(metric, labels, ""))
    return "\n".join(lines) + "\n"


def _row(metric: Metric, labels: str | None, alias: str) -> str:
    cells = [_code(_full(metric.own_name, metric)), metric.kind, _code(labels) if labels else "", alias, metric.help]
    return f"| {' | '.join(cells)} |"


def _full(name: str, metric: Metric) -> str:
    return f"{name}_total" if metric.kind == "counter" else name


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    print(table(), end="")
