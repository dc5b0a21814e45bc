"""Shared by the engine's tests: the oracle of right tokens, gates for deterministic schedules, small builders."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from llmengine.batch import Batch, SlotInit
from llmengine.config import KvCacheConfig, SchedulerConfig
from llmengine.engine.engine import Engine
from llmengine.engine.handle import RequestHandle
from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.request import Family, Request, RequestStatus
from llmengine.engine.scheduler import Scheduler
from llmengine.engine.stats import EngineCounters
from llmengine.engine.stream import OutputStream
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput, OutputLog
from llmengine.request_options import SlowConsumer
from llmengine.sampling_params import SamplingParams
from llmengine.testing import FakeBackend, NextToken, mixing_model
from llmengine.tokenizer.protocol import ByteTokenizer, IncrementalDetokenizer

WAIT_S = 60.0
"""Bound of every wait: a hang fails."""

VOCAB_SIZE = 258

T = TypeVar("T")


class Panic(BaseException):
    """Like the panics of libraries written in Rust, this is not an `Exception`."""


def oracle(prompt: Sequence[int], num_tokens: int, next_token: NextToken | None = None) -> list[int]:
    """Return the tokens that a request generates when it runs alone, one after another."""
    model = next_token or mixing_model(VOCAB_SIZE)
    context = list(prompt)
    for _ in range(num_tokens):
        token_id = model(context)
        assert token_id is not None
        context.append(token_id)
    return context[len(prompt) :]


def counting_model(token_ids: Sequence[int]) -> int:
    """Return the next letter of the alphabet, whatever the context: 'd' after 'c', 'a' after 'z'."""
    return ord("a") + (token_ids[-1] - ord("a") + 1) % 26


def tokens(num_tokens: int, **changes: Any) -> SamplingParams:
    """Return greedy parameters for `num_tokens` tokens."""
    return SamplingParams(max_new_tokens=num_tokens, **changes)


def timeout() -> asyncio.Timeout:
    """Return the time limit of an asynchronous test."""
    return asyncio.timeout(WAIT_S)


def start(function: Callable[[], T]) -> Future[T]:
    """Run a function on a thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def bounded(function: Callable[[], T]) -> T:
    """Call a function that blocks, and fail if it blocks for too long."""
    return start(function).result(WAIT_S)


def in_loop(main: Callable[[], Any], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None) -> Any:
    """Run an async function in a new event loop of this thread, bounded."""

    async def limited() -> Any:
        async with timeout():
            return await main()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(limited())


def close_loop_under(handle: RequestHandle) -> None:
    """Let a task wait for the handle, close its event loop, and destroy the task then."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # expect: a task is destroyed while pending

    async def read() -> None:
        await anext(handle, None)

    async def begin() -> asyncio.Task[None]:
        task = loop.create_task(read())
        await asyncio.sleep(0)
        return task

    task = loop.run_until_complete(begin())
    loop.close()
    task.get_coro().close()  # type: ignore[union-attr]


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Ctrl-C raises `KeyboardInterrupt`, also in a process that a shell started in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def interrupt_main_in(function: str, *, on_main: bool = True) -> None:
    """Send Ctrl-C once the main thread is in a function of this name.

    Args:
        on_main: False: the kernel delivers it to this thread, as it may, and so does not wake the main thread.
    """
    until = time.monotonic() + WAIT_S
    main = threading.main_thread().ident
    assert main is not None
    while function not in (frame.name for frame in traceback.extract_stack(sys._current_frames()[main])):
        assert time.monotonic() < until, f"the main thread never came to {function}"
    signal.pthread_kill(main if on_main else threading.get_ident(), signal.SIGINT)


class ShiftedTime:
    """The module `time`, whose clock a test can put forward by `ahead_s` seconds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return time.monotonic() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class StepGate:
    """An `on_step` that holds the engine thread inside each step until the test lets it go on."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self._arrived = threading.Semaphore(0)
        self._permits = threading.Semaphore(0)
        self._is_open = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.batches.append(batch)
        self._arrived.release()
        if not self._is_open.is_set():
            assert self._permits.acquire(timeout=WAIT_S), "nobody opened the gate"

    def wait(self) -> None:
        """Block until the engine stands in the next step."""
        assert self._arrived.acquire(timeout=WAIT_S), "the engine made no step"

    def let_go(self) -> None:
        """Let the current step end."""
        self._permits.release()

    def step(self) -> None:
        """Let the current step end, and wait for the next."""
        self.let_go()
        self.wait()

    def open(self) -> None:
        """Hold no step from now on."""
        self._is_open.set()
        self._permits.release()


class GatedTokenizer(ByteTokenizer):
    """Encodes when the test says so; counts the calls that have begun."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def encode(self, text: str) -> list[int]:
        self.begun.release()
        assert self.gate.wait(WAIT_S), "nobody opened the tokenizer"
        return super().encode(text)

    def wait_begun(self) -> None:
        """Block until one more call has begun."""
        assert self.begun.acquire(timeout=WAIT_S), "nothing was tokenized"


