"""Tiny random models of every family, as transformers makes them, written as safetensors and as GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tests.quantization.random_blocks import random_blocks

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 5.0],
}
GEMMA = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": False, "tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"sliding_window": 9}),
    "phi3_short": (
        "Phi3",
        {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 128},
    ),
    "phi3_long": (
        "Phi3",
        {"rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.5}, "original_max_position_embeddings": 20},
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "smollm3_window": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window_pattern": 2, "num_key_value_heads": 1}),
    "olmo2": ("Olmo2", {}),
}


def make_family(name: str, **changes: Any) -> Any:
    """Return the transformers model of a family with random weights, all of which matter."""
    family, own = FAMILIES[name]
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**TINY, **own, **changes})
    config._attn_implementation = "eager"  # the only one that caps scores
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    offset = 1.0 if family.startswith("Gemma") else 0.0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5 - offset, 1.5 - offset)
    return model


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GGUF_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
_INTERLEAVED = ("llama", "granite", "smollm3")
_POST_NORMED = ("gemma2", "gemma3", "olmo2")


def write_family_gguf(
    path: Path,
    model: Any,
    matrix_type: str | Callable[[str, int], str] = "F32",
    sliding_window: int | None = None,
) -> None:
    """Write a transformers model as llama.cpp's converter does.

    Args:
        matrix_type: of all matrices, or a function of a tensor's name in GGUF and its columns. Matrices of a type that
            the gguf package cannot make get random weights.
        sliding_window: for a family that has none.
    """
    config = model.config
    architecture = _GGUF_ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(str(path), architecture)
    _write_metadata(writer, config, architecture)
    if sliding_window is not None:
        writer.add_sliding_window(sliding_window)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        if architecture in _INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = data.reshape(heads, 2, -1, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        stored_name = _gguf_name(name, architecture)
        type_name = "F32" if data.ndim != 2 else matrix_type
        if callable(type_name):
            type_name = type_name(stored_name, data.shape[1])
        if type_name == "F32":
            writer.add_tensor(stored_name, np.ascontiguousarray(data))
            continue
        kind = gguf.GGMLQuantizationType[type_name]
        try:
            blocks = gguf.quants.quantize(data, kind)
        except NotImplementedError:
            blocks = random_blocks(type_name, *data.shape).reshape(data.shape[0], -1)
        writer.add_tensor(stored_name, blocks, raw_dtype=kind)
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, architecture: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _GGUF_NAMES:
        return f"{_GGUF_NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    post = "post_attention_norm" if architecture in _POST_NORMED else "ffn_norm"
    return f"blk.{layer}.{_GGUF_NAMES.get(module, post)}.{kind}"


def _write_metadata(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "longrope":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if architecture in ("phi3", "gemma2", "gemma3"):
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    writers: dict[str, Callable[[float], None]] = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
    }
    for key, write in writers.items():
        if getattr(config, key, None):
            write(getattr(config, key))
