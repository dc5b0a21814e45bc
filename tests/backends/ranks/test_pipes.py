"""Stages of ranks: what they send each other, and how one that fails is found."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from benchmarks.pretended_hosts import PretendedHosts
from llmengine.backends.ranks import RankGroup
from llmengine.backends.ranks.layout import receiver_of, sender_to
from llmengine.errors import ConfigError, EngineDeadError
from tests.backends.ranks.helpers import OBEY_WITH_TENSORS, is_gone, pids


@pytest.mark.parametrize(("stage_size", "num_stages"), [(1, 1), (1, 2), (1, 5), (3, 1), (2, 2), (2, 4)])
def test_every_rank_but_the_first_stages_receives_from_one(stage_size: int, num_stages: int) -> None:
    size = stage_size * num_stages
    for rank in range(size):
        receiver, sender = receiver_of(rank, stage_size, size), sender_to(rank, stage_size, size)
        assert (receiver is None) == (rank < stage_size), "rank 0 is of the last stage"
        assert receiver is None or sender_to(receiver, stage_size, size) == rank
        assert (sender is None) == (num_stages == 1 or stage_size <= rank < 2 * stage_size)
        assert all(other is None or other % stage_size == rank % stage_size for other in (receiver, sender))


def open_stages(
    size: int, stage_size: int, stuck_after_s: float | None = None, hosts: tuple[int, ...] | None = None
) -> RankGroup:
    where = None if hosts is None else PretendedHosts(hosts)
    group = RankGroup(size, OBEY_WITH_TENSORS, b"", hosts=where, stage_size=stage_size, stuck_after_s=stuck_after_s)
    group.start()
    return group


@pytest.fixture(
    scope="module",
    params=[(3, 1), (4, 2), (3, 1, None, (0, 1, 1)), (4, 2, None, (0, 1, 2, 2))],
    ids=["3 stages", "2 stages of 2", "3 stages on 2 hosts", "2 stages of 2 on 3 hosts"],
)
def group(request: pytest.FixtureRequest) -> Iterator[RankGroup]:
    group = open_stages(*request.param)
    yield group
    group.close()


@pytest.mark.parametrize("numbers", [1, 1000, 3_000_001])
def test_tensors_pass_through_all_stages_in_order(group: RankGroup, numbers: int) -> None:
    group.broadcast(b"pass_on %d" % numbers)
    group.broadcast(b"pass_on 2")
    for count in (numbers, 2):
        tensor = group.pipe.receive((count,), torch.float32)
        group.collectives.all_reduce(tensor)
        # 3 stages: 100 * 1 + 1, then + 2. 2 stages of 2: 100 * (2 + 3) on both, then + 2 and + 3, added up.
        expected = 103.0 if group.size == 3 else 1005.0
        assert tensor.shape == (count,)
        assert (tensor == expected).all()


@pytest.mark.parametrize("hosts", [None, (0, 1, 2)])
def test_a_rank_that_is_killed_ends_the_wait_for_it(hosts: tuple[int, ...] | None) -> None:
    group = open_stages(3, 1, hosts=hosts)
    ranks = pids(group)
    group.broadcast(b"pass_on_late 1 600 4")
    os.kill(ranks[0], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"rank 1 of 3 .*SIGKILL"):
        group.pipe.receive((4,), torch.float32)
    group.close()
    assert all(map(is_gone, ranks))


def test_a_rank_that_raises_is_named_and_not_those_behind_it() -> None:
    group = open_stages(3, 1)
    group.broadcast(b"pass_on_unless 1 4")
    with pytest.raises(EngineDeadError, match=r"rank 1 of 3 .*a mistake of 1") as caught:
        group.pipe.receive((4,), torch.float32)
    assert isinstance(caught.value.__cause__, ConfigError)
    group.close()


@pytest.mark.parametrize("hosts", [None, (0, 1, 1, 0)])
def test_a_stage_that_hangs_is_named_and_not_those_that_wait_for_it(hosts: tuple[int, ...] | None) -> None:
    group = open_stages(4, 1, stuck_after_s=1.0, hosts=hosts)
    ranks = pids(group)
    group.broadcast(b"pass_on_late 2 600 4")
    with pytest.raises(EngineDeadError, match=r"rank 2 of 4 .*has been stuck") as caught:
        group.pipe.receive((4,), torch.float32)
    assert "in _pass_on_late" in str(caught.value), "the place where it hangs"
    group.close()
    assert all(map(is_gone, ranks))


@pytest.mark.parametrize("hosts", [None, (0, 1, 2)])
def test_close_ends_ranks_that_wait_for_each_other(hosts: tuple[int, ...] | None) -> None:
    group = open_stages(3, 1, hosts=hosts)
    ranks = pids(group)
    group.broadcast(b"pass_on_late 1 600 4")  # rank 2 waits for rank 1
    group.close()
    assert all(map(is_gone, ranks))
