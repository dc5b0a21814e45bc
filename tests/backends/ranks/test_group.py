"""Groups of ranks that live: messages, replies, collectives, and the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmengine.backends.ranks import RankGroup
from llmengine.errors import EngineClosedError
from tests.backends.ranks.helpers import OBEY, OBEY_WITH_TENSORS, is_gone, open_group, pids


@pytest.fixture(
    scope="module",
    params=[(2, None), (3, None), (2, (0, 1)), (3, (0, 1, 0)), (4, (0, 1, 1, 2))],
    ids=lambda param: f"{param[0]} on {param[1] or 'one host'}",
)
def group(request: pytest.FixtureRequest) -> Iterator[RankGroup]:
    size, hosts = request.param
    with open_group(size, hosts=hosts, target=OBEY_WITH_TENSORS) as group:
        yield group


def test_messages_arrive_in_order_at_every_rank(group: RankGroup) -> None:
    for number in range(500):
        group.broadcast(b"echo %d" % number + b"x" * (number * 7 % 300))
    for number in range(500):
        expected = b" %d" % number + b"x" * (number * 7 % 300)
        assert group.replies() == [b"%d" % rank + expected for rank in range(1, group.size)]


@pytest.mark.parametrize("size", [0, 1, 8, 20_000, (4 << 20) - 8, (4 << 20) + 1, 9 << 20])
def test_messages_of_any_size(group: RankGroup, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    message = b"echo " + content[:size]
    group.broadcast(message)
    group.broadcast(b"echo after")
    assert [reply.partition(b" ")[2] for reply in group.replies()] == [message[5:]] * (group.size - 1)
    assert [reply.partition(b" ")[2] for reply in group.replies()] == [b"after"] * (group.size - 1)


def test_a_slow_rank_holds_the_writer_and_loses_nothing(group: RankGroup) -> None:
    group.broadcast(b"sleep 1 0.5")
    message = b"echo " + b"x" * 100_000
    for _ in range(100):  # more than twice the ring
        group.broadcast(message)
    for _ in range(100):
        assert {len(reply) for reply in group.replies()} == {len(message) - 3}


@pytest.mark.parametrize("size", [1, 576, 100_000, 1_000_000])
def test_all_reduce_sums(group: RankGroup, size: int) -> None:
    group.broadcast(b"sum %d" % size)
    tensor = torch.ones(size)
    group.collectives.all_reduce(tensor)
    assert tensor.tolist() == [sum(range(1, group.size + 1))] * size


def test_gather_is_in_the_order_of_ranks(group: RankGroup) -> None:
    group.broadcast(b"gather 5")
    tensors = group.collectives.gather(torch.arange(5.0))
    assert tensors is not None
    assert [tensor.tolist() for tensor in tensors] == [
        [100 * rank + index for index in range(5)] for rank in range(group.size)
    ]


def test_close_ends_the_ranks_and_may_be_called_again() -> None:
    group = RankGroup(3, OBEY, b"")
    with pytest.raises(EngineClosedError, match="not started"):
        group.broadcast(b"")
    group.start()
    ranks = pids(group)
    assert len(set(ranks)) == 2
    group.close()
    assert all(map(is_gone, ranks))
    group.close()
    with pytest.raises(EngineClosedError, match="closed"):
        group.broadcast(b"")
