"""Loads on targets that decide when a request ends."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Iterator

import pytest

from llmengine.errors import QueueFullError
from llmengine.load_test.arrivals import Clients, Rate
from llmengine.load_test.records import LoadRequest, RequestFailure, RequestRecord
from llmengine.load_test.runner import run_load


def endless() -> Iterator[LoadRequest]:
    return (LoadRequest(f"prompt {index}", None, 1) for index in itertools.count())


class Gate:
    """A target that holds its requests until there are `capacity` at once, or forever."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.prompts: list[str | None] = []
        self.num_open = self.max_open = self.num_cancelled = 0
        self.full = asyncio.Event()

    async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
        self.prompts.append(request.prompt)
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        if self.num_open == self.capacity:
            self.full.set()
        try:
            await self.full.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1
        record.arrived(time.perf_counter())

    async def count_prompt_tokens(self, request: LoadRequest) -> int:
        raise NotImplementedError


async def test_clients_send_one_request_after_the_other() -> None:
    target = Gate(capacity=3)
    result = await run_load(target, endless(), Clients(3), num_requests=10)
    assert target.max_open == 3
    assert len(result.records) == 10
    assert target.prompts == [f"prompt {index}" for index in range(10)]


async def test_a_rate_does_not_wait_for_answers() -> None:
    # Nothing is answered before all requests are there, so clients that wait would never send the second one.
    target = Gate(capacity=20)
    result = await run_load(target, endless(), Rate(2000.0), num_requests=20)
    assert target.max_open == 20
    assert all(record.error is None for record in result.records)


async def test_requests_are_due_at_the_rate_whatever_the_target_does() -> None:
    class Blocking(Gate):
        async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
            time.sleep(0.005)  # noqa: ASYNC251 - this is what a busy loop does to the client
            record.arrived(time.perf_counter())

    result = await run_load(Blocking(1), endless(), Rate(1000.0, "constant"), num_requests=20)
    due = [record.due for record in result.records]
    assert [later - earlier for earlier, later in itertools.pairwise(due)] == pytest.approx([0.001] * 19)
    assert result.records[-1].arrivals[0] - result.records[-1].due > 0.05, "the wait before sending counts"
    assert result.client.lags_s or result.wall_s < 1


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    offsets = list(itertools.islice(Rate(50.0).offsets_s(random.Random(1)), 20_001))
    gaps = [later - earlier for earlier, later in itertools.pairwise(offsets)]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert offsets[0] == 0


async def test_warm_up_requests_are_not_in_the_result() -> None:
    target = Gate(capacity=1)
    result = await run_load(target, endless(), Clients(1), num_requests=3, warm_up_requests=2)
    assert len(target.prompts) == 5
    assert len(result.records) == 3


async def test_failures_are_records() -> None:
    class Failing(Gate):
        async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
            if request.prompt == "prompt 0":
                raise RequestFailure("refused", "nobody there")
            raise QueueFullError("full")

    result = await run_load(Failing(1), endless(), Clients(1), num_requests=2)
    assert [(record.error, record.detail) for record in result.records] == [
        ("refused", "nobody there"),
        ("QueueFullError", "full"),
    ]


async def test_a_request_that_does_not_end_is_a_timeout() -> None:
    target = Gate(capacity=100)
    result = await run_load(target, endless(), Clients(2), num_requests=2, timeout_s=0.05)
    assert [record.error for record in result.records] == ["timeout", "timeout"]
    assert target.num_cancelled == 2


async def test_a_timeout_of_the_target_itself_is_a_defect_that_shows() -> None:
    class Defective(Gate):
        async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
            raise TimeoutError("not the load's")

    with pytest.raises(ExceptionGroup) as caught:
        await run_load(Defective(1), endless(), Clients(1), num_requests=1)
    assert caught.group_contains(TimeoutError, match="not the load's")


async def test_cancelling_a_load_cancels_its_requests() -> None:
    class Announcing(Gate):
        async def serve(self, request: LoadRequest, record: RequestRecord) -> None:
            if self.num_open == 3:
                all_open.set()
            await super().serve(request, record)

    all_open = asyncio.Event()
    target = Announcing(capacity=5)
    load = asyncio.ensure_future(run_load(target, endless(), Clients(4), num_requests=8))
    await all_open.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert (target.num_open, target.num_cancelled) == (0, 4)
