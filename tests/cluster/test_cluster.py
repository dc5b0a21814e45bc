"""`Cluster` over replicas in this process: the API of `LLM`, and what becomes of requests when replicas die."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import pickle
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import pytest

from llmengine import LLM, GenerationOutput, SamplingParams
from llmengine.batch import Batch
from llmengine.chat.answers import Answer
from llmengine.cluster import Cluster, ClusterConfig
from llmengine.cluster.transport import LocalTransport
from llmengine.cluster.wire import Abort, Command, Hold, ReplicaInfo, Update
from llmengine.config import SchedulerConfig
from llmengine.engine.handle import RequestHandle
from llmengine.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    InvalidRequestError,
    PromptTooLongError,
    QueueFullError,
    ReplicaDeadError,
)
from llmengine.testing import ChatByteTokenizer
from tests.chat.answers.test_chats_with_tools import ASK, CALL, HERMES, WEATHER
from tests.chat.answers.tokens import MarkerTokenizer, saying
from tests.engine.helpers import WAIT_S, StepGate, assert_idle, make_llm, oracle, timeout, tokens

T = TypeVar("T")

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


class Pickling(LocalTransport):
    """Pickles what travels, as Ray would."""

    async def start(self) -> ReplicaInfo:
        return copied(await super().start())

    async def send(self, commands: Sequence[Command]) -> None:
        await super().send(copied(commands))

    async def updates(self) -> AsyncIterator[Update]:
        async for update in super().updates():
            yield copied(update)


def copied(value: T) -> T:
    """What arrives of a value at the other end of a wire."""
    return pickle.loads(pickle.dumps(value))  # type: ignore[no-any-return]


async def make_cluster(make: Callable[[int], LLM] | None = None, **config: Any) -> Cluster:
    """A cluster of engines in this process; `make` is given the number of each replica."""
    chosen = make or (lambda number: make_llm(tokenizer=ChatByteTokenizer()))
    config.setdefault("num_replicas", 2)
    return await Cluster.from_transports(lambda number: LocalTransport(lambda: chosen(number)), ClusterConfig(**config))


def whole(output: GenerationOutput) -> list[tuple[Any, ...]]:
    """All that the outputs of a prompt have, but for what differs from run to run."""
    return [
        (
            each.index,
            each.prompt,
            each.prompt_token_ids,
            each.token_ids,
            each.text,
            each.decoded_logprobs,
            each.decoded_prompt_logprobs,
            each.finish_reason,
            each.matched_stop,
            each.metadata,
        )
        for each in output.outputs
    ]


REQUESTS: dict[str, Callable[[Any], RequestHandle]] = {
    "text": lambda llm: llm.generate_async("Once upon a time", tokens(20), metadata=["mine"]),
    "ids": lambda llm: llm.generate_async([5, 6, 7], tokens(5)),
    "stop": lambda llm: llm.generate_async("stop", tokens(60, stop=["a", "e", "i"], seed=3, temperature=1.0)),
    "n": lambda llm: llm.generate_async("n", tokens(7, n=3, temperature=1.0, seed=1)),
    "best_of": lambda llm: llm.generate_async("best", tokens(7, n=2, best_of=4, temperature=1.0, seed=1)),
    "logprobs": lambda llm: llm.generate_async("log", tokens(7, logprobs=2, prompt_logprobs=1)),
    "chat": lambda llm: llm.chat_async(MESSAGES, tokens(9)),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_outputs_are_those_of_an_llm(name: str) -> None:
    with make_llm(tokenizer=ChatByteTokenizer()) as llm:
        expected = REQUESTS[name](llm).result()
    async with timeout(), await make_cluster() as cluster:
        assert whole(await REQUESTS[name](cluster)) == whole(expected)


async def test_answers_are_divided_as_those_of_an_llm() -> None:
    said = f"<think>Hm.</think>Let me look.\n{CALL}"

    def make(number: int) -> LLM:
        tokenizer = MarkerTokenizer(HERMES)
        return LLM.from_backend(lambda: saying(said, tokenizer), tokenizer=tokenizer)

    def begin(llm: Any) -> RequestHandle:
        return llm.chat_async(ASK, tokens(500), streaming=True, tools=[WEATHER])  # type: ignore[no-any-return]

    with make(0) as llm:
        expected = begin(llm).result()
    async with timeout(), await make_cluster(make) as cluster:
        events = []
        async for output in begin(cluster):
            events += output.answer_delta
    assert output.answer == Answer.of(events)
    assert (output.reasoning, output.content) == (expected.reasoning, expected.content) == ("Hm.", "Let me look.")
    (call,), (expected_call,) = output.tool_calls, expected.tool_calls
    assert dataclasses.replace(call, id="") == dataclasses.replace(expected_call, id="")


async def test_streams_add_up_to_the_final_output() -> None:
    params = tokens(30, n=2, temperature=1.0, seed=5)
    with make_llm() as llm:
        expected = llm.generate("Streams", params)[0]
    async with timeout(), await make_cluster() as cluster:
        texts, ids = ["", ""], [[], []]
        async for output in cluster.generate_async("Streams", params, streaming=True):
            texts[output.index] += output.text_delta
            ids[output.index] += output.token_ids_delta
            assert output.text == texts[output.index]
    assert texts == [output.text for output in expected.outputs]
    assert ids == [output.token_ids for output in expected.outputs]


async def test_generate_answers_in_order() -> None:
    prompts = [f"prompt {index}" for index in range(40)]
    with make_llm() as llm:
        expected = [output.token_ids for output in llm.generate(prompts, tokens(6))]
    async with timeout(), await make_cluster(num_replicas=3) as cluster:
        outputs = await cluster.generate(prompts, tokens(6))
        assert [output.token_ids for output in outputs] == expected
        assert {output.prompt for output in outputs} == set(prompts)


async def test_leaving_a_stream_aborts_its_request_before_the_next_step() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    arrived = threading.Event()

    class Watched(LocalTransport):
        async def send(self, commands: Sequence[Command]) -> None:
            await super().send(commands)
            if any(isinstance(command, Abort) for command in commands):
                arrived.set()

    async with timeout(), await Cluster.from_transports(lambda number: Watched(lambda: llm)) as cluster:
        handle = cluster.generate_async("leave", tokens(200), streaming=True)
        for _ in range(3):
            await asyncio.to_thread(gate.wait)
            gate.let_go()
        await asyncio.to_thread(gate.wait)
        await read_some(handle, 3)
        await handle.aclose()
        await asyncio.to_thread(arrived.wait, WAIT_S)
        gate.open()
        output = await handle
        assert output.finish_reason == "abort"
        assert output.num_tokens <= 4
        assert_idle(llm)


async def test_requests_go_where_their_prefix_is_and_else_where_fewest_are() -> None:
    ran: list[int] = []
    async with (
        timeout(),
        await make_cluster(lambda number: make_llm(on_step=lambda batch: ran.append(number))) as cluster,
    ):
        for prompt in (range(100), range(100, 200), range(100, 220), range(120)):
            await cluster.generate_async(list(prompt), tokens(1))
        assert ran == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("submit", "error", "words"),
    [
        (lambda cluster: cluster.generate_async([999], tokens(1)), InvalidRequestError, "999"),
        (lambda cluster: cluster.generate_async([1] * 999, tokens(1)), PromptTooLongError, "999"),
        (lambda cluster: cluster.generate_async("x" * 999, tokens(1)), PromptTooLongError, "999"),
        (lambda cluster: cluster.chat_async(MESSAGES, tokens(1), no_such=1), InvalidRequestError, "no_such"),
        (lambda cluster: cluster.generate_async("a", tokens(1), nonsense=1), TypeError, "nonsense"),
        (lambda cluster: cluster.generate_async("a", tokens(1, logit_bias={999: 1.0})), InvalidRequestError, "999"),
    ],
)
async def test_faults_of_requests(submit: Callable[[Cluster], RequestHandle], error: type, words: str) -> None:
    async with timeout(), await make_cluster() as cluster:
        with pytest.raises(error, match=words):
            await submit(cluster)
        assert (await cluster.generate_async([1], tokens(2))).num_tokens == 2


async def test_a_deadline_that_passed_on_the_way() -> None:
    gate = StepGate()
    async with timeout(), await make_cluster(lambda _: make_llm(on_step=gate), num_replicas=1) as cluster:
        handle = cluster.generate_async("late", tokens(100), deadline_s=1e-9)
        gate.open()
        assert (await handle).finish_reason == "timeout"


async def test_full_queues_are_tried_elsewhere_before_a_request_is_refused() -> None:
    gates = [StepGate(), StepGate()]
    scheduler = SchedulerConfig(max_batch_size=1, max_queued_requests=1)
    async with (
        timeout(),
        await make_cluster(lambda number: make_llm(on_step=gates[number], scheduler=scheduler)) as cluster,
    ):
        running = [cluster.generate_async([number + 1], tokens(2)) for number in range(2)]
        for gate in gates:
            await asyncio.to_thread(gate.wait)
        waiting = [cluster.generate_async([number + 3], tokens(2)) for number in range(2)]
        with pytest.raises(QueueFullError):
            await cluster.generate_async([9], tokens(2))
        for gate in gates:
            gate.open()
        assert [len((await handle).token_ids) for handle in running + waiting] == [2] * 4


class Dies:
    """An `on_step` that lets some steps go, and raises in the next when it is told to."""

    def __init__(self, num_steps: int = 20) -> None:
        self.now = threading.Event()
        self._num_steps = num_steps

    def __call__(self, batch: Batch) -> None:
        self._num_steps -= 1
        if self._num_steps < 0:
            assert self.now.wait(WAIT_S), "the test forgot it"
            raise RuntimeError("the device fell off the bus")


async def read_some(handle: RequestHandle, num_tokens: int) -> list[int]:
    """Read until a stream has brought so many tokens."""
    ids: list[int] = []
    while len(ids) < num_tokens:
        ids += (await anext(handle)).token_ids_delta
    return ids


async def test_requests_of_a_dead_replica_fail_with_its_cause_and_it_is_replaced() -> None:
    dies = Dies()
    async with (
        timeout(),
        await make_cluster(lambda number: make_llm(on_step=dies if number == 0 else None), num_replicas=1) as cluster,
    ):
        handle = cluster.generate_async("dies", tokens(240), streaming=True)
        await read_some(handle, 1)
        dies.now.set()
        with pytest.raises(ReplicaDeadError, match=r"replica 0.*fell off the bus") as caught:
            async for _ in handle:
                pass
        assert isinstance(caught.value, EngineDeadError)
        assert "fell off the bus" in str(caught.value.__cause__)
        # Waits for the replica that takes the place of the dead one.
        assert (await cluster.generate_async([1], tokens(3))).token_ids == oracle([1], 3)
        assert list(cluster.stats()) == [1]


@pytest.mark.parametrize("params", [tokens(200), tokens(100, n=2, temperature=1.0), tokens(150, logprobs=1)])
async def test_requests_can_be_run_again_elsewhere(params: SamplingParams) -> None:
    dies = Dies()
    with make_llm() as llm:
        expected = llm.generate("again", params.replace(seed=7))[0]
    async with (
        timeout(),
        await make_cluster(
            lambda number: make_llm(on_step=dies if number == 0 else None), num_replicas=1, rerun_requests=True
        ) as cluster,
    ):
        handle = cluster.generate_async("again", params.replace(seed=7), streaming=True)
        other = handle.subscribe(streaming=False)
        texts = ["", ""]
        async for output in handle:
            texts[output.index] += output.text_delta
            if output.num_tokens >= 2:
                dies.now.set()
        assert texts[: params.n] == [each.text for each in expected.outputs]
        assert whole(await other) == whole(expected)


async def test_a_request_that_gives_other_tokens_when_run_again_fails() -> None:
    dies = Dies()

    def make(number: int) -> LLM:
        return make_llm(on_step=dies if number == 0 else None, next_token=lambda context: 97 + number)

    async with timeout(), await make_cluster(make, num_replicas=1, rerun_requests=True) as cluster:
        handle = cluster.generate_async("other", tokens(200), streaming=True)
        await read_some(handle, 1)
        dies.now.set()
        with pytest.raises(ReplicaDeadError, match="other tokens"):
            await handle


async def test_a_replica_whose_step_hangs_is_dead() -> None:
    gate = StepGate()
    async with (
        timeout(),
        await make_cluster(
            lambda number: make_llm(on_step=gate if number == 0 else None), num_replicas=1, step_timeout_s=0.5
        ) as cluster,
    ):
        handle = cluster.generate_async("hangs", tokens(20), streaming=True)
        with pytest.raises(ReplicaDeadError, match=r"replica 0 is dead: .*no step has ended for .*step_timeout_s=0.5"):
            await handle
        while list(cluster.stats()) != [1]:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
        gate.open()


async def test_without_replicas_the_cluster_is_dead() -> None:
    dies = Dies(0)
    dies.now.set()
    async with (
        timeout(),
        await make_cluster(lambda _: make_llm(on_step=dies), num_replicas=1, replace_replicas=False) as cluster,
    ):
        with pytest.raises(ReplicaDeadError):
            await cluster.generate_async("dies", tokens(2))
        await cluster._core.wait_over()
        assert not cluster.health().ok
        with pytest.raises(EngineDeadError, match="no replica"):
            cluster.generate_async("late", tokens(2))


async def test_a_cluster_whose_model_cannot_be_loaded_says_why() -> None:
    def make(number: int) -> LLM:
        if number == 1:
            raise ConfigError("this one has no memory")
        return make_llm()

    async with timeout():
        with pytest.raises(ConfigError, match="no memory"):
            await make_cluster(make)


async def test_slow_consumers_hold_their_requests_back() -> None:
    gate, held = StepGate(), threading.Event()
    llm = make_llm(scheduler=SchedulerConfig(max_unread_tokens=4), on_step=gate)

    class Watched(LocalTransport):
        async def send(self, commands: Sequence[Command]) -> None:
            await super().send(commands)
            if any(isinstance(command, Hold) and command.held for command in commands):
                held.set()

    async with timeout(), await Cluster.from_transports(lambda number: Watched(lambda: llm)) as cluster:
        handle = cluster.generate_async("slow", tokens(100), streaming=True, slow_consumer="pause")
        gate.let_go()
        ids = await read_some(handle, 1)
        while not held.is_set():  # a step at a time, or the replica might make all before it hears of it
            num_tokens = handle.stats().num_tokens
            gate.let_go()
            while handle.stats().num_tokens == num_tokens and not held.is_set():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.01)
            await asyncio.to_thread(held.wait, 0.05)
        gate.open()
        # Others run to their end meanwhile, in more steps than the slow one may be ahead by.
        await cluster.generate_async("fast", tokens(60))
        assert handle.stats().num_tokens < 60
        async for output in handle:
            ids += output.token_ids_delta
        assert ids == oracle(list(b"slow"), 100)


async def test_closing_drains_or_aborts() -> None:
    async with timeout():
        cluster = await make_cluster()
        finishing = cluster.generate_async("finishes", tokens(50))
        await cluster.aclose(drain=15.0)
        assert (await finishing).token_ids == oracle(list(b"finishes"), 50)
        with pytest.raises(EngineClosedError):
            cluster.generate_async("late", tokens(2))
        gate = StepGate()
        llm = make_llm(on_step=gate)
        cluster = await make_cluster(lambda _: llm, num_replicas=1)
        handle = cluster.generate_async("aborted", tokens(200))
        await asyncio.to_thread(gate.wait)
        closing = asyncio.create_task(cluster.aclose())
        while llm.health().ok:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.01)
        gate.open()
        await closing
        assert (await handle).finish_reason == "abort"


async def test_a_dropped_cluster_closes_its_engines() -> None:
    llms: list[weakref.ref[LLM]] = []

    def make(number: int) -> LLM:
        llm = make_llm()
        llms.append(weakref.ref(llm))
        return llm

    async with timeout():
        cluster = await make_cluster(make)
        core = cluster._core
        del cluster
        gc.collect()
        await core.wait_over()
        gc.collect()
        assert [reference() for reference in llms] == [None, None]
