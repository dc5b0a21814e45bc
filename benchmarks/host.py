"""Host cost of a step: the engine under N streaming consumers, with a backend that computes nothing.

    python -m benchmarks.host --concurrency 1,8,64,256
    python -m benchmarks.host --concurrency 256 --profile
    python -m benchmarks.host --concurrency 64 --step-ms 6 --busy-ms 20 --switch-ms 5 --steps-in-flight 2

Everything except the model is real: scheduling, KV bookkeeping, streams, wake-ups, and the consumers' ``async for`` on
their own event loop beside the engine thread, under one GIL. The costs are CPU times of the two threads, on which other
processes on the machine have little influence.

    engine, loop  CPU time of the engine thread and of the consumers' event loop
    idle          share of the wall-clock time in which the simulated device had nothing to do (with `--step-ms`)
    batch         requests per step
    outputs       outputs per token that consumers received; below 1 if deltas were merged
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import anyio

from benchmarks.report import format_table, new_parser, positive_integers
from benchmarks.workloads import StreamingLoad, exact_length, keep_busy
from llmengine import LLM, KvCacheConfig, SchedulerConfig
from llmengine.batch import Backend, BackendInfo, Batch, StepResult

_VOCAB_SIZE = 32000
_BLOCK_SIZE = 16
_BYTES = bytes(20_000)


@dataclass(frozen=True, slots=True)
class Device:
    """The simulated device.

    Attributes:
        step_s: seconds that it takes for a step.
    """

    step_s: float = 0.0
    max_steps_in_flight: int = 2


class NullBackend:
    """A `llmengine.batch.Backend` without a model: each token of step n is n modulo the vocabulary size.

    A step takes `step_s`, counted from its launch or from its predecessor's end, whichever is later; `collect()` sleeps
    until then. Both calls release the GIL, as replaying a CUDA graph and waiting for an event do.
    """

    def __init__(self, load: StreamingLoad, device: Device, profile: cProfile.Profile | None = None) -> None:
        num_blocks = load.concurrency * -(-(load.prompt_tokens + load.output_tokens) // _BLOCK_SIZE)
        self.info = BackendInfo(
            description="null",
            vocab_size=_VOCAB_SIZE,
            max_model_len=load.prompt_tokens + load.output_tokens,
            num_blocks=2 * num_blocks + 1,
            block_size=_BLOCK_SIZE,
            kv_bytes_per_block=1,
            weight_bytes=0,
            max_steps_in_flight=device.max_steps_in_flight,
        )
        self._step_s = device.step_s
        self._launched: deque[tuple[float, StepResult]] = deque()
        self._profile = profile
        self.num_steps = 0
        self.began = self.ended = 0.0
        self.busy_s = 0.0
        self.cpu_s = time.thread_time()
        """CPU time of the engine thread when it collected its latest step."""
        if profile is not None:
            profile.enable()

    def launch(self, batch: Batch) -> None:
        """Queue the step and note when it will end."""
        _release_gil()
        now = time.perf_counter()
        if not self.num_steps and not self._launched:
            self.began = self.ended = now
        started = max(now, self._launched[-1][0] if self._launched else self.ended)
        token_id = batch.step % _VOCAB_SIZE
        result = StepResult(batch.step, {row.slot: (token_id,) for row in batch.rows if row.sample})
        self._launched.append((started + self._step_s, result))

    def collect(self) -> StepResult:
        """Sleep until the oldest step's end."""
        self.ended, result = self._launched.popleft()
        if (rest_s := self.ended - time.perf_counter()) > 0:
            time.sleep(rest_s)
        else:
            _release_gil()
        self.num_steps += 1
        self.busy_s += self._step_s
        if not self._step_s:
            self.ended = time.perf_counter()
        self.cpu_s = time.thread_time()
        return result

    def close(self) -> None:
        """End the profile."""
        if self._profile is not None:
            self._profile.disable()


def _release_gil() -> None:
    """Compute for about 5 us without the GIL, as replaying a CUDA graph does."""
    zlib.crc32(_BYTES)


def _check_protocol(backend: NullBackend) -> Backend:
    return backend


async def consume(llm: LLM, prompt: list[int], output_tokens: int, num_outputs: list[int]) -> None:
    """Stream one request and note the number of its outputs."""
    params = exact_length(output_tokens)
    token_ids: list[int] = []
    count = 0
    async for output in llm.generate_async(prompt, params, streaming=True):
        token_ids += output.token_ids_delta
        count += 1
    assert len(token_ids) == output_tokens, "a request ended early"
    num_outputs.append(count)


async def serve(llm: LLM, load: StreamingLoad) -> tuple[int, float, float]:
    """Run all consumers; return the number of outputs, and wall-clock and CPU seconds of this thread."""
    num_outputs: list[int] = []
    began, cpu_began = time.perf_counter(), time.thread_time()
    async with anyio.create_task_group() as background:
        if load.busy_s:
            background.start_soon(keep_busy, load.busy_s)
        async with anyio.create_task_group() as consumers:
            for first in range(load.concurrency):
                prompt = [(first + i) % _VOCAB_SIZE for i in range(load.prompt_tokens)]
                consumers.start_soon(consume, llm, prompt, load.output_tokens, num_outputs)
        background.cancel_scope.cancel()
    return sum(num_outputs), time.perf_counter() - began, time.thread_time() - cpu_began


