"""The real scheduler on a trace of requests, with a formula for the duration of each step.

    python -m benchmarks.simulate --compare --plot scheduling.png
    python -m benchmarks.simulate --requests 2000 --write-trace trace.jsonl
    python -m benchmarks.simulate --trace trace.jsonl --weights noisy=0.5 --max-decode-latency-ms 20

A trace has one JSON object per line: `arrival_s`, `prompt_tokens`, `output_tokens`, and optionally `tenant`, `priority`
and `prefix_tokens`, the number of leading tokens that a prompt shares with the tenant's other prompts. Without
`--trace`, a trace is generated: several tenants of equal demand, and one, "noisy", that sends most of its requests in
bursts.

A step takes `--step-ms`, plus `--token-us` for each token that it computes, plus `--context-us` for each token in the
contexts of its requests. The defaults resemble an 8B model on an H100. Nothing else is simulated: the waiting queue,
tenants, preemptions, KV blocks and the prefix cache are the engine's.

    delay     seconds from arrival to the first step; TTFT: to the first token
    Jain      Jain's index of what each tenant received in proportion to its entitlement, over windows of `--window-s`
              in which demand exceeded what was served: 1 if all received the same proportion, 1/n if one of n received
              everything. A tenant is entitled to its demand or, if that is too much, to a share by its weight
    hits      share of the prompt tokens that were found in the prefix cache
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import add_json, append_record, format_table, new_parser, new_plot, percentile, save_plot
from benchmarks.traces import Arrival, Cost, TraceProfile, make_trace, read_trace, write_trace
from llmengine import SamplingParams, SchedulerConfig
from llmengine.batch import Batch, StepResult
from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.request import Request
from llmengine.engine.scheduler import Scheduler
from llmengine.engine.stats import EngineCounters
from llmengine.engine.stream import OutputStream
from llmengine.outputs import OutputLog

_PARAMS = SamplingParams(ignore_eos=True)
_CONTENDED = 1.2
"""Least ratio of requested to served tokens of a window that counts: requests still running explain smaller ratios."""


@dataclass(frozen=True, slots=True)
class Served:
    """Times of one request, in simulated seconds."""

    arrival: Arrival
    delay_s: float
    ttft_s: float
    duration_s: float


@dataclass(slots=True)
class Window:
    """Some seconds of the simulation: each tenant's demand in tokens, unserved demand included, and its share."""

    start_s: float
    asked: Counter[str | None] = field(default_factory=Counter)
    served: Counter[str | None] = field(default_factory=Counter)
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0

    @property
    def contended(self) -> bool:
        """Whether several tenants had demand, and together more than was served."""
        return len(+self.asked) > 1 and self.asked.total() > _CONTENDED * self.served.total()

    def jain(self, weights: Mapping[str, float]) -> float:
        """Jain's index of what tenants received in proportion to their entitlements."""
        entitled = entitlements(self.asked, self.served.total(), weights)
        return jain([self.served[tenant] / amount for tenant, amount in entitled.items()])


@dataclass(slots=True)
class Outcome:
    """Results of a simulation."""

    served: list[Served] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    decode_steps_s: list[float] = field(default_factory=list)
    counters: EngineCounters = field(default_factory=EngineCounters)
    simulated_s: float = 0.0
    wall_s: float = 0.0

    def jain(self, weights: Mapping[str, float]) -> float:
        """Mean of Jain's index over the contended windows; nan without any."""
        indices = [window.jain(weights) for window in self.contended()]
        return sum(indices) / len(indices) if indices else float("nan")

    def contended(self) -> list[Window]:
        """Windows in which demand exceeded what was served."""
        return [window for window in self.windows if window.contended]

    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in the prefix cache."""
        num_queried = sum(window.num_queried_tokens for window in self.windows)
        return sum(window.num_hit_tokens for window in self.windows) / num_queried if num_queried else 0.0


def jain(shares: Sequence[float]) -> float:
    """(sum x)^2 / (n * sum x^2); 1 if all shares are 0."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 1.0


