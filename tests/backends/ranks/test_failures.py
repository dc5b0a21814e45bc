"""Ranks that fail: what rank 0 is told, and that nothing is left."""

from __future__ import annotations

import pytest
import torch

from llmengine.backends.ranks import RankGroup
from llmengine.errors import ConfigError, EngineDeadError, OutOfMemoryError

TARGETS = "tests.backends.ranks.targets"


def start_and_hear(group: RankGroup) -> None:
    group.start()
    group.replies()


def test_what_a_target_raises_comes_with_rank_and_traceback() -> None:
    group = RankGroup(2, f"{TARGETS}:raise_at_once", b"")
    with pytest.raises(EngineDeadError, match=r"rank 1 of 2.*ValueError: boom on 1") as caught:
        start_and_hear(group)
    group.close()
    assert 'raise ValueError(f"boom on {channel.rank}")' in str(caught.value)


def test_our_own_errors_keep_their_type() -> None:
    group = RankGroup(3, f"{TARGETS}:raise_ours", b"")
    with pytest.raises(OutOfMemoryError, match="no memory on 2") as caught:
        start_and_hear(group)
    group.close()
    assert any("rank 2 of 3" in note and "in raise_ours" in note for note in caught.value.__notes__)


def test_a_rank_that_raises_later_is_named_and_not_those_that_waited_for_it() -> None:
    group = RankGroup(3, f"{TARGETS}:obey", b"")
    group.start()
    group.broadcast(b"raise 2")
    with pytest.raises(EngineDeadError, match=r"rank 2 of 3.*a mistake of 2") as caught:
        group.collectives.all_reduce(torch.ones(1))
    assert isinstance(caught.value.__cause__, ConfigError)
    with pytest.raises(EngineDeadError, match=r"rank 2 of 3"):
        group.check()
    group.close()
