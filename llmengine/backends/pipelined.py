"""`PipelinedBackend`: steps that go through the stages of a pipeline, the last of which is the caller's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmengine.backends.micro_batches import MicroBatcher, merged
from llmengine.batch import Backend, BackendInfo, Batch, ScoringBackend, StepResult

_MOST_AHEAD_BYTES = 2 << 20
"""Messages about micro-batches that are not finished may be this long together, half the ring that they pass through.

A rank that waits for rank 0 to compute its stage reads none, and rank 0 must not wait for it to read.
"""


class EarlierStages(Protocol):
    """The stages before the last, as rank 0 talks to them."""

    def prepare(self, batch: Batch) -> bytes:
        """The message by which all ranks compute a micro-batch. Micro-batches are prepared in the order of steps.

        A row may lack its last id while the micro-batch that samples it is not finished.
        """

    def begin(self, message: bytes) -> None:
        """Have the ranks compute what was prepared as soon as they can."""

    def finish(self, result: StepResult) -> None:
        """Take in what the oldest micro-batch that has begun sampled, and tell the first stage if it waits for that."""

    def begun(self) -> AbstractContextManager[None]:
        """A context in which rank 0's own stage computes what has begun, so that nobody is told again."""

    def follow(self, batch: Batch) -> None:
        """Take note of a step whose forward passes the ranks are told of one after the other, as rank 0 begins them."""

    def followed(self, result: StepResult) -> None:
        """Take note of what such a step sampled."""


class PipelinedBackend:
    """Implements `batch.ScoringBackend` over a backend of the last stage.

    `launch` cuts a step into micro-batches and lets the earlier stages begin with them. `collect` computes the last
    stage, and samples. So while it does, the others are busy with the next micro-batches, also of the next step.

    Steps with log-probabilities of prompts, whose logits are computed in several goes, and scores go through the stages
    alone, after what was launched before.
    """

    def __init__(self, own: Backend, stages: EarlierStages, num_stages: int) -> None:
        self._own = own
        self._stages = stages
        self._batcher = MicroBatcher(num_stages)
        self._steps: deque[_Step] = deque()
        self._waiting: deque[_MicroBatch] = deque()
        self._prompts_with_logprobs: dict[int, int] = {}

    @property
    def info(self) -> BackendInfo:
        return self._own.info

    def launch(self, batch: Batch) -> None:
        """See `batch.Backend.launch`."""
        step = _Step(batch.step)
        self._steps.append(step)
        if self._has_prompt_logprobs(batch):
            self.settle()
            self._stages.follow(batch)
            self._own.launch(batch)
            result = self._own.collect()
            self._stages.followed(result)
            step.results.append(result)
            return
        for part in self._batcher.split(batch):
            message = self._stages.prepare(part)
            if sum(waiting.num_bytes for waiting in self._waiting) + len(message) > _MOST_AHEAD_BYTES:
                self.settle()
            self._stages.begin(message)
            self._waiting.append(_MicroBatch(part, step, len(message)))
            step.num_waiting += 1

    def collect(self) -> StepResult:
        """See `batch.Backend.collect`."""
        step = self._steps.popleft()
        while step.num_waiting:
            self._finish_one()
        return merged(step.number, step.results)

    def settle(self) -> None:
        """Finish all that has begun; its results remain to be collected."""
        while self._waiting:
            self._finish_one()

    def score(self, batch: Batch) -> Iterator[Any]:
        """See `batch.ScoringBackend.score`."""
        assert isinstance(self._own, ScoringBackend)
        self.settle()
        self._stages.follow(batch)
        yield from self._own.score(batch)

    def close(self) -> None:
        """See `batch.Backend.close`."""
        self._waiting.clear()
        self._own.close()

    def _finish_one(self) -> None:
        """Compute the last stage of the oldest micro-batch, and sample."""
        part = self._waiting.popleft()
        with self._stages.begun():
            self._own.launch(part.batch)
        result = self._own.collect()
        self._stages.finish(result)
        part.step.results.append(result)
        part.step.num_waiting -= 1

    def _has_prompt_logprobs(self, batch: Batch) -> bool:
        """Whether log-probabilities of some prompt's tokens are to be computed."""
        ends = self._prompts_with_logprobs
        for init in batch.slot_inits:
            ends.pop(init.slot, None)
            if init.sampling_params.prompt_logprobs is not None:
                ends[init.slot] = init.num_prompt_tokens
        return bool(ends) and any(row.start < ends.get(row.slot, 0) for row in batch.rows)


@dataclass(slots=True)
class _Step:
    """A step that was launched: the results of its micro-batches so far, and how many are missing."""

    number: int
    results: list[StepResult] = field(default_factory=list)
    num_waiting: int = 0


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """One that has begun and is not finished."""

    batch: Batch
    step: _Step
    num_bytes: int
