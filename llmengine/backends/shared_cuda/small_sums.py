"""Sums of small tensors by kernels of our own where they are faster, and everything else by NCCL."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from llmengine.backends.ranks.store import MeetingPoint
from llmengine.backends.shared_cuda.collectives import NcclCollectives, RankCollectives, add_sum_in_steps
from llmengine.backends.shared_cuda.peer_memory import CannotMapError, IpcPeerMemory
from llmengine.kernels.peer_sum import (
    PeerMemory,
    RowNorm,
    add_over_peers,
    can_add_rows,
    can_sum,
    choose_over_peers,
    sum_over_peers,
)

Way = Literal["other", "one_shot", "two_shots"]
WAYS: Sequence[Way] = ("other", "one_shot", "two_shots")

SIZES = (*(1 << bits for bits in range(13, 24)), 1 << 25)
"""Bytes that ways are measured at: 8 KiB to 8 MiB, and 32 MiB, which is also how anything larger is summed."""

CAPACITY = 1 << 23
"""Bytes that one call sums; more takes several."""

_ELEMENT = torch.bfloat16
_CALLS = 20
_REPEATS = 7

_logger = logging.getLogger("llmengine.backends.shared_cuda")


class OpenMemory(Protocol):
    """Memory that ranks map."""

    memory: PeerMemory

    def release(self) -> None:
        """End every sum that waits for another rank, now and later."""

    def close(self) -> None:
        """Free it; nothing may be queued. Idempotent."""


@dataclass(frozen=True, slots=True)
class SumWays:
    """How tensors are summed, by their size: up to so many bytes in such a way, and larger ones as `beyond` says."""

    limits: Sequence[tuple[int, Way]]
    beyond: Way = "other"

    def way_of(self, num_bytes: int) -> Way:
        """The way for a tensor of so many bytes."""
        return next((way for limit, way in self.limits if num_bytes <= limit), self.beyond)

    @property
    def description(self) -> str:
        """Our kernels, and up to which sizes they are used, for people."""
        parts = [f"{_name(way)} up to {limit >> 10} KiB" for limit, way in self.limits if way != "other"]
        if self.beyond != "other":
            parts.append(f"then {_name(self.beyond)}" if parts else _name(self.beyond))
        return ", ".join(parts)

    @property
    def needs_other(self) -> bool:
        """Whether anything but our kernels sums tensors of some size."""
        return "other" in (self.beyond, *(way for _, way in self.limits))


class SmallSums:
    """`DeviceCollectives` that sums small tensors through memory that ranks map.

    Args:
        other: everything else.
    """

    def __init__(self, other: RankCollectives, memory: OpenMemory, ways: SumWays) -> None:
        self.rank, self.size = other.rank, other.size
        self._other = other
        self._memory = memory
        self._ways = ways

    @property
    def description(self) -> str:
        ours = self._ways.description
        if not self._ways.needs_other:
            return ours
        return f"{ours}, else {self._other.description}" if ours else self._other.description

    def all_reduce(self, tensor: Tensor) -> None:
        way = self._ways.way_of(tensor.nbytes)
        if way == "other" or not can_sum(tensor):
            self._other.all_reduce(tensor)
        else:
            sum_over_peers(self._memory.memory, tensor, 1 if way == "one_shot" else 2)

    def add_sum(self, part: Tensor, x: Tensor, norm: RowNorm | None) -> None:
        way = self._ways.way_of(part.nbytes)
        if way == "other" or not can_add_rows(self._memory.memory, part):
            add_sum_in_steps(self, part, x, norm)
        else:
            add_over_peers(self._memory.memory, part, x, norm, 1 if way == "one_shot" else 2)

    def choose(self, logits: Tensor, counts: Tensor, ids: Tensor, failed: Tensor, start: int) -> None:
        choose_over_peers(self._memory.memory, logits, counts, ids, failed, start)

    def broadcast(self, tensor: Tensor) -> None:
        self._other.broadcast(tensor)

    def gather(self, tensor: Tensor, parts: Tensor | None) -> None:
        self._other.gather(tensor, parts)

    def abort(self) -> None:
        self._memory.release()
        self._other.abort()

    def close(self) -> None:
        self._other.close()
        self._memory.close()


def measured_ways(other: RankCollectives, memory: PeerMemory, device: torch.device) -> SumWays:
    """The fastest way at each size, as rank 0 measures it; all ranks call this together."""
    times = torch.zeros(len(SIZES), len(WAYS), device=device)
    for row, size in enumerate(SIZES):
        tensor = torch.zeros(size // _ELEMENT.itemsize, dtype=_ELEMENT, device=device)
        for column, way in enumerate(WAYS):
            times[row, column] = time_together(_sum_in(way, other, memory), tensor)
    other.broadcast(times)  # every rank does as rank 0 found
    return ways_from(times.tolist())


def ways_from(times_us: Sequence[Sequence[float]]) -> SumWays:
    """The fastest way up to each size, from microseconds [sizes, ways]."""
    limits: list[tuple[int, Way]] = []
    for size, row in zip(SIZES, times_us, strict=True):
        way = WAYS[min(range(len(WAYS)), key=row.__getitem__)]
        if limits and limits[-1][1] == way:
            limits[-1] = (size, way)
        else:
            limits.append((size, way))
    _, beyond = limits.pop()
    _logger.info("sums: %s", dict(zip(SIZES, times_us, strict=True)))
    return SumWays(limits, beyond)


def _name(way: Way) -> str:
    return way.replace("_", " ")


def time_together(function: Callable[[Tensor], None], tensor: Tensor) -> float:
    """Microseconds of one call in a CUDA graph of many; all ranks call this together, and replay as often."""
    function(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads of the program may use CUDA
        for _ in range(_CALLS):
            function(tensor)
    times = []
    try:
        for _ in range(_REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # the ranks meet in it
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1000.0 / _CALLS)
    finally:
        graph.reset()  # which a traceback would keep, and NCCL ends after it
    return statistics.median(times)


def _sum_in(way: Way, other: RankCollectives, memory: PeerMemory) -> Callable[[Tensor], None]:
    if way == "other":
        return other.all_reduce
    shots = 1 if way == "one_shot" else 2
    return lambda tensor: sum_over_peers(memory, tensor, shots)


def with_small_sums(nccl: NcclCollectives, meeting: MeetingPoint, device: torch.device) -> RankCollectives:
    """Meet the other ranks, which call this too; sums are done by what is fastest at each size.

    Where GPUs cannot map each other's memory, that is NCCL.
    """
    torch.cuda.set_device(device)
    nccl.connect()
    try:
        memory = IpcPeerMemory(meeting, nccl.rank, nccl.size, device, CAPACITY)
    except CannotMapError as error:
        _logger.warning("all sums are NCCL's, since the GPUs cannot map each other's memory: %s", error)
        return nccl
    try:
        return SmallSums(nccl, memory, measured_ways(nccl, memory.memory, device))
    except BaseException:
        memory.release()  # freeing it waits for what is queued
        nccl.close()
        memory.close()
        raise
