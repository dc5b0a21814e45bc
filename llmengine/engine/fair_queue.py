"""FairQueue: the order in which several tenants are served, by how much each was served (start-time fair queueing).

Each tenant has a counter, its service: what it was charged, divided by its weight. The next item is the one with the
lowest rank of the waiting tenant with the least service. A rank never changes while its item waits, so each operation
costs O(log n), however many items wait.

A tenant that has not waited for a while has no claim to what it did not use. When it comes back, its service is raised
to the *floor*: the service at which the latest item was taken, or more (`raise_floor`). Goyal, Vin and Cheng,
"Start-time Fair Queueing" (1996); Sheng et al., "Fairness in Serving Large Language Models" (2024), where the charges
are tokens, as they are here.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_MAX_REMEMBERED = 1024
"""Most tenants without items whose service is remembered."""


class TenantShare(Generic[T]):
    """One tenant's items and what it was served.

    Attributes:
        name: None for the tenant of all items that name none.
        weight: of two waiting tenants, one with twice the weight is served twice as much.
        service: what the tenant was charged, divided by its weight; at least the floor when it began to wait.
        num_waiting: the tenant's items in the queue.
        num_running: items that were taken and may still be charged for; counted by the queue's owner.
        queued: the tenant has a place in the order of tenants.
    """

    __slots__ = ("heap", "name", "num_running", "num_waiting", "queued", "service", "weight")

    def __init__(self, name: str | None, weight: float, service: float) -> None:
        self.name = name
        self.weight = weight
        self.service = service
        self.num_waiting = 0
        self.num_running = 0
        self.queued = False
        self.heap: list[tuple[float, int, T]] = []

    def charge(self, amount: float) -> None:
        """Add something that the tenant was served."""
        self.service += amount / self.weight


class FairQueue(Generic[T]):
    """Items in a fair order. Not thread-safe.

    Args:
        weights: weight of each tenant that has one other than 1.
        is_waiting: False for an item that has left the queue without being taken.
    """

    def __init__(self, weights: Mapping[str, float], is_waiting: Callable[[T], bool]) -> None:
        self._weights = weights
        self._is_waiting = is_waiting
        self._shares: dict[str | None, TenantShare[T]] = {}
        # The order of waiting tenants: (service when the entry was made, which may have grown since; number; share).
        self._order: list[tuple[float, int, TenantShare[T]]] = []
        self._numbers = itertools.count()
        self._num_waiting = 0
        self._prune_at = _MAX_REMEMBERED
        self.floor = 0.0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[T]:
        """Yield the waiting items in no particular order."""
        for share in self._shares.values():
            for _, _, item in share.heap:
                if self._is_waiting(item):
                    yield item

    @property
    def num_tenants(self) -> int:
        """Tenants that are remembered. With only one there is nothing to share."""
        return len(self._shares)

    def share(self, tenant: str | None) -> TenantShare[T]:
        """The tenant's share."""
        share = self._shares.get(tenant)
        if share is None:
            if len(self._shares) >= self._prune_at:
                self._prune()
            weight = 1.0 if tenant is None else self._weights.get(tenant, 1.0)
            share = self._shares[tenant] = TenantShare(tenant, weight, self.floor)
        return share

    def push(self, share: TenantShare[T], rank: float, number: int, item: T) -> None:
        """Add an item. Of two with equal ranks the one with the lower number, which is unique, is next."""
        if share.num_waiting == 0:
            share.service = max(share.service, self.floor)
        heapq.heappush(share.heap, (rank, number, item))
        share.num_waiting += 1
        self._num_waiting += 1
        if not share.queued:
            share.queued = True
            heapq.heappush(self._order, (share.service, next(self._numbers), share))

    def raise_floor(self, running: Iterable[TenantShare[T]]) -> None:
        """Have tenants that begin to wait now start level with the least served waiting one, or else with `running`.

        Needed where tenants are charged between two items that are taken.
        """
        first = self._next_share()
        services = [share.service for share in running] if first is None else [first.service]
        self.floor = max(self.floor, min(services, default=0.0))

    def peek(self) -> T | None:
        """The next item; None when nothing waits."""
        share = self._next_share()
        if share is None:
            return None
        while not self._is_waiting(share.heap[0][2]):
            heapq.heappop(share.heap)
        return share.heap[0][2]

    def pop(self) -> T:
        """Take the item that `peek()` shows."""
        item = self.peek()
        assert item is not None
        share = self._order[0][2]
        heapq.heappop(share.heap)
        share.num_waiting -= 1
        self._num_waiting -= 1
        self.floor = max(self.floor, share.service)
        return item

    def left(self, share: TenantShare[T]) -> None:
        """Note that one of the tenant's items has left without being taken."""
        share.num_waiting -= 1
        self._num_waiting -= 1
        if share.num_waiting == 0:
            share.heap.clear()
        elif len(share.heap) > 2 * share.num_waiting + 64:
            share.heap = [entry for entry in share.heap if self._is_waiting(entry[2])]
            heapq.heapify(share.heap)

    def forget(self) -> None:
        """Start afresh. Nothing may wait or run, so that there is no contention to be fair about."""
        assert self._num_waiting == 0
        self._shares.clear()
        self._order.clear()
        self._prune_at = _MAX_REMEMBERED
        self.floor = 0.0

    def check_integrity(self, running: Sequence[TenantShare[T]], waiting: Sequence[TenantShare[T]]) -> None:
        """Assert that the counts are right, given the share of each running and of each waiting item."""
        assert len(self) == len(waiting)
        for share in {id(share): share for share in (*running, *waiting)}.values():
            assert share is self.share(share.name), "a tenant has two shares"
            assert share.num_running == sum(other is share for other in running)
            assert share.num_waiting == sum(other is share for other in waiting)

    def _next_share(self) -> TenantShare[T] | None:
        """The waiting tenant with the least service, which is then the first in `_order`."""
        order = self._order
        while order:
            service, number, share = order[0]
            if share.num_waiting == 0:
                heapq.heappop(order)
                share.queued = False
            elif share.service > service:
                heapq.heapreplace(order, (share.service, number, share))
            else:
                return share
        return None

    def _prune(self) -> None:
        """Forget tenants without items: those below the floor, which lose nothing, and the least served of the others.

        Called when the number of tenants has doubled, so it costs O(log n) for each tenant.
        """
        idle = [share for share in self._shares.values() if not (share.num_waiting or share.num_running)]
        indebted = sorted((share for share in idle if share.service > self.floor), key=lambda share: -share.service)
        kept = {share.name for share in indebted[:_MAX_REMEMBERED]}
        for share in idle:
            if share.name not in kept:
                del self._shares[share.name]
        self._prune_at = 2 * len(self._shares) + _MAX_REMEMBERED
