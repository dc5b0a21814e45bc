"""Throughput and latencies as seen by N concurrent consumers, each of which streams one request after the other.

    python -m benchmarks.serving --shape 135m --concurrency 1,8,64 --prompt-tokens 128 --output-tokens 128

Prompts are random token ids, EOS is ignored, the prefix cache and the tokenizer are off: every request has exactly the
requested lengths. Latencies are measured in the consumers' event loop.

    TTFT  from `generate_async()` to the first output
    ITL   between two outputs of one request (an output holds several tokens when the consumer was late)
    TPOT  (last output - first output) / (tokens - 1) of one request
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from benchmarks.models import add_model_or_shape, add_quantization, add_tuning_budget, load_chosen
from benchmarks.report import (
    add_json,
    append_record,
    format_table,
    machine,
    median,
    median_of_runs,
    new_parser,
    new_plot,
    peak_host_bytes,
    percentile,
    positive_integers,
    save_plot,
)
from benchmarks.workloads import StreamingLoad, exact_length, keep_busy, random_prompts
from llmengine import LLM, EngineStats, ParallelConfig, SchedulerConfig

_WARM_UP_TOKENS = 4


@dataclass(slots=True)
class Arrivals:
    """Times at which one request was sent and its outputs arrived, in seconds of `time.perf_counter()`."""

    sent: float
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0


async def consume(llm: LLM, prompts: Iterator[list[int]], output_tokens: int, arrivals: list[Arrivals]) -> None:
    """Stream one request after the other until no prompts are left."""
    params = exact_length(output_tokens)
    for prompt in prompts:
        request = Arrivals(time.perf_counter())
        async for output in llm.generate_async(prompt, params, streaming=True):
            request.times.append(time.perf_counter())
            request.num_tokens = output.num_tokens
        arrivals.append(request)


async def serve(llm: LLM, load: StreamingLoad, seed: int) -> tuple[list[Arrivals], float]:
    """Run all consumers and return the requests' arrivals and the wall-clock seconds."""
    lengths = [load.prompt_tokens] * load.num_requests
    prompts = iter(random_prompts(random.Random(seed), lengths, llm.info.vocab_size))
    arrivals: list[Arrivals] = []
    began = time.perf_counter()
    async with anyio.create_task_group() as others:
        if load.busy_s:
            others.start_soon(keep_busy, load.busy_s)
        async with anyio.create_task_group() as consumers:
            for _ in range(load.concurrency):
                consumers.start_soon(consume, llm, prompts, load.output_tokens, arrivals)
        others.cancel_scope.cancel()
    return arrivals, time.perf_counter() - began


def summarize(arrivals: Sequence[Arrivals], wall_s: float, before: EngineStats, after: EngineStats) -> dict[str, float]:
    """Figures of one run: tokens per second, latencies in ms, batch size, overhead as a share of the step time."""
    ttft = [request.times[0] - request.sent for request in arrivals]
    itl = [later - earlier for request in arrivals for earlier, later in itertools.pairwise(request.times)]
    tpot = [
        (request.times[-1] - request.times[0]) / (request.num_tokens - 1)
        for request in arrivals
        if request.num_tokens > 1
    ]
    num_tokens = sum(request.num_tokens for request in arrivals)
    num_steps = after.counters.num_steps - before.counters.num_steps
    step_s = after.counters.step_s - before.counters.step_s
    forward_s = after.counters.forward_s - before.counters.forward_s
    return {
        "output_tokens_per_s": num_tokens / wall_s,
        "ttft_p50_ms": 1e3 * median(ttft),
        "ttft_p99_ms": 1e3 * percentile(ttft, 99),
        "itl_p50_ms": 1e3 * median(itl),
        "itl_p99_ms": 1e3 * percentile(itl, 99),
        "tpot_p50_ms": 1e3 * median(tpot),
        "mean_batch_size": (after.counters.num_rows - before.counters.num_rows) / num_steps,
        "step_overhead": 1 - forward_s / step_s,
        "wall_s": wall_s,
        "num_output_tokens": num_tokens,
    }


def run_once(llm: LLM, load: StreamingLoad, seed: int) -> dict[str, float]:
    """Serve the load once and return its figures."""
    before = llm.stats()
    arrivals, wall_s = anyio.run(serve, llm, load, seed)
    assert all(request.num_tokens == load.output_tokens for request in arrivals), "a request ended early"
    return summarize(arrivals, wall_s, before, llm.stats())


def load_model(arguments: argparse.Namespace, directory: Path) -> LLM:
    """The model that the arguments name."""
    largest = max(arguments.concurrency)
    batch_size = min(largest, arguments.max_batch_size or largest)
    scheduler = SchedulerConfig(max_batch_size=batch_size)
    scheduler.max_queued_requests = max(scheduler.max_queued_requests, largest)
    if arguments.tokens_per_step is not None:
        scheduler.max_tokens_per_step = scheduler.max_tokens_per_mixed_step = arguments.tokens_per_step
    return load_chosen(
        arguments,
        directory,
        scheduler,
        device=arguments.device,
        num_threads=arguments.threads,
        deterministic=arguments.deterministic,
        parallel_config=ParallelConfig(tp_size=arguments.tp, pp_size=arguments.pp),
    )


