"""Architectures as data: config.json in both transformers dialects, round trip, canonical shapes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import arch_from_dict, arch_from_hf_config, arch_to_dict, canonical_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def arch_of(**changes: Any):
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value != "absent"}
    return arch_from_hf_config(config, "m/config.json")


def test_defaults_are_those_of_transformers() -> None:
    arch = arch_of(num_key_value_heads=None, max_position_embeddings="absent")
    assert (arch.num_kv_heads, arch.head_dim, arch.max_position_embeddings) == (4, 8, 2048)
    assert (arch.rms_norm_eps, arch.tie_word_embeddings, arch.attention_bias, arch.mlp_bias) == (
        1e-6,
        False,
        False,
        False,
    )
    assert (arch.rope.theta, arch.rope.type, arch.rope.original_max_position_embeddings) == (10000.0, "default", 2048)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "llama3", "yarn"])
def test_both_dialects_say_the_same(rope_type: str) -> None:
    values = LLAMA3 if rope_type in ("llama3", "yarn") else {"factor": 4.0}
    old = arch_of(rope_theta=5e5, rope_scaling={"type": rope_type, **values})
    new = arch_of(rope_parameters={"rope_type": rope_type, "rope_theta": 5e5, **values})
    assert old == new
    assert new.rope.type == rope_type
    assert new.rope.theta == 5e5
    assert new.rope.factor == values["factor"]
    assert new.rope.original_max_position_embeddings == (64 if "low_freq_factor" in values else 128)


def test_yarn_options_and_derived_factor() -> None:
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 32, "mscale": 0.7, "truncate": False}
    rope = arch_of(rope_scaling=scaling).rope
    assert (rope.factor, rope.mscale, rope.mscale_all_dim, rope.attention_factor) == (4.0, 0.7, None, None)
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "absent"),
        ("hidden_size", "32"),
        ("hidden_size", 33),
        ("hidden_size", True),
        ("intermediate_size", 0),
        ("num_hidden_layers", 10**12),
        ("num_attention_heads", 4.0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("head_dim", 7),
        ("max_position_embeddings", -1),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", 1),
        ("attention_bias", "no"),
        ("architectures", "LlamaForCausalLM"),
        ("rope_theta", -1.0),
        ("rope_theta", 10**400),
        ("rope_scaling", [1]),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
        ("rope_scaling", {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ("rope_scaling", {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
        ("rope_scaling", {"type": 3}),
    ],
)
def test_wrong_values_name_file_and_key(key: str, value: Any) -> None:
    with pytest.raises(CorruptFileError, match=r"m/config\.json") as caught:
        arch_of(**{key: value})
    words = {"num_key_value_heads": "key-value|num_key", "rope_scaling": "rope|factor", "head_dim": "head_dim"}
    assert caught.match(words.get(key, key))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["GPT2LMHeadModel"], "GPT2LMHeadModel.*supported are: LlamaForCausalLM"),
        ("architectures", [], "supported are: LlamaForCausalLM"),
        ("hidden_act", "gelu", "gelu.*silu"),
        ("pretraining_tp", 2, "pretraining_tp=2"),
        ("quantization_config", {"quant_method": "gptq"}, "gptq"),
        ("rope_scaling", {"type": "longrope"}, "longrope.*yarn"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ],
)
def test_unsupported_options_say_what_is_supported(key: str, value: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        arch_of(**{key: value})


def test_model_type_stands_in_for_absent_architectures() -> None:
    assert arch_of(architectures=None, model_type="llama").architecture == "LlamaForCausalLM"
    with pytest.raises(UnsupportedModelError, match="mamba"):
        arch_of(architectures=None, model_type="mamba")


@pytest.mark.parametrize("rope_scaling", [None, {"type": "yarn", "factor": 2.0, "attention_factor": 1.1}])
def test_dict_round_trip_survives_json(rope_scaling: Any) -> None:
    arch = arch_of(rope_scaling=rope_scaling, attention_bias=True, mlp_bias=True)
    assert arch_from_dict(json.loads(json.dumps(arch_to_dict(arch))), "engine.json") == arch


def test_dict_is_read_strictly() -> None:
    good = arch_to_dict(arch_of())
    for key in good:
        with pytest.raises(CorruptFileError, match=key):
            arch_from_dict({name: value for name, value in good.items() if name != key}, "engine.json")
        with pytest.raises((CorruptFileError, UnsupportedModelError)):
            arch_from_dict({**good, key: object()}, "engine.json")
    with pytest.raises(CorruptFileError, match="surprise"):
        arch_from_dict({**good, "surprise": 1}, "engine.json")
    with pytest.raises(CorruptFileError, match="rope"):
        arch_from_dict({**good, "rope": {**good["rope"], "type": "spiral"}}, "engine.json")


def test_canonical_shapes_in_stream_order() -> None:
    arch = dataclasses.replace(arch_of(attention_bias=True, mlp_bias=True), num_layers=1)
    assert list(canonical_shapes(arch).items()) == [
        ("embed_tokens.weight", (96, 32)),
        ("layers.0.input_norm.weight", (32,)),
        ("layers.0.qkv.weight", (64, 32)),
        ("layers.0.qkv.bias", (64,)),
        ("layers.0.o.weight", (32, 32)),
        ("layers.0.o.bias", (32,)),
        ("layers.0.post_attention_norm.weight", (32,)),
        ("layers.0.gate_up.weight", (96, 32)),
        ("layers.0.gate_up.bias", (96,)),
        ("layers.0.down.weight", (32, 48)),
        ("layers.0.down.bias", (32,)),
        ("final_norm.weight", (32,)),
        ("lm_head.weight", (96, 32)),
    ]
    plain = canonical_shapes(arch_of(tie_word_embeddings=True))
    assert "lm_head.weight" not in plain
    assert not any(name.endswith("bias") for name in plain)


def test_opening_a_model_needs_no_torch() -> None:
    code = "import sys, llmengine.models.source; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
