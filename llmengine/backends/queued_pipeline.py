"""`QueuedPipeline`: steps in micro-batches, over a backend that queues them on devices of several stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmengine.backends.micro_batches import MicroBatcher, merged
from llmengine.batch import BackendInfo, Batch, PreparingBackend, ScoringBackend, StepResult


class QueuedPipeline:
    """Implements `batch.PreparingBackend` and `batch.ScoringBackend`.

    Every stage is a device with a queue of its own, which waits for others where it must, and the host waits for none.
    So all that keeps them busy at once is that a step is several::

        first stage   a1 b1 a2 b2 a3 ...    a, b: micro-batches; 1, 2, 3: steps
        last             a1 b1 a2 b2 ...    a2 begins when the last stage has sampled a1

    The next step is launched while the last stage has yet to compute most of this one, since the first is nearly done
    with it.

    Args:
        own: takes each micro-batch as a step.
    """

    def __init__(self, own: PreparingBackend, num_stages: int) -> None:
        self._own = own
        self._batcher = MicroBatcher(num_stages)
        self._steps: deque[tuple[int, int]] = deque()
        self._info = replace(
            own.info, max_steps_in_flight=own.info.max_steps_in_flight // num_stages, wants_early_launches=True
        )

    @property
    def info(self) -> BackendInfo:
        return self._info

    def launch(self, batch: Batch) -> None:
        """See `batch.Backend.launch`."""
        parts = self._batcher.split(batch)
        for part in parts:
            self._own.launch(part)
        self._steps.append((batch.step, len(parts)))

    def collect(self) -> StepResult:
        """See `batch.Backend.collect`."""
        step, num_parts = self._steps.popleft()
        return merged(step, [self._own.collect() for _ in range(num_parts)])

    def score(self, batch: Batch) -> Iterator[Any]:
        """See `batch.ScoringBackend.score`."""
        assert isinstance(self._own, ScoringBackend)
        return self._own.score(batch)

    def prepare(self) -> bool:
        """See `batch.PreparingBackend.prepare`."""
        return self._own.prepare()

    def close(self) -> None:
        """See `batch.Backend.close`."""
        self._own.close()
