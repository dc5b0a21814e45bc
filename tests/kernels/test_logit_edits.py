"""The device's sampler against the CPU's: equal choices with every edit, logits restored, tables that grow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cpu.sampler import Sampler
from llmengine.backends.cuda.buckets import Bucket
from llmengine.backends.cuda.sampling import DeviceSampler, SamplerTensors
from llmengine.backends.cuda.step_buffer import StepBuffer, StepLimits
from llmengine.backends.cuda.stream import HostStream
from llmengine.backends.logit_edits import NO_MASKS
from llmengine.batch import Batch, BatchRow, SlotInit
from llmengine.kernels.step import SlotState
from llmengine.sampling_params import SamplingParams
from tests.backends.sampling_helpers import EDITS, SlotHistory

VOCAB = 24


class Device:
    """A `DeviceSampler` that is given logits instead of a model."""

    def __init__(self, num_slots: int, vocab: int, device: str) -> None:
        self.sampler = DeviceSampler(SamplerTensors.allocate(num_slots, num_slots, vocab, torch.device(device)), vocab)
        state = SlotState.empty(num_slots, 1, torch.device(device))
        self._buffer = StepBuffer.allocate(StepLimits(num_slots, num_slots, 0, num_slots), state, 1, 1)
        self.replaced = 0

    def step(
        self,
        logits: Tensor,
        slots: list[int],
        positions: list[int],
        inits: Sequence[SlotInit] = (),
        masks: Mapping[int, NDArray[np.int32]] = NO_MASKS,
    ) -> list[int]:
        """Return the ids chosen for `positions`, -1 where a row failed; logits [bucket, vocab], padding behind."""
        rows = [BatchRow(slot, at - 1, 1, (), (), 1) for slot, at in zip(slots, positions, strict=True)]
        batch = Batch(0, rows, inits)
        self.replaced += self.sampler.prepare(batch, masks)
        bucket = Bucket(len(logits), len(logits), mixed=False, draws=self.sampler.draws(rows))
        self._buffer.fill(batch, [], bucket, 0)
        self._buffer.send(0, HostStream())
        self.sampler.choose(logits, self._buffer.step, bucket)
        failed = self.sampler.failed != 0
        return self.sampler.ids.masked_fill(failed, -1)[: len(slots)].tolist()


def make_histories(params: list[SamplingParams]) -> list[SlotHistory]:
    random = np.random.default_rng(4)
    return [
        SlotHistory(slot, random.integers(0, VOCAB, 1 + 3 * slot).tolist(), item, [2, 3])
        for slot, item in enumerate(params)
    ]


def test_choices_are_the_cpu_samplers_and_transformers(device: str) -> None:
    """Some of the rows draw; slots are resumed in between, and the last one is taken over by a plain request."""
    params = EDITS[1:] + [item.replace(temperature=1.5) for item in EDITS[::3]]
    histories = make_histories(params)
    on_device, on_cpu = Device(len(params) + 1, VOCAB, device), Sampler(len(params) + 1, VOCAB)
    generator = torch.Generator().manual_seed(0)
    inits = [history.init() for history in histories]
    for index in range(8):
        logits = torch.randn(len(params) + 1, VOCAB, generator=generator) * 2.0
        if index == 5:
            histories[-1] = SlotHistory(len(params) - 1, [7], SamplingParams())
            histories.pop(3)
            inits = [histories[-1].init(), histories[5].init()]
        slots = [history.slot for history in histories]
        positions = [len(history.token_ids) for history in histories]
        line = logits.to(device)
        found = on_device.step(line, slots, positions, inits)
        assert torch.equal(line.cpu(), logits)
        for init in inits:
            on_cpu.init_slot(init)
        expected = on_cpu.sample(logits[: len(slots)], np.array(slots), np.array(positions))
        assert found == expected.token_ids
        for history, row, token_id in zip(histories, logits, found, strict=False):
            if history.params.greedy:
                assert token_id == int(history.expected_logits(row).argmax())
            history.token_ids.append(token_id)
        inits = []
    assert on_device.replaced == 1  # more words than there was room for


def test_a_row_has_its_own_edits_alone_and_in_any_batch(device: str) -> None:
    histories = make_histories(EDITS)
    logits = torch.randn(len(EDITS), VOCAB, generator=torch.Generator().manual_seed(3))
    positions = [len(history.token_ids) for history in histories]
    inits = [history.init() for history in histories]
    together = Device(len(EDITS), VOCAB, device).step(logits.to(device), list(range(len(EDITS))), positions, inits)
    for slot in range(len(EDITS)):
        alone = Device(len(EDITS), VOCAB, device)
        padded = torch.full((2, VOCAB), math.nan)
        padded[0] = logits[slot]
        assert alone.step(padded.to(device), [slot], [positions[slot]], [inits[slot]]) == [together[slot]]


def test_entries_grow_while_tokens_are_generated(device: str) -> None:
    """Each token is chosen only once, since presence_penalty then bars it."""
    vocab, known = 2100, 1020
    history = SlotHistory(0, range(known), SamplingParams(presence_penalty=2.0, repetition_penalty=100.0))
    on_device, inits = Device(1, vocab, device), [history.init()]
    logits = torch.full((1, vocab), 1.0, device=device)
    for index in range(8):
        found = on_device.step(logits, [0], [known + index], inits)
        assert found == [known + index]
        inits = []
    assert on_device.replaced == 1
    assert on_device.step(logits, [0], [known + 8], [SlotHistory(0, [0], history.params).init()]) == [1]


def test_masks_hold_for_one_step(device: str) -> None:
    params = [SamplingParams(), SamplingParams(), SamplingParams(logit_bias={9: 5.0})]
    on_device = Device(3, VOCAB, device)
    logits = torch.zeros(3, VOCAB)
    logits[:, [4, 6, 9]] = torch.tensor([3.0, 2.0, 1.0])
    inits = [SlotHistory(slot, [1], item).init() for slot, item in enumerate(params)]
    only_6, only_6_and_9 = np.array([1 << 6], dtype=np.int32), np.array([1 << 6 | 1 << 9], dtype=np.int32)
    steps = [({}, [4, 4, 9]), ({1: only_6, 2: only_6}, [4, 6, 6]), ({1: only_6_and_9}, [4, 6, 9]), ({}, [4, 4, 9])]
    for index, (masks, expected) in enumerate(steps):
        found = on_device.step(logits.to(device), [0, 1, 2], [1 + index] * 3, inits if index == 0 else (), masks)
        assert found == expected
    assert on_device.replaced == 1


def test_rows_fail_that_have_nothing_left(device: str) -> None:
    params = [
        SamplingParams(bad_words=[(token,) for token in range(VOCAB)]),
        SamplingParams(bad_words=[(3,)]),
        SamplingParams(logit_bias={3: -100.0}),
    ]
    on_device, on_cpu = Device(3, VOCAB, device), Sampler(3, VOCAB)
    inits = [SlotHistory(slot, [1], item).init() for slot, item in enumerate(params)]
    logits = torch.zeros(3, VOCAB)
    logits[1:, 3] = torch.tensor([math.nan, math.inf])
    assert on_device.step(logits.to(device), [0, 1, 2], [1, 1, 1], inits) == [-1, -1, -1]
    for init in inits:
        on_cpu.init_slot(init)
    assert on_cpu.sample(logits, np.arange(3), np.ones(3, dtype=np.int64)).failed == [True] * 3


@pytest.mark.parametrize(
    ("vocab", "num_slots", "num_tokens"),
    [
        (3000, 2, 2000),
        pytest.param(
            128256,
            64,
            6000,
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="large for the interpreter"),
        ),
    ],
)
def test_thousands_of_entries_and_words(device: str, vocab: int, num_slots: int, num_tokens: int) -> None:
    """Some steps' logits are low but for a few tokens, nearly all of which are forbidden."""
    random = np.random.default_rng(1)
    histories = []
    for slot in range(num_slots):
        prompt = random.integers(0, vocab, num_tokens).tolist()
        words = random.choice(vocab, 1500, replace=False).tolist()
        params = SamplingParams(
            repetition_penalty=1.3,
            frequency_penalty=0.2,
            logit_bias=dict.fromkeys(random.integers(0, vocab, 50).tolist(), 3.0),
            bad_words=[*((word,) for word in words[:1200]), *((prompt[-1], word) for word in words[1200:])],
            temperature=float(slot % 2),
        )
        histories.append(SlotHistory(slot, prompt, params))
    on_device, on_cpu = Device(num_slots, vocab, device), Sampler(num_slots, vocab)
    slots = list(range(num_slots))
    inits = [history.init() for history in histories]
    for init in inits:
        on_cpu.init_slot(init)
    for index in range(3):
        logits = torch.randn(num_slots, vocab, generator=torch.Generator().manual_seed(index))
        for line, history in zip(logits, histories, strict=True):
            line[[word[-1] for word in history.params.bad_words[::2]]] += 9.0
        positions = [len(history.token_ids) for history in histories]
        line = logits.to(device)
        found = on_device.step(line, slots, positions, inits)
        assert torch.equal(line.cpu(), logits)
        expected = on_cpu.sample(logits.clone(), np.array(slots), np.array(positions)).token_ids
        # A draw between two tokens may fall either way, since the CPU sums in another order.
        assert sum(a != b for a, b in zip(found, expected, strict=True)) <= num_slots // 20
        for history, token_id in zip(histories, expected, strict=True):
            history.token_ids.append(token_id)
        inits = [history.init() for history, a, b in zip(histories, found, expected, strict=True) if a != b]
