"""BlockAllocator: which KV blocks a request gets."""

from __future__ import annotations

from collections.abc import Sequence

from llmengine.engine.grammar_steps import is_quick
from llmengine.engine.kv_cache import KVCacheManager
from llmengine.engine.request import Request
from llmengine.engine.step_plan import StepPlan


class BlockAllocator:
    """Fills the block tables of requests: from the prefix cache, from relatives, and with new blocks.

    Whether there is room is the scheduler's business, which preempts for it. Engine thread only.

    Args:
        max_samples: most tokens that a step samples for one request (`BackendInfo.max_samples`).
    """

    def __init__(self, kv_cache: KVCacheManager, max_samples: int) -> None:
        self._kv_cache = kv_cache
        self._max_samples = max_samples

    def find(self, plan: StepPlan, request: Request) -> int:
        """Fill the request's table with blocks that hold its first tokens; return how many tokens they hold.

        They come from the prefix cache or, where that has fewer, from a relative whose prompt launched steps compute.
        A relative's last, partly filled block is not shared: at most a block's tokens are computed again.
        """
        if request.lacks_prompt_logprobs:
            return 0
        kv_cache = self._kv_cache
        num_tokens = kv_cache.match_prefix(request.blocks, request.token_ids)
        num_blocks = (len(request.prompt_token_ids) - 1) // kv_cache.block_size
        num_shared = num_blocks * kv_cache.block_size
        if request.family is None or num_tokens >= num_shared:
            return num_tokens
        for relative in request.relatives:
            if relative.slot is not None and plan.num_launched_tokens(relative) >= num_shared:
                kv_cache.free(request.blocks)
                kv_cache.fork(relative.blocks, request.blocks, num_blocks)
                return num_shared
        return num_tokens

    def grow(self, request: Request, num_tokens: int) -> Sequence[int]:
        """Newly allocated blocks, so that the request has blocks for its first `num_tokens` tokens."""
        num_blocks = len(request.blocks.block_ids)
        allocated = self._kv_cache.allocate(request.blocks, num_tokens)
        assert allocated, "no room was made for a decode"
        return request.blocks.block_ids[num_blocks:]

    def grow_for_samples(self, request: Request, end: int, num_reserved: int) -> tuple[Sequence[int], int]:
        """New blocks for tokens that may be sampled after the one at `end`, and how many samples there is room for.

        All but the last of them are computed in the same step. `num_reserved` blocks are left over.
        """
        if request.grammar is not None and not is_quick(request.grammar):
            return (), 1  # checking several tokens would hold up the other requests
        block_size = self._kv_cache.block_size
        num_samples = min(self._max_samples, request.max_total_tokens - end)
        block_ids = request.blocks.block_ids
        num_missing = self._kv_cache.blocks_for(end + num_samples - 1) - len(block_ids)
        num_spare = self._kv_cache.num_available_blocks - num_reserved
        new_block_ids: Sequence[int] = ()
        if num_missing > 0 and num_spare > 0:
            new_block_ids = self.grow(request, (len(block_ids) + min(num_missing, num_spare)) * block_size)
        return new_block_ids, min(num_samples, 1 + len(block_ids) * block_size - end)

    def forget_prefix(self, request: Request) -> None:
        """Make the blocks unfindable that were computed for this request and that no other one refers to."""
        if request.num_preemptions and not request.blocks.block_ids:
            self._kv_cache.match_prefix(request.blocks, request.token_ids)
        num_kept = request.relatives[0].stream.log.num_cached_tokens // self._kv_cache.block_size
        self._kv_cache.forget(request.blocks, num_kept)
        if request.slot is None:
            self._kv_cache.free(request.blocks)
