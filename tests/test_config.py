"""Configuration: ranges, mistyped names, and that it cannot change once it is resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmengine.config import KvCacheConfig, ModelConfig, ParallelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError

KINDS = [ParallelConfig, QuantConfig, KvCacheConfig, SchedulerConfig, lambda **values: ModelConfig("dir", **values)]

GOOD: list[tuple[Any, dict[str, Any]]] = [
    (KvCacheConfig, {"free_memory_fraction": 1.0}),
    (KvCacheConfig, {"free_memory_fraction": 1}),
    (KvCacheConfig, {"max_bytes": 1}),
    (KvCacheConfig, {"block_size": 1}),
    (KvCacheConfig, {"block_size": 256}),
    (KvCacheConfig, {"enable_prefix_caching": False}),
    (SchedulerConfig, {"max_batch_size": 1}),
    (SchedulerConfig, {"max_batch_size": 256}),
    (SchedulerConfig, {"max_tokens_per_mixed_step": 512}),
    (SchedulerConfig, {"max_tokens_per_mixed_step": 64}),
    (QuantConfig, {"weights": "int4", "group_size": 16}),
    (ModelConfig, {"model_dir": Path("dir"), "device": "cuda:3", "max_model_len": 2, "num_threads": 1}),
]
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (ParallelConfig, {"tp_size": 0}, "tp_size must be .*, not 0"),
    (ParallelConfig, {"tp_size": 2}, r"tp_size=2 is not supported: .* no tensor parallelism.*device='cuda:N'"),
    (ParallelConfig, {"pp_size": 2}, r"pp_size=2 is not supported: .* no pipeline parallelism.*device='cuda:N'"),
    (ParallelConfig, {"pp_size": True}, "pp_size must be .*, not True"),
    (QuantConfig, {"weights": "fp3"}, "weights must be .*, not 'fp3'"),
    (QuantConfig, {"weights": None}, "weights must be .*, not None"),
    (QuantConfig, {"group_size": 8}, "group_size must be .*, not 8"),
    (KvCacheConfig, {"free_memory_fraction": 0.0}, "free_memory_fraction must be .*, not 0.0"),
    (KvCacheConfig, {"free_memory_fraction": 1.1}, "free_memory_fraction must be .*, not 1.1"),
    (KvCacheConfig, {"free_memory_fraction": float("nan")}, "free_memory_fraction must be .*, not nan"),
    (KvCacheConfig, {"free_memory_fraction": "0.9"}, "free_memory_fraction must be .*, not '0.9'"),
    (KvCacheConfig, {"free_memory_fraction": True}, "free_memory_fraction must be .*, not True"),
    (KvCacheConfig, {"max_bytes": 0}, "max_bytes must be .*, not 0"),
    (KvCacheConfig, {"max_bytes": 1e9}, "max_bytes must be .*, not 1000000000.0"),
    (KvCacheConfig, {"block_size": 0}, "block_size must be .*, not 0"),
    (KvCacheConfig, {"block_size": 24}, "block_size must be a power of two, not 24"),
    (KvCacheConfig, {"enable_prefix_caching": "no"}, "enable_prefix_caching must be .*, not 'no'"),
    (SchedulerConfig, {"max_batch_size": 0}, "max_batch_size must be .*, not 0"),
    (SchedulerConfig, {"max_batch_size": "8"}, "max_batch_size must be an integer of at least 1, not '8'"),
    (SchedulerConfig, {"max_tokens_per_step": None}, "max_tokens_per_step must be an integer of at least 1, not None"),
    (SchedulerConfig, {"max_tokens_per_step": 32}, "max_tokens_per_step must be at least max_batch_size=64, not 32"),
    (
        SchedulerConfig,
        {"max_tokens_per_mixed_step": 32},
        r"max_tokens_per_mixed_step must be in \[max_batch_size=64, max_tokens_per_step=512\], not 32",
    ),
    (
        SchedulerConfig,
        {"max_tokens_per_mixed_step": 513},
        r"max_tokens_per_mixed_step must be in \[max_batch_size=64, max_tokens_per_step=512\], not 513",
    ),
    (SchedulerConfig, {"max_queued_requests": 0}, "max_queued_requests must be .*, not 0"),
    (SchedulerConfig, {"max_queued_tokens": -5}, "max_queued_tokens must be .*, not -5"),
    (SchedulerConfig, {"max_preemptions": 1.5}, "max_preemptions must be .*, not 1.5"),
    (ModelConfig, {"model_dir": ""}, "model_dir must be .*, not ''"),
    (ModelConfig, {"model_dir": None}, "model_dir must be .*, not None"),
    (ModelConfig, {"model_dir": "d", "dtype": "float8"}, "dtype must be .*, not 'float8'"),
    (ModelConfig, {"model_dir": "d", "backend": "vllm"}, "backend must be .*, not 'vllm'"),
    (ModelConfig, {"model_dir": "d", "attention_backend": "fa4"}, "attention_backend must be .*, not 'fa4'"),
    (ModelConfig, {"model_dir": "d", "load_format": "fast"}, "load_format must be .*, not 'fast'"),
    (ModelConfig, {"model_dir": "d", "device": "tpu"}, "device must be .*, not 'tpu'"),
    (ModelConfig, {"model_dir": "d", "device": "cuda:"}, "device must be .*, not 'cuda:'"),
    (ModelConfig, {"model_dir": "d", "device": "0"}, "device must be .*, not '0'"),
    (ModelConfig, {"model_dir": "d", "device": 0}, "device must be .*, not 0"),
    (ModelConfig, {"model_dir": "d", "max_model_len": 1}, "max_model_len must be .*, not 1"),
    (ModelConfig, {"model_dir": "d", "num_threads": 0}, "num_threads must be .*, not 0"),
    (
        ModelConfig,
        {"model_dir": "d", "kv_cache_config": {"block_size": 16}},
        "kv_cache_config must be a KvCacheConfig, not {'block_size': 16}",
    ),
    (ModelConfig, {"model_dir": "d", "quant_config": None}, "quant_config must be .*, not None"),
    (
        ModelConfig,
        {"model_dir": "d", "scheduler_config": KvCacheConfig()},
        "scheduler_config must be a SchedulerConfig, not KvCacheConfig",
    ),
]


@pytest.mark.parametrize(("kind", "values"), GOOD, ids=str)
def test_values_in_range(kind: Any, values: dict[str, Any]) -> None:
    resolved = kind(**values).resolve()
    for name, value in values.items():
        assert getattr(resolved, name) == value


@pytest.mark.parametrize(("kind", "values", "named"), BAD, ids=lambda item: getattr(item, "__name__", str(item)))
def test_values_out_of_range_are_refused_by_name(kind: Any, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        kind(**values).resolve()


@pytest.mark.parametrize("kind", KINDS)
def test_typos_raise_in_the_constructor_and_in_assignments(kind: Any) -> None:
    with pytest.raises(TypeError, match="max_btach_size"):
        kind(max_btach_size=3)
    config = kind()
    with pytest.raises(AttributeError):
        config.max_btach_size = 3


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_resolve(kind: Any) -> None:
    resolved = kind().resolve()
    assert resolved.resolve() == resolved


@pytest.mark.parametrize(
    ("given", "accelerator", "limits"),
    [
        ({}, False, (64, 512, 256)),
        ({}, True, (256, 2048, 1024)),
        ({"max_batch_size": 700}, False, (700, 700, 700)),
        ({"max_batch_size": 8}, True, (8, 2048, 1024)),
        ({"max_tokens_per_step": 100}, False, (64, 100, 100)),
        ({"max_tokens_per_step": 4096, "max_tokens_per_mixed_step": 300}, True, (256, 4096, 300)),
    ],
)
def test_limits_that_are_not_given_follow_the_device(
    given: dict[str, int], accelerator: bool, limits: tuple[int, int, int]
) -> None:
    for resolved in (
        SchedulerConfig(**given).resolve(accelerator),
        ModelConfig("d", scheduler_config=SchedulerConfig(**given)).resolve(accelerator).scheduler_config,
    ):
        assert (
            resolved.max_batch_size,
            resolved.max_tokens_per_step,
            resolved.max_tokens_per_mixed_step,
        ) == limits


def test_fault_of_a_part_is_found_from_the_whole() -> None:
    with pytest.raises(ConfigError, match="block_size must be a power of two, not 3"):
        ModelConfig("d", kv_cache_config=KvCacheConfig(block_size=3)).resolve()


def test_resolved_copy_is_fixed_and_the_original_is_not() -> None:
    config = ModelConfig("d")
    resolved = config.resolve()
    with pytest.raises(ConfigError, match=r"cannot be changed.*dtype='float16'"):
        resolved.dtype = "float16"
    with pytest.raises(ConfigError, match="cannot be changed"):
        resolved.scheduler_config.max_batch_size = 3
    with pytest.raises(ConfigError, match="cannot be changed"):
        resolved.quant_config.init_from_description(quantize_weights=True)
    config.dtype = "float16"
    config.scheduler_config.max_batch_size = 3
    assert resolved.dtype == "auto"
    assert resolved.scheduler_config.max_batch_size == 64
    assert resolved.resolve() == resolved


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ({}, "none"),
        ({"quantize_weights": True}, "int8"),
        ({"quantize_weights": True, "per_channel": True}, "int8"),
        ({"quantize_weights": True, "quantize_activations": True, "per_token": True, "per_channel": True}, "int8"),
        ({"quantize_weights": True, "use_int4_weights": True}, "int4"),
        ({"quantize_weights": True, "use_int4_weights": True, "per_group": True, "group_size": 64}, "int4"),
    ],
)
def test_descriptions_that_a_format_has(flags: dict[str, Any], weights: str) -> None:
    config = QuantConfig()
    config.init_from_description(**flags)
    assert config.weights == weights
    assert config.group_size == flags.get("group_size", 128)
    config.resolve()


@pytest.mark.parametrize(
    "flags",
    [
        {"quantize_activations": True},
        {"per_token": True},
        {"per_channel": True},
        {"per_group": True},
        {"use_int4_weights": True},
        {"quantize_weights": True, "use_int4_weights": True, "quantize_activations": True},
        {"quantize_weights": True, "per_group": True},
    ],
)
def test_descriptions_that_no_format_has(flags: dict[str, Any]) -> None:
    config = QuantConfig()
    with pytest.raises(ConfigError):
        config.init_from_description(**flags)
    assert config == QuantConfig()
