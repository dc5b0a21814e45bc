"""Metrics of engines, as real scrapes show them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from llmengine.config import SchedulerConfig
from llmengine.errors import ConfigError, EngineDeadError, PromptTooLongError, QueueFullError
from llmengine.observability import EngineMetrics
from llmengine.observability.metric_list import METRICS
from tests.engine.helpers import WAIT_S, StepGate, bounded, make_llm, tokens
from tests.observability.scrapes import scrape


def test_counts_of_finished_requests() -> None:
    with make_llm() as llm:
        metrics = EngineMetrics(llm, engine="a", model_name="tiny")
        llm.generate(["abcde", "xyz"], tokens(7))
        seen = scrape(metrics.registry)
        of = {"engine": "a", "model_name": "tiny"}
        assert seen.value("llmengine_prompt_tokens_total", **of) == 8
        assert seen.value("llmengine_generation_tokens_total", **of) == 14
        assert seen.value("llmengine_requests_finished_total", finished_reason="length", **of) == 2
        assert seen.values("llmengine_requests_finished_total", finished_reason="abort", **of) == [0]
        for name in ("time_to_first_token", "request_queue", "request_duration", "request_prefill", "request_decode"):
            assert seen.value(f"llmengine_{name}_seconds_count", **of) == 2
            assert seen.value(f"llmengine_{name}_seconds_sum", **of) >= 0
        assert seen.value("llmengine_inter_token_latency_seconds_count", **of) == 12
        assert seen.value("llmengine_request_time_per_output_token_seconds_count", **of) == 2
        assert seen.value("llmengine_request_prompt_tokens_sum", **of) == 8
        assert seen.value("llmengine_request_generation_tokens_bucket", le="5.0", **of) == 0
        assert seen.value("llmengine_request_generation_tokens_bucket", le="10.0", **of) == 2
        assert seen.value("llmengine_step_requests_sum", **of) == 14
        assert seen.value("llmengine_step_tokens_sum", **of) == seen.value("llmengine_computed_tokens_total", **of)
        assert seen.value("llmengine_engine_state", state="ready", **of) == 1
        assert seen.value("llmengine_requests_running", **of) == 0


def test_gauges_while_a_step_runs() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, num_blocks=17, scheduler=SchedulerConfig(max_batch_size=1)) as llm:
        metrics = EngineMetrics(llm)
        handles = [llm.generate_async([1, 2, 3, 4, 5], tokens(4)) for _ in range(3)]
        gate.wait()
        gate.step()  # all three have been submitted, and are seen between two steps
        seen = scrape(metrics.registry)
        assert seen.value("llmengine_requests_running") == 1
        assert seen.value("llmengine_requests_waiting") == 2
        assert seen.value("llmengine_requests_queued") == 2
        assert seen.value("llmengine_kv_cache_usage_ratio") == 2 / 16
        assert seen.value("llmengine_kv_cache_blocks", state="used") == 2
        assert sum(seen.values("llmengine_kv_cache_blocks")) == 16
        gate.open()
        for handle in handles:
            handle.result(WAIT_S)


def test_several_engines_in_one_registry_lose_nothing_and_repeat_nothing() -> None:
    registry = CollectorRegistry()
    engines = [make_llm() for _ in range(3)]
    try:
        for index, llm in enumerate(engines):
            EngineMetrics(llm, registry=registry, engine=f"e{index}")
        for index, llm in enumerate(engines):
            llm.generate_async([1], tokens(index + 1)).result(WAIT_S)
        seen = scrape(registry)
        assert seen.label_values("engine") == {"e0", "e1", "e2"}
        for index in range(3):
            assert seen.value("llmengine_generation_tokens_total", engine=f"e{index}") == index + 1
        engines[1].close()
        assert scrape(registry).label_values("engine") == {"e0", "e2"}
        engines[0].close()
        engines[2].close()
        assert generate_latest(registry) == b""
        with make_llm() as again:
            EngineMetrics(again, registry=registry, engine="e1")
            assert scrape(registry).value("llmengine_generation_tokens_total", engine="e1") == 0
    finally:
        for llm in engines:
            llm.close()


def test_labels_are_unique_in_a_registry_and_numbered_by_default() -> None:
    registry = CollectorRegistry()
    with make_llm() as first, make_llm() as second, make_llm() as third:
        assert EngineMetrics(first, registry=registry).engine == "0"
        assert EngineMetrics(second, registry=registry).engine == "1"
        with pytest.raises(ConfigError, match="engine='0' is in the registry already"):
            EngineMetrics(third, registry=registry, engine="0")
        assert EngineMetrics(third, registry=CollectorRegistry(), engine="0").engine == "0"
        first.close()
        assert EngineMetrics(third, registry=registry).engine == "0"


def test_metrics_may_leave_before_the_engine() -> None:
    with make_llm() as llm:
        metrics = EngineMetrics(llm)
        metrics.close()
        metrics.close()
        assert generate_latest(metrics.registry) == b""
        successor = EngineMetrics(llm, registry=metrics.registry)
        assert successor.engine == metrics.engine
        metrics.close()  # does not take its successor's series
        llm.generate([[1]], tokens(2))
        assert scrape(metrics.registry).value("llmengine_time_to_first_token_seconds_count") == 1


def test_a_collected_engine_takes_its_series_with_it() -> None:
    llm = make_llm()
    metrics = EngineMetrics(llm)
    assert scrape(metrics.registry).label_values("engine") == {"0"}
    del llm
    gc.collect()
    assert generate_latest(metrics.registry) == b""


def test_dead_engine_says_so_until_it_is_closed() -> None:
    gate = StepGate()

    def fail(batch: Any) -> None:
        gate(batch)
        raise OSError("the device is gone")

    llm = make_llm(on_step=fail)
    metrics = EngineMetrics(llm, engine="doomed")
    handles = [llm.generate_async([1, 2], tokens(4)) for _ in range(2)]
    gate.open()
    for handle in handles:
        with pytest.raises(EngineDeadError):
            handle.result(WAIT_S)
    seen = scrape(metrics.registry)
    assert seen.value("llmengine_engine_state", engine="doomed", state="dead") == 1
    assert seen.value("llmengine_requests_failed_total", engine="doomed", error="EngineDeadError") >= 1
    for gauge in ("requests_running", "requests_waiting", "requests_queued", "kv_cache_usage_ratio"):
        assert seen.value(f"llmengine_{gauge}", engine="doomed") == 0
    llm.close()
    assert generate_latest(metrics.registry) == b""


def test_refusals_failures_and_aborts_are_counted() -> None:
    gate = StepGate()
    with make_llm(on_step=gate, scheduler=SchedulerConfig(max_queued_requests=1)) as llm:
        metrics = EngineMetrics(llm)
        running = llm.generate_async([1, 2, 3], tokens(50))
        gate.wait()
        with pytest.raises(PromptTooLongError):
            llm.generate_async("x" * 500, tokens(4)).result(WAIT_S)
        waiting = llm.generate_async([1], tokens(2))
        with pytest.raises(QueueFullError):
            llm.generate_async([1], tokens(2))
        waiting.abort()
        running.abort()
        gate.open()
        assert running.result(WAIT_S).finish_reason == waiting.result(WAIT_S).finish_reason == "abort"
        seen = scrape(metrics.registry)
        assert seen.value("llmengine_requests_refused_total") == 1
        assert seen.value("llmengine_requests_failed_total", error="PromptTooLongError") == 1
        assert seen.value("llmengine_requests_finished_total", finished_reason="abort") == 2
        assert seen.value("llmengine_request_duration_seconds_count") == 0


@pytest.mark.parametrize("names", ["llmengine", "vllm", "both"])
def test_names(names: Any) -> None:
    with make_llm() as llm:
        metrics = EngineMetrics(llm, names=names)
        llm.generate([[1, 2]], tokens(3))
        seen = scrape(metrics.registry)
        core = {
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:time_to_first_token_seconds_bucket",
            "vllm:inter_token_latency_seconds_bucket",
            "vllm:e2e_request_latency_seconds_bucket",
            "vllm:request_queue_time_seconds_bucket",
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
            "vllm:prefix_cache_queries_total",
            "vllm:prefix_cache_hits_total",
            "vllm:num_preemptions_total",
            "vllm:request_success_total",
        }
        assert core <= seen.names if names != "llmengine" else not core & seen.names
        assert ("llmengine_requests_running" in seen.names) == (names != "vllm")
        assert "llmengine_step_seconds_count" in seen.names, "a metric that vLLM has not keeps its own name"
        if names == "both":
            assert seen.value("vllm:generation_tokens_total") == seen.value("llmengine_generation_tokens_total") == 3


def test_every_metric_has_series_once_it_can() -> None:
    with make_llm() as llm:
        metrics = EngineMetrics(llm, names="both")
        with pytest.raises(PromptTooLongError):
            llm.generate_async("x" * 500, tokens(4)).result(WAIT_S)
        families = {family.name for family in scrape(metrics.registry).families}
    expected = {name for metric in METRICS for name in (metric.own_name, metric.vllm_name) if name is not None}
    assert families == expected


def test_names_of_metrics_are_well_formed() -> None:
    names = [metric.own_name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.help.endswith("."), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets)), metric.name


def test_own_buckets() -> None:
    with make_llm() as llm:
        metrics = EngineMetrics(llm, buckets={"request_generation_tokens": (3, 4)})
        llm.generate([[1], [2], [3]], [tokens(count) for count in (3, 4, 5)])
        seen = scrape(metrics.registry)
        counts = [seen.value("llmengine_request_generation_tokens_bucket", le=le) for le in ("3.0", "4.0", "+Inf")]
        assert counts == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": {"generation_tokens": (1.0,)}}, "is not a histogram; supported: time_to_first_token_seconds"),
        ({"buckets": {"step_seconds": (1.0, 1.0)}}, "must be numbers in rising order"),
        ({"buckets": {"step_seconds": ()}}, "must be numbers in rising order"),
        ({"names": "sglang"}, "names must be one of"),
        ({"engine": ""}, "engine must be a non-empty string"),
        ({"model_name": ""}, "model_name must be a non-empty string"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with make_llm() as llm, pytest.raises(ConfigError, match=message):
        EngineMetrics(llm, **options)


def test_default_registry_is_used_only_when_asked() -> None:
    with make_llm() as llm:
        before = generate_latest(REGISTRY)
        EngineMetrics(llm)
        assert b"llmengine" not in before
        assert b"llmengine" not in generate_latest(REGISTRY)
        asked = EngineMetrics(llm, registry=REGISTRY, engine="asked")
        assert scrape(REGISTRY).value("llmengine_requests_running", engine="asked") == 0
        assert b"llmengine_requests_running" in generate_latest(
            REGISTRY.restricted_registry(["llmengine_requests_running"])
        )
        asked.close()
        assert b"llmengine" not in generate_latest(REGISTRY)


def test_scrapes_while_the_engine_runs() -> None:
    stop = threading.Event()
    with make_llm() as llm:
        metrics = EngineMetrics(llm)

        def scrape_on() -> int:
            count, latest = 0, 0.0
            while not stop.is_set() or not count:
                seen = scrape(metrics.registry)
                now = seen.value("llmengine_inter_token_latency_seconds_count")
                assert now >= latest
                latest = now
                count += 1
            return count

        worker = threading.Thread(target=lambda: results.append(bounded(scrape_on)))
        results: list[int] = []
        worker.start()
        llm.generate([[index] for index in range(40)], tokens(30))
        stop.set()
        worker.join(WAIT_S)
        assert results
        assert results[0] >= 1
        seen = scrape(metrics.registry)
        assert seen.value("llmengine_inter_token_latency_seconds_count") == 40 * 29


def test_importing_the_package_imports_neither_library() -> None:
    script = (
        "import sys, llmengine, llmengine.observability, llmengine.llm\n"
        "assert not {'prometheus_client', 'opentelemetry'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
