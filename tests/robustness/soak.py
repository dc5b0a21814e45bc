"""Hostile callers on failing backends: a served caller gets the right tokens, any other learns why, nothing leaks.

    python -m tests.robustness.soak --minutes 5 --seed 1

Engines live one after the other, each for a moment. Two event loops, on threads of their own, are full of clients of
all the kinds of `benchmarks.soak` and some that are worse. Meanwhile the backend shows faults, and the engine ends in
one way or another. The exit code is 1 if a client got a wrong token or another error than the cause, or if a KV block,
a task, a thread or memory is left over.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import logging
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from operator import attrgetter
from typing import Literal

import anyio
import anyio.to_thread
import psutil

from benchmarks.report import format_table
from benchmarks.soak import Client, Sample, Soak, memory_growth, wait_until_idle
from llmengine import (
    LLM,
    EngineClosedError,
    EngineDeadError,
    GenerationOutput,
    LLMEngineError,
    QueueFullError,
    RequestHandle,
    SamplingParams,
    SchedulerConfig,
)
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import close_loop_under, oracle, start
from tests.robustness.faults import CAUSES, FAULT_KINDS, FaultKind, Faults, FaultyBackend

Ending = Literal["idle", "close", "drain"] | FaultKind
"""How an engine's life ends: when nobody is there any more, closed under its clients, drained, or by a fault."""

_ENDINGS: tuple[Ending, ...] = ("idle", "close", "drain", *CAUSES)
_NUM_CLIENTS = 12
_MAX_PROMPT_TOKENS, _MAX_NEW_TOKENS = 24, 40
_LIMIT_S = 30.0
_STEP_TIMEOUT_S = 0.2
_MAX_GROWTH_BYTES = 8 << 20


@dataclasses.dataclass(slots=True)
class Totals:
    """Counts over all engines.

    Attributes:
        operations: what clients did -> how their requests ended, or what was raised: if not that the queue is full,
            what the engine's ending explains.
        shown: endings of engines, and faults that backends showed.
        violations: what must not be.
        samples: the process after each engine.
    """

    operations: dict[str, Counter[str]] = dataclasses.field(default_factory=lambda: defaultdict(Counter))
    shown: Counter[str] = dataclasses.field(default_factory=Counter)
    violations: list[str] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(slots=True, kw_only=True)
class Life(Soak):
    """One engine's life."""

    ending: Ending
    operations: dict[str, Counter[str]]

    def explains(self, error: BaseException) -> bool:
        """Return whether this error is the one that a client must get for this ending."""
        if self.ending in CAUSES:
            return isinstance(error, EngineDeadError) and isinstance(error.__cause__, CAUSES[self.ending])
        return self.ending != "idle" and isinstance(error, EngineClosedError)