class RecordingBackend(FakeBackend):
    """Remembers which threads made and closed it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.made_by = threading.get_ident()
        self.closed_by: list[int] = []

    def close(self) -> None:
        self.closed_by.append(threading.get_ident())
        super().close()


_BYTES = ByteTokenizer()


def make_llm(
    *,
    tokenizer: Any = _BYTES,
    scheduler: SchedulerConfig | None = None,
    caching: bool = True,
    eos_token_ids: Iterable[int] = (),
    backend: Callable[..., FakeBackend] = FakeBackend,
    **options: Any,
) -> LLM:
    """Return an LLM on a FakeBackend; `options` are those of the backend."""
    options.setdefault("vocab_size", VOCAB_SIZE)
    return LLM.from_backend(
        lambda: backend(**options),
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids,
        scheduler_config=scheduler,
        kv_cache_config=KvCacheConfig(enable_prefix_caching=caching),
    )


def assert_idle(llm: LLM) -> None:
    """Assert that nothing is held by requests that ended or were aborted before this call.

    Commands reach the engine in order, so once a request submitted now has finished, earlier aborts are done.
    """
    bounded(lambda: llm.generate_async([1], tokens(1)).result(WAIT_S))
    stats = llm.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_running == 0
    assert stats.num_waiting == 0
    assert stats.num_queued == 0


def request_of(
    request_id: int,
    prompt: Sequence[int],
    *,
    params: SamplingParams | None = None,
    limit: int = 256,
    priority: int = 0,
    tenant: str | None = None,
    queued: float = 0.0,
    salt: Hashable = None,
    stop_token_ids: Iterable[int] = (),
    tokenizer: Any = None,
) -> Request:
    """Return a request as `LLM` would make it."""
    params = tokens(8) if params is None else params
    wanted = limit if params.max_new_tokens is None else min(limit, len(prompt) + params.max_new_tokens)
    return Request(
        stream=OutputStream(OutputLog(request_id, queued, prompt_token_ids=tuple(prompt))),
        prompt_token_ids=list(prompt),
        params=params,
        seed=0,
        stop_token_ids=frozenset(stop_token_ids),
        max_total_tokens=wanted,
        priority=priority,
        tenant=tenant,
        cache_salt=salt,
        detokenizer=None if tokenizer is None else IncrementalDetokenizer(tokenizer, prompt, stop=params.stop),
    )


class Steps:
    """Scheduler and FakeBackend without an engine: the test launches and collects each step, and sets the time (`now`).

    Every launch checks the limits that hold for any batch.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 33,
        block_size: int = 4,
        max_model_len: int = 64,
        max_steps_in_flight: int = 1,
        max_samples: int = 1,
        caching: bool = True,
        next_token: NextToken | None = None,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        self.next_token = next_token or mixing_model(VOCAB_SIZE)
        self.config = SchedulerConfig(**settings).resolve()
        self.kv_cache = KVCacheManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.counters = EngineCounters()
        self.scheduler = Scheduler(self.config, self.kv_cache, self.counters, lambda: self.now, max_samples=max_samples)
        self.backend = FakeBackend(
            self.next_token,
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_steps_in_flight=max_steps_in_flight,
            max_samples=max_samples,
        )
        self.limit = self.backend.info.max_model_len
        self.requests: list[Request] = []
        self._ids = itertools.count()
        self._slots: dict[int, SlotInit] = {}

    def submit(
        self, prompt: Sequence[int], num_tokens: int = 8, *, num_outputs: int = 1, priority: int = 0, **options: Any
    ) -> Request:
        """Queue a request for `num_tokens` tokens, or a family of them; return the first."""
        options.setdefault("params", tokens(num_tokens))
        options.update(limit=self.limit, priority=priority, queued=self.now)
        members = [request_of(next(self._ids), prompt, **options) for _ in range(num_outputs)]
        family = Family(members) if num_outputs > 1 else None
        for member in members:
            member.family = family
        self.requests += members
        self.scheduler.add(members[0])
        return members[0]

    def launch(self) -> Batch | None:
        """Schedule and launch one step."""
        decoding = [
            request
            for request in self.scheduler.running
            if request.num_uncomputed_tokens == 1
            and not request.is_awaited
            and request.num_computed_tokens >= len(request.prompt_token_ids)
        ]
        resumable = [r.request_id for r in self.requests if r.status is RequestStatus.WAITING]
        batch = self.scheduler.schedule()
        slots = {row.slot for row in batch.rows} if batch else set()
        for request in decoding:
            assert request.status is RequestStatus.WAITING or request.slot in slots, "a decode was starved"
        if batch is None:
            assert not resumable or self.scheduler.num_steps_in_flight, "nothing runs, but requests are waiting"
            return None
        self._check_limits(batch)
        self.backend.launch(batch)
        return batch

    def collect(self) -> list[Request]:
        """Collect the oldest step and return the requests that changed."""
        return self.scheduler.update(self.backend.collect())

    def step(self) -> Batch:
        """Launch and collect one step."""
        batch = self.launch()
        assert batch is not None
        self.collect()
        return batch

    def drain(self, max_steps: int = 10_000) -> int:
        """Run until every request has ended; return the number of steps. Fails when that takes too many."""
        for num_steps in range(max_steps):
            while self.scheduler.num_steps_in_flight < self.backend.info.max_steps_in_flight:
                if self.launch() is None:
                    break
            if not self.scheduler.num_steps_in_flight:
                assert not self.scheduler.has_requests
                return num_steps
            self.collect()
            self.scheduler.check_integrity()
        raise AssertionError(f"requests are unfinished after {max_steps} steps")

    def check_tokens(self) -> None:
        """Assert that each request's tokens are the oracle's, and that nothing is held when nothing runs."""
        for request in self.requests:
            log = request.stream.log
            expected = oracle(request.prompt_token_ids, len(log.token_ids), self.next_token)
            assert log.token_ids == expected, f"request {request.request_id}"
            if log.finish_reason == "length":
                assert len(request.token_ids) == request.max_total_tokens
        self.scheduler.check_integrity()

    def running_ids(self) -> list[int]:
        """Return the ids of the running requests."""
        return sorted(request.request_id for request in self.scheduler.running)

    def _check_limits(self, batch: Batch) -> None:
        admitted = {init.slot for init in batch.slot_inits}
        self._slots.update({init.slot: init for init in batch.slot_inits})
        assert len(self.scheduler.running) <= self.config.max_batch_size
        assert len(batch.rows) <= self.config.max_batch_size
        assert batch.num_tokens == sum(row.num_tokens for row in batch.rows)
        assert batch.num_tokens <= self.config.max_tokens_per_step
        assert all(row.num_tokens >= 1 for row in batch.rows)
        if any(row.start >= self._slots[row.slot].num_prompt_tokens for row in batch.rows if row.slot not in admitted):
            assert batch.num_tokens <= self.config.max_tokens_per_mixed_step


