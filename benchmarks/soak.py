"""Random clients that join, read, cancel, stall and leave; nothing may be left of them.

    python -m benchmarks.soak --minutes 3 --clients 100                  SmolLM2
    python -m benchmarks.soak --minutes 1 --clients 100 --shape 135m     random weights of a shape
    python -m benchmarks.soak --minutes 1 --clients 100 --fake           the engine alone, without a model

Each client picks one behaviour after the other until the time is up. The exit code is 1 if a KV block is still in use
at the end, a request is left, memory (also the GPU's) has grown, or a client saw an unexpected error.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import anyio
import psutil

from benchmarks.models import add_demo_model
from benchmarks.report import add_json, append_record, format_table, median, new_parser, new_plot, save_plot
from benchmarks.shapes import SHAPES, write_shape
from llmengine import (
    LLM,
    GenerationOutput,
    InvalidRequestError,
    KvCacheConfig,
    ModelConfig,
    QueueFullError,
    RequestHandle,
    SamplingParams,
)
from llmengine.cli.demo import find_demo_model
from llmengine.testing import FakeBackend

_REPORT_EVERY_S = 10.0
_KV_BYTES = 256 << 20
_IDLE_LIMIT_S = 30.0
_IDLE_CHECK_S = 0.05
_MAX_GROWTH_SHARE = 0.05
_MAX_GROWTH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """The process `at` seconds after the start; `device_bytes` is the GPU memory in use by all processes."""

    at: float
    num_running: int
    num_waiting: int
    num_used_blocks: int
    rss_bytes: int
    device_bytes: int = 0


@dataclass(slots=True)
class Soak:
    """State that all clients share."""

    llm: LLM
    max_prompt_tokens: int
    max_new_tokens: int
    endings: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


class Client:
    """A client that behaves at random, by its seed alone. It never waits longer than `patience_s` at a time."""

    patience_s = 0.5

    def __init__(self, soak: Soak, seed: int) -> None:
        self._soak = soak
        self._rng = random.Random(seed)
        self._behaviours: Sequence[Callable[[], Awaitable[str]]] = (
            self._read_all,
            self._read_all,
            self._await_result,
            self._break_early,
            self._get_cancelled,
            self._time_out,
            self._drop_handle,
            self._stall,
            self._expire,
            self._abort,
        )

    async def run(self, until: float) -> None:
        """Behave at random until the moment `until` (`time.monotonic()`)."""
        while time.monotonic() < until:
            behave = self._rng.choice(self._behaviours)
            try:
                ending = await behave()
            except QueueFullError:
                ending = "queue full"
                await anyio.sleep(self._rng.uniform(0.01, 0.1))
            except InvalidRequestError as error:
                ending = "invalid"
                self._soak.faults.append(repr(error))
            self._soak.endings[f"{behave.__name__.strip('_').replace('_', ' ')}: {ending}"] += 1
            if self._rng.random() < 0.2:
                await anyio.sleep(self._some_time())

    def _some_time(self) -> float:
        return self._rng.uniform(0.0, self.patience_s)

    def _submit(self, *, deadline_s: float | None = None) -> RequestHandle:
        rng, soak = self._rng, self._soak
        vocab_size = soak.llm.info.vocab_size
        num_tokens = rng.randint(1, soak.max_prompt_tokens)
        if rng.random() < 0.3:  # a prefix that others have as well
            prompt = [token % vocab_size for token in range(num_tokens)]
        else:
            prompt = [rng.randrange(vocab_size) for _ in range(num_tokens)]
        params = SamplingParams(
            max_new_tokens=rng.randint(1, soak.max_new_tokens),
            temperature=rng.choice((0.0, 0.7, 1.5)),
            top_k=rng.choice((0, 1, 40)),
            top_p=rng.choice((1.0, 0.9)),
            seed=rng.choice((None, rng.randrange(1 << 40))),
            logprobs=rng.choice((None, None, 2)),
            ignore_eos=rng.random() < 0.5,
        )
        return soak.llm.generate_async(
            prompt, params, streaming=rng.random() < 0.8, priority=rng.randint(-2, 2), deadline_s=deadline_s
        )

    async def _read_all(self) -> str:
        token_ids: list[int] = []
        async for output in self._submit():
            token_ids += output.token_ids_delta
        if token_ids != output.token_ids:
            self._soak.faults.append(f"request {output.request_id}: the deltas differ from the output")
        return self._ending(output)

    async def _await_result(self) -> str:
        return self._ending(await self._submit())

    def _ending(self, output: GenerationOutput) -> str:
        """The final output's finish reason. Subclasses add checks of the output."""
        return str(output.finish_reason)

    async def _break_early(self) -> str:
        ending, num_left = "left", self._rng.randint(1, 8)
        async for output in self._submit():
            ending = output.finish_reason or "left"
            num_left -= 1
            if not num_left:
                break
        return ending

    async def _get_cancelled(self) -> str:
        """Read in a task that is cancelled at some moment."""
        endings = ["cancelled"]

        async def read() -> None:
            endings[0] = await self._read_all()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await anyio.sleep(self._some_time())
            tasks.cancel_scope.cancel()
        return endings[0]

    async def _time_out(self) -> str:
        with anyio.move_on_after(self._some_time()):
            return await self._await_result()
        return "timed out"

    async def _drop_handle(self) -> str:
        handle = self._submit()
        if self._rng.random() < 0.5:
            await anyio.sleep(self._some_time())
        del handle
        return "dropped"

    async def _stall(self) -> str:
        """Read so slowly that deltas are merged."""
        ending = ""
        async for output in self._submit():
            ending = str(output.finish_reason)
            await anyio.sleep(self._some_time())
        return ending

    async def _expire(self) -> str:
        return self._ending(await self._submit(deadline_s=self._rng.uniform(0.001, 2 * self.patience_s)))

    async def _abort(self) -> str:
        handle = self._submit()
        await anyio.sleep(self._some_time())
        handle.abort()
        return self._ending(await handle)


