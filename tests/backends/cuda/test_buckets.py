"""The sizes that steps are padded to, and the buckets that a start prepares."""

from __future__ import annotations

import itertools

import pytest

from llmengine.backends.cuda.buckets import Bucket, BucketSizes
from llmengine.batch import Batch, BatchRow, SlotInit
from llmengine.config import SchedulerConfig
from llmengine.sampling_params import SamplingParams

LIMITS = SchedulerConfig(max_batch_size=50, max_tokens_per_step=700, max_tokens_per_mixed_step=700)


def make_rows(*lengths: int, sample: bool = True) -> list[BatchRow]:
    return [BatchRow(slot, 0, length, [1] * length, [], int(sample)) for slot, length in enumerate(lengths)]


def test_sizes_end_with_the_limits() -> None:
    sizes = BucketSizes.of(LIMITS, only_mixed=False)
    assert sizes.decodes == (1, 2, 4, 8, 16, 24, 32, 48, 50)
    assert sizes.mixed == (16, 32, 64, 96, 128, 192, 256, 384, 512, 700)
    assert sizes.samples == (1, 8, 50)
    assert sizes.largest() == Bucket(700, 50, mixed=True)


@pytest.mark.parametrize("draws", [False, True])
def test_a_step_of_decodes_has_buckets_of_its_own(draws: bool) -> None:
    sizes = BucketSizes.of(LIMITS, only_mixed=False)
    batch = Batch(1, make_rows(*[1] * 17))
    assert sizes.bucket_of(batch, draws=draws, needs_mixed=False) == Bucket(24, 24, mixed=False, draws=draws)
    assert sizes.bucket_of(batch, draws=draws, needs_mixed=True) == Bucket(32, 50, mixed=True, draws=draws)


def test_steps_with_new_slots_or_chunks_are_mixed() -> None:
    sizes = BucketSizes.of(LIMITS, only_mixed=False)
    init = SlotInit(0, (1,), 1, SamplingParams(), 0, frozenset())
    for batch in (Batch(1, make_rows(1), [init]), Batch(1, make_rows(9))):
        assert sizes.bucket_of(batch, draws=False, needs_mixed=False) == Bucket(16, 1, mixed=True)
    chunk = Batch(1, make_rows(600, sample=False))
    assert sizes.bucket_of(chunk, draws=False, needs_mixed=False) == Bucket(700, 1, mixed=True)


def test_deterministic_steps_are_all_mixed() -> None:
    sizes = BucketSizes.of(LIMITS, only_mixed=True)
    assert sizes.decode_bucket(17) == Bucket(32, 50, mixed=True)
    assert all(bucket.mixed for bucket in [*sizes.decode_buckets(), *sizes.kernel_buckets(), *sizes.likely_buckets()])


@pytest.mark.parametrize("only_mixed", [False, True])
def test_likely_buckets_are_all_that_steps_can_have(only_mixed: bool) -> None:
    sizes = BucketSizes.of(LIMITS, only_mixed=only_mixed)
    likely = list(sizes.likely_buckets())
    assert likely[: len(sizes.decode_buckets())] == sizes.decode_buckets()
    for num_decodes, chunk, draws in itertools.product((0, 1, 7, 8, 9, 50), (0, 2, 300, 650), (False, True)):
        rows = make_rows(*[1] * num_decodes, *[chunk] * bool(chunk))[-50:]
        if rows:
            assert sizes.bucket_of(Batch(1, rows), draws=draws, needs_mixed=False) in likely, rows
