"""How ranks that share a model choose what computes between its attentions: all of them together."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from llmengine.backends.cuda.backend import CudaBackend, CudaParts
from llmengine.backends.cuda.fused_segments import SegmentsFactory
from llmengine.backends.cuda.generic_segments import build_cuda_segments, cuda_segments_factory
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.checkpoints.source import ModelSource

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exchange:
    """Tells all ranks what each of them found while they load.

    Attributes:
        rank: this rank.
        swap: see `of_all`, in pickled form.
    """

    rank: int
    swap: Callable[[bytes], bytes]

    @classmethod
    def of_rank_0(cls, group: RankGroup) -> Exchange:
        """Rank 0's end."""

        def swap(own: bytes) -> bytes:
            found = pickle.dumps([pickle.loads(one) for one in (own, *group.replies())])
            group.broadcast(found)
            return found

        return cls(0, swap)

    @classmethod
    def of_rank(cls, channel: RankChannel) -> Exchange:
        """The end of another rank."""

        def swap(own: bytes) -> bytes:
            channel.reply(own)
            return channel.receive()

        return cls(channel.rank, swap)

    def of_all(self, own: T) -> list[T]:
        """What each rank calls this with, in the order of ranks. All call it, the same number of times."""
        found: list[T] = pickle.loads(self.swap(pickle.dumps(own)))
        return found


class RankSegments(Protocol):
    """What chooses; ranks other than 0 get it pickled, before it is asked for anything."""

    def factory(self, source: ModelSource, exchange: Exchange) -> SegmentsFactory:
        """Builds the segments of a rank, whose shard of the model is `source`."""

    def backend(self, parts: CudaParts) -> CudaBackend:
        """Rank 0's own backend, of parts with those segments."""


@dataclass(frozen=True, slots=True)
class TorchSegments:
    """`RankSegments` of kernels.

    Attributes:
        reason: why these were chosen, for `BackendInfo.description`.
    """

    reason: str | None = None

    def factory(self, source: ModelSource, exchange: Exchange) -> SegmentsFactory:
        return build_cuda_segments if self.reason is None else cuda_segments_factory(self.reason)

    def backend(self, parts: CudaParts) -> CudaBackend:
        return CudaBackend(parts)


TORCH_SEGMENTS = TorchSegments()
