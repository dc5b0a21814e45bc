"""A backend with faults on demand."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any, Literal, get_args

from llmengine.batch import Batch, StepResult
from llmengine.errors import OutOfMemoryError
from llmengine.testing import FakeBackend

FaultKind = Literal["launch raises", "collect raises", "out of memory", "hang", "NaN logits"]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class DeviceLost(Exception):
    """An error such as a driver might raise."""


CAUSES: dict[FaultKind, type[BaseException]] = {
    "launch raises": DeviceLost,
    "collect raises": DeviceLost,
    "out of memory": OutOfMemoryError,
    "hang": TimeoutError,
}
"""What the engine dies of; the kind that is not here is the fault of one row."""


class Faults:
    """Faults that a `FaultyBackend` is to show, set and read from another thread."""

    def __init__(self) -> None:
        self.pending: FaultKind | None = None
        self.num_shown: Counter[FaultKind] = Counter()
        self.hangs = threading.Event()
        self.let_go = threading.Event()

    def inject(self, kind: FaultKind) -> None:
        """Let the next step fail in this way."""
        self.pending = kind

    def take(self, *kinds: FaultKind) -> FaultKind | None:
        """Return the fault to show now, if it is one of these."""
        kind = self.pending
        if kind not in kinds:
            return None
        self.pending = None
        if kind is not None:
            self.num_shown[kind] += 1
        return kind


class FaultyBackend(FakeBackend):
    """A FakeBackend whose next step does what `faults` says. A hang lasts until `faults.let_go`."""

    def __init__(self, faults: Faults, **options: Any) -> None:
        super().__init__(**options)
        self._faults = faults

    def launch(self, batch: Batch) -> None:
        if self._faults.take("launch raises"):
            raise DeviceLost("launch")
        super().launch(batch)

    def collect(self) -> StepResult:
        result = super().collect()
        match self._faults.take("collect raises", "out of memory", "hang"):
            case "collect raises":
                raise DeviceLost("collect")
            case "out of memory":
                raise OutOfMemoryError("the KV cache does not fit any more")
            case "hang":
                self._faults.hangs.set()
                self._faults.let_go.wait()
        if result.token_ids and self._faults.take("NaN logits"):
            slot = next(iter(result.token_ids))
            sampled = {other: token_id for other, token_id in result.token_ids.items() if other != slot}
            return dataclasses.replace(result, token_ids=sampled, errors={slot: "logits are not finite"})
        return result
