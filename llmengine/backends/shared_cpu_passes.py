"""Forward passes that ranks on CPUs compute together: what rank 0 tells the others, and what they make of it.

A pass is told in one of two ways. `Forward` comes when rank 0 begins it, and everybody computes it at once: that is how
the ranks of one stage work, and all stages where rank 0 must see the logits before it knows what comes next. `Ahead`
comes when a micro-batch is launched: each stage computes it when it gets there, and rank 0's last of all.
"""

from __future__ import annotations

import contextlib
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmengine.backends.cpu.deterministic import token_pieces
from llmengine.backends.cpu.forward_pass import StepPass
from llmengine.backends.cpu.step_inputs import BlockTables, HostSlotState, StepInputs, in_step_order
from llmengine.backends.cpu.weights import CpuModel
from llmengine.backends.ranks.channel import RankChannel
from llmengine.backends.ranks.group import RankGroup
from llmengine.backends.shared_weights import tensor_bytes
from llmengine.batch import Batch, StepResult
from llmengine.models.stages import Stage

_Changes = Sequence[tuple[int, Sequence[int] | None]]
"""Changes of block tables: (slot, blocks to append; None empties the table)."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward pass.

    Attributes:
        tables: changes of block tables before it.
        ends: whether the logits of `inputs.sample_tokens` are wanted at once; else `Last` asks for some.
    """

    tables: _Changes
    inputs: StepInputs
    ends: bool


@dataclass(frozen=True, slots=True)
class Last:
    """The logits of these tokens, int64 [n], of the forward pass that has begun."""

    tokens: np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Ahead:
    """The forward passes of a micro-batch, which rank 0 computes later.

    Attributes:
        needs: number of the micro-batch whose sampled tokens the first stage must know, 0 for none.
        tables: changes of block tables before it.
        passes: in them, the id -1 - slot stands for the token that was sampled last for that slot.
    """

    needs: int
    tables: _Changes
    passes: Sequence[StepInputs]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens that a micro-batch sampled; micro-batches are numbered from 1."""

    number: int
    slots: Sequence[int]
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class NextWeight:
    """Each rank of a stage answers with its tensor of the next canonical weight, or of the first if `restarts`.

    Ranks of other stages answer with nothing.
    """

    stage: int
    restarts: bool


Message = Forward | Last | Ahead | Sampled | NextWeight


class RecordedTables(BlockTables):
    """Block tables that remember their changes until the other ranks are told."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        super().__init__(num_slots, max_blocks)
        self._changes: list[tuple[int, Sequence[int] | None]] = []

    def reset(self, slot: int) -> None:
        super().reset(slot)
        self._changes.append((slot, None))

    def append(self, slot: int, block_ids: Sequence[int]) -> None:
        super().append(slot, block_ids)
        self._changes.append((slot, block_ids))

    def take_changes(self) -> _Changes:
        """The changes since the last call."""
        changes, self._changes = self._changes, []
        return changes


class LeadingPass:
    """Forward passes of rank 0, which the other ranks are told of first.

    Attributes:
        is_told: the other ranks have been told of the passes that follow.
    """

    def __init__(self, own: StepPass, tables: RecordedTables, group: RankGroup) -> None:
        self._own = own
        self._recorded = tables
        self._group = group
        self.is_told = False

    def run(self, inputs: StepInputs) -> Tensor | None:
        """See `StepPass.run`."""
        if not self.is_told:
            self._tell(Forward(self._recorded.take_changes(), inputs, ends=True))
        return self._own.run(inputs)

    def begin(self, inputs: StepInputs) -> Callable[[Tensor], Tensor]:
        """See `StepPass.begin`."""
        assert not self.is_told
        self._tell(Forward(self._recorded.take_changes(), inputs, ends=False))
        own = self._own.begin(inputs)

        def last(tokens: Tensor) -> Tensor:
            self._tell(Last(tokens.numpy()))
            return own(tokens)

        return last

    def _tell(self, message: Message) -> None:
        self._group.broadcast(pickle.dumps(message))


