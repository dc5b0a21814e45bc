"""Architectures as data: config.json in both transformers dialects, round trip, canonical shapes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import transformers

from llmengine.checkpoints.arch_json import arch_from_dict, arch_to_dict
from llmengine.checkpoints.huggingface_arch import arch_from_hf_config
from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import LayerArch, RopeConfig, canonical_shapes, head_order
from llmengine.models.families import family_of

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


def test_a_scaling_that_was_added_wins_over_the_parameters() -> None:
    added = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    there = {"rope_type": "default", "rope_theta": 777.0}
    assert arch_of(rope_theta=5e5, rope_parameters=there, rope_scaling=added) == arch_of(
        rope_theta=5e5, rope_scaling=added
    )
    assert arch_of(rope_parameters=there, rope_scaling={}) == arch_of(rope_parameters=there)
    gemma = {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": {"full_attention": there}}
    rope = arch_of(**gemma, rope_scaling={"rope_type": "linear", "factor": 8.0}).rope
    assert (rope.type, rope.factor, rope.theta) == ("linear", 8.0, 777.0)


def test_keys_that_change_nothing_are_not_looked_at() -> None:
    assert arch_of(pretraining_tp=2) == arch_of()


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
        ("num_attention_heads", 4.5),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("head_dim", 7),
        ("max_position_embeddings", -1),
        ("rms_norm_eps", "1e-6"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", 1),
        ("attention_bias", "no"),
        ("architectures", 3),
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
        ("architectures", ["GPT2LMHeadModel"], "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ("architectures", [], "supported: LlamaForCausalLM"),
        ("hidden_act", "gelu", "gelu.*silu"),
        ("rope_scaling", {"type": "spiral"}, "spiral.*yarn"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ],
)
def test_unsupported_options_say_what_is_supported(key: str, value: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        arch_of(**{key: value})


def test_model_type_stands_in_for_absent_architectures() -> None:
    for found in (None, [], "LlamaForCausalLM", ["LlamaModel", "LlamaForCausalLM"]):
        assert arch_of(architectures=found, model_type="llama") == arch_of()
    assert arch_of(num_attention_heads=4.0, vocab_size=float(arch_of().vocab_size)) == arch_of()
    assert arch_of(architectures=None, model_type="llama").architecture == "LlamaForCausalLM"
    with pytest.raises(UnsupportedModelError, match="mamba"):
        arch_of(architectures=None, model_type="mamba")


@pytest.mark.parametrize("rope_scaling", [None, {"type": "yarn", "factor": 2.0, "attention_factor": 1.1}])
def test_dict_round_trip_survives_json(rope_scaling: Any) -> None:
    arch = arch_of(rope_scaling=rope_scaling, attention_bias=True, mlp_bias=True)
    assert arch_from_dict(json.loads(json.dumps(arch_to_dict(arch))), "engine.json") == arch


FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"layers": (LayerArch(4096), LayerArch(4096))},
    "Qwen2ForCausalLM": {"attention_bias": True, "attention_out_bias": False, "layers": ()},
    "Qwen3ForCausalLM": {"qk_norm": "head", "head_dim": 128, "attention_bias": False},
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "layers": ()},
    "GraniteForCausalLM": {"attention_scale": 1.0, "embedding_scale": 1.0, "logit_scale": 1.0},
    "SmolLM3ForCausalLM": {"tie_word_embeddings": True, "layers": ()},
    "Gemma2ForCausalLM": {
        "hidden_act": "gelu_tanh",
        "norm_placement": "both",
        "attention_soft_cap": 50.0,
        "logit_soft_cap": 30.0,
        "attention_scale": None,
        "embedding_scale": 32**0.5,
        "layers": (LayerArch(4096), LayerArch()),
        "float32_norms": True,
    },
    "Gemma3ForCausalLM": {
        "qk_norm": "head",
        "attention_soft_cap": None,
        "layers": (LayerArch(4096, "local"), LayerArch(4096, "local")),
        "local_rope": RopeConfig(theta=1e4, original_max_position_embeddings=128),
    },
    "Olmo2ForCausalLM": {"norm_placement": "post", "qk_norm": "projection", "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("architecture", FAMILY_DEFAULTS)
def test_families_have_the_defaults_of_transformers(architecture: str) -> None:
    arch = arch_of(architectures=[architecture])
    assert arch.architecture == architecture
    for name, value in FAMILY_DEFAULTS[architecture].items():
        assert getattr(arch, name) == value, name
    assert arch_from_dict(json.loads(json.dumps(arch_to_dict(arch))), "engine.json") == arch
    assert not arch.is_llama(8192) or architecture in ("Qwen2ForCausalLM", "Phi3ForCausalLM", "SmolLM3ForCausalLM")


@pytest.mark.parametrize("architecture", FAMILY_DEFAULTS)
def test_key_value_heads_that_are_not_named_are_those_of_transformers(architecture: str) -> None:
    arch = arch_of(architectures=[architecture], num_key_value_heads="absent", num_attention_heads=64, hidden_size=128)
    config = transformers.AutoConfig.for_model(family_of(arch).model_type, num_attention_heads=64, hidden_size=64)
    assert arch.num_kv_heads == config.num_key_value_heads


def test_layers_come_from_the_config() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert arch_of(**qwen).layers == ()
    assert arch_of(**qwen, use_sliding_window=True).layers == (LayerArch(), LayerArch(8))
    gemma = {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]}
    assert arch_of(**gemma, sliding_window=8).layers == (LayerArch(), LayerArch(8))
    smollm = {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [0, 1, 1]}
    assert arch_of(**smollm).layers == (LayerArch(None, "none"), LayerArch())
    mistral = arch_of(architectures=["MistralForCausalLM"], sliding_window=64)
    assert (mistral.is_llama(64), mistral.is_llama(65)) == (True, False)


def test_what_residuals_are_multiplied_by_is_in_the_embedding() -> None:
    granite = {"architectures": ["GraniteForCausalLM"], "rms_norm_eps": 1e-5, "logits_scaling": 8.0}
    arch = arch_of(**granite, embedding_multiplier=12.0, residual_multiplier=0.25, attention_multiplier=8**-0.5)
    assert (arch.embedding_scale, arch.logit_scale, arch.attention_scale) == (48.0, 0.125, None)
    assert arch.rms_norm_eps == pytest.approx(1.6e-4)


def test_scales_of_other_families_are_not_read() -> None:
    stray = {"attention_multiplier": 0.1, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 5.0}
    more = {"logits_scaling": 2.0, "residual_multiplier": 0.5, "sliding_window": 8, "use_sliding_window": True}
    assert arch_of(**stray, **more) == arch_of()


def test_longrope_and_partial_rotation() -> None:
    scaling = {"type": "su", "short_factor": [1, 1.5], "long_factor": [2.0, 3.0]}
    changes = {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5}
    rope = arch_of(**changes, rope_scaling=scaling, original_max_position_embeddings=32).rope
    assert (rope.type, rope.factor, rope.original_max_position_embeddings, rope.rotary_dim) == ("longrope", 4.0, 32, 4)
    assert (rope.short_factor, rope.long_factor) == ((1.0, 1.5), (2.0, 3.0))
    with pytest.raises(CorruptFileError, match="long_factor has 3 numbers, expected 2"):
        arch_of(**changes, rope_scaling={**scaling, "long_factor": [1, 2, 3]})
    assert head_order(arch_of(**changes)) == (0, 1, 4, 5, 2, 3, 6, 7)
    assert head_order(arch_of()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*supported: .*MistralForCausalLM"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "supported: .*Gemma3ForCausalLM"),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention", "linear_attention"]}, "linear_att"),
        ({"architectures": ["Qwen3ForCausalLM"], "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "separate parameters for each layer type"),
    ],
)
def test_families_refuse_what_they_do_not_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        arch_of(**changes)


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


def test_canonical_norms() -> None:
    both = canonical_shapes(arch_of(architectures=["Gemma3ForCausalLM"], head_dim=8))
    assert [(name, shape) for name, shape in both.items() if name.startswith("layers.1") and "norm" in name] == [
        ("layers.1.input_norm.weight", (32,)),
        ("layers.1.q_norm.weight", (8,)),
        ("layers.1.k_norm.weight", (8,)),
        ("layers.1.attention_out_norm.weight", (32,)),
        ("layers.1.post_attention_norm.weight", (32,)),
        ("layers.1.mlp_out_norm.weight", (32,)),
    ]
    post = canonical_shapes(arch_of(architectures=["Olmo2ForCausalLM"]))
    assert (post["layers.0.q_norm.weight"], post["layers.0.k_norm.weight"]) == ((32,), (16,))
    assert "layers.0.input_norm.weight" not in post


def test_opening_a_model_needs_no_torch() -> None:
    code = "import sys, llmengine.checkpoints.opening; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
