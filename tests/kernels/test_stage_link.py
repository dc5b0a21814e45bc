"""What stages give each other through memory: here two or three of them in one process, in an order of ours."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from llmengine.kernels.stage_link import (
    RELEASED_BYTE,
    LinkLayout,
    LinkMemory,
    send_hidden,
    send_ids,
    take_hidden,
    take_ids,
)
from llmengine.kernels.step import IDS_LAG, NUM_SAMPLES, DeviceStep, SlotState

SLOTS, TOKENS, HIDDEN = 5, 3, 24


class Stages:
    """A pipeline whose memory is one tensor; stage 0 is the first."""

    def __init__(self, num_stages: int, device: str, number: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.layout = LinkLayout.of(SLOTS, TOKENS, HIDDEN, dtype, num_stages)
        each = self.layout.size_bytes(is_first=False)
        self.blocks = torch.zeros((num_stages, each), dtype=torch.uint8, device=device)
        starts = [self.blocks.data_ptr() + each * stage for stage in range(num_stages)]
        self.words = self.blocks.view(torch.int32)
        self.words[:, 0] = number
        self.memories = [
            LinkMemory(
                self.layout,
                torch.tensor([start, starts[(stage + 1) % num_stages]], dtype=torch.int64, device=device),
                torch.tensor([number], dtype=torch.int32, device=device),
            )
            for stage, start in enumerate(starts)
        ]
        self.states = [SlotState.empty(SLOTS, 1, device) for _ in range(num_stages)]
        self.device, self.dtype = device, dtype

    def step(self, lag: int, sampled: dict[int, int] | None = None) -> DeviceStep:
        """A step that needs ids of the one `lag` steps before, and of which slots sample."""
        empty = torch.zeros(8, dtype=torch.int32, device=self.device)
        counts, slots = empty.clone(), empty.clone()
        slots[: len(sampled or ())] = torch.tensor(list(sampled or ()), dtype=torch.int32)
        counts[IDS_LAG], counts[NUM_SAMPLES] = lag, len(sampled or ())
        others = {name: empty for name in DeviceStep.__dataclass_fields__ if name not in ("counts", "sample_slots")}
        return DeviceStep(counts=counts, sample_slots=slots, **others)

    def begin_first(self, lag: int = 0) -> list[int]:
        """Begin the first stage's next step; the slots' ids."""
        take_ids(self.memories[0], self.step(lag), self.states[0])
        return self.states[0].last_token_ids.tolist()

    def send(self, stage: int, value: float, num_tokens: int = TOKENS) -> None:
        """End a stage's step."""
        x = torch.arange(num_tokens * HIDDEN, device=self.device).view(num_tokens, HIDDEN).to(self.dtype)
        send_hidden(self.memories[stage], x + value)

    def take(self, stage: int, num_tokens: int = TOKENS) -> Tensor:
        """Begin a later stage's next step; the hidden states, less what `send` adds its value to."""
        x = torch.full((num_tokens, HIDDEN), torch.nan, dtype=self.dtype, device=self.device)
        take_hidden(self.memories[stage], x)
        return x - torch.arange(num_tokens * HIDDEN, device=self.device).view(num_tokens, HIDDEN)

    def end_last(self, sampled: dict[int, int]) -> None:
        """End the last stage's step."""
        for slot, token_id in sampled.items():
            self.states[-1].last_token_ids[slot] = token_id
        send_ids(self.memories[-1], self.step(0, sampled), self.states[-1])


@pytest.mark.parametrize("number", [0, (1 << 31) - 5, -3])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_run_ahead_and_nothing_is_lost(device: str, num_stages: int, number: int) -> None:
    """The first stage is as many steps ahead as there are stages; of step numbers that wrap around as well."""
    stages = Stages(num_stages, device, number)
    for step in range(num_stages):
        assert stages.begin_first() == [0] * (SLOTS + 1)
        stages.send(0, step, 1 + step % TOKENS)
    for step in range(12):
        for stage in range(1, num_stages):
            assert set(stages.take(stage, 1 + step % TOKENS).flatten().tolist()) == {step}
            if stage < num_stages - 1:
                stages.send(stage, step, 1 + step % TOKENS)
        slot = step % 2
        stages.end_last({slot: 100 + step, 3: 200 + step})
        ids = stages.begin_first(lag=num_stages)
        assert (ids[slot], ids[3]) == (100 + step, 200 + step)
        stages.send(0, step + num_stages, 1 + (step + num_stages) % TOKENS)


def test_half_precision(device: str) -> None:
    stages = Stages(2, device, dtype=torch.float16)
    stages.begin_first()
    stages.send(0, 7)
    assert set(stages.take(1).flatten().tolist()) == {7}


class FirstStage:
    """The first stage's next step, begun on a thread."""

    def __init__(self, stages: Stages, lag: int) -> None:
        self._stages = stages
        self._thread = threading.Thread(target=stages.begin_first, args=(lag,), daemon=True)
        self._thread.start()

    def waits_until(self, word: int, value: int) -> bool:
        """Whether it waits before a word of its memory has a value, and not after it."""
        self._thread.join(0.2)
        has_waited = self._thread.is_alive()
        self._stages.words[0, word] = value
        return has_waited and self.goes_on()

    def goes_on(self) -> bool:
        """Whether it waits for nothing that is not there."""
        self._thread.join(60)
        return not self._thread.is_alive()


def test_the_first_stage_waits_for_the_step_that_it_needs_and_for_no_later_one(device: str) -> None:
    if device != "cpu":
        pytest.skip("what waits on a GPU is ended by another process: test_shared_gpus")
    stages = Stages(2, device)
    depth = stages.layout.depth
    assert all(FirstStage(stages, lag=0).goes_on() for _ in range(depth))
    assert FirstStage(stages, lag=0).waits_until(0, 1), "until its place for hidden states is free"
    assert FirstStage(stages, lag=2).waits_until(0, depth)
    assert FirstStage(stages, lag=3).goes_on()
    assert FirstStage(stages, lag=9).goes_on(), "a lag beyond the places is as long as they are"
    assert FirstStage(stages, lag=1).waits_until(RELEASED_BYTE // 4, 1)
    assert FirstStage(stages, lag=1).goes_on(), "nothing waits any more"
