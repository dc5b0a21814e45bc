"""HttpMetrics: what a server's requests and its event loop are measured by."""

from __future__ import annotations

import asyncio
import threading
import weakref
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from llmengine.observability.metric_list import LONG_S, WAIT_S, Metric

_LAG_INTERVAL_S = 0.25

_LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

HTTP_METRICS = (
    Metric("http_requests", "counter", "Requests that were answered, by route and status.", label="route"),
    Metric("http_requests_in_flight", "gauge", "Requests whose answer is not complete."),
    Metric(
        "http_time_to_first_byte_seconds",
        "histogram",
        "Seconds from a request's headers to the beginning of its answer's body.",
        label="route",
        buckets=WAIT_S,
    ),
    Metric(
        "http_request_duration_seconds",
        "histogram",
        "Seconds from a request's headers to the end of its answer, streams included.",
        label="route",
        buckets=LONG_S,
    ),
    Metric(
        "event_loop_lag_seconds",
        "histogram",
        "Seconds by which a timer of the server's event loop fires late, measured four times a second.",
        buckets=_LAG_S,
    ),
)
"""What the servers of a registry share; `http_requests` has the labels `method` and `status` as well."""


class HttpMetrics:
    """Counts of all servers in one registry. `http_metrics_of` makes it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        requests, in_flight, first_byte, duration, lag = HTTP_METRICS
        routed = ("method", "route")
        self._requests = Counter(requests.own_name, requests.help, (*routed, "status"), registry=registry)
        self._in_flight = Gauge(in_flight.own_name, in_flight.help, registry=registry)
        self._first_byte = Histogram(
            first_byte.own_name, first_byte.help, routed, buckets=first_byte.buckets, registry=registry
        )
        self._duration = Histogram(
            duration.own_name, duration.help, routed, buckets=duration.buckets, registry=registry
        )
        self._lag = Histogram(lag.own_name, lag.help, buckets=lag.buckets, registry=registry)
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()

    def began(self) -> None:
        """Count a request that is being answered."""
        self._in_flight.inc()

    def ended(self, method: str, route: str, status: int, first_byte_s: float | None, duration_s: float) -> None:
        """Count a request that was answered; `first_byte_s` is None if its answer has no body."""
        self._in_flight.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._duration.labels(method, route).observe(duration_s)
        if first_byte_s is not None:
            self._first_byte.labels(method, route).observe(first_byte_s)

    def watch_loop(self) -> None:
        """Measure the running event loop's lag until it closes. Idempotent."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            self._loops.add(loop)
            _measure_lag(loop, weakref.ref(self), None)

    def observe_lag(self, lag_s: float) -> None:
        """Count how late a timer fired."""
        self._lag.observe(lag_s)


def _measure_lag(loop: asyncio.AbstractEventLoop, metrics: weakref.ref[HttpMetrics], expected: float | None) -> None:
    """Measure how late this call is, and arrange the next one, as long as somebody wants to know."""
    if (found := metrics()) is None:
        return
    now = loop.time()
    if expected is not None:
        found.observe_lag(max(0.0, now - expected))
    due = now + _LAG_INTERVAL_S
    loop.call_at(due, partial(_measure_lag, loop, metrics, due))


_all: weakref.WeakKeyDictionary[CollectorRegistry, HttpMetrics] = weakref.WeakKeyDictionary()
_all_lock = threading.Lock()


def http_metrics_of(registry: CollectorRegistry) -> HttpMetrics:
    """The registry's metrics of servers, which this registers if there are none."""
    with _all_lock:
        metrics = _all.get(registry)
        if metrics is None:
            metrics = _all[registry] = HttpMetrics(registry)
        return metrics
