"""The Serve application over two fake engines, on a real Ray in a process of its own, through HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.ray_serve import free_port
from tests import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python"),
]

START_S = 300.0
WAIT_S = 120.0
"""Bounds on what never takes so long, except on a machine that does something else."""

KEY, MODEL, POISON = "sesame", "fake", "\x07"
NO_END = 6000


@pytest.fixture(scope="module")
def application() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Where the application serves, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "tests.cluster.serve_app", str(port)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        try:
            assert says(process, "ready"), "the application did not start"
            yield f"http://127.0.0.1:{port}", process
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()


def says(process: subprocess.Popen[str], word: str) -> bool:
    """Wait for a line of the application's output, among what Ray writes there; False if it ends before."""
    return any(line == f"{word}\n" for line in iter(process.stdout.readline, "")) if process.stdout else False


@pytest.fixture(scope="module")
def address(application: tuple[str, subprocess.Popen[str]]) -> str:
    """Where the application serves."""
    return application[0]


@pytest.fixture
async def client(address: str) -> AsyncIterator[AsyncOpenAI]:
    """OpenAI's client. It does not try again, so that what is lost shows."""
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=START_S) as client:
        yield client


async def ask(client: AsyncOpenAI, text: str, *, system: str = "", max_tokens: int = 24) -> int:
    """The process that answered a chat."""
    messages: list[Any] = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=max_tokens)
    return process_in(answer.choices[0].message.content or "")


def process_in(text: str) -> int:
    """The process that a text was made in."""
    found = re.search(r" (\d+) ", f"{text} ")
    assert found, text
    return int(found[1])


async def samples(address: str, name: str) -> list[tuple[dict[str, str], float]]:
    """(labels, value) of a metric, of all replicas."""
    async with httpx.AsyncClient(timeout=WAIT_S) as http:
        text = (await http.get(f"{address}/metrics")).raise_for_status().text
    families = text_string_to_metric_families(text)
    return [(each.labels, each.value) for family in families for each in family.samples if each.name == name]


