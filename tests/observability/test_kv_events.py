"""KV events as a router reads them: a real ZeroMQ subscriber that rebuilds the prefix cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ray_serve import free_port
from llmengine import LLM, CachedBlock, ConfigError, EngineDeadError, EngineObserver, PrefixCacheChange, SamplingParams
from llmengine.batch import Batch
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer

zmq = pytest.importorskip("zmq", reason="pyzmq is not installed")
from llmengine.observability import kv_events  # noqa: E402
from llmengine.observability.kv_events import KvEventPublisher  # noqa: E402

WAIT_S = 60.0
"""Bound of every wait: a hang fails."""
SIZE = 4
ANY = "tcp://127.0.0.1:*"


class Router:
    """A subscriber that knows from the events alone which prefixes the engine has; it asks for what it missed."""

    def __init__(self, publisher: KvEventPublisher) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.subscribe(b"kv@")
        self.socket.rcvtimeo = int(WAIT_S * 1000)
        self.socket.connect(publisher.endpoint)
        assert publisher.replay_endpoint is not None
        self.replay = self.context.socket(zmq.DEALER)
        self.replay.rcvtimeo = int(WAIT_S * 1000)
        self.replay.connect(publisher.replay_endpoint)
        self.next_number = 0
        self.events: list[list[Any]] = []
        self.prefixes: dict[int, tuple[int, ...]] = {}

    def catch_up(self) -> None:
        """Read all past messages that it has not read."""
        self.replay.send_multipart([b"", self.next_number.to_bytes(8, "big")])
        while True:
            _, number, payload = self.replay.recv_multipart()
            if number == b"\xff" * 8:
                assert payload == b""
                return
            self.take(number, payload)

    def take(self, number: bytes, payload: bytes) -> None:
        found = int.from_bytes(number, "big")
        if found < self.next_number:
            return
        assert found == self.next_number
        self.next_number += 1
        moment, events, rank = msgpack.unpackb(payload)
        assert abs(moment - time.time()) < 3600
        assert rank == 0
        for event in events:
            self.apply(event)

    def apply(self, event: list[Any]) -> None:
        self.events.append(event)
        if event[0] == "AllBlocksCleared":
            self.prefixes.clear()
        elif event[0] == "BlockRemoved":
            for block_hash in event[1]:
                del self.prefixes[block_hash]
        else:
            kind, hashes, parent, token_ids, size, lora_id, medium, lora_name, extra_keys = event
            assert (kind, size, lora_id, medium, lora_name) == ("BlockStored", SIZE, None, "GPU", None)
            assert len(token_ids) == SIZE * len(hashes)
            assert extra_keys is None or len(extra_keys) == len(hashes)
            before = () if parent is None else self.prefixes[parent]
            for index, block_hash in enumerate(hashes):
                before += tuple(token_ids[index * SIZE : (index + 1) * SIZE])
                assert block_hash not in self.prefixes
                self.prefixes[block_hash] = before

    def catch_up_until(self, expected: set[tuple[int, ...]]) -> None:
        """Read until it knows what is expected; fails if that never comes."""
        until = time.monotonic() + WAIT_S
        self.catch_up()
        while set(self.prefixes.values()) != expected:
            assert time.monotonic() < until, (sorted(self.prefixes.values()), sorted(expected))
            time.sleep(0.001)
            self.catch_up()
        assert len(self.prefixes) == len(expected)

    def close(self) -> None:
        self.context.destroy(linger=0)


class Follower(EngineObserver):
    """What the engine itself says that a lookup finds."""

    def __init__(self) -> None:
        self.blocks: dict[int, CachedBlock] = {}

    def prefix_cache_changed(self, change: PrefixCacheChange) -> None:
        if change.is_whole:
            self.blocks.clear()
        for uid in change.removed:
            del self.blocks[uid]
        self.blocks.update({block.uid: block for block in change.stored})

    def prefixes(self) -> set[tuple[int, ...]]:
        return {self.prefix(block) for block in self.blocks.values()}

    def prefix(self, block: CachedBlock) -> tuple[int, ...]:
        before = () if block.parent is None else self.prefix(self.blocks[block.parent])
        return before + block.token_ids


def small_llm(num_blocks: int = 16, on_step: Callable[[Batch], None] | None = None) -> LLM:
    size = {"num_blocks": num_blocks, "block_size": SIZE, "max_model_len": 40}
    return LLM.from_backend(
        lambda: FakeBackend(lambda token_ids: 7, on_step=on_step, **size),
        tokenizer=ByteTokenizer(),
    )


@contextmanager
def routed(llm: LLM) -> Iterator[Router]:
    publisher = KvEventPublisher(llm, ANY, replay_endpoint=ANY, topic="kv@host@model")
    router = Router(publisher)
    try:
        yield router
    finally:
        router.close()
        publisher.close()


def prefixes(token_ids: Sequence[int]) -> set[tuple[int, ...]]:
    return {tuple(token_ids[:end]) for end in range(SIZE, len(token_ids) + 1, SIZE)}


def test_a_router_knows_what_was_computed() -> None:
    with small_llm() as llm, routed(llm) as router:
        llm.generate([[1, 2, 3, 4, 5, 6, 7, 8, 9]], SamplingParams(max_new_tokens=1))
        router.catch_up_until(prefixes([1, 2, 3, 4, 5, 6, 7, 8]))
        llm.generate([[1, 2, 3, 4, 9, 9, 9, 9, 9]], SamplingParams(max_new_tokens=1))
        router.catch_up_until(prefixes([1, 2, 3, 4, 5, 6, 7, 8]) | prefixes([1, 2, 3, 4, 9, 9, 9, 9]))
    assert router.events[0] == ["AllBlocksCleared"]
    first, second = [event for event in router.events if event[0] == "BlockStored"]
    assert (first[2], first[3], second[2], second[3]) == (None, [1, 2, 3, 4, 5, 6, 7, 8], first[1][0], [9] * 4)


def join(llm: LLM, router: Router) -> list[bytes]:
    """The first message that the subscription brings, which takes effect at some time after it was made."""
    until = time.monotonic() + WAIT_S
    router.socket.rcvtimeo = 50
    token_id = 0
    while True:
        assert time.monotonic() < until
        token_id = token_id % 250 + 1
        llm.generate([[token_id] * 5], SamplingParams(max_new_tokens=1))
        try:
            frames: list[bytes] = router.socket.recv_multipart()
        except zmq.Again:
            continue
        router.socket.rcvtimeo = int(WAIT_S * 1000)
        return frames


def test_messages_are_published_and_can_be_had_again() -> None:
    with small_llm() as llm, routed(llm) as router:
        topic, number, payload = join(llm, router)
        assert topic == b"kv@host@model"
        router.next_number = int.from_bytes(number, "big")
        router.replay.send_multipart([b"", number])
        assert router.replay.recv_multipart() == [b"", number, payload]


@pytest.mark.parametrize("dies", [False, True])
def test_an_engine_that_has_ended_has_no_cache(dies: bool) -> None:
    is_failing = threading.Event()

    def fail(batch: Batch) -> None:
        if is_failing.is_set():
            raise RuntimeError("the device is on fire")

    with small_llm(on_step=fail) as llm, routed(llm) as router:
        join(llm, router)
        if dies:
            is_failing.set()
            with pytest.raises(EngineDeadError):
                llm.generate([[1, 2, 3, 4, 5]], SamplingParams(max_new_tokens=10))
        else:
            llm.close()
        while msgpack.unpackb(router.socket.recv_multipart()[2])[1] != [["AllBlocksCleared"]]:
            pass


def test_hashes_depend_on_tokens_and_salt_only() -> None:
    found = []
    for _ in range(2):
        with small_llm() as llm, routed(llm) as router:
            for salt in (None, "one", "two"):
                options: Any = {} if salt is None else {"cache_salt": salt}
                llm.generate([[1, 2, 3, 4, 5]], SamplingParams(max_new_tokens=1), **options)
            until = time.monotonic() + WAIT_S
            while len(router.prefixes) < 3:
                assert time.monotonic() < until
                router.catch_up()
        found.append(list(router.prefixes))
        stored = [event for event in router.events if event[0] == "BlockStored"]
        assert [event[8] for event in stored] == [None, [["'one'"]], [["'two'"]]]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_a_publisher_of_a_running_engine_begins_with_its_content_and_ends_with_nothing() -> None:
    with small_llm() as llm:
        llm.generate([list(range(9))], SamplingParams(max_new_tokens=1))
        publisher = KvEventPublisher(llm, f"tcp://127.0.0.1:{free_port()}", replay_endpoint=ANY)
        router = Router(publisher)
        router.catch_up_until(prefixes(range(8)))
        router.close()
        publisher.close()
        publisher.close()
        again = KvEventPublisher(llm, publisher.endpoint)
        assert again.endpoint == publisher.endpoint
        with pytest.raises(ConfigError, match="cannot listen at tcp://127"):
            KvEventPublisher(llm, publisher.endpoint)
        llm.generate([list(range(20, 29))], SamplingParams(max_new_tokens=1))
    again.close()  # the engine has ended it already


PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(batches=st.lists(PROMPTS, min_size=1, max_size=4))
def test_what_a_router_rebuilds_is_what_the_cache_has(batches: list[list[list[int]]]) -> None:
    """Prompts that share prefixes run at once in a cache that is too small for them, so blocks come and go."""
    with small_llm(num_blocks=12) as llm, routed(llm) as router:
        follower = Follower()
        llm.add_observer(follower)
        for prompts in batches:
            llm.generate(prompts, SamplingParams(max_new_tokens=6))
        router.catch_up_until(follower.prefixes())
        assert llm.stats().num_cached_blocks >= len(router.prefixes)


def test_closing_does_not_wait_for_zeromq_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_events, "_END_S", 0.05)
    may_end = threading.Event()
    with small_llm() as llm:
        publisher = KvEventPublisher(llm, ANY)
        destroy = publisher._context.destroy

        def late(linger: int) -> None:
            may_end.wait(60.0)
            destroy(linger=linger)

        monkeypatch.setattr(publisher._context, "destroy", late)
        publisher.close()
        assert "ZeroMQ has not ended within 0.05 s" in caplog.text
        may_end.set()
        publisher.close()
        publisher._thread.join(60.0)
    assert not publisher._thread.is_alive()
