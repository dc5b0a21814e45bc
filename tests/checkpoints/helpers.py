"""Small random checkpoints in every format, and their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.opening import open_model
from llmengine.models.arch import canonical_shapes

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": [2, 5],
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_model(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.1)
    return model


def canonical(state: dict[str, torch.Tensor], num_layers: int = 2) -> dict[str, torch.Tensor]:
    """Fuse a Hugging Face state dict by hand."""
    result = {"embed_tokens.weight": state["model.embed_tokens.weight"]}
    fused = {
        "input_norm": ["input_layernorm"],
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "o": ["self_attn.o_proj"],
        "post_attention_norm": ["post_attention_layernorm"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    for layer in range(num_layers):
        for name, parts in fused.items():
            for kind in ("weight", "bias"):
                if f"model.layers.{layer}.{parts[0]}.{kind}" in state:
                    tensors = [state[f"model.layers.{layer}.{part}.{kind}"] for part in parts]
                    result[f"layers.{layer}.{name}.{kind}"] = torch.cat(tensors)
    result["final_norm.weight"] = state["model.norm.weight"]
    if "lm_head.weight" in state:
        result["lm_head.weight"] = state["lm_head.weight"]
    return result


def assert_streams(path: Path, expected: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    source = without_blocks(open_model(path))
    streamed = list(source.weights(dtype))
    assert [name for name, _ in streamed] == list(expected) == list(canonical_shapes(source.arch))
    for name, tensor in streamed:
        assert torch.equal(tensor, expected[name].to(dtype)), name


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load_all(path: Path, load_format: Any = "auto") -> None:
    for _ in open_model(path, load_format).weights(torch.float32):
        pass


def write_bin(model: Any, directory: Path, sharded: bool) -> None:
    (directory / "model.safetensors").unlink()
    state = model.state_dict()
    if not sharded:
        torch.save(state, directory / "pytorch_model.bin")
        return
    names = sorted(state)
    files = {f"pytorch_model-0000{index + 1}-of-00002.bin": names[index::2] for index in range(2)}
    for file, members in files.items():
        torch.save({name: state[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Permute q and k as llama.cpp's converter does."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"


def write_gguf(
    path: Path,
    model: Any,
    matrix_type: str,
    extra: dict[str, np.ndarray] | None = None,
    *,
    kind: str | None = None,
    alignment: int | None = None,
    vocab_size: int | None = None,
    **rope: Any,
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    if kind is not None:
        writer.add_type(kind)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    if vocab_size is not None:
        writer.add_vocab_size(vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope.get("theta", 10000.0))
    if "scaling" in rope:
        writer.add_rope_scaling_type(rope["scaling"])
        writer.add_rope_scaling_factor(4.0)
    writer.add_eos_token_id(2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġé", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    data_type = gguf.GGMLQuantizationType[matrix_type]
    for name, tensor in model.state_dict().items():
        data = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            data = interleave(data, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if data.ndim == 2 and matrix_type != "F32":
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(data, data_type), raw_dtype=data_type)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data))
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(state: dict[str, torch.Tensor], matrix_type: str) -> dict[str, torch.Tensor]:
    """Return the state dict after a trip through a GGUF type."""
    kind = gguf.GGMLQuantizationType[matrix_type]
    result = dict(state)
    for name, tensor in state.items():
        if tensor.ndim == 2:
            quantized = gguf.quants.quantize(tensor.numpy(), kind)
            result[name] = torch.from_numpy(gguf.quants.dequantize(quantized, kind).reshape(tensor.shape).copy())
    return result
