"""What a block consists of, and how many blocks a KV cache gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llmengine.backends.kv_layout import (
    BlockTensor,
    KvLayout,
    KvPool,
    byte_kv_layout,
    context_limit,
    fit_kv_pool,
    joint_kv_layout,
    split_kv_layout,
)
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.errors import ConfigError, OutOfMemoryError
from llmengine.models.arch import RopeConfig
from tests.models.arch_helpers import SMALL_ARCH

ARCH = replace(SMALL_ARCH, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=8)
LAYOUT = KvLayout(num_layers=1, block_size=16, tensors={"kv": BlockTensor((64,), torch.int8)})
"""A block takes 64 bytes."""


def make_config(max_batch_size: int = 4, max_model_len: int | None = None, **kv_cache: Any) -> ModelConfig:
    return ModelConfig(
        Path("model"),
        max_model_len=max_model_len,
        kv_cache_config=KvCacheConfig(**kv_cache),
        scheduler_config=SchedulerConfig(max_batch_size=max_batch_size),
    ).resolve()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_joint_block_holds_keys_then_values(dtype: torch.dtype) -> None:
    layout = joint_kv_layout(ARCH, 16, dtype)
    assert layout.tensors == {"kv": BlockTensor((2, 2, 16, 8), dtype)}
    assert layout.kv_dtype == str(dtype).removeprefix("torch.")
    assert layout.bytes_per_block == 3 * 2 * 2 * 16 * 8 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_joint_block_of_8_bits_has_scales(dtype: torch.dtype) -> None:
    layout = joint_kv_layout(replace(ARCH, head_dim=128), 16, dtype)
    assert layout.tensors == {
        "kv": BlockTensor((2, 2, 16, 128), dtype),
        "scales": BlockTensor((2, 2, 16), torch.float32),
    }
    assert layout.kv_dtype == str(dtype).removeprefix("torch.")
    assert layout.bytes_per_block == 3 * 2 * 2 * 16 * (128 + 4)


def test_a_split_block_has_transposed_keys_of_its_own() -> None:
    layout = split_kv_layout(ARCH, 16)
    assert {name: tensor.shape for name, tensor in layout.tensors.items()} == {"keys": (2, 8, 16), "values": (16, 2, 8)}
    assert layout.bytes_per_block == joint_kv_layout(ARCH, 16, torch.float32).bytes_per_block


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
def test_a_block_of_bytes_takes_a_quarter_and_its_scales(number_format: Literal["int8", "fp8"]) -> None:
    arch = replace(ARCH, head_dim=64)
    layout = byte_kv_layout(arch, 32, number_format)
    assert {name: tensor.shape for name, tensor in layout.tensors.items()} == {
        "keys": (2, 16, 32, 4),
        "values": (2, 8, 64, 4),
        "key_scales": (2, 32),
        "value_scales": (2, 32),
    }
    assert layout.bytes_per_block == 3 * 2 * 32 * 2 * (64 + 4)
    assert 3.7 < split_kv_layout(arch, 32).bytes_per_block / layout.bytes_per_block < 4
    assert layout.kv_dtype == {"int8": "int8", "fp8": "float8_e4m3fn"}[number_format]
    odd = byte_kv_layout(replace(ARCH, head_dim=10), 2, number_format)
    assert (odd.tensors["keys"].shape, odd.tensors["values"].shape) == ((2, 3, 2, 4), (2, 1, 10, 4))


def test_scales_are_tensors_of_the_block() -> None:
    tensors = {"kv": BlockTensor((2, 2, 16, 8), torch.int8), "kv_scales": BlockTensor((2, 2, 16), torch.float32)}
    layout = KvLayout(ARCH.num_layers, 16, tensors)
    assert layout.bytes_per_block == 3 * (2 * 2 * 16 * 8 + 4 * 2 * 2 * 16)
    pool = KvPool(layout, num_blocks=5, max_model_len=50)
    allocated = {name: pool.zeros(name, torch.device("cpu")) for name in tensors}
    assert sum(tensor.nbytes for tensor in allocated.values()) == pool.size_bytes == 5 * layout.bytes_per_block
    assert (allocated["kv_scales"].shape, allocated["kv_scales"].dtype) == ((3, 5, 2, 2, 16), torch.float32)
    assert pool.layer_shape("kv") == (5, 2, 2, 16, 8)


def test_a_pool_knows_its_tokens_without_the_null_block() -> None:
    pool = KvPool(LAYOUT, num_blocks=5, max_model_len=50)
    assert (pool.num_tokens, pool.max_blocks_per_request, pool.size_bytes) == (64, 4, 5 * 64)


@pytest.mark.parametrize(
    ("free_bytes", "settings", "expected"),
    [
        (64 * 100, {}, 50),  # half of it by default
        (64 * 100, {"free_memory_fraction": 0.2}, 20),
        (64 * 100, {"max_bytes": 64 * 30 + 63}, 30),
        (64 * 100, {"free_memory_fraction": 0.2, "max_bytes": 64 * 30}, 20),
        (1 << 30, {}, 4 * 25 + 1),  # no more than four requests of 400 tokens can use
    ],
)
def test_blocks_are_limited_by_memory_and_by_use(free_bytes: int, settings: dict[str, Any], expected: int) -> None:
    pool = fit_kv_pool(LAYOUT, make_config(**settings), 400, free_bytes, default_fraction=0.5)
    assert (pool.num_blocks, pool.max_model_len) == (expected, min(400, 16 * (expected - 1)))


def test_a_cache_for_less_than_a_small_context_is_refused() -> None:
    config = make_config(max_bytes=4 * 64)
    with pytest.raises(OutOfMemoryError, match=r"hold 3 blocks of 16 tokens .*for 64 tokens.*max_bytes=256 or "):
        fit_kv_pool(LAYOUT, config, 400, 1 << 20, default_fraction=0.5)
    assert fit_kv_pool(LAYOUT, config, 48, 1 << 20, default_fraction=0.5).num_blocks == 4


def test_the_context_is_the_models_or_what_its_rotary_encoding_is_stretched_to() -> None:
    assert context_limit(make_config(), ARCH) == 64
    assert context_limit(make_config(max_model_len=40), ARCH) == 40
    with pytest.raises(ConfigError, match=r"max_model_len=65 is above the model's max_position_embeddings=64$"):
        context_limit(make_config(max_model_len=65), ARCH)
    linear = RopeConfig(theta=1e4, original_max_position_embeddings=64, type="linear", factor=4.0)
    stretched = replace(ARCH, rope=linear)
    assert context_limit(make_config(max_model_len=256), stretched) == 256
    with pytest.raises(ConfigError, match=r"=64 and above the 256 that its rotary encoding is stretched to"):
        context_limit(make_config(max_model_len=257), stretched)