async def watch(soak: Soak, period_s: float, scope: anyio.CancelScope) -> None:
    """Take a sample in each period until the scope is cancelled, and print one every few seconds."""
    process = psutil.Process()
    began = time.monotonic()
    next_report = _REPORT_EVERY_S
    with scope:
        while True:
            stats = soak.llm.stats()
            at = time.monotonic() - began
            rss = process.memory_info().rss
            sample = Sample(at, stats.num_running, stats.num_waiting, stats.num_used_blocks, rss, device_bytes())
            soak.samples.append(sample)
            if at >= next_report:
                next_report += _REPORT_EVERY_S
                print(
                    f"{at:6.0f} s  running {sample.num_running:4}  waiting {sample.num_waiting:4}  "
                    f"blocks in use {sample.num_used_blocks:6}  RSS {rss / 2**20:7.0f} MiB  "
                    f"requests {sum(soak.endings.values()):7}",
                    flush=True,
                )
            await anyio.sleep(period_s)


async def run_clients(soak: Soak, duration_s: float, num_clients: int, seed: int) -> None:
    """Run all clients for the duration; each finishes what it has begun. A stuck client is a fault."""
    watching = anyio.CancelScope()
    async with anyio.create_task_group() as background:
        background.start_soon(watch, soak, min(1.0, duration_s / 60), watching)
        with anyio.move_on_after(duration_s + 2 * _IDLE_LIMIT_S) as limit:
            async with anyio.create_task_group() as clients:
                until = time.monotonic() + duration_s
                for index in range(num_clients):
                    clients.start_soon(Client(soak, seed + index).run, until)
        if limit.cancelled_caught:
            soak.faults.append(f"clients were stuck {2 * _IDLE_LIMIT_S:.0f} s after the end")
        watching.cancel()
    await wait_until_idle(soak.llm)


async def wait_until_idle(llm: LLM) -> None:
    """Wait until no request is left. Gives up after a while, which `violations` then reports."""
    for _ in range(int(_IDLE_LIMIT_S / _IDLE_CHECK_S)):
        stats = llm.stats()
        if not (stats.num_running or stats.num_waiting or stats.num_paused or stats.num_queued):
            return
        await anyio.sleep(_IDLE_CHECK_S)


def device_bytes() -> int:
    """Bytes in use on the first GPU; 0 without one."""
    if "torch" not in sys.modules:
        return 0
    import torch

    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    return total - free


def memory_growth(samples: Sequence[Sample], of: Callable[[Sample], int]) -> tuple[float, float]:
    """Median bytes in the middle and in the last third of the time."""
    end = samples[-1].at
    middle = [of(sample) for sample in samples if end / 3 <= sample.at < 2 * end / 3]
    last = [of(sample) for sample in samples if sample.at >= 2 * end / 3]
    return median(middle), median(last)


MEMORY: dict[str, tuple[Callable[[Sample], int], float]] = {
    "RSS": (attrgetter("rss_bytes"), _MAX_GROWTH_SHARE),
    "GPU memory": (attrgetter("device_bytes"), 0.0),
}
"""Memory that must not grow -> its size in a sample, and the share by which it may grow all the same."""