class HostileClient(Client):
    """A client of the usual kinds, or of a worse one."""

    patience_s = 0.02

    def __init__(self, life: Life, seed: int) -> None:
        super().__init__(life, seed)
        self._life = life
        self._unread: list[RequestHandle] = []
        self._behaviours = (
            *self._behaviours,
            self._never_read,
            self._never_read,
            self._throw_in,
            self._block_the_loop,
            self._change_loops,
            self._close_the_loop,
            self._poll_from_a_thread,
            self._generate_in_a_thread,
            self._wait_for_room,
        )

    async def run(self, until: float) -> None:
        """Behave at random until a point in time, or until the engine has ended."""
        while time.monotonic() < until:
            behave = self._rng.choice(self._behaviours)
            error: BaseException | None = None
            try:
                ending = await behave()
            except (LLMEngineError, ExceptionGroup) as raised:
                error = raised
                while isinstance(error, ExceptionGroup):
                    error = error.exceptions[0]
                ending = type(error).__name__
            self._life.operations[behave.__name__.strip("_").replace("_", " ")][ending] += 1
            if isinstance(error, QueueFullError):
                await anyio.sleep(self._some_time())
            elif error is not None:
                if not self._life.explains(error):
                    self._life.faults.append(f"{behave.__name__} heard {error!r} of the ending {self._life.ending!r}")
                return

    def _submit(self, *, deadline_s: float | None = None, wait_for_admission: bool = False) -> RequestHandle:
        rng = self._rng
        num_tokens = rng.randint(1, _MAX_PROMPT_TOKENS)
        prompt: str | list[int]
        if rng.random() < 0.3:
            prompt = ("prefix" * num_tokens)[:num_tokens]
        else:
            prompt = [rng.randrange(256) for _ in range(num_tokens)]
        return self._life.llm.generate_async(
            prompt,
            SamplingParams(max_new_tokens=rng.randint(1, _MAX_NEW_TOKENS)),
            streaming=rng.random() < 0.8,
            priority=rng.randint(-2, 2),
            tenant=rng.choice((None, None, "a", "b")),
            deadline_s=deadline_s,
            slow_consumer=rng.choice(("coalesce", "pause", "pause", "abort")),
            wait_for_admission=wait_for_admission,
        )

    def _ending(self, output: GenerationOutput) -> str:
        if output.token_ids != oracle(output.prompt_token_ids, output.num_tokens):
            self._life.faults.append(f"request {output.request_id} got wrong tokens")
        return str(output.finish_reason) if output.error is None else type(output.error).__name__

    async def _never_read(self) -> str:
        """Hold a few handles and read none of them."""
        self._unread.append(self._submit())
        if len(self._unread) <= 3:
            return "held"
        done = self._unread.pop(0).done
        return "done when dropped" if done else "not done when dropped"

    async def _throw_in(self) -> str:
        handle = self._submit()
        try:
            await handle.athrow(KeyError)
        except KeyError:
            return self._ending(await handle)
        return "swallowed"

    async def _block_the_loop(self) -> str:
        handle = self._submit()
        first = await anext(handle)
        time.sleep(self.patience_s)  # noqa: ASYNC251, which is the point
        return self._ending(first if first.finished else await handle)

    async def _change_loops(self) -> str:
        """Read on where another thread's event loop runs."""
        handle = self._submit()
        first = await anext(handle)

        async def read() -> GenerationOutput:
            last = first
            async for output in handle:
                last = output
            return last

        return self._ending(await anyio.to_thread.run_sync(lambda: asyncio.run(read())))

    async def _close_the_loop(self) -> str:
        handle = self._submit()
        await anyio.to_thread.run_sync(close_loop_under, handle)
        handle.abort()
        return self._ending(await handle)

    async def _poll_from_a_thread(self) -> str:
        handle = self._submit()
        for _ in range(3):
            try:
                return self._ending(await anyio.to_thread.run_sync(handle.result, 0.001))
            except TimeoutError:
                continue
        return "gave up"

    async def _generate_in_a_thread(self) -> str:
        prompts = [[self._rng.randrange(256)] for _ in range(3)]
        params = SamplingParams(max_new_tokens=5)
        outputs = await anyio.to_thread.run_sync(self._life.llm.generate, prompts, params)
        return ", ".join(sorted({self._ending(output) for output in outputs}))

    async def _wait_for_room(self) -> str:
        return self._ending(await self._submit(wait_for_admission=True))


async def crowd(life: Life, seed: int, duration_s: float) -> None:
    """Run the clients of one event loop. It is a fault if they or their tasks do not end in time."""
    with anyio.move_on_after(duration_s + _LIMIT_S) as limit:
        async with anyio.create_task_group() as clients:
            until = time.monotonic() + duration_s
            for index in range(_NUM_CLIENTS):
                clients.start_soon(HostileClient(life, seed + index).run, until)
    if limit.cancelled_caught:
        life.faults.append(f"clients were stuck after the ending {life.ending!r}")
    if len(asyncio.all_tasks()) > 1:
        life.faults.append(f"{len(asyncio.all_tasks()) - 1} tasks are left")


def live(totals: Totals, rng: random.Random) -> None:
    """Let one engine live and end among its clients, and record what went wrong."""
    threads = set(threading.enumerate())
    faults, ending = Faults(), rng.choice(_ENDINGS)
    options = {"num_blocks": rng.randint(18, 60), "max_steps_in_flight": rng.randint(1, 3)}
    llm = LLM.from_backend(
        lambda: FaultyBackend(faults, block_size=4, **options),
        tokenizer=ByteTokenizer(),
        scheduler_config=SchedulerConfig(
            max_batch_size=rng.randint(1, 8),
            max_queued_requests=rng.randint(6, 64),
            max_unread_tokens=rng.randint(1, 16),
            step_timeout_s=_STEP_TIMEOUT_S if ending == "hang" else _LIMIT_S,
        ),
    )
    life = Life(
        llm=llm,
        max_prompt_tokens=_MAX_PROMPT_TOKENS,
        max_new_tokens=_MAX_NEW_TOKENS,
        faults=totals.violations,
        ending=ending,
        operations=totals.operations,
    )
    duration_s = rng.uniform(0.1, 1.0)
    seeds = [rng.randrange(1 << 40) for _ in range(2)]
    crowds = [start(lambda seed=seed: anyio.run(crowd, life, seed, duration_s)) for seed in seeds]
    for _ in range(rng.randint(0, 3)):
        time.sleep(duration_s / 5)
        faults.inject("NaN logits")
    totals.shown[ending] += ending not in CAUSES
    if ending in CAUSES:
        faults.inject(ending)
    elif ending == "close":
        within_limit(start(llm.close), life, "close() under load")
    elif ending == "drain":
        within_limit(start(lambda: asyncio.run(llm.aclose(drain=0.05))), life, "aclose(drain)")
    for one in crowds:
        within_limit(one, life, "a crowd")
    gc.collect()
    faults.pending = None  # it may have been injected after the last client had gone
    check_end(life, faults)
    within_limit(start(llm.close), life, "close()")
    faults.let_go.set()
    totals.shown.update(faults.num_shown)
    for thread in set(threading.enumerate()) - threads:
        thread.join(_LIMIT_S)
        if thread.is_alive():
            life.faults.append(f"the thread {thread.name} is left after the ending {ending!r}")


