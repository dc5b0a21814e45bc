"""Logits of whole texts from a running engine, by which its model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmengine.batch import Backend, Batch, BatchRow, ScoringBackend, SlotInit
from llmengine.engine.scheduler import Scheduler
from llmengine.errors import ConfigError
from llmengine.sampling_params import SamplingParams

_MAX_LOGITS = 1 << 26
"""Logits of a step: 256 MiB."""

_LEAST_TOKENS = 64
"""Tokens of a step, however large the vocabulary is."""

_SCORING_STEP = -1
"""The number of a step that the scheduler does not know of."""


def score_tokens(scheduler: Scheduler, backend: Backend, token_ids: Sequence[int], take: Callable[[Any], None]) -> None:
    """Compute the tokens' logits and hand them to `take`, fp32 [n, vocab_size] at a time, in order.

    A slot and KV blocks that no request has are borrowed meanwhile. The tokens are cut into steps as a prompt's are;
    nothing comes from the prefix cache and nothing is left in it. Runs on the engine thread, between two steps.

    Raises `QueueFullError` if no slot is free, or too few blocks; `ConfigError` if the backend does not give logits;
    and what `take` raises.
    """
    if not isinstance(backend, ScoringBackend):
        raise ConfigError(f"{backend.info.description}: the backend has no score(), so its model cannot be evaluated")
    limit = max(_LEAST_TOKENS, _MAX_LOGITS // backend.info.vocab_size)
    size = min(limit, scheduler.config.max_tokens_per_step)
    with scheduler.borrowed(len(token_ids)) as (slot, blocks):
        init = SlotInit(slot, token_ids, len(token_ids), SamplingParams(), 0, frozenset())
        for begin in range(0, len(token_ids), size):
            part = token_ids[begin : begin + size]
            row = BatchRow(slot, begin, len(part), part, () if begin else tuple(blocks.block_ids), 0)
            for logits in backend.score(Batch(_SCORING_STEP, (row,), () if begin else (init,))):
                take(logits)
