"""Configuration: ranges, mistyped names, and that it cannot change once it is resolved."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from llmengine.config import KvCacheConfig, ModelConfig, ParallelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.quant_config import PRESETS

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
    (ParallelConfig, {"tp_size": 2, "devices": ("cuda:0", "cuda:2")}),
    (ParallelConfig, {"tp_size": 2, "devices": ("cpu", "cpu")}),
    (QuantConfig, {"weights": "int4", "group_size": 16}),
    (ModelConfig, {"model_dir": Path("dir"), "device": "cuda:3", "max_model_len": 2, "num_threads": 1}),
]
BAD: list[tuple[Any, dict[str, Any], str]] = [
    (ParallelConfig, {"tp_size": 0}, "tp_size must be .*, not 0"),
    (ParallelConfig, {"pp_size": 0}, "pp_size must be .*, not 0"),
    (ParallelConfig, {"tp_size": 2, "devices": "cuda:0"}, "devices must be a list of devices, not 'cuda:0'"),
    (ParallelConfig, {"devices": {"cuda:0"}}, "devices must be a list of devices, not {'cuda:0'}"),
    (ParallelConfig, {"devices": ["cuda"]}, r"devices\[0\] must be 'cpu' or 'cuda:N', not 'cuda'"),
    (ParallelConfig, {"tp_size": 2, "devices": ["cpu", 1]}, r"devices\[1\] must be 'cpu' or 'cuda:N', not 1"),
    (ParallelConfig, {"devices": ["cuda:0", "cuda:2"]}, r"devices has 2 devices; tp_size \* pp_size is 1"),
    (ParallelConfig, {"tp_size": 3, "devices": ["cuda:1"] * 3}, r"devices\[1\]='cuda:1' is there twice"),
    (ParallelConfig, {"tp_size": 2, "devices": ["cpu", "cuda:1"]}, "devices must be all 'cpu' or all GPUs, not"),
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


W8A8 = {"quantize_weights": True, "quantize_activations": True}


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ({}, ("none", None, "none", None)),
        ({"quantize_weights": True}, ("int8", "channel", "none", "rtn")),
        ({"quantize_weights": True, "per_channel": True}, ("int8", "channel", "none", "rtn")),
        (W8A8, ("int8", "tensor", "tensor", "smoothquant")),
        ({**W8A8, "per_token": True}, ("int8", "tensor", "token", "smoothquant")),
        ({**W8A8, "per_channel": True}, ("int8", "channel", "tensor", "smoothquant")),
        ({**W8A8, "per_token": True, "per_channel": True}, ("int8", "channel", "token", "smoothquant")),
        ({"quantize_weights": True, "use_int4_weights": True}, ("int4", "channel", "none", "rtn")),
        (
            {"quantize_weights": True, "use_int4_weights": True, "per_group": True, "group_size": 64},
            ("int4", "group", "none", "awq"),
        ),
        ({"use_fp8_qdq": True}, ("fp8", "tensor", "token", "rtn")),
        ({**W8A8, "use_fp8_qdq": True}, ("fp8", "tensor", "token", "rtn")),
        ({"use_fp8_qdq": True, "per_channel": True, "per_token": True}, ("fp8", "channel", "token", "rtn")),
    ],
)
def test_descriptions_that_a_format_has(flags: dict[str, Any], settings: tuple[str | None, ...]) -> None:
    config = QuantConfig()
    config.init_from_description(**flags)
    assert config.weights == settings[0]
    assert config.group_size == flags.get("group_size", 128)
    resolved = config.resolve()
    assert (resolved.weights, resolved.scales, resolved.activations, resolved.method) == settings
    assert resolved.resolve() == resolved


def test_descriptions_of_the_kv_cache_go_with_any_weights() -> None:
    config = QuantConfig()
    config.init_from_description(use_int8_kv_cache=True)
    assert (config.weights, config.kv_cache) == ("none", "int8")
    config.init_from_description(**W8A8, use_fp8_kv_cache=True)
    assert (config.resolve().weights, config.kv_cache) == ("int8", "fp8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quantize_activations": True}, "quantize_activations=True needs quantize_weights=True or use_fp8_qdq=True"),
        ({"per_token": True}, "per_token=True needs quantize_activations=True or use_fp8_qdq=True"),
        ({"per_token": True, "quantize_weights": True}, "per_token=True needs quantize_activations=True"),
        ({"per_channel": True}, "per_channel=True needs quantize_weights=True or use_fp8_qdq=True"),
        ({"per_group": True}, "per_group=True needs use_int4_weights=True"),
        ({"use_int4_weights": True}, "use_int4_weights=True needs quantize_weights=True"),
        ({**W8A8, "use_int4_weights": True}, "use_int4_weights=True excludes quantize_activations=True: INT4 is for"),
        ({"quantize_weights": True, "per_group": True}, "per_group=True needs use_int4_weights=True"),
        (
            {"quantize_weights": True, "use_int4_weights": True, "per_channel": True},
            r"use_int4_weights=True excludes per_channel=True: .* \(per_group\)",
        ),
        ({"use_int4_weights": True, "use_fp8_qdq": True}, "use_fp8_qdq=True excludes use_int4_weights=True: FP8"),
        ({"use_fp8_qdq": True, "per_token": True}, "use_fp8_qdq=True needs both per_channel=True and per_token=True"),
        (
            {"use_int8_kv_cache": True, "use_fp8_kv_cache": True},
            "use_int8_kv_cache=True excludes use_fp8_kv_cache=True",
        ),
        ({"quantize_weights": "yes"}, "quantize_weights must be True or False, not 'yes'"),
    ],
)
def test_descriptions_that_no_format_has(flags: dict[str, Any], message: str) -> None:
    config = QuantConfig()
    with pytest.raises(ConfigError, match=message):
        config.init_from_description(**flags)
    assert config == QuantConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int3"}, "weights must be one of 'none', 'stored', 'int8', 'int4', 'fp8', 'mxfp4', not 'int3'"),
        (
            {"weights": "int4", "activations": "token"},
            r"activations='token' is not available with weights='int4'; .*'fp8'",
        ),
        (
            {"weights": "fp8", "activations": "tensor"},
            "activations='tensor' is not .* weights='fp8'; available: 'token'",
        ),
        ({"weights": "int8", "scales": "group"}, "scales='group' is not available with weights='int8'; .*: 'channel'"),
        ({"weights": "int8", "method": "awq"}, "method='awq' is not available with weights='int8'; available: 'rtn'"),
        ({"method": "awq"}, "method='awq' is not available with weights='none'; available: None"),
        (
            {"weights": "fp8", "activations": "token", "method": "awq"},
            "method='awq' .* and activations='token'; available: 'rtn', 'gptq'",
        ),
        ({"group_size": 24}, "group_size must be one of 16, 32, 64, 128, not 24"),
        ({"kv_cache": "int4"}, "kv_cache must be one of 'none', 'int8', 'fp8', not 'int4'"),
        ({"skip_layers": "lm_head"}, "skip_layers must be a sequence of strings, not 'lm_head'"),
        ({"skip_layers": ["lm_head", ""]}, r"skip_layers\[1\] must be a non-empty string, not ''"),
        ({"calibration_prompts": []}, "calibration_prompts must be a non-empty sequence of texts"),
        ({"calibration_prompts": [[1, 2], [3, "x"]]}, r"calibration_prompts\[1\] must be .* sequence of token ids"),
        ({"calibration_prompts": [[{"role": "user"}], [3]]}, r"calibration_prompts\[1\] must be a chat: a non-empty"),
        ({"calibration_prompts": ["a", [3]]}, r"calibration_prompts\[1\] must be a non-empty string"),
        ({"num_calibration_samples": 0}, "num_calibration_samples must be an integer of at least 1"),
        ({"calibration_seed": -1}, "calibration_seed must be an integer of at least 0"),
        ({"symmetric": 1}, "symmetric must be True or False"),
    ],
)
def test_quantization_that_is_not_there(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"quant_config.{message}"):
        ModelConfig("d", quant_config=QuantConfig(**settings)).resolve()


def test_presets() -> None:
    for name, settings in PRESETS.items():
        resolved = QuantConfig.preset(name).resolve()
        assert {key: getattr(resolved, key) for key in settings} == settings
    awq = ModelConfig("d", quant="int4-awq").resolve().quant_config
    assert (awq.weights, awq.method, awq.scales, awq.group_size) == ("int4", "awq", "group", 128)
    assert ModelConfig("d", quant="int8") == ModelConfig("d", quant_config=QuantConfig(weights="int8"))
    assert QuantConfig.preset("int4-rtn", group_size=32).group_size == 32
    with pytest.raises(ConfigError, match=r"quant must be one of 'stored', 'int8', .*'int4-awq'.*, not 'int3'"):
        ModelConfig("d", quant="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"quant='int8' excludes quant_config: use QuantConfig\.preset"):
        ModelConfig("d", quant="int8", quant_config=QuantConfig(weights="int4"))


def test_calibration_prompts_are_copied() -> None:
    prompts = [[1, 2], [3]]
    resolved = QuantConfig(weights="int4", calibration_prompts=prompts, skip_layers=["*.o"]).resolve()
    prompts[0].append(4)
    assert resolved.calibration_prompts == ((1, 2), (3,))
    assert resolved.skip_layers == ("*.o",)


def test_devices_of_ranks_win_over_the_device() -> None:
    parallel = ParallelConfig(tp_size=2, devices=["cuda:1", "cuda:3"])
    config = ModelConfig("d", device="cpu", parallel_config=parallel).resolve()
    assert config.device == "cuda:1"
    assert config.parallel_config.devices == ("cuda:1", "cuda:3")
    assert pickle.loads(pickle.dumps(config)).parallel_config.devices == ("cuda:1", "cuda:3")
    assert parallel.devices == ["cuda:1", "cuda:3"]
    assert config.resolve().device == "cuda:1"