def violations(soak: Soak) -> list[str]:
    """Violations found after the run."""
    stats, health = soak.llm.stats(), soak.llm.health()
    found = sorted(set(soak.faults))
    if not health.ok:
        found.append(f"the engine is {health.state}: {health.failure}")
    if stats.num_used_blocks:
        found.append(f"{stats.num_used_blocks} KV blocks are in use although no request is left")
    if stats.num_running or stats.num_waiting or stats.num_queued:
        found.append(f"{stats.num_running} running, {stats.num_waiting} waiting and {stats.num_queued} queued are left")
    for name, (of, share) in MEMORY.items():
        middle, last = memory_growth(soak.samples, of)
        if last - middle > max(share * middle, _MAX_GROWTH_BYTES):
            found.append(
                f"{name} grew from {middle / 2**20:.0f} MiB in the middle third to {last / 2**20:.0f} MiB in the last"
            )
    return found


def report(soak: Soak, found: Sequence[str]) -> None:
    """Print how the requests ended and what is left of them."""
    rows = [[name, str(count)] for name, count in sorted(soak.endings.items())]
    print()
    print(format_table(["client: its request's end", "requests"], [*rows, ["all", str(sum(soak.endings.values()))]]))
    stats = soak.llm.stats()
    grown = {name: memory_growth(soak.samples, of) for name, (of, _) in MEMORY.items()}
    counters = stats.counters
    print(
        f"\nblocks in use {stats.num_used_blocks}, cached {stats.num_cached_blocks}, free {stats.num_free_blocks}; "
        f"{counters.num_generated_tokens} tokens in {counters.num_steps} steps, "
        f"{counters.num_preemptions} preemptions"
    )
    for name, (middle, last) in grown.items():
        if last:
            print(f"{name}: {middle / 2**20:,.0f} MiB in the middle third, {last / 2**20:,.0f} MiB in the last")
    print("\n".join(f"VIOLATION: {fault}" for fault in found) if found else "PASS")


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Draw memory, blocks and requests over the time."""
    figure, (memory, blocks, requests) = new_plot(3, "Random clients joining, cancelling and stalling")
    seconds = [sample.at for sample in samples]
    memory.plot(seconds, [sample.rss_bytes / 2**20 for sample in samples])
    memory.set_ylabel("RSS, MiB")
    blocks.plot(seconds, [sample.num_used_blocks for sample in samples])
    blocks.set_ylabel("KV blocks in use")
    requests.plot(seconds, [sample.num_running for sample in samples], label="running")
    requests.plot(seconds, [sample.num_waiting for sample in samples], label="waiting")
    requests.set_ylabel("requests")
    requests.legend(frameon=False, loc="upper right")
    for panel in (memory, blocks, requests):
        panel.set_xlabel("time, s")
        panel.set_ylim(bottom=0)
    save_plot(figure, path)


def load_llm(arguments: argparse.Namespace, directory: Path) -> LLM:
    """The model, or an engine on a fake backend with so few blocks that requests are preempted as well."""
    if arguments.fake:
        return LLM.from_backend(lambda: FakeBackend(num_blocks=513, max_steps_in_flight=2))
    # A pool that clients fill within seconds: RSS grows while cached prefixes fill the pool for the first time.
    cache = KvCacheConfig(max_bytes=_KV_BYTES)
    if arguments.shape is not None:
        config = ModelConfig(write_shape(arguments.shape, directory), load_format="dummy", kv_cache_config=cache)
    else:
        config = ModelConfig(arguments.model or find_demo_model(), kv_cache_config=cache)
    return LLM(config, enable_tokenizer=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("soak", __doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=100, metavar="N")
    add_demo_model(parser)
    parser.add_argument("--shape", choices=SHAPES, help="random weights instead of a model")
    parser.add_argument("--fake", action="store_true", help="a fake backend instead of a model")
    parser.add_argument("--max-prompt-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    add_json(parser)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the clients, print the report and return 1 on a violation."""
    arguments = _parse(argv)
    with tempfile.TemporaryDirectory() as directory, load_llm(arguments, Path(directory)) as llm:
        print(llm.info.description)
        soak = Soak(llm, arguments.max_prompt_tokens, arguments.max_new_tokens)
        anyio.run(run_clients, soak, 60 * arguments.minutes, arguments.clients, arguments.seed)
        found = violations(soak)
        report(soak, found)
        results = {
            "endings": dict(soak.endings),
            "violations": found,
            "num_used_blocks": llm.stats().num_used_blocks,
            "num_preemptions": llm.stats().counters.num_preemptions,
            "mib_in_middle_and_last_third": {
                name: [size / 2**20 for size in memory_growth(soak.samples, of)] for name, (of, _) in MEMORY.items()
            },
        }
        append_record(arguments, "soak", results, engine={"description": llm.info.description})
    if arguments.plot is not None:
        plot(soak.samples, arguments.plot)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