def within_limit(future: Future[None], life: Life, what: str) -> None:
    """Wait for a condition that must not take long."""
    try:
        future.result(2 * _LIMIT_S)
    except FutureTimeoutError:
        life.faults.append(f"{what} hangs after the ending {life.ending!r}")


def check_end(life: Life, faults: Faults) -> None:
    """Record what is wrong with an engine whose clients have gone."""
    llm, ending = life.llm, life.ending
    health = llm.health()
    # A machine on which a thread stands still may be taken for a hang before the backend hangs.
    if ending in CAUSES and (faults.num_shown[ending] or (ending == "hang" and health.state == "dead")):
        if health.state != "dead" or CAUSES[ending].__name__ not in str(health.failure):
            life.faults.append(f"after the ending {ending!r} the engine is {health.state}: {health.failure}")
    elif ending in ("close", "drain"):
        if health.state != "closed":
            life.faults.append(f"after the ending {ending!r} the engine is {health.state}: {health.failure}")
    elif not health.ok:
        life.faults.append(f"an engine without a fault is {health.state}: {health.failure}")
    if health.state == "dead":
        return
    anyio.run(wait_until_idle, llm)
    stats = llm.stats()
    left = (stats.num_used_blocks, stats.num_running, stats.num_waiting, stats.num_paused, stats.num_queued)
    if any(left):
        life.faults.append(f"blocks, running, waiting, paused, queued: {left} are left after the ending {ending!r}")


def violations(totals: Totals) -> list[str]:
    """Return what is wrong after the run; empty if all is well."""
    found = sorted(set(totals.violations))
    middle, last = memory_growth(totals.samples, attrgetter("rss_bytes"))
    if last - middle > _MAX_GROWTH_BYTES:
        found.append(f"RSS grew from {middle / 2**20:.0f} MiB to {last / 2**20:.0f} MiB in the last third")
    return found


def report(totals: Totals, found: Sequence[str]) -> None:
    """Print what was done, what became of it, and what is wrong."""
    operations = [
        [name, str(endings.total()), ", ".join(f"{ending} {count}" for ending, count in endings.most_common())]
        for name, endings in sorted(totals.operations.items())
    ]
    print(format_table(["clients", "times", "how it ended"], operations))
    shown = [[name, str(totals.shown[name])] for name in dict.fromkeys((*_ENDINGS, *FAULT_KINDS))]
    print("\n" + format_table(["engine's ending or fault", "times"], shown))
    middle, last = memory_growth(totals.samples, attrgetter("rss_bytes"))
    print(
        f"\n{len(totals.samples)} engines, {sum(count.total() for count in totals.operations.values())} operations; "
        f"{threading.active_count()} thread is left; RSS {middle / 2**20:.1f} MiB in the middle third, "
        f"{last / 2**20:.1f} MiB in the last"
    )
    print("\n".join(f"VIOLATION: {fault}" for fault in found) if found else "PASS")


@contextmanager
def faults_not_logged() -> Iterator[None]:
    """Keep the log free of the faults that are injected during the block."""
    logger = logging.getLogger("llmengine")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Let engines live until the time is up, print the report and return 1 on a violation."""
    parser = argparse.ArgumentParser(prog="tests.soak", description="Hostile callers on failing backends.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rng = random.Random(arguments.seed)
    totals = Totals()
    began = time.monotonic()
    with faults_not_logged():
        while time.monotonic() < began + 60 * arguments.minutes and not totals.violations:
            live(totals, rng)
            gc.collect()
            totals.samples.append(Sample(time.monotonic() - began, 0, 0, 0, psutil.Process().memory_info().rss))
    found = violations(totals)
    report(totals, found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
