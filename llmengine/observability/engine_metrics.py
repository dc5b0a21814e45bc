"""EngineMetrics: the metrics of engines, for Prometheus."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry

from llmengine.checks import require_choice, require_text
from llmengine.errors import ConfigError
from llmengine.observability.collector import EngineSeries, collector_of
from llmengine.observability.histogram import Histogram
from llmengine.observability.metric_list import HISTOGRAMS, MetricNames, Snapshot
from llmengine.observer import EngineObserver, RequestEnd, StepRecord
from llmengine.outputs import FinishReason

if TYPE_CHECKING:
    from llmengine.llm import LLM


class EngineMetrics(EngineObserver):
    """The metrics of one engine in a registry of prometheus_client, as series with a label `engine`.

    Any number of engines may share a registry, and none replaces another. The series of an engine vanish when its
    `LLM` is closed or collected; those of an engine that died stay until then and say so (`engine_state`). Nothing is
    computed between two scrapes beyond adding to arrays, once for each step and once for each output.

    Args:
        llm: the engine; referred to weakly.
        registry: where the series appear; None for a new registry, which is the attribute `registry`. Pass
            `prometheus_client.REGISTRY` for the process's own.
        engine: the engine's label, unique in the registry; None for the lowest number that is free there.
        model_name: a label of every series.
        names: "llmengine" for `llmengine_*`, "vllm" for vLLM's names where it has the metric, "both" for all of these.
        buckets: name of a histogram, without a prefix -> upper bounds of its buckets, to replace the usual ones.

    Raises:
        ConfigError: `engine` is taken, or `buckets` names no histogram or does not rise.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        registry: CollectorRegistry | None = None,
        engine: str | None = None,
        model_name: str = "default",
        names: MetricNames = "llmengine",
        buckets: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        require_choice("names", names, get_args(MetricNames), error=ConfigError)
        require_text("model_name", model_name, error=ConfigError)
        self.registry = CollectorRegistry() if registry is None else registry
        self._llm = weakref.ref(llm)
        self._histograms = {name: Histogram(bounds) for name, bounds in _with_buckets(buckets or {}).items()}
        self._finished: Counter[str] = Counter(dict.fromkeys(get_args(FinishReason), 0))
        self._failed: Counter[str] = Counter()
        self._lock = threading.Lock()
        """Held while an output's end is counted: outputs may end on several threads."""
        self._step_seconds = self._histograms["step_seconds"]
        self._step_tokens = self._histograms["step_tokens"]
        self._step_requests = self._histograms["step_requests"]
        self._gaps = self._histograms["inter_token_latency_seconds"]
        self._first_tokens = self._histograms["time_to_first_token_seconds"]
        self._queue = self._histograms["request_queue_seconds"]
        self._collector = collector_of(self.registry)
        self._series = EngineSeries(model_name, names, self._read, self._histograms, self._count)
        self.engine = self._collector.add(engine, self._series)
        llm.add_observer(self)

    def close(self) -> None:
        """Take the engine's series out of the registry. Idempotent; the end of the `LLM` does the same."""
        self._collector.remove(self.engine, self._series)
        if (llm := self._llm()) is not None:
            llm.remove_observer(self)

    def step_ended(self, step: StepRecord) -> None:
        """Count a step, the gaps between its tokens and those before, and the waits for first tokens."""
        self._step_seconds.add(step.duration_s)
        self._step_tokens.add(step.num_tokens)
        self._step_requests.add(step.num_requests)
        for gap_s, count in step.token_gaps:
            self._gaps.add(gap_s, count)
        for timeline in step.first_tokens:
            assert timeline.first_token is not None
            self._first_tokens.add(timeline.first_token - timeline.queued)
            if timeline.first_scheduled is not None:
                self._queue.add(timeline.first_scheduled - timeline.queued)

    def request_ended(self, end: RequestEnd) -> None:
        """Count the end of an output."""
        reason = end.output.finish_reason
        with self._lock:
            if reason is not None:
                self._finished[reason] += 1
            if end.error is not None and reason in (None, "error"):
                self._failed[type(end.error).__name__] += 1
            if reason in ("stop", "length"):
                self._count_complete(end)

    def engine_closed(self) -> None:
        """Take the engine's series out of the registry."""
        self._collector.remove(self.engine, self._series)

    def _count_complete(self, end: RequestEnd) -> None:
        timeline, output, histograms = end.output.timeline, end.output, self._histograms
        histograms["request_duration_seconds"].add(end.ended - timeline.queued)
        histograms["request_prompt_tokens"].add(output.num_prompt_tokens)
        histograms["request_generation_tokens"].add(output.num_tokens)
        if timeline.first_token is None:
            return
        decode_s = end.ended - timeline.first_token
        histograms["request_decode_seconds"].add(decode_s)
        if timeline.first_scheduled is not None:
            histograms["request_prefill_seconds"].add(timeline.first_token - timeline.first_scheduled)
        if output.num_tokens > 1:
            histograms["request_time_per_output_token_seconds"].add(decode_s / (output.num_tokens - 1))

    def _read(self) -> Snapshot | None:
        llm = self._llm()
        if llm is None or (health := llm.health()).state == "closed":
            return None
        return Snapshot(llm.stats(), health)

    def _count(self, name: str) -> Mapping[str, float]:
        with self._lock:
            return dict(self._finished if name == "requests_finished" else self._failed)


def _with_buckets(buckets: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """The bounds of all histograms; raises `ConfigError` for bounds that are of none, or do not rise."""
    for name, bounds in buckets.items():
        if name not in HISTOGRAMS:
            raise ConfigError(f"buckets[{name!r}] is not a histogram; supported: {', '.join(HISTOGRAMS)}")
        if not bounds or any(low >= high for low, high in itertools.pairwise(bounds)):
            raise ConfigError(f"buckets[{name!r}] must be numbers in rising order, not {list(bounds)!r:.200}")
    return {**HISTOGRAMS, **buckets}
