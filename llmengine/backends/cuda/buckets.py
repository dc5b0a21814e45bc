"""The padded sizes that steps run with: kernels are compiled, and graphs captured, for these and no others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llmengine.batch import Batch
from llmengine.config import SchedulerConfig
from llmengine.kernels.gemm_candidates import ROW_BUCKETS


@dataclass(frozen=True, slots=True)
class Bucket:
    """The padded sizes of one step.

    Attributes:
        num_tokens: tokens computed.
        num_samples: rows of logits computed; equal to num_tokens in a step of decodes alone.
        mixed: rows may have more than one token, and slots may be initialised.
        draws: some row is not simply greedy.
    """

    num_tokens: int
    num_samples: int
    mixed: bool
    draws: bool = False


@dataclass(frozen=True, slots=True)
class BucketSizes:
    """All sizes that a step can be padded to, each ascending.

    Attributes:
        decodes: rows of a step of decodes; the last is the largest batch.
        mixed: tokens of a mixed step; the last is the most that a step may have.
        samples: rows of logits of a mixed step; the last is the largest batch.
        only_mixed: steps of decodes are mixed steps too, as where results are deterministic.
    """

    decodes: tuple[int, ...]
    mixed: tuple[int, ...]
    samples: tuple[int, ...]
    only_mixed: bool

    @staticmethod
    def of(scheduler: SchedulerConfig, *, only_mixed: bool) -> BucketSizes:
        """Sizes for a scheduler's limits."""
        max_rows, max_tokens = scheduler.max_batch_size, scheduler.max_tokens_per_step
        return BucketSizes(_decode_sizes(max_rows), _mixed_sizes(max_tokens), _sample_sizes(max_rows), only_mixed)

    def bucket_of(self, batch: Batch, *, draws: bool, needs_mixed: bool) -> Bucket:
        """Bucket of a step.

        Args:
            draws: see `Bucket`.
            needs_mixed: the step is a mixed one even if it only decodes.
        """
        rows = batch.rows
        if not needs_mixed and not batch.slot_inits and batch.num_tokens == len(rows):
            return replace(self.decode_bucket(len(rows)), draws=draws)
        num_samples = sum(row.sample > 0 for row in rows)
        return Bucket(
            _round_up(self.mixed, batch.num_tokens), _round_up(self.samples, num_samples), mixed=True, draws=draws
        )

    def decode_bucket(self, num_rows: int) -> Bucket:
        """Greedy bucket of a step that decodes `num_rows` rows."""
        if self.only_mixed:
            return Bucket(_round_up(self.mixed, num_rows), _round_up(self.samples, num_rows), mixed=True)
        size = _round_up(self.decodes, num_rows)
        return Bucket(size, size, mixed=False)

    def decode_buckets(self) -> list[Bucket]:
        """Greedy buckets of all steps that decode, small ones first."""
        return list(dict.fromkeys(map(self.decode_bucket, self.decodes)))

    def largest(self) -> Bucket:
        """The bucket that holds any step without draws."""
        return Bucket(self.mixed[-1], self.samples[-1], mixed=True)

    def kernel_buckets(self) -> list[Bucket]:
        """Buckets whose steps launch every kernel in every form: a mixed one, those of decodes, the last with draws."""
        most = self.decodes[-1]
        decodes = list(dict.fromkeys(self.decode_bucket(min(rows, most)) for rows in ROW_BUCKETS))
        mixed = Bucket(self.mixed[0], self.samples[0], mixed=True)
        return [mixed, *decodes, replace(decodes[-1], draws=True)]

    def likely_buckets(self) -> Iterator[Bucket]:
        """All buckets, likely ones first: decodes, then mixed ones with few samples; then the same with draws."""
        for draws in (False, True):
            yield from (replace(bucket, draws=draws) for bucket in self.decode_buckets())
            fewer = 0
            for num_samples in self.samples:
                for num_tokens in self.mixed:
                    if num_tokens > fewer:
                        yield Bucket(num_tokens, num_samples, mixed=True, draws=draws)
                fewer = num_samples


def _decode_sizes(max_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then in steps of 8 to 32, of 16 to 128, of 32 beyond."""
    sizes = [1, 2, 4, 8, *range(16, 32, 8), *range(32, 128, 16), *range(128, max_rows, 32)]
    return (*(size for size in sizes if size < max_rows), max_rows)


def _mixed_sizes(max_tokens: int) -> tuple[int, ...]:
    """16 to 512 in factors of about 1.5, then in steps of 256."""
    sizes = [16, 32, 64, 96, 128, 192, 256, 384, *range(512, max_tokens, 256)]
    return (*(size for size in sizes if size < max_tokens), max_tokens)


def _sample_sizes(max_rows: int) -> tuple[int, ...]:
    return (*(size for size in (1, 8, 64) if size < max_rows), max_rows)


def _round_up(sizes: Sequence[int], wanted: int) -> int:
    """The least of the ascending sizes that holds `wanted`."""
    return sizes[bisect_left(sizes, wanted)]
