"""The simulator: small traces through the real scheduler, with figures that can be worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import simulate
from benchmarks.simulate import Simulation
from benchmarks.traces import Arrival, Cost, TraceProfile, make_trace, read_trace
from llmengine import SchedulerConfig

SECOND = Cost(step_ms=1000.0, token_us=0.0, context_us=0.0)


def run(trace: list[Arrival], cost: Cost = SECOND, *, batch: int = 1, fair: bool = True, **settings: Any) -> Any:
    config = SchedulerConfig(max_batch_size=batch, max_tokens_per_step=64, max_tokens_per_mixed_step=64, **settings)
    return Simulation(trace, cost, config, num_blocks=65, fair=fair, window_s=4.0).run()


def test_times_are_the_cost_models() -> None:
    cost = Cost(step_ms=10.0, token_us=100.0, context_us=10.0)
    outcome = run([Arrival(1.0, 5, 3)], cost)
    (served,) = outcome.served
    first = 0.010 + 5 * 1e-4 + 5 * 1e-5
    rest = 2 * (0.010 + 1e-4) + (6 + 7) * 1e-5
    assert served.delay_s == pytest.approx(0.0)
    assert served.ttft_s == pytest.approx(first)
    assert served.duration_s == pytest.approx(first + rest)
    assert outcome.decode_steps_s == pytest.approx([0.0101 + 6e-5, 0.0101 + 7e-5])
    assert outcome.simulated_s == pytest.approx(1.0 + first + rest)


def test_requests_wait_for_those_before_them() -> None:
    outcome = run([Arrival(0.0, 4, 2), Arrival(0.5, 4, 2), Arrival(100.0, 4, 1)])
    assert [served.delay_s for served in outcome.served] == [0.0, 1.5, 0.0]
    assert [served.ttft_s for served in outcome.served] == [1.0, 2.5, 1.0]


def test_prefixes_are_found_within_a_tenant() -> None:
    trace = [Arrival(float(10 * i), 40, 1, tenant, 0, 32) for i, tenant in enumerate("aab")]
    for fair in (True, False):
        outcome = run(trace, fair=fair)
        assert outcome.hit_rate() == pytest.approx(32 / 120)


def test_fairness_is_what_makes_the_difference() -> None:
    """A crowd of one tenant's requests is there before the single request of another."""
    trace = [Arrival(0.0, 4, 1, "crowd")] * 20 + [Arrival(0.5, 4, 1, "one")]
    delays = {}
    for fair in (True, False):
        outcome = run(trace, fair=fair)
        (delays[fair],) = (served.delay_s for served in outcome.served if served.arrival.tenant == "one")
        assert len(outcome.served) == 21
    assert delays == {True: 1.5, False: 19.5}


def test_entitlements_fill_small_demands_first_and_share_the_rest_by_weight() -> None:
    asked = {"small": 10, "big": 500, "bigger": 900, "none": 0}
    entitled = simulate.entitlements(asked, 310, {"bigger": 2.0})
    assert entitled == {"small": 10, "big": pytest.approx(100), "bigger": pytest.approx(200)}
    assert simulate.entitlements({"a": 3, "b": 4}, 100, {}) == {"a": 3, "b": 4}


def test_jain_index() -> None:
    assert simulate.jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert simulate.jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert simulate.jain([0.0, 0.0]) == 1.0


def test_index_is_higher_with_fairness_where_more_is_asked_than_served() -> None:
    trace = make_trace(TraceProfile(num_requests=400, load=2.0, num_tenants=3), Cost(), 8)
    config = SchedulerConfig(max_batch_size=8, max_tokens_per_step=256, max_tokens_per_mixed_step=256)
    fair, unfair = (
        Simulation(trace, Cost(), config, num_blocks=1001, fair=fair, window_s=2.0).run() for fair in (True, False)
    )
    assert fair.contended()
    assert fair.jain({}) > 0.95
    assert fair.jain({}) > unfair.jain({}) + 0.02


def test_made_up_traces_are_what_was_asked_for_and_repeatable() -> None:
    profile = TraceProfile(num_requests=3000, num_tenants=3)
    trace = make_trace(profile, Cost(), 64)
    assert trace == make_trace(profile, Cost(), 64)
    assert [a.arrival_s for a in trace] == sorted(a.arrival_s for a in trace)
    assert {a.tenant for a in trace} == {"noisy", "tenant 1", "tenant 2"}
    assert sum(a.prompt_tokens for a in trace) / 3000 == pytest.approx(profile.prompt_tokens, rel=0.1)
    assert sum(a.output_tokens for a in trace) / 3000 == pytest.approx(profile.output_tokens, rel=0.1)
    assert sum(a.priority for a in trace) / 3000 == pytest.approx(profile.urgent, abs=0.03)


@pytest.mark.parametrize(
    ("line", "named"),
    [("{", "Expecting"), ("[]", "mapping"), ('{"arrival_s": 1}', "prompt_tokens"),
     ('{"arrival_s": 0, "prompt_tokens": 0, "output_tokens": 1}', "must be at least 1"),
     ('{"arrival_s": 0, "prompt_tokens": 4, "output_tokens": 1, "prefix_tokens": 4}', "prefix_tokens must be in")],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n' + line)
    with pytest.raises(ValueError, match=rf"trace.jsonl:2: .*{named}"):
        read_trace(path)


def test_a_request_that_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match="2001 tokens exceeds the KV cache of 1024"):
        run([Arrival(0.0, 2000, 1)])


def test_commands_write_replay_print_and_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot, lines = tmp_path / "trace.jsonl", tmp_path / "plot.png", tmp_path / "out.jsonl"
    simulate.main(["--requests", "150", "--tenants", "2", "--load", "3", "--write-trace", str(trace)])
    assert len(read_trace(trace)) == 150
    options = ["--trace", str(trace), "--max-decode-latency-ms", "20", "--weights", "noisy=0.5", "--window-s", "1"]
    simulate.main([*options, "--compare", "--plot", str(plot), "--json", str(lines)])
    printed = capsys.readouterr().out
    assert re.findall(r"^\| (fair|not fair) +\| +(noisy|tenant 1) \|", printed, re.MULTILINE)
    assert plot.read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [record["scheduling"] for record in records] == ["fair", "not fair"]
    assert records[0]["results"]["decode_step_p99_s"] < 0.025
    simulate.main([*options, "--no-fairness"])
    assert "| not fair" in capsys.readouterr().out