class EngineHarness:
    """An Engine without an LLM, for checks of its invariants while requests come and go."""

    def __init__(
        self,
        scheduler: SchedulerConfig | None = None,
        *,
        backend: Callable[..., FakeBackend] = FakeBackend,
        **options: Any,
    ) -> None:
        self._ids = itertools.count()
        self.engine = Engine(
            lambda: backend(**options), (scheduler or SchedulerConfig()).resolve(), KvCacheConfig().resolve()
        )
        self.info = self.engine.start()

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        streaming: bool = True,
        slow_consumer: SlowConsumer = "coalesce",
    ) -> RequestHandle:
        """Submit token ids and return the handle."""
        request = request_of(next(self._ids), prompt, params=params, limit=self.info.max_model_len)
        request.stream.slow_consumer = slow_consumer
        request.stream.max_unread = self.engine.scheduler_config.max_unread_tokens
        handle = RequestHandle(request.stream, self.engine.abort, streaming=streaming)
        self.engine.submit(request)
        return handle

    def close(self) -> None:
        """Stop the engine, and fail if it does not end."""
        self.engine.stop()
        assert self.engine.join(WAIT_S)


def assert_concatenates(outputs: Sequence[GenerationOutput]) -> None:
    """Assert that the outputs are one stream: deltas add up, and only the last is final."""
    final = outputs[-1]
    assert "".join(output.text_delta for output in outputs) == final.text
    assert [i for output in outputs for i in output.token_ids_delta] == final.token_ids
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for output in outputs:
        assert final.text.startswith(output.text)
        assert final.token_ids[: output.num_tokens] == output.token_ids