async def num_running(address: str) -> float:
    """Requests that the engines are at."""
    return sum(value for _, value in await samples(address, "llmengine_requests_running"))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a condition that the network tells of."""
    async with asyncio.timeout(WAIT_S):
        while not await condition():  # noqa: ASYNC110  # it is in other processes
            await asyncio.sleep(0.1)


async def test_answers_come_token_by_token_and_end_with_their_client(address: str, client: AsyncOpenAI) -> None:
    stream = await client.completions.create(model=MODEL, prompt="count", max_tokens=NO_END, stream=True)
    texts = [chunk.choices[0].text async for chunk, _ in _first(stream, 10)]
    assert len("".join(texts)) >= 10
    assert await num_running(address) == 1, "the answer came before its end"
    await stream.close()

    async def is_idle() -> bool:
        return not await num_running(address)

    await until(is_idle)
    finished = await samples(address, "llmengine_requests_finished_total")
    assert sum(value for labels, value in finished if labels["finished_reason"] == "abort") == 1


async def _first(stream: Any, count: int) -> AsyncIterator[tuple[Any, int]]:
    for number in range(count):
        yield await anext(stream), number


async def test_a_client_that_leaves_before_an_answer_ends_it_too(address: str, client: AsyncOpenAI) -> None:
    asked = asyncio.create_task(ask(client, "a long answer", max_tokens=NO_END))

    async def runs() -> bool:
        return await num_running(address) == 1

    async def is_idle() -> bool:
        return not await num_running(address)

    await until(runs)
    asked.cancel()
    await until(is_idle)


async def test_a_prompt_goes_to_the_replica_that_knows_its_beginning(client: AsyncOpenAI) -> None:
    systems = {name: f"{name} is how every prompt begins. " * 100 for name in ("this", "that")}
    processes: dict[str, set[int]] = {name: set() for name in systems}
    for number in range(4):
        for name, system in systems.items():
            processes[name].add(await ask(client, f"question {number}", system=system))
    assert [len(found) for found in processes.values()] == [1, 1], processes


async def test_requests_at_the_same_time_are_shared_by_the_replicas(client: AsyncOpenAI) -> None:
    processes = await asyncio.gather(*(ask(client, f"{number}", max_tokens=100) for number in range(8)))
    counts = {process: processes.count(process) for process in processes}
    assert len(counts) == 2, counts
    assert min(counts.values()) >= 2, counts


async def test_keys_health_errors_and_metrics(address: str, client: AsyncOpenAI) -> None:
    async with httpx.AsyncClient(timeout=WAIT_S) as http:
        assert (await http.get(f"{address}/health")).json() == {"state": "ready"}
        assert (await http.get(f"{address}/v1/models")).status_code == 401
    assert [model.id async for model in client.models.list()] == [MODEL]
    with pytest.raises(APIStatusError, match="another") as failed:
        await client.completions.create(model="another", prompt="x")
    assert failed.value.status_code == 404
    with pytest.raises(APIStatusError, match="max_tokens"):
        await client.completions.create(model=MODEL, prompt="x", max_tokens=-1, stream=True)
    assert len({labels["replica"] for labels, _ in await samples(address, "llmengine_requests_running")}) == 2


async def read(stream: Any) -> str:
    """All text of a stream."""
    return "".join([chunk.choices[0].text async for chunk in stream])


async def streams_of_both(client: AsyncOpenAI, num_tokens: int) -> dict[int, list[Any]]:
    """Streams that have begun, by the process that they come from."""
    streams: dict[int, list[Any]] = {}
    for number in range(8):
        prompt = f"stream {number}"
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=num_tokens, stream=True)
        text = ""
        while not re.search(r" \d+ ", text):
            text += (await anext(stream)).choices[0].text
        streams.setdefault(process_in(text), []).append(stream)
    assert len(streams) == 2, streams.keys()
    return streams


async def new_replica(address: str, client: AsyncOpenAI, known: set[int]) -> int:
    """The process of a replica that was not known, once there are two again and it answers."""
    found: set[int] = set()

    async def answers() -> bool:
        try:
            found.update(await asyncio.gather(*(ask(client, f"new {number}") for number in range(6))))
        except APIError:  # a request that was sent to a replica which is gone
            return False
        return len(found - known) == 1

    await until(answers)
    assert len(await samples(address, "llmengine_requests_running")) == 2
    return (found - known).pop()


async def test_streams_of_a_replica_that_is_killed_fail_and_another_takes_its_place(
    address: str, client: AsyncOpenAI
) -> None:
    streams = await streams_of_both(client, 300)
    killed, spared = streams
    os.kill(killed, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        for stream in streams[killed]:
            with pytest.raises(APIError, match="replica that ran the request has died"):
                await read(stream)
        for stream in streams[spared]:
            assert process_in(await read(stream)) == spared
    assert await new_replica(address, client, {killed, spared}) != killed


async def test_a_replica_whose_engine_is_dead_is_replaced(address: str, client: AsyncOpenAI) -> None:
    known = {*(await streams_of_both(client, 100))}
    with pytest.raises(APIStatusError) as failed:
        await client.completions.create(model=MODEL, prompt=POISON)
    assert failed.value.status_code == 503
    await new_replica(address, client, known)


async def test_stored_responses_are_found_whichever_replica_has_them(address: str, client: AsyncOpenAI) -> None:
    await streams_of_both(client, 30)  # both are there, and have something to do
    for number in range(6):
        first = await client.responses.create(model=MODEL, input=f"story {number}", max_output_tokens=24)
        second = await client.responses.create(
            model=MODEL, input="Go on.", max_output_tokens=24, previous_response_id=first.id
        )
        assert process_in(second.output_text) == process_in(first.output_text)
        items = await client.responses.input_items.list(second.id)
        assert len(items.data) == 3
        assert (await client.responses.retrieve(first.id)).output_text == first.output_text


async def num_replicas(address: str) -> int:
    """Replicas that answer."""
    return len(await samples(address, "llmengine_requests_running"))


async def test_replicas_that_are_taken_away_finish_their_streams_and_load_brings_others(
    application: tuple[str, subprocess.Popen[str]], client: AsyncOpenAI
) -> None:
    address, process = application
    old = await streams_of_both(client, 400)
    assert process.stdin is not None
    process.stdin.write("scale\n")
    process.stdin.flush()
    reading = {name: [asyncio.create_task(read(stream)) for stream in streams] for name, streams in old.items()}
    assert await asyncio.to_thread(says, process, "scaling")
    async with asyncio.timeout(WAIT_S):
        for name, tasks in reading.items():
            for task in tasks:
                assert process_in(await task) == name
    assert await ask(client, "who is there?") not in old

    loads = [asyncio.create_task(ask(client, f"load {number}", max_tokens=NO_END)) for number in range(12)]

    async def are_two() -> bool:
        return await num_replicas(address) == 2

    async def is_one() -> bool:
        return await num_replicas(address) == 1

    await until(are_two)
    for load in loads:
        load.cancel()
    await until(is_one)
