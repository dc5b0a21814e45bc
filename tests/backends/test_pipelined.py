"""Steps through a pipeline: micro-batches, tokens that are not known yet, and how busy the stages are.

The last stage is a `FakeBackend`, whose tokens depend on the whole context. The stages before are simulated: they only
take time, and the clock is virtual.
"""

from __future__ import annotations

import contextlib
import pickle
import random
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmengine import LLM, SamplingParams
from llmengine.backends.micro_batches import MicroBatcher
from llmengine.backends.pipelined import PipelinedBackend
from llmengine.batch import Batch, BatchRow, StepResult
from llmengine.config import KvCacheConfig, SchedulerConfig
from llmengine.testing import FakeBackend


class SimulatedStages:
    """Implements `EarlierStages`: all stages take `seconds(micro-batch)`, rank 0 computes the last one in `finish`.

    Attributes:
        busy_s: of each stage.
        now: when the last stage finished its latest micro-batch.
    """

    def __init__(self, num_stages: int, seconds: Callable[[Batch], float]) -> None:
        self._seconds = seconds
        self._free_at = [0.0] * num_stages
        self._arrivals: deque[tuple[Batch, float]] = deque()
        self._sampled_at: dict[int, float] = {}
        self._sampling: set[int] = set()
        self.busy_s = [0.0] * num_stages
        self.now = 0.0

    def prepare(self, batch: Batch) -> bytes:
        return pickle.dumps(batch)

    def begin(self, message: bytes) -> None:
        batch: Batch = pickle.loads(message)
        self._arrivals.append((batch, self.now))

    def finish(self, result: StepResult) -> None:
        batch, launched_at = self._arrivals.popleft()
        lacking = [row.slot for row in batch.rows if len(row.token_ids) < row.num_tokens]
        time_s = max([launched_at, *(self._sampled_at[slot] for slot in lacking)])
        for stage, free_at in enumerate(self._free_at):
            time_s = max(time_s, free_at) + self._seconds(batch)
            self._free_at[stage] = time_s
            self.busy_s[stage] += self._seconds(batch)
        self.now = time_s
        self._sampled_at.update(dict.fromkeys(result.token_ids, time_s))

    def begun(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def follow(self, batch: Batch) -> None:
        assert not self._arrivals, "what was launched before is finished"

    def followed(self, result: StepResult) -> None:
        self._sampled_at.update(dict.fromkeys(result.token_ids, self.now))


def decode_steps(batch: Batch) -> float:
    """As on a device that reads all weights for few tokens, and computes for many."""
    return max(1.0, batch.num_tokens / 16)


def open_pipelined(
    num_stages: int, seconds: Callable[[Batch], float] = decode_steps, **options: Any
) -> tuple[LLM, SimulatedStages]:
    stages = SimulatedStages(num_stages, seconds)
    own = FakeBackend(num_blocks=600, max_steps_in_flight=2, max_model_len=512, **options)
    llm = LLM.from_backend(
        lambda: PipelinedBackend(own, stages, num_stages),
        kv_cache_config=KvCacheConfig(block_size=4),
        scheduler_config=SchedulerConfig(max_batch_size=64, max_tokens_per_step=256, max_tokens_per_mixed_step=128),
    )
    return llm, stages


def generate(llm: LLM, seed: int, count: int, params: SamplingParams) -> list[list[int]]:
    """Generate for random prompts, some of them long, with outputs of random lengths."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(256) for _ in range(chance.choice([1, 3, 17, 90, 200]))] for _ in range(count)]
    each = [params.replace(max_new_tokens=chance.randrange(1, 40)) for _ in prompts]
    return [list(output.token_ids) for output in llm.generate(prompts, each)]


GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_the_tokens_are_those_of_one_stage(num_stages: int) -> None:
    with LLM.from_backend(lambda: FakeBackend(num_blocks=600, max_model_len=512)) as alone:
        expected = generate(alone, 1, 20, GREEDY)
    llm, stages = open_pipelined(num_stages)
    with llm:
        assert generate(llm, 1, 20, GREEDY) == expected
        assert generate(llm, 1, 20, GREEDY.replace(prompt_logprobs=0)) == expected
        assert sum(map(len, generate(llm, 1, 20, GREEDY))) == sum(map(len, expected))
    assert all(busy_s > 0 for busy_s in stages.busy_s)


def test_preempted_requests_go_on() -> None:
    own = FakeBackend(num_blocks=70, max_steps_in_flight=2)
    scheduler_config = SchedulerConfig(max_batch_size=16, max_tokens_per_step=64, max_tokens_per_mixed_step=64)
    prompts, params = [[number] * 9 for number in range(16)], GREEDY.replace(max_new_tokens=60)
    with LLM.from_backend(FakeBackend, scheduler_config=SchedulerConfig(max_batch_size=2)) as alone:
        expected = [output.token_ids for output in alone.generate(prompts, params)]
    stages = SimulatedStages(3, decode_steps)
    with LLM.from_backend(lambda: PipelinedBackend(own, stages, 3), scheduler_config=scheduler_config) as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert llm.stats().counters.num_preemptions > 0


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_all_stages_are_busy_where_there_are_enough_rows(num_stages: int) -> None:
    """64 requests at a time, whose prompts and outputs have random lengths: each step some end, and others begin."""
    chance = random.Random(num_stages)
    llm, stages = open_pipelined(num_stages, next_token=lambda ids: len(ids) % 256)
    with llm:
        prompts = [[number % 256] * chance.randrange(1, 100) for number in range(200)]
        params = [GREEDY.replace(max_new_tokens=chance.randrange(20, 80)) for _ in prompts]
        llm.generate(prompts, params)
    share = [busy_s / stages.now for busy_s in stages.busy_s]
    assert min(share) >= 0.85


class LargeMessages(SimulatedStages):
    """Stages whose messages are as long as is asked for.

    Attributes:
        most_ahead: bytes of messages about micro-batches that were not finished, at most.
    """

    def __init__(self, size: int) -> None:
        super().__init__(2, decode_steps)
        self._size = size
        self._ahead = 0
        self.most_ahead = 0

    def prepare(self, batch: Batch) -> bytes:
        message = super().prepare(batch)
        return message + bytes(self._size - len(message))

    def begin(self, message: bytes) -> None:
        self._ahead += len(message)
        self.most_ahead = max(self.most_ahead, self._ahead)
        super().begin(message)

    def finish(self, result: StepResult) -> None:
        self._ahead -= self._size
        super().finish(result)


@pytest.mark.parametrize(("kib", "most"), [(100, 4), (600, 3), (1500, 1), (3000, 1)])
def test_no_more_is_ahead_than_fits_into_the_ring_of_messages(kib: int, most: int) -> None:
    """Else rank 0 would wait for a rank to read that waits for rank 0's stage."""
    stages = LargeMessages(kib << 10)
    own = FakeBackend(max_steps_in_flight=2)
    with LLM.from_backend(lambda: PipelinedBackend(own, stages, 2)) as llm:
        with LLM.from_backend(FakeBackend) as alone:
            expected = [output.token_ids for output in alone.generate([[1], [2], [3]], GREEDY)]
        assert [output.token_ids for output in llm.generate([[1], [2], [3]], GREEDY)] == expected
    assert stages.most_ahead == most * kib << 10


ROWS = st.lists(st.sampled_from([1, 1, 1, 2, 40, 64, 130, 300]), min_size=1, max_size=40)


@given(st.integers(1, 6), st.lists(ROWS, min_size=1, max_size=4))
@settings(max_examples=100)
def test_micro_batches_are_the_step_in_order(num_stages: int, steps: list[list[int]]) -> None:
    batcher = MicroBatcher(num_stages)
    for number, sizes in enumerate(steps):
        rows = [
            BatchRow(slot, 5, size, tuple(range(size - (size == 1))), (slot,), sample=slot % 2)
            for slot, size in enumerate(sizes)
        ]
        parts = batcher.split(Batch(number, rows, masks={row.slot: b"m" for row in rows if row.sample}))
        assert 1 <= len(parts) <= num_stages
        assert all(part.rows and part.step == number for part in parts)
        for row in rows:
            pieces = [piece for part in parts for piece in part.rows if piece.slot == row.slot]
            assert [piece.start for piece in pieces] == [
                5 + sum(piece.num_tokens for piece in pieces[:index]) for index in range(len(pieces))
            ]
            assert [token for piece in pieces for token in piece.token_ids] == list(row.token_ids)
            assert sum(piece.num_tokens for piece in pieces) == row.num_tokens
            assert [list(piece.new_block_ids) for piece in pieces] == [[row.slot]] + [[]] * (len(pieces) - 1)
            assert [piece.sample for piece in pieces] == [0] * (len(pieces) - 1) + [row.sample]
            assert len(pieces) == 1 or min(piece.num_tokens for piece in pieces) >= 4
        assert {slot for part in parts for slot in part.masks} == {row.slot for row in rows if row.sample}
        if all(size == 1 for size in sizes):
            counts = [len(part.rows) for part in parts]
            assert len(parts) == min(num_stages, len(rows))
            assert max(counts) <= -(-len(rows) // len(parts)) * 9 / 8 + 1


def test_rows_stay_in_their_micro_batch() -> None:
    batcher = MicroBatcher(3)

    def places(slots: Sequence[int]) -> dict[int, int]:
        rows = [BatchRow(slot, 5, 1, (1,), (), sample=1) for slot in slots]
        return {row.slot: index for index, part in enumerate(batcher.split(Batch(0, rows))) for row in part.rows}

    before = places(range(12))
    assert places(range(11, -1, -1)) == before
    gone = {slot for slot, index in before.items() if not index}
    after = places([slot for slot in range(12) if slot not in gone])
    assert sum(before[slot] != index for slot, index in after.items()) == 1, "no more than what leaves none empty"