def entitlements(
    asked: Mapping[str | None, int], amount: float, weights: Mapping[str, float]
) -> dict[str | None, float]:
    """Each tenant's part of the amount: never more than its demand, and otherwise by weight."""
    entitled: dict[str | None, float] = {}
    waiting = {tenant: weights.get(str(tenant), 1.0) for tenant, tokens in asked.items() if tokens > 0}
    while waiting:
        per_weight = amount / sum(waiting.values())
        content = [tenant for tenant, weight in waiting.items() if asked[tenant] <= per_weight * weight]
        if not content:
            return entitled | {tenant: per_weight * weight for tenant, weight in waiting.items()}
        for tenant in content:
            entitled[tenant] = asked[tenant]
            amount -= asked[tenant]
            del waiting[tenant]
    return entitled


class Simulation:
    """One run of a trace through a scheduler of its own."""

    def __init__(
        self,
        trace: Sequence[Arrival],
        cost: Cost,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int = 16,
        fair: bool = True,
        window_s: float = 10.0,
    ) -> None:
        self._trace = trace
        self._cost = cost
        self._fair = fair
        self._window_s = window_s
        self._now = 0.0
        self._outcome = Outcome()
        self._kv_cache = KVCacheManager(num_blocks, block_size)
        self._scheduler = Scheduler(config.resolve(), self._kv_cache, self._outcome.counters, lambda: self._now)
        self._window = Window(0.0)
        limit = self._kv_cache.num_usable_blocks * block_size
        if (longest := max((a.prompt_tokens + a.output_tokens for a in trace), default=0)) > limit:
            raise ValueError(f"a request of {longest} tokens exceeds the KV cache of {limit} (--kv-tokens)")

    def run(self) -> Outcome:
        """Serve the whole trace."""
        began = time.perf_counter()
        scheduler, trace = self._scheduler, self._trace
        num_arrived = 0
        while num_arrived < len(trace) or scheduler.has_requests:
            while num_arrived < len(trace) and trace[num_arrived].arrival_s <= self._now:
                self._arrive(num_arrived)
                num_arrived += 1
            batch = scheduler.schedule()
            if batch is None:
                self._pass_time(trace[num_arrived].arrival_s - self._now)
            else:
                self._step(batch)
        self._close_window()
        self._outcome.simulated_s = self._now
        self._outcome.wall_s = time.perf_counter() - began
        return self._outcome

    def _arrive(self, index: int) -> None:
        arrival = self._trace[index]
        # The request's own tokens begin with its number, so that only the tenant's prefix is ever found in the cache.
        token_ids = [0] * arrival.prefix_tokens + [index + 1]
        token_ids += [0] * (arrival.prompt_tokens - len(token_ids))
        request = Request(
            stream=OutputStream(OutputLog(index, arrival.arrival_s)),
            prompt_token_ids=token_ids,
            params=_PARAMS,
            seed=0,
            stop_token_ids=frozenset(),
            max_total_tokens=arrival.prompt_tokens + arrival.output_tokens,
            priority=arrival.priority,
            tenant=arrival.tenant if self._fair else None,
            cache_salt=arrival.tenant,
        )
        self._window.asked[arrival.tenant] += arrival.prompt_tokens + arrival.output_tokens
        self._scheduler.add(request)

    def _step(self, batch: Batch) -> None:
        step_s = self._cost.step_s(batch)
        self._pass_time(step_s)
        result = StepResult(batch.step, {row.slot: (0,) for row in batch.rows if row.sample})
        num_first = 0
        changed = self._scheduler.update(result)
        served = self._window.served
        for request in changed:
            log = request.stream.log
            served[self._trace[log.request_id].tenant] += 1
            if len(log.token_ids) == 1:
                num_first += 1
                self._note_first_token(log)
            if log.finish_reason is not None:
                self._note_end(log)
        if len(changed) > num_first:
            self._outcome.decode_steps_s.append(step_s)

    def _note_first_token(self, log: OutputLog) -> None:
        arrival, window = self._trace[log.request_id], self._window
        window.served[arrival.tenant] += arrival.prompt_tokens
        window.num_queried_tokens += arrival.prompt_tokens
        window.num_hit_tokens += log.num_cached_tokens
        log.first_token = self._now

    def _note_end(self, log: OutputLog) -> None:
        assert log.first_scheduled is not None
        assert log.first_token is not None
        self._outcome.served.append(
            Served(
                self._trace[log.request_id],
                log.first_scheduled - log.queued,
                log.first_token - log.queued,
                self._now - log.queued,
            )
        )

    def _pass_time(self, seconds: float) -> None:
        self._now += seconds
        if self._now - self._window.start_s >= self._window_s:
            self._close_window()

    def _close_window(self) -> None:
        self._outcome.windows.append(self._window)
        self._window = Window(self._now, self._window.asked - self._window.served)


