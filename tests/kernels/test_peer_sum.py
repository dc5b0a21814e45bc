"""Sums over memory that ranks map: real processes map a file and run the kernels through Triton's interpreter."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from llmengine.backends.ranks import RankGroup
from llmengine.kernels.peer_sum import PeerMemory, can_sum
from tests.kernels.peer_ranks import Call, MappedMemory, expected_sum, file_size, take_part

# Sizes that are no multiple of anything, one program and several, ways and dtypes in turn.
CALLS: list[Call] = [
    (5, torch.float32, 1),
    (2500, torch.float16, 2),
    (2500, torch.float32, 1),
    (64, torch.float32, 2),
    (1024, torch.float16, 1),
    (1025, torch.float32, 2),  # not bfloat16, which the interpreter rounds in a way of its own
]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_get_the_sum_in_their_order(tmp_path: Path, device: str, size: int) -> None:
    if device != "cpu":
        pytest.skip("GPUs map memory by other means: benchmarks.all_reduce checks them")
    path = tmp_path / "memory"
    path.write_bytes(bytes(file_size(size, size)))
    group = RankGroup(size, "tests.kernels.peer_ranks:serve", pickle.dumps((str(path), CALLS)))
    group.start()
    try:
        mapped = MappedMemory.open(str(path), 0, size)
        for index, (result, call) in enumerate(zip(take_part(mapped.memory, CALLS), CALLS, strict=True)):
            assert torch.equal(result, expected_sum(size, index, *call[:2])), call
        assert [pickle.loads(reply) for reply in group.replies()] == [[True] * len(CALLS)] * (size - 1)
    finally:
        group.close()


def test_what_can_be_summed(device: str) -> None:
    address = torch.zeros(2, dtype=torch.int64)
    memory = PeerMemory(0, 2, address, address, address.int(), capacity=64)
    assert can_sum(memory, torch.zeros(16))
    assert not can_sum(memory, torch.zeros(17))
    assert not can_sum(memory, torch.zeros(4, dtype=torch.int32))
    assert not can_sum(memory, torch.zeros(0))
