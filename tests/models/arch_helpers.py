"""A model small enough to be stored and built in milliseconds."""

from __future__ import annotations

from llmengine.models.arch import ModelArch, RopeConfig

SMALL_ARCH = ModelArch(
    architecture="LlamaForCausalLM",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    attention_bias=True,
    attention_out_bias=False,
    mlp_bias=False,
    rope=RopeConfig(theta=1e4, original_max_position_embeddings=64),
)
