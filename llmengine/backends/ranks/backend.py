"""`RanksBackend`: a backend of rank 0 together with the processes that share its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from llmengine.backends.ranks.group import RankGroup
from llmengine.batch import Backend, BackendInfo, Batch, PreparingBackend, ScoringBackend, StepResult


class RanksBackend:
    """Implements `batch.WatchedBackend` with that of rank 0, whose forward passes the other ranks follow.

    Args:
        own: of rank 0; it tells the others what to compute.
        group: the other ranks, started.
        info: of all ranks together.
        weights: see `batch.SavableBackend.weights`; of all ranks together.
    """

    def __init__(
        self,
        own: Backend,
        group: RankGroup,
        info: BackendInfo,
        weights: Callable[[], Iterator[tuple[str, Any]]],
    ) -> None:
        self._own = own
        self._group = group
        self._info = info
        self._weights = weights

    @property
    def info(self) -> BackendInfo:
        return self._info

    def launch(self, batch: Batch) -> None:
        """See `batch.Backend.launch`. Raises `EngineDeadError` that names the rank that failed."""
        try:
            self._own.launch(batch)
        except Exception:
            self._group.check()  # if a rank has failed, that is the cause
            raise
        finally:
            self._group.rest()
        self._group.check()

    def collect(self) -> StepResult:
        """See `batch.Backend.collect`; raises as `launch` does."""
        try:
            result = self._own.collect()
        except Exception:
            self._group.check()
            raise
        finally:
            self._group.rest()
        self._group.check()  # a step that was broken off has results that mean nothing
        return result

    def score(self, batch: Batch) -> Iterator[Any]:
        """See `batch.ScoringBackend.score`."""
        assert isinstance(self._own, ScoringBackend)
        return self._own.score(batch)

    def weights(self) -> Iterator[tuple[str, Any]]:
        """See `batch.SavableBackend.weights`."""
        return self._weights()

    def watch(self, on_failure: Callable[[], None]) -> None:
        """See `batch.WatchedBackend`."""
        self._group.watch(on_failure)

    def check(self) -> None:
        """See `batch.WatchedBackend`."""
        self._group.check()

    def close(self) -> None:
        """End all ranks. Idempotent."""
        self._weights = _no_weights  # which would keep memory that `own` is about to free
        try:
            self._own.close()
        finally:
            self._group.close()


def _no_weights() -> Iterator[tuple[str, Any]]:
    raise AssertionError("the backend is closed")


class OpenCollectives(Protocol):
    """Collectives of rank 0 that hold connections or memory of a device."""

    def abort(self) -> None:
        """End every operation that waits, on any thread; its result means nothing. Idempotent."""

    def close(self) -> None:
        """Free what they hold, when nothing is queued any more. Idempotent; waits for nobody."""


class PreparingRanksBackend(RanksBackend):
    """A `RanksBackend` on devices of which each rank has its own.

    Args:
        collectives: aborted when a rank has failed, since a device would wait for it for ever.
        saved_plans: as `PlanHolder.saved_plans`, of all ranks; None if there are no plans.
    """

    def __init__(
        self,
        own: Backend,
        group: RankGroup,
        info: BackendInfo,
        weights: Callable[[], Iterator[tuple[str, Any]]],
        collectives: OpenCollectives,
        saved_plans: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(own, group, info, weights)
        self._saved_plans = saved_plans
        assert isinstance(own, PreparingBackend)
        self._preparing: PreparingBackend = own
        self._collectives = collectives

    def saved_plans(self) -> Any:
        """See `checkpoints.saved_files.PlanHolder`."""
        return None if self._saved_plans is None else self._saved_plans()

    def prepare(self) -> bool:
        """See `batch.PreparingBackend`. Raises `EngineDeadError` that names the rank that failed."""
        try:
            has_worked = self._preparing.prepare()
        except Exception:
            self._group.check()
            raise
        finally:
            self._group.rest()
        self._group.check()
        return has_worked

    def watch(self, on_failure: Callable[[], None]) -> None:
        def abort_and_tell() -> None:
            try:
                self._collectives.abort()
            finally:
                on_failure()

        super().watch(abort_and_tell)

    def close(self) -> None:
        """End all ranks, and free the device. Idempotent."""
        self._saved_plans = None
        try:
            super().close()
        finally:
            self._collectives.close()
