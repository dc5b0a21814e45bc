"""Tiny random Llama models as GGUF files, with vocabularies of the test's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_HIDDEN, _INNER, _HEADS, _KV_HEADS, _HEAD_DIM = 32, 48, 4, 2, 8


def byte_level_tokens() -> list[str]:
    """Return the names of the 256 bytes in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in plain]
    names = {value: chr(value) for value in plain} | {value: chr(256 + place) for place, value in enumerate(others)}
    return [names[value] for value in range(256)]


def write_tiny_gguf(
    path: Path,
    tokens: Sequence[str],
    types: Sequence[int],
    metadata: Mapping[str, Any],
    *,
    num_rows: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a model; `metadata` has the keys behind `tokenizer.ggml.`, `num_rows` is of the embedding."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(_HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for key, value in metadata.items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    rows = num_rows or len(tokens)
    shapes = {
        "token_embd": (rows, _HIDDEN),
        "output": (rows, _HIDDEN),
        "blk.0.attn_q": (_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_k": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_v": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
        "blk.0.attn_output": (_HIDDEN, _HEADS * _HEAD_DIM),
        "blk.0.ffn_gate": (_INNER, _HIDDEN),
        "blk.0.ffn_up": (_INNER, _HIDDEN),
        "blk.0.ffn_down": (_HIDDEN, _INNER),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) * 0.2).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(_HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))
