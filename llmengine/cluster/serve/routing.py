"""PrefixRequestRouter: our router of replicas, on Serve's interface for routers.

It runs in a gateway, whose requests it sees; what other gateways send to a replica shows in the load that the replica
tells of with each request that it accepts.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from llmengine.cluster.router import PrefixKeys, Router
from llmengine.cluster.serve.forwarded import ForwardedRequest


class PrefixRequestRouter(RequestRouter):  # type: ignore[misc]  # Ray is not type checked
    """Gives a request to the replica where `Router` finds it cheapest; if that is full, to the least loaded other."""

    def initialize_state(self, **kwargs: Any) -> None:
        """See Serve's `RequestRouter`; there are no arguments."""
        self._prefixes = Router()
        self._numbers: dict[ReplicaID, int] = {}
        self._next_number = itertools.count()
        self._on_their_way: dict[int, tuple[int, weakref.ref[Any]]] = {}
        """id of a request -> the replica that was chosen for it, and the request, until a replica has accepted it."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, and after it all others, of which Serve takes the least loaded that has room.

        A request that names a response goes to the replica that keeps it, and waits there for room.
        """
        keys = _keys(pending_request)
        known = {replica.replica_id: replica for replica in candidate_replicas}
        keeper = _keeper(pending_request)
        if keeping := [replica for name, replica in known.items() if name.unique_id == keeper]:
            return [keeping]
        if keys is None or len(known) < 2:
            return [list(known.values())]
        await self._probe_queue_lens([known[name] for name in known if self._queue_len(name) is None], 0)
        loads = {self._number(name): self._load(replica) for name, replica in known.items()}
        for number, count in self._num_on_their_way().items():
            if number in loads:
                loads[number] += count
        chosen = self._prefixes.choose(loads, keys)
        self._on_their_way[id(pending_request)] = chosen, weakref.ref(pending_request)
        # At once, so that the same prompt goes to the same replica if it comes again before this one was accepted.
        self._prefixes.note(chosen, keys)
        best = [replica for name, replica in known.items() if self._number(name) == chosen]
        return [best, [replica for replica in known.values() if replica not in best]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """A replica has accepted a request: it will know the prompt, whether it was the best or not."""
        self._on_their_way.pop(id(pending_request), None)
        if (keys := _keys(pending_request)) is not None:
            self._prefixes.note(self._number(replica_id), keys)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """See Serve's `RequestRouter`. What replicas that are gone have seen is forgotten."""
        super().update_replicas(replicas)
        for name in self._numbers.keys() - self.curr_replicas.keys():
            self._prefixes.forget(self._numbers.pop(name))

    def _num_on_their_way(self) -> Counter[int]:
        """Requests for each replica that do not count in its load yet. Those that are given up are forgotten."""
        gone = [key for key, (_, request) in self._on_their_way.items() if request() is None]
        for key in gone:
            del self._on_their_way[key]
        return Counter(number for number, _ in self._on_their_way.values())

    def _number(self, name: ReplicaID) -> int:
        if name not in self._numbers:
            self._numbers[name] = next(self._next_number)
        return self._numbers[name]

    def _queue_len(self, name: ReplicaID) -> int | None:
        """Requests that a replica has, as far as is known; None if nothing was heard of it for a while."""
        found: int | None = self.replica_queue_len_cache.get(name)
        return found

    def _load(self, replica: RunningReplica) -> int:
        """Requests that a replica has; of one that does not answer, as many as it can have."""
        load = self._queue_len(replica.replica_id)
        return int(replica.max_ongoing_requests) if load is None else load


def _forwarded(request: PendingRequest | None) -> ForwardedRequest | None:
    """The HTTP request that a replica is wanted for; None for another call."""
    argument = request.args[0] if request is not None and request.args else None
    return argument if isinstance(argument, ForwardedRequest) else None


def _keys(request: PendingRequest | None) -> PrefixKeys | None:
    forwarded = _forwarded(request)
    return None if forwarded is None else forwarded.keys


def _keeper(request: PendingRequest | None) -> str | None:
    forwarded = _forwarded(request)
    return None if forwarded is None else forwarded.keeper
