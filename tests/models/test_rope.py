"""`rope_table` against transformers' rotary embedding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from llmengine.checkpoints.huggingface_arch import arch_from_hf_config
from llmengine.models.arch import LayerArch, RopeConfig
from llmengine.models.rope import inverse_frequencies, layer_tables, rope_table

LENGTH = 128
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
CASES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 64},
    {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    YARN,
    {**YARN, "attention_factor": 1.25},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 5e6},
    {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
]


def make_config(rope: dict[str, Any], head_dim: int) -> LlamaConfig:
    parameters = {"rope_theta": 10000.0, **rope}
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=LENGTH,
        rope_parameters=parameters,
    )


def reference(config: LlamaConfig, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("rope", CASES, ids=lambda rope: "-".join(map(str, rope.values())))
def test_equals_transformers(rope: dict[str, Any], head_dim: int) -> None:
    config = make_config(rope, head_dim)
    arch = arch_from_hf_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, "config.json")
    table = rope_table(arch.rope, head_dim, LENGTH)
    assert table.shape == (LENGTH, head_dim)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, reference(config, torch.arange(LENGTH)), rtol=0, atol=2e-5)
    # A difference in the last bit is one of 0.004 radians at position 131071.
    assert torch.equal(inverse_frequencies(arch.rope, head_dim, LENGTH), LlamaRotaryEmbedding(config).inv_freq)


def test_dynamic_beyond_the_original_length_equals_cached_decoding() -> None:
    config = make_config({"rope_type": "dynamic", "factor": 2.0}, 16)
    arch = arch_from_hf_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, "config.json")
    table = rope_table(arch.rope, 16, 3 * LENGTH)
    for position in (LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH, 3 * LENGTH - 1):
        expected = reference(config, torch.tensor([position]))
        torch.testing.assert_close(table[position : position + 1], expected, rtol=0, atol=5e-5)


FACTORS = {"short_factor": [1.0, 1.3, 1.7, 2.1], "long_factor": [2.3, 3.0, 4.1, 9.7]}


@pytest.mark.parametrize("original", [LENGTH, 32])
@pytest.mark.parametrize("partial", [0.5, 1.0])
def test_longrope_takes_the_factors_of_its_longest_context(original: int, partial: float) -> None:
    head_dim = int(8 / partial)
    config = Phi3Config(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        original_max_position_embeddings=original,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": partial, **FACTORS},
    )
    arch = arch_from_hf_config(config.to_dict() | {"architectures": ["Phi3ForCausalLM"]}, "config.json")
    table = rope_table(arch.rope, head_dim, LENGTH)
    rotary = Phi3RotaryEmbedding(config)
    cos, sin = (x[0, :, :4] for x in rotary(torch.zeros(1), torch.arange(LENGTH)[None]))
    assert torch.equal(inverse_frequencies(arch.rope, 8, LENGTH), rotary.inv_freq)
    half = head_dim // 2
    torch.testing.assert_close(table[:, :4], cos, rtol=0, atol=2e-5)
    torch.testing.assert_close(table[:, half : half + 4], sin, rtol=0, atol=2e-5)
    assert bool((table[:, 4:half] == 1).all())
    assert bool((table[:, half + 4 :] == 0).all())


def test_layers_without_rotation_and_with_their_own() -> None:
    arch = arch_from_hf_config(make_config(CASES[0], 16).to_dict() | {"architectures": ["LlamaForCausalLM"]}, "c")
    local = RopeConfig(theta=100.0, original_max_position_embeddings=LENGTH)
    layers = (LayerArch(), LayerArch(rope="none"), LayerArch(rope="local"), LayerArch())
    arch = dataclasses.replace(arch, num_layers=4, layers=layers, local_rope=local)
    tables = layer_tables(arch, LENGTH)
    assert tables[0] is tables[3]
    assert torch.equal(tables[1], torch.cat((torch.ones(LENGTH, 8), torch.zeros(LENGTH, 8)), dim=1))
    assert torch.equal(tables[2], rope_table(local, 16, LENGTH))