def waiting_table(outcomes: dict[str, Outcome]) -> str:
    """One row for each scheduling, tenant and priority."""
    rows = []
    for name, outcome in outcomes.items():
        groups: defaultdict[tuple[str, int], list[Served]] = defaultdict(list)
        for one in outcome.served:
            groups[str(one.arrival.tenant), one.arrival.priority].append(one)
        for (tenant, priority), group in sorted(groups.items()):
            delays, ttfts = [one.delay_s for one in group], [one.ttft_s for one in group]
            values = [*(percentile(delays, p) for p in (50, 90, 99, 100)), percentile(ttfts, 50), percentile(ttfts, 99)]
            rows.append([name, tenant, str(priority), str(len(group)), *(f"{value:.2f}" for value in values)])
    header = ["scheduling", "tenant", "priority", "requests", "delay p50", "p90", "p99", "max", "TTFT p50", "p99"]
    return format_table(header, rows)


def summary(outcome: Outcome, weights: dict[str, float]) -> dict[str, float]:
    """Figures of a whole run."""
    counters = outcome.counters
    return {
        "jain": outcome.jain(weights),
        "contended_windows": len(outcome.contended()),
        "hit_rate": outcome.hit_rate(),
        "preemptions": counters.num_preemptions,
        "decode_step_p50_s": percentile(outcome.decode_steps_s, 50),
        "decode_step_p99_s": percentile(outcome.decode_steps_s, 99),
        "tokens_per_s": (counters.num_generated_tokens / outcome.simulated_s) if outcome.simulated_s else 0.0,
        "simulated_s": outcome.simulated_s,
        "wall_s": outcome.wall_s,
    }


def summary_table(outcomes: dict[str, Outcome], weights: dict[str, float]) -> str:
    """One row for each scheduling."""
    header = ["scheduling", "Jain", "windows", "hits", "preemptions", "decode step p50 ms", "p99 ms", "tokens/s"]
    rows = []
    for name, outcome in outcomes.items():
        figures = summary(outcome, weights)
        rows.append(
            [
                name,
                f"{figures['jain']:.3f}",
                f"{figures['contended_windows']:.0f}",
                f"{figures['hit_rate']:.1%}",
                f"{figures['preemptions']:.0f}",
                f"{1e3 * figures['decode_step_p50_s']:.1f}",
                f"{1e3 * figures['decode_step_p99_s']:.1f}",
                f"{figures['tokens_per_s']:.0f}",
                f"{figures['simulated_s']:.0f}",
                f"{figures['wall_s']:.0f}",
            ]
        )
    return format_table([*header, "simulated s", "took s"], rows)