def describe(llm: LLM, load_s: float) -> dict[str, Any]:
    """What a record says of an engine that has just been loaded; loading includes quantizing and measuring."""
    info = llm.info
    kv_tokens = (info.num_blocks - 1) * info.block_size
    return {
        "description": info.description,
        "load_s": load_s,
        "weight_bytes": info.weight_bytes,
        "kv_tokens": kv_tokens,
        "peak_host_bytes": peak_host_bytes(),
    }


def benchmark(arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Run every concurrency `--runs` times, interleaved, and return the medians."""
    runs: dict[int, list[dict[str, float]]] = {concurrency: [] for concurrency in arguments.concurrency}
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        llm = load_model(arguments, Path(directory))
        load_s = time.perf_counter() - began
    gc.freeze()  # see docs/streaming_and_cancellation.md: a full garbage collection would stop a run for 200 ms
    with llm:
        engine = describe(llm, load_s)
        print(f"{llm.info.description}\nloaded in {load_s:.1f} s")
        time.sleep(arguments.quiet)
        for run, concurrency in itertools.product(range(-1, arguments.runs), arguments.concurrency):
            warm_up = run < 0
            load = StreamingLoad(
                concurrency,
                concurrency if warm_up else max(arguments.requests or concurrency, concurrency),
                arguments.prompt_tokens,
                min(_WARM_UP_TOKENS, arguments.output_tokens) if warm_up else arguments.output_tokens,
                arguments.busy_ms / 1e3,
            )
            results = run_once(llm, load, seed=concurrency * 1000 + run)
            if warm_up:
                continue
            runs[concurrency].append(results)
            append_record(arguments, "serving", results, engine=engine, concurrency=concurrency, run=run)
    return {concurrency: median_of_runs(results) for concurrency, results in runs.items()}


def table(medians: dict[int, dict[str, float]]) -> str:
    """One row of medians for each concurrency."""
    header = [
        "concurrency",
        "output tok/s",
        "TTFT p50 ms",
        "p99",
        "ITL p50 ms",
        "p99",
        "TPOT p50 ms",
        "batch",
        "overhead",
    ]
    rows = []
    for concurrency, figures in medians.items():
        latencies = [figures[f"{name}_ms"] for name in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "tpot_p50")]
        rows.append(
            [
                str(concurrency),
                f"{figures['output_tokens_per_s']:.1f}",
                *(f"{value:.1f}" for value in latencies),
                f"{figures['mean_batch_size']:.1f}",
                f"{figures['step_overhead']:.1%}",
            ]
        )
    return format_table(header, rows)


def plot(medians: dict[int, dict[str, float]], title: str, path: Path) -> None:
    """Draw throughput, TTFT and ITL over the concurrency."""
    figure, (throughput, ttft, itl) = new_plot(3, title)
    concurrency = list(medians)

    def series(name: str) -> list[float]:
        return [medians[n][name] for n in concurrency]

    throughput.plot(concurrency, series("output_tokens_per_s"), marker="o")
    throughput.set_ylabel("output tokens/s")
    for panel, name in ((ttft, "ttft"), (itl, "itl")):
        panel.plot(concurrency, series(f"{name}_p50_ms"), marker="o", label="p50")
        panel.plot(concurrency, series(f"{name}_p99_ms"), marker="s", linestyle="--", label="p99")
        panel.set_ylabel(f"{name.upper()}, ms")
        panel.legend(frameon=False)
    for panel in (throughput, ttft, itl):
        panel.set_xscale("log", base=2)
        panel.set_xticks(concurrency, [str(n) for n in concurrency])
        panel.set_xlabel("concurrent consumers")
        panel.set_ylim(bottom=0)
    save_plot(figure, path)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all that `benchmark` needs, except `--model` or `--shape`, and `--quant` and `--kv-cache`."""
    parser.add_argument("--concurrency", type=positive_integers, default=[1, 8, 64], metavar="N,N,...")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--requests", type=int, metavar="N", help="in each run; default: one per consumer")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--max-batch-size", type=int, metavar="N", help="default: the largest concurrency")
    parser.add_argument("--tokens-per-step", type=int, metavar="N", help="most tokens in a step, prompts included")
    add_tuning_budget(parser)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share each matrix")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="stages into which the layers are cut")
    parser.add_argument(
        "--quiet",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="wait before the first run, while steps are captured",
    )
    parser.add_argument(
        "--busy-ms", type=float, default=0.0, metavar="MS", help="a task blocks the loop for so long, again and again"
    )
    parser.add_argument("--threads", type=int, metavar="N")
    add_json(parser)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("serving", __doc__)
    add_model_or_shape(parser)
    add_quantization(parser)
    add_options(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table of medians."""
    arguments = _parse(argv)
    medians = benchmark(arguments)
    print(f"medians of {arguments.runs} runs, {arguments.prompt_tokens} -> {arguments.output_tokens} tokens\n")
    print(table(medians))
    if arguments.plot is not None:
        name: Any = arguments.shape or arguments.model
        lengths = f"{arguments.prompt_tokens} -> {arguments.output_tokens} tokens"
        plot(medians, f"{name}, {lengths}, {machine()['gpu'] or machine()['cpu']}", arguments.plot)


if __name__ == "__main__":
    main()
