"""Steps whose micro-batches are queued on devices of several stages: what waits for what, and how busy they are.

The last stage is a `FakeBackend`, whose tokens depend on the whole context. What all stages take is simulated, with a
virtual clock and the lags that the first stage is told.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest

from llmengine import LLM, SamplingParams
from llmengine.backends.cuda.stage_link import IdsLag
from llmengine.backends.queued_pipeline import QueuedPipeline
from llmengine.batch import Batch, BatchRow, StepResult
from llmengine.config import KvCacheConfig, SchedulerConfig
from llmengine.kernels.stage_link import link_depth
from llmengine.testing import FakeBackend
from tests.backends.test_pipelined import decode_steps, generate

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class QueuedStages(FakeBackend):
    """A backend whose steps go through stages that all take `decode_steps`, as the kernels let them.

    Attributes:
        lags: of the steps, as the first stage is told.
        busy_s: of each stage.
        now: when the host has seen the latest result.
    """

    def __init__(self, num_stages: int, **options: Any) -> None:
        super().__init__(max_steps_in_flight=8 * num_stages, **options)
        self._ids_lag = IdsLag()
        self._depth = link_depth(num_stages)
        self._free_at = [0.0] * num_stages
        self._ended_at: list[float] = []
        self._in_flight: deque[float] = deque()
        self.lags: list[int] = []
        self.busy_s = [0.0] * num_stages
        self.now = 0.0

    def launch(self, batch: Batch) -> None:
        super().launch(batch)
        lag = self._ids_lag.of(batch)
        assert 0 <= lag <= len(self._ended_at)
        self.lags.append(lag)
        awaited = len(self._ended_at) - min(lag or self._depth, self._depth)
        time_s = max(self.now, self._ended_at[awaited] if awaited >= 0 else 0.0)
        for stage, free_at in enumerate(self._free_at):
            time_s = max(time_s, free_at) + decode_steps(batch)
            self._free_at[stage] = time_s
            self.busy_s[stage] += decode_steps(batch)
        self._ended_at.append(time_s)
        self._in_flight.append(time_s)

    def collect(self) -> StepResult:
        self.now = max(self.now, self._in_flight.popleft())
        return super().collect()

    def prepare(self) -> bool:
        return False


def open_queued(num_stages: int, **options: Any) -> tuple[LLM, QueuedStages]:
    own = QueuedStages(num_stages, num_blocks=600, max_model_len=512, **options)
    llm = LLM.from_backend(
        lambda: QueuedPipeline(own, num_stages),
        kv_cache_config=KvCacheConfig(block_size=4),
        scheduler_config=SchedulerConfig(max_batch_size=64, max_tokens_per_step=256, max_tokens_per_mixed_step=128),
    )
    return llm, own


@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_the_tokens_are_those_of_one_stage(num_stages: int) -> None:
    with LLM.from_backend(lambda: FakeBackend(num_blocks=600, max_model_len=512)) as alone:
        expected = generate(alone, 1, 20, GREEDY)
        logprobs = [output.prompt_logprobs for output in alone.generate([[7] * 200], GREEDY.replace(prompt_logprobs=0))]
    llm, _ = open_queued(num_stages)
    with llm:
        assert generate(llm, 1, 20, GREEDY) == expected
        found = llm.generate([[7] * 200], GREEDY.replace(prompt_logprobs=0))
        assert [output.prompt_logprobs for output in found] == logprobs


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_the_first_stage_begins_decodes_before_the_last_has_ended_the_micro_batch_before(num_stages: int) -> None:
    """It waits for the step with the same rows, which is as many before as there are stages."""
    llm, own = open_queued(num_stages)
    with llm:
        llm.generate([[slot] for slot in range(4 * num_stages)], GREEDY.replace(max_new_tokens=50))
    decodes = own.lags[2 * num_stages : -2 * num_stages]
    assert len(decodes) > 40 * num_stages
    assert set(decodes) <= {0, num_stages}


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_all_stages_are_busy_where_there_are_enough_rows(num_stages: int) -> None:
    """64 requests at a time, whose prompts and outputs have random lengths: each step some end, and others begin."""
    chance = random.Random(num_stages)
    llm, own = open_queued(num_stages, next_token=lambda ids: len(ids) % 256)
    with llm:
        prompts = [[number % 256] * chance.randrange(1, 100) for number in range(200)]
        params = [GREEDY.replace(max_new_tokens=chance.randrange(20, 80)) for _ in prompts]
        llm.generate(prompts, params)
    share = [busy_s / own.now for busy_s in own.busy_s]
    assert min(share) >= 0.85


def test_ids_that_come_with_a_step_are_not_waited_for() -> None:
    lag = IdsLag()

    def step(*rows: tuple[int, int, bool]) -> int:
        """Of rows (slot, how many of two ids come with it, whether it samples)."""
        found = [BatchRow(slot, 0, 2, (1,) * known, (), sample=int(samples)) for slot, known, samples in rows]
        return lag.of(Batch(0, found))

    assert step((0, 2, True), (1, 2, False)) == 0
    assert step((2, 2, True)) == 0
    assert step((0, 1, True), (3, 2, True)) == 2
    assert step((0, 2, False), (2, 1, True)) == 2
    assert step((0, 1, True), (2, 1, True)) == 1, "the later of two"