def plot(outcomes: dict[str, Outcome], weights: dict[str, float], path: Path) -> None:
    """Draw the distribution of each tenant's delays, and fairness and cache hits over time."""
    figure, (delays, fairness, hits) = new_plot(3, "Scheduling, simulated")
    styles = ("-", ":")
    for (name, outcome), style in zip(outcomes.items(), styles, strict=False):
        tenants = sorted({str(one.arrival.tenant) for one in outcome.served})
        for index, tenant in enumerate(tenants):
            ordered = sorted(one.delay_s for one in outcome.served if str(one.arrival.tenant) == tenant)
            shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
            delays.plot(ordered, shares, style, color=f"C{index}", label=f"{tenant}, {name}", linewidth=1.3)
        windows = outcome.contended()
        indices = [window.jain(weights) for window in windows]
        fairness.plot([window.start_s for window in windows], indices, style, label=name, linewidth=1.3)
        known = [window for window in outcome.windows if window.num_queried_tokens]
        rates = [100 * window.num_hit_tokens / window.num_queried_tokens for window in known]
        hits.plot([window.start_s for window in known], rates, style, label=name, linewidth=1.3)
    delays.set(title="Queueing delay", xlabel="seconds", ylabel="share of requests", xscale="symlog", xlim=(0, None))
    fairness.set(
        title="Fairness while demand exceeds capacity", xlabel="seconds", ylabel="Jain's index", ylim=(0, 1.05)
    )
    hits.set(title="Prompt tokens found in the cache", xlabel="seconds", ylabel="%")
    for panel in (delays, fairness, hits):
        panel.legend(fontsize=6, loc="lower right")
    save_plot(figure, path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("simulate", __doc__)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines; default: a generated trace")
    parser.add_argument("--write-trace", type=Path, metavar="FILE", help="write the trace and exit")
    profile, cost = TraceProfile(), Cost()
    parser.add_argument("--requests", type=int, default=profile.num_requests, metavar="N")
    parser.add_argument("--load", type=float, default=profile.load, metavar="X", help="demand over capacity")
    parser.add_argument("--tenants", type=int, default=profile.num_tenants, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=profile.prompt_tokens, metavar="N", help="mean")
    parser.add_argument("--output-tokens", type=int, default=profile.output_tokens, metavar="N", help="mean")
    parser.add_argument("--seed", type=int, default=profile.seed, metavar="N")
    parser.add_argument("--step-ms", type=float, default=cost.step_ms, metavar="MS")
    parser.add_argument("--token-us", type=float, default=cost.token_us, metavar="US")
    parser.add_argument("--context-us", type=float, default=cost.context_us, metavar="US")
    parser.add_argument("--max-batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--kv-tokens", type=int, default=20_000, metavar="N", help="size of the KV cache")
    parser.add_argument("--max-decode-latency-ms", type=float, metavar="MS")
    parser.add_argument("--priority-ageing-s", type=float, default=SchedulerConfig().priority_ageing_s, metavar="S")
    parser.add_argument("--weights", type=_weights, default={}, metavar="TENANT=X,...")
    parser.add_argument("--window-s", type=float, default=10.0, metavar="S")
    scheduling = parser.add_mutually_exclusive_group()
    scheduling.add_argument("--no-fairness", action="store_true", help="treat all tenants as one")
    scheduling.add_argument("--compare", action="store_true", help="run with and without fairness")
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def _weights(text: str) -> dict[str, float]:
    pairs = [part.rpartition("=") for part in text.split(",")]
    return {tenant: float(weight) for tenant, _, weight in pairs}


def _trace(arguments: argparse.Namespace, cost: Cost) -> list[Arrival]:
    if arguments.trace is not None:
        return read_trace(arguments.trace)
    profile = TraceProfile(
        num_requests=arguments.requests,
        load=arguments.load,
        num_tenants=arguments.tenants,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        seed=arguments.seed,
    )
    return make_trace(profile, cost, arguments.max_batch_size)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the simulation and print its tables."""
    arguments = _parse(argv)
    cost = Cost(arguments.step_ms, arguments.token_us, arguments.context_us)
    trace = _trace(arguments, cost)
    if arguments.write_trace is not None:
        write_trace(arguments.write_trace, trace)
        return
    weights: dict[str, float] = arguments.weights
    settings: dict[str, Any] = {
        "max_batch_size": arguments.max_batch_size,
        "max_tokens_per_step": 2048,
        "max_tokens_per_mixed_step": 1024,
        "max_decode_latency_ms": arguments.max_decode_latency_ms,
        "priority_ageing_s": arguments.priority_ageing_s,
        "tenant_weights": weights,
    }
    names = ["fair", "not fair"] if arguments.compare else ["not fair" if arguments.no_fairness else "fair"]
    block_size = 16
    outcomes = {
        name: Simulation(
            trace,
            cost,
            SchedulerConfig(**settings),
            num_blocks=arguments.kv_tokens // block_size + 1,
            block_size=block_size,
            fair=name == "fair",
            window_s=arguments.window_s,
        ).run()
        for name in names
    }
    print(waiting_table(outcomes), summary_table(outcomes, weights), sep="\n\n")
    for name, outcome in outcomes.items():
        append_record(arguments, "simulate", summary(outcome, weights), scheduling=name)
    if arguments.plot is not None:
        plot(outcomes, weights, arguments.plot)


if __name__ == "__main__":
    main()
