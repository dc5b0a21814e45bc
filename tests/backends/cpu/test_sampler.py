"""The sampler: distributions, masks, log-probabilities, and independence of a row from its batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmengine.backends.cpu.sampler import Sampler, Samples, uniform
from llmengine.batch import SlotInit
from llmengine.sampling_params import SamplingParams

VOCAB = 1500


def make_sampler(
    params: list[SamplingParams], stop_token_ids: frozenset[int] = frozenset(), vocab: int = VOCAB
) -> Sampler:
    sampler = Sampler(len(params), vocab)
    for slot, item in enumerate(params):
        sampler.init_slot(SlotInit(slot, (1, 2, 3), 3, item, 1000 + slot, stop_token_ids))
    return sampler


def sample_all(sampler: Sampler, logits: torch.Tensor, positions: Any = None, slots: Any = None) -> Samples:
    num_rows = len(logits)
    slots = np.arange(num_rows) if slots is None else np.array(slots)
    positions = np.full(num_rows, 3) if positions is None else np.array(positions)
    return sampler.sample(logits.clone(), slots, positions)


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Return the distribution, float64 [vocab], that transformers' warpers make of logits [vocab]."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits.double()[None])[0].softmax(0)


KINDS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=5),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.8),
    SamplingParams(temperature=2.0, top_k=700),
    SamplingParams(temperature=50.0, top_p=0.95),
    SamplingParams(temperature=0.7, top_k=1400, top_p=0.999),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.2, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=60, min_p=0.02),
    SamplingParams(temperature=2.0, top_p=0.7, min_p=0.1),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(),
    SamplingParams(temperature=1.0, top_k=1),
]


@pytest.mark.parametrize("params", KINDS, ids=str)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    draws, vocab = 4000, 1152
    logits = random_logits(1, vocab)
    sampler = make_sampler([params], vocab=vocab)
    found = sample_all(sampler, logits.expand(draws, -1), range(3, 3 + draws), [0] * draws).token_ids
    counts = torch.bincount(torch.tensor(found), minlength=vocab).double()
    if params.greedy:
        assert set(found) == {int(logits[0].argmax())}
        return
    expected = reference_distribution(logits[0], params)
    assert set(found) <= set(torch.nonzero(expected)[:, 0].tolist())
    # Buckets by rank keep the expected counts large enough for a chi-square statistic.
    order = expected.argsort(descending=True)
    edges = (expected[order].cumsum(0) * 20).floor().clamp(max=19).long()
    bins = torch.zeros(20, dtype=torch.float64).index_add(0, edges, counts[order])
    wanted = torch.zeros(20, dtype=torch.float64).index_add(0, edges, expected[order] * draws)
    used = wanted > 5
    assert float(((bins - wanted)[used] ** 2 / wanted[used]).sum()) < 60


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    params = [item.replace(logprobs=slot % 4) for slot, item in enumerate(KINDS)]
    sampler = make_sampler(params)
    logits = random_logits(len(params))
    together = sample_all(sampler, logits, range(3, 3 + len(params)))
    backwards = list(range(len(params)))[::-1]
    reverse = sample_all(sampler, logits[backwards], [3 + slot for slot in backwards], backwards)
    for slot in range(len(params)):
        alone = sample_all(sampler, logits[slot : slot + 1], [3 + slot], [slot])
        assert alone.token_ids[0] == together.token_ids[slot] == reverse.token_ids[backwards.index(slot)]
        assert alone.logprobs[0] == together.logprobs[slot] == reverse.logprobs[backwards.index(slot)]


@pytest.mark.parametrize("vocab", [49153, 49152])
def test_rows_of_one_kind_are_independent_to_the_last_bit(vocab: int) -> None:
    logits = random_logits(9, vocab)
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=3.0, top_p=0.99)):
        sampler = make_sampler([params.replace(logprobs=3)] * 9, vocab=vocab)
        together = sample_all(sampler, logits)
        for row in range(9):
            alone = sample_all(sampler, logits[row : row + 1], slots=[row])
            assert alone.token_ids[0] == together.token_ids[row]
            assert alone.logprobs[0] == together.logprobs[row]


@pytest.mark.parametrize("vocab", [40000, 40064])
def test_greedy_takes_the_lowest_id_of_a_tie(vocab: int) -> None:
    logits = torch.zeros(3, vocab)
    logits[0, [39999, 123, 20000]] = 5.0
    logits[1, [39998, 39999]] = 1.0
    sampler = make_sampler([SamplingParams()] * 3, vocab=vocab)
    assert sample_all(sampler, logits).token_ids == [123, 39998, 0]


def test_stops_are_masked_until_min_new_tokens() -> None:
    params = [SamplingParams(min_new_tokens=2), SamplingParams(min_new_tokens=2, temperature=1.0, top_k=2)]
    sampler = make_sampler(params, frozenset({7, 8, VOCAB + 5}))
    logits = torch.zeros(2, VOCAB)
    logits[:, 7], logits[:, 8], logits[:, 9], logits[:, 10] = 90.0, 80.0, 70.0, 0.1
    assert sample_all(sampler, logits, [3, 3]).token_ids == [9, 9]
    assert sample_all(sampler, logits, [4, 4]).token_ids == [9, 9]
    assert sample_all(sampler, logits, [5, 5]).token_ids == [7, 7]


def test_logprobs_are_of_the_unchanged_distribution() -> None:
    params = [
        SamplingParams(logprobs=3, min_new_tokens=5),
        SamplingParams(logprobs=0, temperature=0.5, top_k=3),
        SamplingParams(),
        SamplingParams(logprobs=20, temperature=2.0),
        SamplingParams(logprobs=2, repetition_penalty=2.0, logit_bias={7: 100.0}, bad_words=[(1,), (3, 8)]),
    ]
    logits = random_logits(5)
    best = int(logits[0].argmax())
    samples = sample_all(make_sampler(params, frozenset({best})), logits)
    expected = logits.log_softmax(-1)
    assert sorted(samples.logprobs) == [0, 1, 3, 4]
    assert samples.token_ids[0] == int(logits[0].topk(2).indices[1])
    assert samples.token_ids[4] == 7
    for row, count in ((0, 3), (1, 0), (3, 20), (4, 2)):
        entry = samples.logprobs[row]
        assert entry.logprob == pytest.approx(float(expected[row, samples.token_ids[row]]), abs=1e-5)
        values, ids = expected[row].topk(count)
        assert entry.top_ids == tuple(ids.tolist())
        assert entry.top_logprobs == pytest.approx(values.tolist(), abs=1e-5)
    assert samples.logprobs[0].top_ids[0] == best


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)]
)
def test_non_finite_rows_fail_alone(bad: float, params: SamplingParams) -> None:
    sampler = make_sampler([params] * 3)
    logits = random_logits(3)
    sound = sample_all(sampler, logits)
    logits[1, 700] = bad
    samples = sample_all(sampler, logits)
    assert samples.failed == [False, True, False]
    assert (samples.token_ids[0], samples.token_ids[2]) == (sound.token_ids[0], sound.token_ids[2])


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    positions = np.tile(np.arange(200), 200)
    numbers = uniform(seeds, positions).view(200, 200)
    assert float(numbers.min()) >= 0.0
    assert float(numbers.max()) < 1.0
    counts = torch.histc(numbers.float(), 50, 0, 1)
    assert float(((counts - 800) ** 2 / 800).sum()) < 100
    for shifted in (numbers.roll(1, 0), numbers.roll(1, 1), numbers.T):
        assert abs(float(torch.corrcoef(torch.stack((numbers.flatten(), shifted.flatten())))[0, 1])) < 0.02
    again = uniform(np.array([7, 2**63 - 1], dtype=np.uint64), np.array([9, 100]))
    assert float(again[0]) == float(numbers[7, 9])
    assert numbers.unique().numel() > 39900
