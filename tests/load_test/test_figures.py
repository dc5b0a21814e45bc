"""Figures of records whose every moment is known."""

from __future__ import annotations

import math

import pytest

from llmengine.load_test.arrivals import Clients
from llmengine.load_test.figures import Objectives, figures
from llmengine.load_test.records import RequestRecord
from llmengine.load_test.report import report_text
from llmengine.load_test.runner import ClientCost, LoadResult


def record(
    due: float, arrivals: list[tuple[float, int]], tokens: int | None = None, finished: float | None = None
) -> RequestRecord:
    made = RequestRecord(due=due, sent=due, num_prompt_tokens=10, num_output_tokens=tokens)
    for moment, pieces in arrivals:
        made.arrived(moment, pieces)
    made.finished = finished if finished is not None else arrivals[-1][0] if arrivals else due
    return made


def result(*records: RequestRecord, wall_s: float = 10.0, client: ClientCost | None = None) -> LoadResult:
    return LoadResult(Clients(2), list(records), wall_s, client or ClientCost())


def test_latencies_count_from_the_moment_a_request_was_due() -> None:
    late = record(1.0, [(3.0, 1), (3.5, 1)], tokens=2, finished=4.0)
    late.sent = 2.5
    found = figures(result(late))
    assert (found["ttft_ms"]["p50"], found["e2e_ms"]["p50"]) == (2000, 3000)
    assert found["client"]["sent_late_p99_ms"] == 1500
    assert any("sent requests up to 1500 ms late" in warning for warning in found["warnings"])


def test_an_arrival_of_several_tokens_is_several_intervals() -> None:
    found = figures(result(record(0.0, [(1.0, 1), (1.4, 4), (1.5, 1)], tokens=6)))
    assert found["itl_ms"]["mean"] == pytest.approx(100)
    assert found["itl_ms"]["max"] == pytest.approx(100)
    assert found["gap_ms"]["max"] == pytest.approx(400)
    assert found["tpot_ms"]["p50"] == pytest.approx(100)


def test_usage_says_how_many_tokens_the_chunks_have() -> None:
    found = figures(result(record(0.0, [(1.0, 1), (1.2, 1), (1.4, 1)], tokens=6)))
    assert found["itl_ms"]["p50"] == pytest.approx(100)
    assert found["tpot_ms"]["p50"] == pytest.approx(100)
    assert found["output_tokens_per_s"] == pytest.approx(0.6)
    assert found["total_tokens_per_s"] == pytest.approx(1.6)


def test_chunks_of_one_read_are_one_arrival() -> None:
    read_at_once = record(0.0, [(1.0, 1), (1.3, 1), (1.3, 1), (1.3, 1)], tokens=4)
    assert read_at_once.arrivals == [1.0, 1.3]
    assert figures(result(read_at_once))["itl_ms"]["p50"] == pytest.approx(100)


def test_without_usage_chunks_count_as_tokens_and_the_report_says_so() -> None:
    found = figures(result(record(0.0, [(1.0, 1), (2.0, 1)])))
    assert found["output_tokens"]["mean"] == 2
    assert "the endpoint reports no usage in its streams: each chunk counts as one token" in found["warnings"]


def test_failures_are_counted_by_kind_and_left_out_of_latencies() -> None:
    failed = [RequestRecord(due=0.0), RequestRecord(due=0.0), RequestRecord(due=0.0)]
    failed[0].fail("timeout", "slow")
    for one in failed[1:]:
        one.fail("HTTP 429", "full")
        one.fail("disconnected", "a second failure does not count")
    found = figures(result(record(0.0, [(1.0, 1)], tokens=1), *failed))
    assert list(found["errors"]) == ["HTTP 429", "timeout"]
    assert found["errors"]["HTTP 429"] == {"count": 2, "example": "full"}
    assert (found["num_requests"], found["num_successful"]) == (4, 1)
    assert found["ttft_ms"]["max"] == 1000
    assert math.isnan(found["tpot_ms"]["p50"])
    assert "failed: 2 x HTTP 429: full" in report_text([found])


def test_goodput_counts_requests_within_all_objectives() -> None:
    quick = record(0.0, [(0.1, 1), (0.2, 1)], tokens=2)
    slow_start = record(0.0, [(2.0, 1), (2.1, 1)], tokens=2)
    slow_tokens = record(0.0, [(0.1, 1), (2.1, 1)], tokens=2)
    failed = RequestRecord(due=0.0)
    failed.fail("timeout", "")
    found = figures(result(quick, slow_start, slow_tokens, failed), Objectives(ttft_ms=500, tpot_ms=500))
    assert found["goodput"] == {"share": 0.25, "requests_per_s": 0.1}
    assert "0.10 (25%)" in report_text([found])


@pytest.mark.parametrize(
    ("client", "warning"),
    [
        (ClientCost(cpu_s=9.5), "this client was busy 95% of the time"),
        (ClientCost(lags_s=[0.5] * 50), "this client woke up up to 500 ms late"),
    ],
)
def test_a_saturated_client_says_so(client: ClientCost, warning: str) -> None:
    found = figures(result(record(0.0, [(1.0, 1)], tokens=1), client=client))
    assert any(line.startswith(warning) for line in found["warnings"])
    assert f"warning: {warning}" in report_text([found])


def test_an_idle_client_does_not_warn() -> None:
    found = figures(result(record(0.0, [(1.0, 1)], tokens=1), client=ClientCost(1.0, [0.001] * 50)))
    assert found["warnings"] == []
