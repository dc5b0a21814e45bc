"""Sends a load to a target, and measures what the client itself cost meanwhile."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmengine.errors import LLMEngineError
from llmengine.load_test.arrivals import Arrivals, Clients, Rate
from llmengine.load_test.records import LoadRequest, RequestFailure, RequestRecord, Target

_LAG_INTERVAL_S = 0.02


@dataclass(slots=True)
class ClientCost:
    """What this client's event loop cost, which tells whether it, rather than the target, was the limit.

    Attributes:
        cpu_s: processor time of the loop's thread.
        lags_s: how late the loop woke up, of a timer every 20 ms.
    """

    cpu_s: float = 0.0
    lags_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class LoadResult:
    """All records of one load, from the first request that was due to the end of the last one."""

    arrivals: Arrivals
    records: list[RequestRecord]
    wall_s: float
    client: ClientCost


async def run_load(
    target: Target,
    requests: Iterator[LoadRequest],
    arrivals: Arrivals,
    *,
    num_requests: int,
    warm_up_requests: int = 0,
    timeout_s: float = 600.0,
    seed: int = 0,
) -> LoadResult:
    """Send `num_requests` as `arrivals` says, wait for all of them, and return what happened.

    The warm-up requests come before, at the same arrivals, and are not in the result. A request that fails is a record
    with an error; it does not end the load. One that lasts longer than `timeout_s` fails as "timeout". If this is
    cancelled, so are its requests. It runs on asyncio's event loops only.
    """
    if warm_up_requests:
        await _send_all(target, itertools.islice(requests, warm_up_requests), arrivals, timeout_s, seed + 1)
    cost = ClientCost()
    with _frozen_heap():
        began, cpu_began = time.perf_counter(), time.thread_time()
        async with asyncio.TaskGroup() as tasks:
            lag = tasks.create_task(_watch_lag(cost.lags_s))
            records = await _send_all(target, itertools.islice(requests, num_requests), arrivals, timeout_s, seed)
            lag.cancel()
        cost.cpu_s = time.thread_time() - cpu_began
    return LoadResult(arrivals, records, time.perf_counter() - began, cost)


async def _send_all(
    target: Target, requests: Iterator[LoadRequest], arrivals: Arrivals, timeout_s: float, seed: int
) -> list[RequestRecord]:
    records: list[RequestRecord] = []
    async with asyncio.TaskGroup() as tasks:
        if isinstance(arrivals, Clients):
            for _ in range(arrivals.count):
                tasks.create_task(_client(target, requests, records, timeout_s))
        else:
            await _dispatch(tasks, target, requests, arrivals, records, timeout_s, seed)
    return records


async def _client(
    target: Target, requests: Iterator[LoadRequest], records: list[RequestRecord], timeout_s: float
) -> None:
    """One request after the other until none are left."""
    for request in requests:
        record = RequestRecord(due=time.perf_counter())
        records.append(record)
        await _send(target, request, record, timeout_s)


async def _dispatch(
    tasks: asyncio.TaskGroup,
    target: Target,
    requests: Iterator[LoadRequest],
    rate: Rate,
    records: list[RequestRecord],
    timeout_s: float,
    seed: int,
) -> None:
    """Start each request when it is due; those that are late, because this loop was, still count from then."""
    began = time.perf_counter()
    for request, offset_s in zip(requests, rate.offsets_s(random.Random(f"arrivals {seed}")), strict=False):
        wait_s = began + offset_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        record = RequestRecord(due=began + offset_s)
        records.append(record)
        tasks.create_task(_send(target, request, record, timeout_s))


async def _send(target: Target, request: LoadRequest, record: RequestRecord, timeout_s: float) -> None:
    record.sent = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s) as timer:
            await target.serve(request, record)
    except RequestFailure as failure:
        record.fail(failure.kind, str(failure))
    except LLMEngineError as error:
        record.fail(type(error).__name__, str(error))
    except TimeoutError:
        if not timer.expired():
            raise
        record.fail("timeout", f"no end of the answer within {timeout_s:g} s")
    record.finished = record.finished or time.perf_counter()


async def _watch_lag(lags_s: list[float]) -> None:
    while True:
        due = time.perf_counter() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        lags_s.append(max(0.0, time.perf_counter() - due))


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keep what exists out of garbage collections, which would stop the loop for as long as there are objects.

    It stays out where the program has a frozen heap already: thawing knows no parts.
    """
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
