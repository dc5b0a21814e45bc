"""The snapshot of an engine's counts that `LLM.stats()` returns."""

from __future__ import annotations

import copy

from llmengine.engine.admission import Admission
from llmengine.engine.scheduler import Scheduler
from llmengine.engine.stats import EngineCounters, EngineStats


def take_stats(
    scheduler: Scheduler, admission: Admission, counters: EngineCounters, last_step_s: float, *, is_over: bool
) -> EngineStats:
    """Current counts. The engine runs on meanwhile: each count is right, but they are not all of one moment.

    An engine that `is_over` has no requests, whatever its scheduler was in the middle of when it failed.
    """
    kv_cache = scheduler.kv_cache
    num_used, num_cached = kv_cache.num_used_blocks, kv_cache.num_cached_blocks
    num_free = kv_cache.num_available_blocks - num_cached
    return EngineStats(
        num_running=0 if is_over else len(scheduler.running),
        num_waiting=0 if is_over else scheduler.num_waiting,
        num_paused=0 if is_over else scheduler.num_paused,
        num_queued=0 if is_over else admission.num_requests,
        num_used_blocks=0 if is_over else num_used,
        num_cached_blocks=num_cached,
        num_free_blocks=num_free + num_used if is_over else num_free,
        block_size=kv_cache.block_size,
        num_queried_tokens=kv_cache.num_queried_tokens,
        num_hit_tokens=kv_cache.num_hit_tokens,
        num_refused=admission.num_refused,
        last_step_s=last_step_s,
        counters=copy.copy(counters),
    )
