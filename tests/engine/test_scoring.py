"""Scoring a text between two steps: borrowed slots and blocks, and requests that go on beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llmengine import ConfigError, EngineClosedError, QueueFullError, SchedulerConfig
from llmengine.batch import Batch
from llmengine.engine.scoring import score_tokens
from llmengine.testing import FakeBackend
from tests.engine.helpers import Steps, bounded, make_llm, oracle

TEXT = list(range(40, 61))


class ScoringFake(FakeBackend):
    """Gives for each token, in place of logits, its context as the block table has it; keeps KV of its own for that."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.kv: dict[tuple[int, int], int] = {}
        self.table: list[int] = []
        self.slots: list[int] = []

    def score(self, batch: Batch) -> Iterator[list[list[int]]]:
        (row,) = batch.rows
        if batch.slot_inits:
            self.table = []
            self.slots.append(batch.slot_inits[0].slot)
        self.table += row.new_block_ids
        size = self.info.block_size
        for position, token_id in enumerate(row.token_ids, row.start):
            self.kv[self.table[position // size], position % size] = token_id
        context = [self.kv[self.table[at // size], at % size] for at in range(row.start + row.num_tokens)]
        ends = range(row.start + 1, row.start + row.num_tokens + 1)
        for begin in range(0, row.num_tokens, 3):
            yield [context[:end] for end in ends[begin : begin + 3]]


def contexts() -> list[list[int]]:
    return [TEXT[:end] for end in range(1, len(TEXT) + 1)]


def test_a_text_is_scored_beside_running_requests() -> None:
    steps = Steps(max_batch_size=2, max_tokens_per_step=8, max_tokens_per_mixed_step=8)
    backend = ScoringFake(num_blocks=33, block_size=4)
    request = steps.submit([1, 2, 3, 4, 5], 9)
    steps.step()
    steps.step()
    seen: list[list[int]] = []
    score_tokens(steps.scheduler, backend, TEXT, seen.extend)
    assert seen == contexts()
    assert not set(backend.table) & {0, *request.blocks.block_ids}
    steps.scheduler.check_integrity()
    steps.drain()
    assert request.token_ids[5:] == oracle([1, 2, 3, 4, 5], 9)
    assert steps.kv_cache.num_used_blocks == 0


def test_nothing_comes_from_the_prefix_cache_or_goes_into_it() -> None:
    steps = Steps(max_batch_size=2)
    backend = ScoringFake(num_blocks=33, block_size=4)
    steps.submit(TEXT, 1)
    steps.drain()
    cached = steps.kv_cache.num_cached_blocks
    seen: list[list[int]] = []
    score_tokens(steps.scheduler, backend, TEXT, seen.extend)
    assert seen == contexts()
    assert steps.kv_cache.num_cached_blocks == cached > 0


def test_a_failure_gives_slot_and_blocks_back() -> None:
    steps = Steps(max_batch_size=1)
    backend = ScoringFake(num_blocks=33, block_size=4)

    def take(logits: Any) -> None:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            score_tokens(steps.scheduler, backend, TEXT, take)
    steps.scheduler.check_integrity()
    assert backend.slots == [0, 0, 0]


def test_without_room_nothing_changes() -> None:
    steps = Steps(num_blocks=5, block_size=4, max_batch_size=1)
    backend = ScoringFake(num_blocks=5, block_size=4)
    with pytest.raises(QueueFullError, match="21 tokens need 6 KV blocks; 4 are free"):
        score_tokens(steps.scheduler, backend, TEXT, print)
    steps.submit([1, 2, 3], 4)
    steps.step()
    with pytest.raises(QueueFullError, match="all 1 slots are taken by requests"):
        score_tokens(steps.scheduler, backend, TEXT[:2], print)
    steps.drain()
    steps.scheduler.check_integrity()
    with pytest.raises(ConfigError, match=r"fake: the backend has no score\(\)"):
        score_tokens(steps.scheduler, steps.backend, TEXT[:2], print)


def test_a_closed_llm_cannot_be_evaluated() -> None:
    pytest.importorskip("torch")
    llm = make_llm(backend=ScoringFake, scheduler=SchedulerConfig(max_batch_size=2))
    llm.close()
    with pytest.raises(EngineClosedError):
        bounded(lambda: llm.evaluate(text=TEXT * 5, window_tokens=32, measure_speed=False))
