"""Residency: which requests hold slots and KV blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from llmengine.config import SchedulerConfig
from llmengine.engine.block_allocation import BlockAllocator
from llmengine.engine.kv_cache import BlockTable, KVCacheManager
from llmengine.engine.paused_requests import PausedRequests
from llmengine.engine.request import Request
from llmengine.engine.stats import EngineCounters
from llmengine.engine.step_plan import StepPlan
from llmengine.errors import QueueFullError


class Residency:
    """Gives slots and blocks to requests and takes them back. Engine thread only.

    Paused requests keep theirs until others need them. The scheduler decides which running request to preempt.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv_cache: KVCacheManager,
        allocator: BlockAllocator,
        paused: PausedRequests,
        counters: EngineCounters,
    ) -> None:
        self._config = config
        self._kv_cache = kv_cache
        self._allocator = allocator
        self._paused = paused
        self._counters = counters
        self._free_slots = list(range(config.max_batch_size))

    @property
    def has_slot(self) -> bool:
        """True if `take_slot` has one to give."""
        return bool(self._free_slots) or self._paused.has_residents

    def take_slot(self, request: Request) -> None:
        """Give the request a slot."""
        if not self._free_slots:
            self.evict_paused()
        request.slot = self._free_slots.pop()
        request.share.num_running += 1

    def take_blocks(self, plan: StepPlan, request: Request, num_running: int) -> int | None:
        """Give the request blocks for all of its tokens; return how many of these are computed already.

        None, and no change, if too few are left: one block is reserved for each running request to grow into, and one
        more of those for each time that the request was preempted, up to `max_preemptions` times. A request that lost
        its place to a lack of room comes back when there is more of it.
        """
        kv_cache = self._kv_cache
        reserve = num_running * (1 + min(request.num_preemptions, self._config.max_preemptions))
        while kv_cache.num_available_blocks <= reserve:
            if not self.evict_paused():
                # Its prefix is not looked up in each step: the final token needs a block of its own anyway.
                return None
        num_cached_tokens = self._allocator.find(plan, request)
        missing = kv_cache.blocks_for(len(request.token_ids)) - len(request.blocks.block_ids)
        while kv_cache.num_available_blocks < missing + reserve and self.evict_paused():
            pass
        if kv_cache.num_available_blocks < missing + reserve or not kv_cache.allocate(
            request.blocks, len(request.token_ids)
        ):
            kv_cache.free(request.blocks)
            return None
        return num_cached_tokens

    def release(self, request: Request) -> None:
        """Take slot and blocks back; nothing of the request is computed then."""
        assert request.slot is not None
        request.charge_tenant()
        request.share.num_running -= 1
        self._free_slots.append(request.slot)
        request.slot = None
        self._kv_cache.free(request.blocks)
        request.num_computed_tokens = 0

    def evict(self, request: Request) -> None:
        """`release` a request that will need slot and blocks again."""
        self.release(request)
        request.num_preemptions += 1
        request.stream.log.num_preemptions += 1
        self._counters.num_preemptions += 1

    def evict_paused(self) -> bool:
        """Evict the longest paused request that has a slot; False if there is none."""
        if (request := self._paused.pop_resident()) is None:
            return False
        self.evict(request)
        return True

    @contextmanager
    def borrowed(self, num_tokens: int) -> Iterator[tuple[int, BlockTable]]:
        """A slot and blocks for `num_tokens` tokens, which are given back, without a trace in the prefix cache.

        Raises `QueueFullError` if no slot is free, or too few blocks.
        """
        blocks = BlockTable()
        if not self._free_slots:
            raise QueueFullError(
                f"all {self._config.max_batch_size} slots are taken by requests; wait until one is free"
            )
        if not self._kv_cache.allocate(blocks, num_tokens):
            raise QueueFullError(
                f"{num_tokens} tokens need {self._kv_cache.blocks_for(num_tokens)} KV blocks; "
                f"{self._kv_cache.num_available_blocks} are free: wait until fewer requests run"
            )
        slot = self._free_slots.pop()
        try:
            yield slot, blocks
        finally:
            self._free_slots.append(slot)
            self._kv_cache.free(blocks)

    def check_integrity(self, running: Sequence[Request], requests: Iterable[Request]) -> None:
        """Assert that each slot is free or belongs to one request, and that only unfinished requests have blocks."""
        residents = [*running, *self._paused.residents]
        slots = [request.slot for request in residents]
        assert sorted([*self._free_slots, *(s for s in slots if s is not None)]) == list(
            range(self._config.max_batch_size)
        ), "slots leaked or shared"
        for request in residents:
            assert len(request.blocks.block_ids) >= self._kv_cache.blocks_for(request.num_computed_tokens)
        self._paused.check_integrity()
        self._kv_cache.check_integrity(request.blocks for request in requests)
