"""Sampling kernels against float64 references: every draw, ties, failures, and independence of a row from its batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.backends.cpu import sampler
from llmengine.kernels.sampling import SlotParams, TokenMasks, sample, sample_greedy, sampling_workspace
from llmengine.kernels.sampling_reference import distribution_reference, sample_greedy_reference
from llmengine.kernels.sampling_values import uniform
from llmengine.kernels.step import NUM_SAMPLES

Params = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p"""

KINDS: list[Params] = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 50, 0.8, 0.0),
    (1.3, 0, 1.0, 0.05),
    (2.0, 40, 0.95, 0.1),
    (100.0, 0, 0.5, 0.0),
    (100.0, 7, 1.0, 0.0),
    (1e-6, 0, 1.0, 0.0),
    (1e-6, 3, 0.9, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 100_000_000, 1.0, 0.0),
    (1.0, 0, 1e-6, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (0.8, 0, 1.0, 1.0),
]


def draw(
    logits: Tensor,
    kinds: list[Params],
    slots: list[int],
    positions: list[int],
    num_rows: int | None = None,
    masks: TokenMasks | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample the first `num_rows` rows; slot s has the parameters kinds[s] and the seed 1000 + s."""
    device = logits.device
    columns = list(zip(*kinds, strict=True))
    params = SlotParams(
        temperature=torch.tensor(columns[0], device=device),
        top_k=torch.tensor(columns[1], dtype=torch.int32, device=device),
        top_p=torch.tensor(columns[2], device=device),
        min_p=torch.tensor(columns[3], device=device),
        seed=torch.arange(1000, 1000 + len(kinds), device=device),
    )
    max_samples, vocab = logits.shape
    ids = torch.full((max_samples,), -7, dtype=torch.int32, device=device)
    failed = ids.clone()
    sample(
        logits,
        counts_of(max_samples if num_rows is None else num_rows, device),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int32, device=device),
        params,
        ids,
        failed,
        sampling_workspace(max_samples, vocab, device),
        masks=masks,
    )
    return ids.cpu(), failed.cpu()


def greedy(logits: Tensor, num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Twice with one workspace, which must come out as it went in."""
    workspace = sampling_workspace(len(logits), logits.shape[1], logits.device)
    counts = counts_of(len(logits) if num_rows is None else num_rows, logits.device)
    results = []
    for _ in range(2):
        ids = torch.full((len(logits),), -7, dtype=torch.int32, device=logits.device)
        failed = ids.clone()
        sample_greedy(logits, counts, ids, failed, workspace)
        results.append((ids.cpu(), failed.cpu()))
    assert torch.equal(results[0][0], results[1][0])
    return results[0]


def counts_of(num_rows: int, device: torch.device) -> Tensor:
    counts = torch.zeros(8, dtype=torch.int32, device=device)
    counts[NUM_SAMPLES] = num_rows
    return counts


def random_logits(num_rows: int, vocab: int, device: str, seed: int = 0, scale: float = 3.0) -> Tensor:
    return (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def assert_drawn_from(logits: Tensor, kind: Params, number: float, found: int, slack: float = 0.0) -> None:
    """`found` is where the reference's cumulative distribution passes `number`.

    A logit may be `slack` below the reference's threshold: where many tokens are unlikely, rounding of the threshold
    decides about the last one.
    """
    logits = logits.cpu().float()
    kept = distribution_reference(logits, *kind)
    assert logits[found] >= logits[kept > 0].min() - slack
    assert slack > 0 or kept[found] > 0
    end = float(kept[: found + 1].sum())
    assert end - float(kept[found]) - 1e-4 <= number <= end + 1e-4


def uniforms(slots: list[int], positions: list[int]) -> list[float]:
    seeds = np.array(slots, dtype=np.uint64) + np.uint64(1000)
    return sampler.uniform(seeds, np.array(positions)).tolist()


@triton.jit
def _uniform(seeds, positions, out):
    index = tl.program_id(0)
    tl.store(out + index, uniform(tl.load(seeds + index), tl.load(positions + index).to(tl.int64)))


def test_random_numbers_are_the_samplers_to_the_last_bit(device: str) -> None:
    seeds = torch.tensor([0, 1, 2, 2**63 - 1, 2**53 + 1, 123456789], device=device)
    positions = torch.tensor([0, 1, 1, 2**31 - 1, 77, 4096], dtype=torch.int32, device=device)
    out = torch.empty(len(seeds), dtype=torch.float64, device=device)
    _uniform[(len(seeds),)](seeds, positions, out)
    expected = sampler.uniform(seeds.cpu().numpy().astype(np.uint64), positions.cpu().long().numpy())
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(("vocab", "scale"), [(50, 20.0), (333, 0.1), (700, 3.0)])
def test_draws_invert_the_reference_distribution(device: str, vocab: int, scale: float) -> None:
    slots = list(range(len(KINDS)))
    logits = random_logits(len(KINDS), vocab, device, vocab, scale)
    logits[:, 7] = -math.inf
    positions = [vocab + slot for slot in slots]
    ids, failed = draw(logits, KINDS, slots, positions)
    assert not failed.any()
    for slot, number in enumerate(uniforms(slots, positions)):
        assert_drawn_from(logits[slot], KINDS[slot], number, int(ids[slot]))


@pytest.mark.parametrize("kind", [(1.0, 3, 1.0, 0.0), (1.0, 0, 0.25, 0.0), (1.0, 6, 0.5, 0.0)])
def test_lower_ids_come_first_among_ties(device: str, kind: Params) -> None:
    rows = 3
    logits = torch.zeros(rows, 10, device=device)
    ids, _ = draw(logits, [kind] * rows, list(range(rows)), [5] * rows)
    for slot, number in enumerate(uniforms(list(range(rows)), [5] * rows)):
        assert int(ids[slot]) == int(number * 3)


def test_a_row_is_the_same_alone_and_in_any_batch(device: str) -> None:
    slots = list(range(7))
    positions = [11 + slot for slot in slots]
    logits = random_logits(len(slots), 333, device, scale=2.0)
    together, _ = draw(logits, KINDS, slots, positions)
    reverse, _ = draw(logits.flip(0).contiguous(), KINDS, slots[::-1], positions[::-1])
    assert torch.equal(together, reverse.flip(0))
    for slot in (0, 3, 5):
        padded = torch.cat((logits[slot : slot + 1], torch.full_like(logits[:1], math.nan)))
        alone, failed = draw(padded, KINDS, [slot, 0], [positions[slot], 0], num_rows=1)
        assert alone.tolist() == [together[slot], -7]
        assert failed.tolist() == [0, -7]


@pytest.mark.parametrize("vocab", [50, 1000, 5000])
def test_greedy_takes_the_lowest_id_among_the_largest(device: str, vocab: int) -> None:
    logits = random_logits(5, vocab, device, vocab)
    logits[1] = 0.25
    logits[2, [vocab - 1, vocab // 2, 3]] = 40.0
    logits[3] = -0.0
    logits[3, 20:] = 0.0
    expected, _ = sample_greedy_reference(logits)
    ids, failed = greedy(logits, num_rows=4)
    assert ids.tolist() == [*expected[:4].tolist(), -7]
    assert failed.tolist() == [0, 0, 0, 0, -7]
    drawn, _ = draw(logits, [(0.0, 0, 1.0, 0.0)], [0] * 5, [3] * 5)
    assert torch.equal(drawn, expected.cpu().int())


def test_rows_without_a_distribution_fail_alone(device: str) -> None:
    logits = random_logits(6, 100, device)
    logits[0, 31] = math.nan
    logits[1, 99] = math.inf
    logits[2] = -math.inf
    logits[3, :50] = -math.inf
    logits[4, 0] = -math.nan
    ids, failed = greedy(logits)
    assert failed.tolist() == [1, 1, 1, 0, 1, 0]
    assert ids.tolist() == sample_greedy_reference(logits)[0].tolist()
    for kind in (KINDS[0], KINDS[1], KINDS[4]):
        drawn, failed = draw(logits, [kind], [0] * 6, list(range(6)))
        assert failed.tolist() == [1, 1, 1, 0, 1, 0]
        assert drawn[[0, 1, 2, 4]].tolist() == [0] * 4
        assert int(drawn[3]) >= 50


def test_masks_leave_only_what_they_allow(device: str) -> None:
    vocab, rows = 70, 6
    logits = random_logits(rows, vocab, device)
    allowed = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[4] = False
    logits[5, 7] = math.nan
    allowed[5, 7] = False
    words = np.packbits(np.pad(allowed.numpy(), ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.int32)
    lines = torch.arange(rows, dtype=torch.int32, device=device)
    masks = TokenMasks(lines.flip(0), torch.from_numpy(words).to(device).flip(0))
    kinds = [KINDS[0], KINDS[1], KINDS[2], KINDS[4], KINDS[0], KINDS[0]]
    slots = list(range(rows))
    ids, failed = draw(logits, kinds, slots, slots, masks=masks)
    assert failed.tolist() == [0, 0, 0, 0, 1, 1]
    for row, number in enumerate(uniforms(slots, slots)[:4]):
        line = logits[row].cpu().masked_fill(~allowed[row], -math.inf)
        assert_drawn_from(line, kinds[row], number, int(ids[row]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too large for the interpreter")
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 262208])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_vocabularies(device: str, vocab: int, dtype: torch.dtype) -> None:
    slots = list(range(len(KINDS))) * 2
    logits = random_logits(len(slots), vocab, device, vocab)
    logits[: len(KINDS)] *= 1.5
    logits = logits.to(dtype)
    positions = list(range(len(slots)))
    ids, failed = draw(logits, KINDS, slots, positions)
    assert not failed.any()
    for row, number in enumerate(uniforms(slots, positions)):
        assert_drawn_from(logits[row], KINDS[slots[row]], number, int(ids[row]), slack=1e-4)
    expected, _ = sample_greedy_reference(logits)
    assert torch.equal(greedy(logits)[0], expected.cpu().int())
    assert torch.equal(greedy(logits[:1])[0], expected[:1].cpu().int())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="too many draws for the interpreter")
@pytest.mark.parametrize("kind", KINDS[:9])
def test_frequencies_follow_the_distribution(device: str, kind: Params) -> None:
    draws, vocab = 20000, 1152
    logits = random_logits(1, vocab, device)
    ids, _ = draw(logits.expand(draws, -1).contiguous(), [kind], [0] * draws, list(range(draws)))
    expected = distribution_reference(logits[0].cpu(), *kind)
    observed = torch.bincount(ids, minlength=vocab).double()
    assert not observed[expected == 0].any()
    # Buckets by rank keep the expected counts large enough for a chi-square statistic.
    order = expected.argsort(descending=True)
    buckets = (expected[order].cumsum(0) * 20).floor().clamp(max=19).long()
    bins = torch.zeros(20, dtype=torch.float64).index_add(0, buckets, observed[order])
    wanted = torch.zeros(20, dtype=torch.float64).index_add(0, buckets, expected[order] * draws)
    used = wanted > 5
    assert float(((bins - wanted)[used] ** 2 / wanted[used]).sum()) < 60
