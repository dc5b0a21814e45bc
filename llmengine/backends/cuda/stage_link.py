"""A rank's place among the stages of a pipeline: what it takes from the stage before, and gives to the one after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llmengine.batch import Batch
from llmengine.kernels.stage_link import LinkMemory, send_hidden, send_ids, take_hidden, take_ids
from llmengine.kernels.step import IDS_LAG, DeviceStep, SlotState

Wait = Callable[[int], None]
"""Waits on the host until the step has arrived that is so many before the one that begins."""


class StageLink(Protocol):
    """What stages give each other in a step, queued in the current stream; a CUDA graph can hold it.

    A step begins with `take_ids` in the first stage, and with `take_hidden` in the others. It ends with `send_ids` in
    the last stage, and with `send_hidden` in the others.
    """

    @property
    def carries_ids(self) -> bool:
        """Whether `send_ids` sends any; else rank 0 tells the first stage, before a step that needs them."""

    def take_ids(self, step: DeviceStep, state: SlotState) -> None:
        """Wait for the ids that a step needs, and make them the slots' last tokens."""

    def take_hidden(self, x: Tensor) -> None:
        """Wait for the hidden states [num_tokens, hidden] of the stage before, and write them to x."""

    def send_hidden(self, x: Tensor) -> None:
        """Give x [num_tokens, hidden] to the stage after."""

    def send_ids(self, step: DeviceStep, state: SlotState) -> None:
        """Give the last tokens of the slots that sampled to the first stage."""


@dataclass(frozen=True, slots=True)
class MappedLink:
    """A `StageLink` through memory that ranks map, see `kernels.stage_link`.

    Attributes:
        wait: called before what waits is queued, where that is done when it is queued; None on GPUs.
    """

    memory: LinkMemory
    wait: Wait | None = None

    @property
    def carries_ids(self) -> bool:
        return True

    def take_ids(self, step: DeviceStep, state: SlotState) -> None:
        if self.wait is not None:
            depth = self.memory.layout.depth
            self.wait(min(int(step.counts[IDS_LAG]) or depth, depth))
        take_ids(self.memory, step, state)

    def take_hidden(self, x: Tensor) -> None:
        if self.wait is not None:
            self.wait(0)
        take_hidden(self.memory, x)

    def send_hidden(self, x: Tensor) -> None:
        send_hidden(self.memory, x)

    def send_ids(self, step: DeviceStep, state: SlotState) -> None:
        send_ids(self.memory, step, state)


class HiddenPipe(Protocol):
    """Passes tensors from each stage to the next one."""

    def receive(self, x: Tensor) -> None:
        """Write the next tensor that the stage before sends, of this shape, to x."""

    def send(self, x: Tensor) -> None:
        """Send x to the stage after."""


@dataclass(frozen=True, slots=True)
class PipedLink:
    """A `StageLink` of ranks that share no memory."""

    pipe: HiddenPipe

    @property
    def carries_ids(self) -> bool:
        return False

    def take_ids(self, step: DeviceStep, state: SlotState) -> None:
        pass

    def take_hidden(self, x: Tensor) -> None:
        self.pipe.receive(x)

    def send_hidden(self, x: Tensor) -> None:
        self.pipe.send(x)

    def send_ids(self, step: DeviceStep, state: SlotState) -> None:
        pass


class IdsLag:
    """How many steps ago the ids were sampled that a step takes from the slots."""

    def __init__(self) -> None:
        self._number = 0
        self._sampled_in: dict[int, int] = {}

    def of(self, batch: Batch) -> int:
        """The lag of the next step, as `DeviceStep.counts` has it; 0 if all ids come with it. Each step is told once.

        Steps that are queued without a batch, for a capture, do not count: a lag that is too short waits for a later
        step than is needed, and never for the step itself.
        """
        self._number += 1
        sampled_in, needed = self._sampled_in, 0
        for row in batch.rows:
            if len(row.token_ids) < row.num_tokens:
                needed = max(needed, sampled_in.get(row.slot, 0))
            if row.sample:
                sampled_in[row.slot] = self._number
        return self._number - needed if needed else 0
