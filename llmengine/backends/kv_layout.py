"""How many KV blocks fit: the same rules on every device."""

from __future__ import annotations

from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, OutOfMemoryError
from llmengine.models.arch import ModelArch
from llmengine.models.rope import stretched_context

_MIN_CONTEXT = 64
"""A KV cache for fewer tokens than this (or than the model's own limit) is refused: nothing useful would fit."""


def context_limit(config: ModelConfig, arch: ModelArch) -> int:
    """Return the most tokens that a request may have.

    That is the model's `max_position_embeddings` unless `max_model_len` says another number, which may be larger where
    a rotary encoding is stretched further: scaling is often added to a configuration that names the original length.
    Raises `ConfigError` for a number above both.
    """
    wanted, limit = config.max_model_len, arch.max_position_embeddings
    if wanted is None:
        return limit
    most = max(limit, stretched_context(arch.rope))
    if wanted > most:
        stretched = f" and above the {most} that its rotary encoding is stretched to" if most > limit else ""
        raise ConfigError(f"max_model_len={wanted} is above the model's max_position_embeddings={limit}{stretched}")
    return wanted


def num_kv_blocks(
    config: ModelConfig, limit: int, bytes_per_block: int, free_bytes: int, default_fraction: float
) -> int:
    """Return how many blocks the KV cache gets, `NULL_BLOCK` included: what memory allows, no more than can be used.

    Args:
        limit: most tokens of a request.
        free_bytes: memory that is free now.
        default_fraction: share of it that is taken if the configuration names none.

    Raises `OutOfMemoryError` if less than a small context fits.
    """
    kv = config.kv_cache_config
    fraction = default_fraction if kv.free_memory_fraction is None else kv.free_memory_fraction
    budget = int(free_bytes * fraction) if kv.max_bytes is None else min(int(free_bytes * fraction), kv.max_bytes)
    useful = config.scheduler_config.max_batch_size * -(-limit // kv.block_size) + 1
    num_blocks = min(budget // bytes_per_block, useful)
    if (num_blocks - 1) * kv.block_size < min(_MIN_CONTEXT, limit):
        raise OutOfMemoryError(
            f"KV cache: {budget / 2**20:.1f} MiB hold {max(num_blocks - 1, 0)} blocks of {kv.block_size} tokens "
            f"({bytes_per_block / 2**20:.2f} MiB each), too few for {min(_MIN_CONTEXT, limit)} tokens; "
            f"{free_bytes / 2**20:.0f} MiB are free: raise kv_cache_config.max_bytes={kv.max_bytes} or "
            f"free_memory_fraction={fraction}"
        )
    return num_blocks
