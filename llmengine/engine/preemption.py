"""The choice of the request to preempt when running requests need more KV blocks than are left."""

from __future__ import annotations

from collections.abc import Sequence

from llmengine.config import SchedulerConfig
from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.request import Request


def choose_victim(running: Sequence[Request], kv_cache: KVCacheManager, config: SchedulerConfig) -> Request:
    """The running request to preempt; its tenants' shares are settled.

    It is of the tenant that was served the most for its weight. Of that tenant's requests it has an effective priority
    within one level of the lowest. Of these it is the cheapest to compute again, where each earlier preemption of the
    request doubles the cost; of equals, the last in rank. A request that was preempted `max_preemptions` times is
    spared if there is another.
    """
    # Any of them helps: its last block is its own, or it is full and the request is among those that need one.
    candidates = [request for request in running if request.num_preemptions < config.max_preemptions] or running
    most_served = max(request.share.service for request in candidates)
    candidates = [request for request in candidates if request.share.service == most_served]
    highest_rank = max(request.rank for request in candidates)
    peers = [request for request in candidates if request.rank > highest_rank - config.priority_ageing_s]
    return min(peers, key=lambda request: (_recompute_cost(request, kv_cache), -request.rank, -request.request_id))


def _recompute_cost(request: Request, kv_cache: KVCacheManager) -> int:
    """Tokens that are lost with the blocks that no other request keeps, weighted."""
    num_kept = kv_cache.num_shared_blocks(request.blocks) * kv_cache.block_size
    return max(0, request.num_computed_tokens - num_kept) << request.num_preemptions
