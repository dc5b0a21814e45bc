"""All metrics of an engine as data: the collector, the documentation and the dashboard are made from this list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from llmengine.engine.stats import EngineHealth, EngineState, EngineStats

Kind = Literal["gauge", "counter", "histogram"]

MetricNames = Literal["llmengine", "vllm", "both"]
"""Which names metrics have: our own, vLLM's where it has the metric, or all of these."""

ENGINE_LABELS = ("engine", "model_name")
"""Labels of every series."""

GAP_S = (
    *(0.001, 0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
WAIT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
LONG_S = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
)
STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
TOKENS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000),
    *(10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000),
)
POWERS = tuple(2**exponent for exponent in range(15))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an engine says of itself at one scrape."""

    stats: EngineStats
    health: EngineHealth

    @property
    def num_blocks(self) -> int:
        """KV blocks that can be handed out."""
        stats = self.stats
        return stats.num_used_blocks + stats.num_cached_blocks + stats.num_free_blocks


Read = Callable[[Snapshot], float | Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, under this engine's name and perhaps under vLLM's.

    Attributes:
        name: without the prefix "llmengine_" and, for a counter, without "_total".
        kind: its type in Prometheus.
        help: one sentence.
        read: takes the value from a snapshot, one for each value of `label` if there is a label; None if observations
            are counted instead.
        alias: vLLM's name, written in the same way; None if vLLM has none.
        label: the label beside those of every series.
        buckets: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Kind
    help: str
    read: Read | None = None
    alias: str | None = None
    label: str | None = None
    buckets: tuple[float, ...] = ()

    @property
    def own_name(self) -> str:
        """The full name, without a counter's "_total"."""
        return f"llmengine_{self.name}"

    @property
    def vllm_name(self) -> str | None:
        """vLLM's full name, without a counter's "_total"."""
        return None if self.alias is None else f"vllm:{self.alias}"


def _states(snapshot: Snapshot) -> Mapping[str, float]:
    return {state: float(state == snapshot.health.state) for state in get_args(EngineState)}


def _blocks(snapshot: Snapshot) -> Mapping[str, float]:
    stats = snapshot.stats
    return {"used": stats.num_used_blocks, "cached": stats.num_cached_blocks, "free": stats.num_free_blocks}


def _kv_usage(snapshot: Snapshot) -> float:
    return snapshot.stats.num_used_blocks / snapshot.num_blocks if snapshot.num_blocks else 0.0


