"""Ranks whose plans are fakes: a library that processes of ranks can be told to use, and collectives of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmengine.backends.cuda.peers import Peers
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.shared import PlannedSegments
from llmengine.backends.tensorrt.spec import PlacedSegment
from llmengine.checkpoints.sharded_source import ShardPlan
from llmengine.checkpoints.source import ModelSource
from llmengine.dtypes import torch_dtype
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.torch_reference import reference

T = TypeVar("T")


def planned(plans: PlanSet, is_required: bool, device: str = "cpu", rank_1: str = "") -> PlannedSegments:
    """Return what ranks are started with.

    Args:
        device: where they run, "cpu" or "cuda".
        rank_1: what the library of other processes than this one does: fail in this call, or be "wrong".
    """
    return PlannedSegments(plans, is_required, partial(library_of_rank, os.getpid(), device, rank_1))


def fake_plans_of_ranks(source: ModelSource, plan: ShardPlan, segments: Sequence[PlacedSegment]) -> PlanSet:
    """Return plans of all ranks that the fake loads, with the weights of `source` where they hold any."""
    dtype = torch_dtype(segments[0].spec.dtype)
    found = []
    for rank in range(plan.size):
        weights = {name: plan.shard(name, tensor, rank) for name, tensor in source.weights(dtype)}
        found.append(fake_plan_set([segment for segment in segments if segment.rank == rank], weights))
    plans = {name: item for one in reversed(found) for name, item in one.plans.items()}
    return PlanSet(found[0].producer, tuple(segments), plans)


def library_of_rank(rank_0_pid: int, device: str, rank_1: str) -> Library:
    """Return a fake library for the process's device; see `planned`."""
    fake = FakeTensorRt(torch.device(device, torch.cuda.current_device() if device == "cuda" else None))
    if rank_1 and os.getpid() != rank_0_pid:
        if rank_1 == "wrong":
            fake.execute = wrong
        else:
            fake.failing.add(rank_1)
    return fake_library(fake)


def wrong(spec: Any, feeds: Any) -> Any:
    """Compute a segment, and half as much again."""
    return {name: tensor * 1.5 for name, tensor in reference(spec, feeds, torch.float32).items()}


_turn = threading.Lock()
"""Held by the rank that runs: the fake library looks at all tensors of the process, which must not go meanwhile."""


class ThreadSums:
    """The sums of `DeviceCollectives` for ranks that are threads of this process, one of which runs at a time."""

    description = "threads"

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list[Tensor]) -> None:
        self.rank, self.size = rank, len(shared)
        self.num_sums = 0
        self._barrier, self._shared = barrier, shared

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up in the order of ranks."""
        self.num_sums += 1
        self._shared[self.rank] = tensor.clone()
        self._await_others()
        total = torch.stack(self._shared).sum(0)
        self._await_others()
        tensor.copy_(total)

    def _await_others(self) -> None:
        _turn.release()
        try:
            self._barrier.wait()
        finally:
            _turn.acquire()


def thread_peers(size: int) -> list[Peers]:
    """Return the peers of ranks that are threads; they can do nothing but sum."""
    barrier, shared = threading.Barrier(size, timeout=60.0), [torch.empty(0)] * size
    sums: list[Any] = [ThreadSums(rank, barrier, shared) for rank in range(size)]
    return [Peers(one, [range(0, 1)] * size, (0, 0), counts_keys=True, logits=None) for one in sums]


def on_threads(size: int, function: Callable[[int], T]) -> list[T]:
    """Call a function with each rank, on threads of `ThreadSums`, and return the results."""

    def run(rank: int) -> T:
        with _turn:
            return function(rank)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
