"""Collectives of tensors in host memory through memory that the ranks share.

::

    [arrived 0 | shape 0, even | shape 0, odd | arrived 1 | ... ][ rank 0: even, odd | rank 1: even, odd | ... ]

A tensor passes in rounds, parts that fit into a slot. In round *n* each rank writes its part to its slot of *n*'s
parity, sets `arrived` to *n*, and reads the others' slots when they have arrived as well. A rank that arrives in round
*n* has read all of round *n - 1*. So a rank may write for round *n* when all have arrived in *n - 1*: two slots
suffice, and one wait for each round.

Sums are in the order of ranks, in float32 for shorter floats. They are the same on all ranks and in every run.

Rejected: gloo over TCP to the same host, whose sums of a token's activations take a multiple of the time (see
docs/decisions.md), in an order of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmengine.backends.ranks.collectives import Waiting, add_up
from llmengine.backends.ranks.memory import LINE_WORDS, SharedMemory
from llmengine.backends.ranks.progress import Progress

if TYPE_CHECKING:
    import torch

__all__ = ["SharedCollectives", "shared_size"]

_SLOT = 1 << 20
_LINES = 3  # of a rank: arrived, and the shapes of both slots
_MAX_DIMS = LINE_WORDS - 1
# A pause is this part of the time waited so far, and so a wait is longer by little more.
_PAUSE = 1 / 16
_MAX_PAUSE_S = 0.05


def shared_size(size: int) -> int:
    """Bytes of the file for the collectives of so many ranks."""
    return SharedMemory.header_size(_LINES * size) + 2 * size * _SLOT


class SharedCollectives:
    """The end of one rank.

    Args:
        fd: descriptor of a file of `shared_size` zeros; stays the caller's.
        rank: this rank, from 0.
        size: how many ranks there are.
        while_waiting: called again and again while other ranks are awaited, with those and the seconds waited so far;
            raises to give up.
        progress: where this rank marks each round.
    """

    def __init__(
        self,
        fd: int,
        rank: int,
        size: int,
        while_waiting: Callable[[Sequence[int], float], None],
        progress: Progress,
    ) -> None:
        self.rank = rank
        self.size = size
        self._while_waiting = while_waiting
        self._progress = progress
        self._memory = SharedMemory(fd, _LINES * size)
        self._slots: dict[torch.dtype, list[tuple[torch.Tensor, ...]]] = {}
        self._arrivals = [LINE_WORDS * _LINES * rank for rank in range(size)]
        self._round = 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        part = _SLOT // tensor.element_size()
        for start in range(0, flat.numel(), part):
            mine = flat[start : start + part]
            count = mine.numel()
            add_up([slot[:count] for slot in self._exchange(mine)], mine)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        flat = tensor.reshape(-1)
        part = _SLOT // tensor.element_size()
        slots = self._exchange(flat[:part], tensor.shape)
        shapes = [self._shape(rank) for rank in range(self.size)]
        results = [tensor.new_empty(shape) for shape in shapes] if self.rank == 0 else []
        for start in range(0, max(map(math.prod, shapes)), part):
            if start:
                slots = self._exchange(flat[start : start + part])
            for slot, result in zip(slots, results, strict=False):
                there = result.view(-1)[start : start + part]
                there.copy_(slot[: there.numel()])
        return results if self.rank == 0 else None

    def close(self) -> None:
        """Nothing: there is no connection."""

    def _exchange(self, mine: torch.Tensor, shape: Sequence[int] | None = None) -> tuple[torch.Tensor, ...]:
        """Pass this round's part, [num_elements]; the slots of all ranks, of its dtype, to be read before the next."""
        self._round += 1
        slots = self._typed(mine.dtype)[self._round % 2]
        slots[self.rank][: mine.numel()].copy_(mine)
        if shape is not None:
            self._set_shape(shape)
        self._memory.fence()
        self._memory.words[self._arrivals[self.rank]] = self._round
        self._await(self._round)
        self._progress.mark()
        return slots

    def _typed(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
        """The slots of even and of odd rounds, by rank, as elements of a dtype."""
        if dtype not in self._slots:
            import torch

            with torch.inference_mode(False):  # otherwise they could be written to in that mode only
                slots = torch.frombuffer(self._memory.data, dtype=dtype).view(2, self.size, -1)
            self._slots[dtype] = [slots[parity].unbind() for parity in (0, 1)]
        return self._slots[dtype]

    def _await(self, number: int) -> None:
        """Wait until all ranks have arrived in a round."""
        if not self._late(number):
            return
        waiting = Waiting()
        while late := self._late(number):
            if not waiting.spins():
                self._progress.rest()
                self._while_waiting(late, waiting.waited_s)
                time.sleep(min(waiting.waited_s * _PAUSE, _MAX_PAUSE_S))

    def _late(self, number: int) -> list[int]:
        words = self._memory.words
        late = [rank for rank, at in enumerate(self._arrivals) if words[at] < number]
        if not late:
            self._memory.fence()
        return late

    def _set_shape(self, shape: Sequence[int]) -> None:
        if len(shape) > _MAX_DIMS:
            raise ValueError(f"a tensor has {len(shape)} dimensions; {_MAX_DIMS} can be gathered")
        at = self._shape_at(self.rank)
        for index, value in enumerate((len(shape), *shape)):
            self._memory.words[at + index] = value

    def _shape(self, rank: int) -> tuple[int, ...]:
        at = self._shape_at(rank)
        num_dims = self._memory.words[at]
        return tuple(self._memory.words[at + 1 : at + 1 + num_dims])

    def _shape_at(self, rank: int) -> int:
        return self._arrivals[rank] + LINE_WORDS * (1 + self._round % 2)