METRICS = (
    Metric(
        "requests_running",
        "gauge",
        "Requests in the running batch.",
        lambda now: now.stats.num_running,
        alias="num_requests_running",
    ),
    Metric(
        "requests_waiting",
        "gauge",
        "Requests in the scheduler's queue, new and preempted.",
        lambda now: now.stats.num_waiting,
        alias="num_requests_waiting",
    ),
    Metric(
        "requests_paused",
        "gauge",
        "Requests that wait for their consumers to read.",
        lambda now: now.stats.num_paused,
    ),
    Metric(
        "requests_queued",
        "gauge",
        "Requests that count towards max_queued_requests, including those whose prompt is being prepared.",
        lambda now: now.stats.num_queued,
    ),
    Metric(
        "kv_cache_usage_ratio",
        "gauge",
        "Fraction of the KV blocks that requests use, from 0 to 1.",
        _kv_usage,
        alias="kv_cache_usage_perc",
    ),
    Metric("kv_cache_blocks", "gauge", "KV blocks that are used, cached or free.", _blocks, label="state"),
    Metric("engine_state", "gauge", "1 for the state that the engine is in, 0 for the others.", _states, label="state"),
    Metric(
        "engine_idle_seconds",
        "gauge",
        "Seconds since the latest step ended; a large value while requests run means that a step hangs.",
        lambda now: now.health.idle_s,
    ),
    Metric(
        "prompt_tokens",
        "counter",
        "Prompt tokens of requests that were admitted.",
        lambda now: now.stats.counters.num_prompt_tokens,
        alias="prompt_tokens",
    ),
    Metric(
        "generation_tokens",
        "counter",
        "Tokens that were generated.",
        lambda now: now.stats.counters.num_generated_tokens,
        alias="generation_tokens",
    ),
    Metric(
        "computed_tokens",
        "counter",
        "Tokens that the model computed, recomputation included.",
        lambda now: now.stats.counters.num_computed_tokens,
    ),
    Metric(
        "prefix_cache_queries",
        "counter",
        "Prompt tokens that were looked up in the prefix cache.",
        lambda now: now.stats.num_queried_tokens,
        alias="prefix_cache_queries",
    ),
    Metric(
        "prefix_cache_hits",
        "counter",
        "Prompt tokens that the prefix cache had.",
        lambda now: now.stats.num_hit_tokens,
        alias="prefix_cache_hits",
    ),
    Metric(
        "preemptions",
        "counter",
        "Times that a request lost its KV blocks and had to be computed again.",
        lambda now: now.stats.counters.num_preemptions,
        alias="num_preemptions",
    ),
    Metric(
        "requests_refused",
        "counter",
        "Requests that were refused because the queue was full.",
        lambda now: now.stats.num_refused,
    ),
    Metric(
        "forward_seconds",
        "counter",
        "Seconds of the model's forward passes; 0 on backends that do not report them.",
        lambda now: now.stats.counters.forward_s,
    ),
    Metric(
        "requests_finished",
        "counter",
        "Outputs that ended, by finish reason.",
        alias="request_success",
        label="finished_reason",
    ),
    Metric(
        "requests_failed",
        "counter",
        "Outputs that ended with an error, by the error's class; also those without a finish reason.",
        label="error",
    ),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "Seconds from submission to the first token.",
        alias="time_to_first_token_seconds",
        buckets=WAIT_S,
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Seconds from one token of a request to the next.",
        alias="inter_token_latency_seconds",
        buckets=GAP_S,
    ),
    Metric(
        "request_queue_seconds",
        "histogram",
        "Seconds from submission to the first step.",
        alias="request_queue_time_seconds",
        buckets=WAIT_S,
    ),
    Metric(
        "request_prefill_seconds",
        "histogram",
        "Seconds from the first step to the first token, of complete outputs.",
        alias="request_prefill_time_seconds",
        buckets=WAIT_S,
    ),
    Metric(
        "request_decode_seconds",
        "histogram",
        "Seconds from the first token to the end, of complete outputs.",
        alias="request_decode_time_seconds",
        buckets=LONG_S,
    ),
    Metric(
        "request_duration_seconds",
        "histogram",
        "Seconds from submission to the end, of complete outputs.",
        alias="e2e_request_latency_seconds",
        buckets=LONG_S,
    ),
    Metric(
        "request_time_per_output_token_seconds",
        "histogram",
        "Mean seconds between the tokens of a complete output that has more than one.",
        alias="request_time_per_output_token_seconds",
        buckets=GAP_S,
    ),
    Metric(
        "request_prompt_tokens",
        "histogram",
        "Prompt tokens of complete outputs.",
        alias="request_prompt_tokens",
        buckets=TOKENS,
    ),
    Metric(
        "request_generation_tokens",
        "histogram",
        "Generated tokens of complete outputs.",
        alias="request_generation_tokens",
        buckets=TOKENS,
    ),
    Metric(
        "step_seconds",
        "histogram",
        "Seconds from the end of one step to the end of the next, or from waking up.",
        buckets=STEP_S,
    ),
    Metric(
        "step_tokens",
        "histogram",
        "Tokens that a step computes.",
        alias="iteration_tokens_total",
        buckets=POWERS,
    ),
    Metric("step_requests", "histogram", "Requests in a step.", buckets=POWERS[:11]),
)

HISTOGRAMS = {metric.name: metric.buckets for metric in METRICS if metric.kind == "histogram"}
