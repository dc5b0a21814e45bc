"""Sums over memory that ranks map: real processes map a file and run the kernels through Triton's interpreter."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from llmengine.backends.ranks import RankGroup
from llmengine.kernels.peer_sum import PeerMemory, can_add_rows, can_sum
from tests.kernels.peer_ranks import Addition, Call, MappedMemory, are_right, file_size

# Sizes that are no multiple of anything, one program and several, ways and dtypes in turn.
CALLS: list[Call] = [
    (5, torch.float32, 1),
    (2500, torch.float16, 2),
    (2500, torch.float32, 1),
    (64, torch.float32, 2),
    (1024, torch.float16, 1),
    (10000, torch.float32, 1),  # in several calls
    (1025, torch.float32, 2),  # not bfloat16, which the interpreter rounds in a way of its own
]


ADDITIONS: list[Addition] = [
    (1, 576, torch.float16, 1, True),
    (3, 40, torch.float32, 2, True),
    (2, 1000, torch.float16, 2, False),
    (5, 64, torch.float32, 1, False),
    (12, 16, torch.float16, 1, True),  # more rows than programs
    (11, 8, torch.float32, 2, True),
    (5, 2048, torch.float32, 2, False),  # in several calls
]


@pytest.mark.parametrize("size", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_ranks_get_the_sum_in_their_order(tmp_path: Path, device: str, size: int) -> None:
    """Also where it is added and normalized, and the likeliest of all ranks' tokens."""
    if device != "cpu":
        pytest.skip("GPUs map memory by other means: test_shared_gpus and benchmarks.all_reduce check them")
    path = tmp_path / "memory"
    path.write_bytes(bytes(file_size(size, size)))
    group = RankGroup(size, "tests.kernels.peer_ranks:serve", pickle.dumps((str(path), CALLS, ADDITIONS)))
    group.start()
    try:
        mapped = MappedMemory.open(str(path), 0, size)
        good = are_right(mapped.memory, CALLS, ADDITIONS)
        assert all(good), good
        assert [pickle.loads(reply) for reply in group.replies()] == [good] * (size - 1)
    finally:
        group.close()


def test_what_can_be_summed(device: str) -> None:
    address = torch.zeros(2, dtype=torch.int64)
    memory = PeerMemory(0, 2, address, address, address.int(), capacity=64)
    assert can_sum(torch.zeros(17))
    assert not can_sum(torch.zeros(4, dtype=torch.int32))
    assert not can_sum(torch.zeros(0))
    assert can_add_rows(memory, torch.zeros(50, 16))
    assert not can_add_rows(memory, torch.zeros(1, 24))  # more than the memory takes
    assert not can_add_rows(memory, torch.zeros(1, 15))
