"""`RanksBackend`: a backend of rank 0 together with the processes that share its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from llmengine.backends.ranks.group import RankGroup
from llmengine.batch import Backend, BackendInfo, Batch, ScoringBackend, StepResult


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
            return self._own.collect()
        except Exception:
            self._group.check()
            raise
        finally:
            self._group.rest()

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
        try:
            self._own.close()
        finally:
            self._group.close()
