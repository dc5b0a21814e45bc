"""The KV cache of every backend: what a block consists of, and how many blocks fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from llmengine.config import ModelConfig
from llmengine.dtypes import dtype_name
from llmengine.errors import ConfigError, OutOfMemoryError
from llmengine.models.arch import ModelArch
from llmengine.models.rope import stretched_context

_MIN_CONTEXT = 64
"""A KV cache for fewer tokens than this (or than the model's own limit) is refused: nothing useful would fit."""

KV_QUAD = 4
"""Bytes that lie together in `byte_kv_layout`."""


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """One of the tensors that a block consists of, in one layer.

    Attributes:
        shape: of one block.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Tensors that hold the keys and values of one block of tokens; every layer has the same.

    Attributes:
        block_size: tokens per block.
        tensors: by name. All that a block occupies is listed here: scales of a quantized cache are tensors too.
    """

    num_layers: int
    block_size: int
    tensors: Mapping[str, BlockTensor]

    @property
    def kv_dtype(self) -> str:
        """The dtype of keys and values, as `BackendInfo.kv_dtype` has it; values tell, since keys may be biased."""
        return dtype_name(self.tensors["values" if "values" in self.tensors else "kv"].dtype)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * sum(tensor.size_bytes for tensor in self.tensors.values())


def joint_kv_layout(arch: ModelArch, block_size: int, dtype: torch.dtype) -> KvLayout:
    """Layout with a tensor "kv", [2, num_kv_heads, block_size, head_dim]: the keys, then the values.

    For a dtype of 8 bits there is also "scales", float32 [2, num_kv_heads, block_size]: what a token's key or value of
    a head is multiplied by.
    """
    shape = (2, arch.num_kv_heads, block_size, arch.head_dim)
    tensors = {"kv": BlockTensor(shape, dtype)}
    if dtype.itemsize == 1:
        tensors["scales"] = BlockTensor(shape[:-1], torch.float32)
    return KvLayout(arch.num_layers, block_size, tensors)


def split_kv_layout(arch: ModelArch, block_size: int) -> KvLayout:
    """Layout in float32 with transposed "keys" and plain "values".

    Keys are [num_kv_heads, head_dim, block_size], values are [block_size, num_kv_heads, head_dim].
    """
    heads, dim = arch.num_kv_heads, arch.head_dim
    tensors = {
        "keys": BlockTensor((heads, dim, block_size), torch.float32),
        "values": BlockTensor((block_size, heads, dim), torch.float32),
    }
    return KvLayout(arch.num_layers, block_size, tensors)


def byte_kv_layout(arch: ModelArch, block_size: int, number_format: Literal["int8", "fp8"]) -> KvLayout:
    """Layout in 8 bits, with a float32 scale for each token's key and value of each head.

    Four numbers that one instruction multiplies and adds lie together: of a key, four neighbouring dimensions, and of
    values, those of four neighbouring positions in one dimension. Keys are
    [num_kv_heads, head_dim / 4, block_size, 4], values are [num_kv_heads, block_size / 4, head_dim, 4], each rounded up
    to whole quads, and both scales are [num_kv_heads, block_size].

    Keys of int8 are stored as uint8 with 128 added; FP8 is e4m3.
    """
    heads, dim = arch.num_kv_heads, arch.head_dim
    dtypes = {"int8": (torch.uint8, torch.int8), "fp8": (torch.float8_e4m3fn, torch.float8_e4m3fn)}
    keys, values = dtypes[number_format]
    scales = BlockTensor((heads, block_size), torch.float32)
    tensors = {
        "keys": BlockTensor((heads, -(-dim // KV_QUAD), block_size, KV_QUAD), keys),
        "values": BlockTensor((heads, -(-block_size // KV_QUAD), dim, KV_QUAD), values),
        "key_scales": scales,
        "value_scales": scales,
    }
    return KvLayout(arch.num_layers, block_size, tensors)


@dataclass(frozen=True, slots=True)
class KvPool:
    """Size of a KV cache, which says everything that has to be allocated for it.

    Attributes:
        num_blocks: blocks of the cache, `NULL_BLOCK` included.
        max_model_len: most tokens of one request; a cache without other requests has room for them.
    """

    layout: KvLayout
    num_blocks: int
    max_model_len: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache has room for."""
        return (self.num_blocks - 1) * self.layout.block_size

    @property
    def max_blocks_per_request(self) -> int:
        """Blocks of the longest request."""
        return -(-self.max_model_len // self.layout.block_size)

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.layout.bytes_per_block

    def layer_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one layer's tensor: [num_blocks, *block]."""
        return (self.num_blocks, *self.layout.tensors[name].shape)

    def zeros(self, name: str, device: torch.device) -> torch.Tensor:
        """Allocate a tensor of all layers, [num_layers, num_blocks, *block].

        It holds zeros because values that an attention masks out must still be finite.
        """
        shape = (self.layout.num_layers, *self.layer_shape(name))
        return torch.zeros(shape, dtype=self.layout.tensors[name].dtype, device=device)


def context_limit(config: ModelConfig, arch: ModelArch) -> int:
    """Most tokens that a request may have, however large the KV cache is.

    This is the model's `max_position_embeddings` unless `max_model_len` gives another number. That number may be larger
    where a rotary encoding is stretched further: scaling is often added to a configuration that names the original
    length. Raises `ConfigError` if `max_model_len` is above both.
    """
    wanted, limit = config.max_model_len, arch.max_position_embeddings
    if wanted is None:
        return limit
    most = max(limit, stretched_context(arch.rope))
    if wanted > most:
        stretched = f" and above the {most} that its rotary encoding is stretched to" if most > limit else ""
        raise ConfigError(f"max_model_len={wanted} is above the model's max_position_embeddings={limit}{stretched}")
    return wanted


def fit_kv_pool(layout: KvLayout, config: ModelConfig, limit: int, free_bytes: int, default_fraction: float) -> KvPool:
    """Size the KV cache: as many blocks as memory allows, but no more than requests can use.

    Args:
        limit: most tokens of a request, see `context_limit`.
        free_bytes: memory that is free now.
        default_fraction: share of it that the cache takes if the configuration names none.

    Raises `OutOfMemoryError` if the memory does not hold even a small context.
    """
    kv, bytes_per_block = config.kv_cache_config, layout.bytes_per_block
    fraction = default_fraction if kv.free_memory_fraction is None else kv.free_memory_fraction
    budget = int(free_bytes * fraction) if kv.max_bytes is None else min(int(free_bytes * fraction), kv.max_bytes)
    useful = config.scheduler_config.max_batch_size * -(-limit // layout.block_size) + 1
    num_blocks = min(budget // bytes_per_block, useful)
    num_tokens = (num_blocks - 1) * layout.block_size
    if num_tokens < min(_MIN_CONTEXT, limit):
        raise OutOfMemoryError(
            f"KV cache: {budget / 2**20:.1f} MiB hold {max(num_blocks - 1, 0)} blocks of {layout.block_size} tokens "
            f"({bytes_per_block / 2**20:.2f} MiB each), too few for {min(_MIN_CONTEXT, limit)} tokens; "
            f"{free_bytes / 2**20:.0f} MiB are free: raise kv_cache_config.max_bytes={kv.max_bytes} or "
            f"free_memory_fraction={fraction}"
        )
    return KvPool(layout, num_blocks, max_model_len=min(limit, num_tokens))
