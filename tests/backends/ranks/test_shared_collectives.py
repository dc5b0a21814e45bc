"""Collectives through shared memory, among threads that stand for ranks: values, order, shapes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from llmengine.backends.ranks.memory import anonymous_file
from llmengine.backends.ranks.progress import Progress, progress_size
from llmengine.backends.ranks.shared_collectives import SharedCollectives, shared_size

T = TypeVar("T")


def give_up(late: Sequence[int], waited_s: float) -> None:
    if waited_s > 60:
        raise TimeoutError(f"{late} are late")


def open_ranks(size: int, while_waiting: Callable[[Sequence[int], float], None] = give_up) -> list[SharedCollectives]:
    """The ends of all ranks."""
    sums, progress = anonymous_file("sums", shared_size(size)), anonymous_file("progress", progress_size(size))
    try:
        return [
            SharedCollectives(sums, rank, size, while_waiting, Progress(progress, rank, size)) for rank in range(size)
        ]
    finally:
        os.close(sums)
        os.close(progress)


@pytest.fixture(params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest) -> list[SharedCollectives]:
    return open_ranks(request.param)


def on_all(ranks: list[SharedCollectives], do: Callable[[SharedCollectives], T]) -> list[T]:
    """What each rank's part of something returns."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(do, ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (3, 576), (0,), (700, 1001)])
def test_sums(ranks: list[SharedCollectives], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(shape, generator=generator) * 10).to(dtype) for _ in ranks]
    exact = torch.stack(inputs).double().sum(0)

    def add_up(rank: SharedCollectives) -> torch.Tensor:
        result = inputs[rank.rank].clone()
        rank.all_reduce(result)
        return result

    results = on_all(ranks, add_up)
    assert all(torch.equal(result, results[0]) for result in results), "the same on all ranks"
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "values", "total"),
    [
        (torch.float32, (1.0, 1e8, -1e8), 0.0),
        (torch.float32, (1e8, -1e8, 1.0), 1.0),
        (torch.bfloat16, (256.0, 1.0, 1.0), 258.0),  # 256 + 1 is 256 in bfloat16
    ],
)
def test_sums_are_in_the_order_of_ranks_and_in_float32(
    dtype: torch.dtype, values: tuple[float, ...], total: float
) -> None:
    ranks = open_ranks(3)

    def add_up(rank: SharedCollectives) -> float:
        result = torch.tensor([values[rank.rank]], dtype=dtype)
        time.sleep(0.01 * (2 - rank.rank))
        rank.all_reduce(result)
        return result.item()

    assert on_all(ranks, add_up) == [total] * 3


def test_gathers_tensors_of_different_shapes(ranks: list[SharedCollectives]) -> None:
    inputs = [torch.arange(6.0), torch.ones(2, 300_000).t(), torch.zeros(0, 4)][: len(ranks)]

    def gather(rank: SharedCollectives) -> list[torch.Tensor] | None:
        return rank.gather(inputs[rank.rank])

    first, *others = on_all(ranks, gather)
    assert others == [None] * (len(ranks) - 1)
    assert first is not None
    for result, given in zip(first, inputs, strict=True):
        torch.testing.assert_close(result, given, rtol=0, atol=0)


def test_any_sequence_of_operations_keeps_ranks_apart(ranks: list[SharedCollectives]) -> None:
    plan = random.Random(3)
    operations = [(plan.random() < 0.5, plan.choice([1, 5, 1000, 300_000])) for _ in range(150)]

    def follow(rank: SharedCollectives) -> None:
        own = random.Random(rank.rank)
        for number, (is_sum, size) in enumerate(operations):
            if own.random() < 0.1:
                time.sleep(own.random() * 0.002)
            tensor = torch.full((size if is_sum else size + rank.rank,), float(number * (rank.rank + 1)))
            if is_sum:
                rank.all_reduce(tensor)
                assert (tensor == number * sum(range(1, rank.size + 1))).all()
            elif (gathered := rank.gather(tensor)) is not None:
                assert [len(part) for part in gathered] == [size + other for other in range(rank.size)]
                assert all((part == number * (other + 1)).all() for other, part in enumerate(gathered))

    on_all(ranks, follow)


def test_a_wait_tells_for_whom() -> None:
    def stop(late: Sequence[int], waited_s: float) -> None:
        raise TimeoutError(f"{late}")

    first = open_ranks(3, stop)[0]
    with pytest.raises(TimeoutError, match=r"\[1, 2\]"):
        first.all_reduce(torch.ones(1))
    with pytest.raises(ValueError, match="8 dimensions; 7 can"):
        first.gather(torch.ones([1] * 8))


def test_a_rank_that_begins_in_inference_mode_may_leave_it() -> None:
    (rank,) = open_ranks(1)
    with torch.inference_mode():
        rank.all_reduce(torch.ones(3))
    rank.all_reduce(torch.ones(3))
