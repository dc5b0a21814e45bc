"""EngineCollector: reads all engines of a registry when it is scraped."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from llmengine.checks import require_text
from llmengine.errors import ConfigError
from llmengine.observability.histogram import Histogram
from llmengine.observability.metric_list import ENGINE_LABELS, METRICS, Metric, MetricNames, Snapshot


@dataclass(frozen=True, slots=True)
class EngineSeries:
    """Where one engine's values come from.

    Attributes:
        model_name: a label of all its series.
        names: under which names they appear.
        read: the engine's current state; None if the engine is gone.
        histograms: by the metric's name.
        count: the values by label of a counter that has neither `Metric.read` nor buckets.
    """

    model_name: str
    names: MetricNames
    read: Callable[[], Snapshot | None]
    histograms: Mapping[str, Histogram]
    count: Callable[[str], Mapping[str, float]]


class EngineCollector(Collector):
    """The series of any number of engines. One for each registry, since a family must appear once in a scrape."""

    def __init__(self) -> None:
        self._engines: dict[str, EngineSeries] = {}
        self._lock = threading.Lock()

    def add(self, engine: str | None, series: EngineSeries) -> str:
        """Add an engine; return its label. Raises `ConfigError` if the label is taken."""
        with self._lock:
            if engine is None:
                engine = next(name for name in map(str, itertools.count()) if not self._is_taken(name))
            require_text("engine", engine, error=ConfigError)
            if self._is_taken(engine):
                raise ConfigError(f"engine={engine!r} is in the registry already; give each engine a name of its own")
            self._engines[engine] = series
            return engine

    def remove(self, engine: str, series: EngineSeries) -> None:
        """Remove an engine. Idempotent; takes no lock, since garbage collections call it."""
        if self._engines.get(engine) is series:
            self._engines.pop(engine, None)

    def describe(self) -> Iterable[Family]:
        """The families that may appear, so that the registry refuses another collector's of the same name."""
        for metric in METRICS:
            for name in _names(metric, "both"):
                yield _family(metric, name)

    def collect(self) -> Iterator[Family]:
        """The families of all engines, read now. Families without series are left out."""
        engines = []
        for engine, series in list(self._engines.items()):
            if (snapshot := series.read()) is not None:
                engines.append((engine, series, snapshot))
        for metric in METRICS:
            families: dict[str, Family] = {}
            for engine, series, snapshot in engines:
                for name in _names(metric, series.names):
                    family = families.setdefault(name, _family(metric, name))
                    _add(family, metric, (engine, series.model_name), series, snapshot)
            yield from (family for family in families.values() if family.samples)

    def _is_taken(self, engine: str) -> bool:
        series = self._engines.get(engine)
        return series is not None and series.read() is not None


_collectors: weakref.WeakKeyDictionary[CollectorRegistry, EngineCollector] = weakref.WeakKeyDictionary()
_collectors_lock = threading.Lock()


def collector_of(registry: CollectorRegistry) -> EngineCollector:
    """The registry's collector of engines, which this registers if there is none."""
    with _collectors_lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = EngineCollector()
            registry.register(collector)
            _collectors[registry] = collector
        return collector


def _names(metric: Metric, names: MetricNames) -> list[str]:
    """The full names under which a metric appears."""
    own, alias = metric.own_name, metric.vllm_name
    if alias is None or names == "llmengine":
        return [own]
    return [alias] if names == "vllm" else [own, alias]


def _family(metric: Metric, name: str) -> Family:
    labels = [*ENGINE_LABELS, *([] if metric.label is None else [metric.label])]
    if metric.kind == "histogram":
        return HistogramMetricFamily(name, metric.help, labels=labels)
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(name, metric.help, labels=labels)


def _add(family: Family, metric: Metric, labels: tuple[str, str], series: EngineSeries, snapshot: Snapshot) -> None:
    if isinstance(family, HistogramMetricFamily):
        histogram = series.histograms[metric.name]
        counts, total = histogram.cumulative()
        bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
        family.add_metric(labels, list(zip(bounds, counts, strict=True)), total)
        return
    assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
    value = series.count(metric.name) if metric.read is None else metric.read(snapshot)
    if isinstance(value, Mapping):
        for name, number in value.items():
            family.add_metric((*labels, name), number)
    else:
        family.add_metric(labels, value)