class StagesAhead:
    """Implements `pipelined.EarlierStages` with ranks that are followers.

    Args:
        tables: as the steps that were launched leave them; rank 0's own stage has others, since it is behind.
        leading: rank 0's passes, which tell changes of `tables` as well.
        deterministic: each token is a pass.
    """

    def __init__(self, tables: RecordedTables, leading: LeadingPass, group: RankGroup, *, deterministic: bool) -> None:
        self._recorded = tables
        self._slots = HostSlotState(tables)
        self._leading = leading
        self._group = group
        self._deterministic = deterministic
        self._num_begun = self._num_finished = self._needed = 0
        self._sampling: deque[list[int]] = deque()
        self._sampled_by: dict[int, int] = {}

    def prepare(self, batch: Batch) -> bytes:
        """See `EarlierStages.prepare`."""
        inputs, needs = self._flatten(batch)
        self._num_begun += 1
        self._sampling.append(inputs.sample_slots.tolist())
        self._sampled_by.update(dict.fromkeys(self._sampling[-1], self._num_begun))
        self._needed = max(self._needed, needs)
        passes = [piece for piece, _ in token_pieces(inputs)] if self._deterministic else [inputs]
        return pickle.dumps(Ahead(needs, self._recorded.take_changes(), passes))

    def begin(self, message: bytes) -> None:
        """See `EarlierStages.begin`."""
        self._group.broadcast(message)

    def finish(self, result: StepResult) -> None:
        """See `EarlierStages.finish`."""
        self._num_finished += 1
        number, slots = self._num_finished, self._sampling.popleft()
        token_ids = _latest(result, slots)
        if number <= self._needed:
            self._group.broadcast(pickle.dumps(Sampled(number, slots, token_ids)))
        for slot, token_id in zip(slots, token_ids, strict=True):
            if self._sampled_by.get(slot) == number:  # else another micro-batch or request has the slot by now
                del self._sampled_by[slot]
                self._slots.store_sampled(np.array([slot]), [token_id])

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """See `EarlierStages.begun`."""
        self._leading.is_told = True
        try:
            yield
        finally:
            self._leading.is_told = False

    def follow(self, batch: Batch) -> None:
        """See `EarlierStages.follow`."""
        self._flatten(batch)

    def followed(self, result: StepResult) -> None:
        """See `EarlierStages.followed`."""
        slots = list(result.token_ids)
        self._slots.store_sampled(np.array(slots, dtype=np.int64), _latest(result, slots))

    def _flatten(self, batch: Batch) -> tuple[StepInputs, int]:
        """The step's inputs, and which micro-batch samples ids that are missing in them."""
        for init in batch.slot_inits:
            self._slots.init_slot(init)
            self._sampled_by.pop(init.slot, None)
        inputs, needs = self._slots.flatten(batch), 0
        for index, row in enumerate(in_step_order(batch.rows)):
            number = self._sampled_by.get(row.slot, 0)
            if number and len(row.token_ids) < row.num_tokens:
                inputs.token_ids[inputs.row_starts[index + 1] - 1] = -1 - row.slot
                needs = max(needs, number)
        return inputs, needs


def _latest(result: StepResult, slots: Sequence[int]) -> list[int]:
    """The latest token of each slot; 0 for a row that failed, whose next one is void."""
    sampled = [result.token_ids.get(slot, 0) for slot in slots]
    return [item if isinstance(item, int) else item[-1] for item in sampled]


class Follower:
    """A rank other than 0, which computes what rank 0 tells it.

    Args:
        own: what the rank computes; hidden states where its stage is not the last.
    """

    def __init__(self, channel: RankChannel, stage: Stage, model: CpuModel, own: StepPass, tables: BlockTables) -> None:
        self._channel = channel
        self._stage = stage
        self._model = model
        self._own = own
        self._tables = tables
        self._last: Callable[[Tensor], Tensor] | None = None
        self._weights = model.canonical()
        self._ahead: deque[Ahead] = deque()
        self._sampled = np.zeros(len(tables.array), dtype=np.int64)
        self._num_sampled = 0

    def run(self) -> None:
        """Follow until rank 0 ends."""
        while True:
            while self._ahead and (self._ahead[0].needs <= self._num_sampled or not self._stage.is_first):
                self._compute_ahead(self._ahead.popleft())
            self._take(pickle.loads(self._channel.receive()))

    def _take(self, message: Message) -> None:
        if isinstance(message, Ahead):
            self._ahead.append(message)
        elif isinstance(message, Sampled):
            self._sampled[message.slots] = message.token_ids
            self._num_sampled = message.number
        elif isinstance(message, Forward):
            self._change(message.tables)
            if message.ends:
                self._compute(message.inputs)
            else:
                self._begin(message.inputs)
        elif isinstance(message, Last):
            if self._last is not None:
                self._last(torch.from_numpy(message.tokens))
        elif isinstance(message, NextWeight):
            self._send_weight(message)
        else:
            raise AssertionError(message)

    def _change(self, tables: _Changes) -> None:
        for slot, block_ids in tables:
            if block_ids is None:
                self._tables.reset(slot)
            else:
                self._tables.append(slot, block_ids)

    def _compute_ahead(self, message: Ahead) -> None:
        self._change(message.tables)
        for inputs in message.passes:
            given = inputs.token_ids
            if self._stage.is_first and (given < 0).any():
                known = np.where(given < 0, self._sampled[np.minimum(given, -1) * -1 - 1], given)
                inputs = replace(inputs, token_ids=known)
            self._compute(inputs)

    def _compute(self, inputs: StepInputs) -> None:
        if self._stage.is_last:
            self._own.run(inputs)
            return
        hidden = self._own.run(replace(inputs, sample_tokens=np.arange(len(inputs.token_ids))))
        assert hidden is not None
        self._channel.pipe.send(hidden)

    def _begin(self, inputs: StepInputs) -> None:
        if self._stage.is_last:
            self._last = self._own.begin(inputs)
        else:
            self._compute(inputs)

    def _send_weight(self, message: NextWeight) -> None:
        if message.stage != self._stage.index:
            self._channel.reply(b"")
            return
        if message.restarts:
            self._weights = self._model.canonical()
        _, tensor = next(self._weights)
        self._channel.reply(tensor_bytes(tensor))