def run_once(
    load: StreamingLoad,
    device: Device,
    profiles: Sequence[cProfile.Profile | None] = (None, None),
    *,
    has_metrics: bool = False,
) -> dict[str, float]:
    """Serve the load once on a new engine and return its figures.

    Args:
        profiles: of the engine thread and of the consumers' loop.
        has_metrics: count for Prometheus.
    """
    backends: list[NullBackend] = []

    def make_backend() -> NullBackend:
        backends.append(NullBackend(load, device, profiles[0]))
        return backends[0]

    budget = load.concurrency * load.prompt_tokens
    scheduler = SchedulerConfig(
        max_batch_size=load.concurrency,
        max_tokens_per_step=budget,
        max_tokens_per_mixed_step=budget,
        max_queued_requests=load.concurrency,
    )
    with LLM.from_backend(
        make_backend, scheduler_config=scheduler, kv_cache_config=KvCacheConfig(enable_prefix_caching=False)
    ) as llm:
        if has_metrics:
            from llmengine.observability import EngineMetrics

            EngineMetrics(llm)
        (backend,) = backends
        engine_began = backend.cpu_s
        if profiles[1] is not None:
            profiles[1].enable()
        num_outputs, wall_s, loop_s = anyio.run(serve, llm, load)
        if profiles[1] is not None:
            profiles[1].disable()
        num_tokens = load.concurrency * load.output_tokens
        engine_s = backend.cpu_s - engine_began
        counters = llm.stats().counters
    return {
        "tokens_per_s": num_tokens / wall_s,
        "steps_per_s": backend.num_steps / (backend.ended - backend.began),
        "idle": 1 - backend.busy_s / (backend.ended - backend.began) if device.step_s else 0.0,
        "engine_us_per_token": 1e6 * engine_s / num_tokens,
        "loop_us_per_token": 1e6 * loop_s / num_tokens,
        "us_per_token": 1e6 * (engine_s + loop_s) / num_tokens,
        "us_per_step": 1e6 * (engine_s + loop_s) / backend.num_steps,
        "batch": counters.num_rows / backend.num_steps,
        "outputs_per_token": num_outputs / num_tokens,
    }


def measure(
    load: StreamingLoad, device: Device, runs: int, variants: Sequence[bool] = (False,)
) -> dict[bool, dict[str, float]]:
    """Figures of the run that took the least CPU time, since it was disturbed least; one more run warms up.

    For an engine without metrics (False), with them (True), or both, which take turns.
    """
    run_once(load, device)
    taken = [(variant, run_once(load, device, has_metrics=variant)) for _ in range(runs) for variant in variants]
    return {
        variant: min((run for other, run in taken if other == variant), key=lambda run: run["us_per_token"])
        for variant in variants
    }


def print_profile(load: StreamingLoad, device: Device, num_functions: int = 25) -> None:
    """Print where each thread spends its CPU time. A profile exaggerates the cost of small functions."""
    for index, name in enumerate(("engine thread", "consumers' loop")):
        profile = cProfile.Profile(time.thread_time)
        # One per run: since Python 3.12 a process can have only one profiler at a time.
        run_once(load, device, [profile if place == index else None for place in range(2)])
        print(f"\n{name}, {load.concurrency} consumers")
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(num_functions)


def table(figures: dict[str, dict[str, float]]) -> str:
    """One row for each concurrency."""
    header = ["consumers", "tok/s", "steps/s", "idle", "engine us/tok", "loop us/tok", "us/tok", "us/step"]
    rows = [
        [
            name,
            f"{run['tokens_per_s']:.0f}",
            f"{run['steps_per_s']:.0f}",
            f"{run['idle']:.1%}",
            *(f"{run[f'{thread}us_per_token']:.2f}" for thread in ("engine_", "loop_", "")),
            f"{run['us_per_step']:.0f}",
            f"{run['batch']:.1f}",
            f"{run['outputs_per_token']:.2f}",
        ]
        for name, run in figures.items()
    ]
    return format_table([*header, "batch", "outputs"], rows)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("host", __doc__)
    parser.add_argument("--concurrency", type=positive_integers, default=[1, 8, 64, 256], metavar="N,N,...")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--runs", type=int, default=3, metavar="N")
    parser.add_argument("--step-ms", type=float, default=0.0, metavar="MS", help="time of a simulated device step")
    parser.add_argument("--steps-in-flight", type=int, default=2, metavar="N")
    parser.add_argument("--busy-ms", type=float, default=0.0, metavar="MS", help="keep the consumers' loop half busy")
    parser.add_argument("--switch-ms", type=float, metavar="MS", help="sys.setswitchinterval; default: Python's")
    parser.add_argument("--metrics", action="store_true", help="run with metrics for Prometheus as well, by turns")
    parser.add_argument("--profile", action="store_true", help="print where each thread's CPU time goes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    arguments = _parse(argv)
    if arguments.switch_ms is not None:
        sys.setswitchinterval(arguments.switch_ms / 1e3)
    device = Device(arguments.step_ms / 1e3, arguments.steps_in_flight)
    lengths = arguments.prompt_tokens, arguments.output_tokens
    loads = [
        StreamingLoad(concurrency, concurrency, *lengths, busy_s=arguments.busy_ms / 1e3)
        for concurrency in arguments.concurrency
    ]
    variants = [False, True] if arguments.metrics else [False]
    figures = {load.concurrency: measure(load, device, arguments.runs, variants) for load in loads}
    print(
        table(
            {
                f"{concurrency} with metrics" if has_metrics else str(concurrency): run
                for concurrency, runs in figures.items()
                for has_metrics, run in runs.items()
            }
        )
    )
    if arguments.profile:
        for load in loads:
            print_profile(load, device)


if __name__ == "__main__":
    main()
