"""Models in GGUF files: architecture from the metadata, weights dequantized into canonical layout."""

from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import FAMILIES, ModelArch, RopeConfig, check_arch, family_of, unsupported_architecture
from llmengine.models.fields import Fields
from llmengine.models.fused import (
    COPY_ELEMENTS,
    ModelSource,
    WeightStream,
    check_tensors,
    read_exactly,
    stored_shapes,
    stream_fused,
    unique_ids,
)
from llmengine.models.gguf_file import GgufFile, GgufTensor, read_gguf

if TYPE_CHECKING:
    import torch

__all__ = ["GgufFile", "GgufTensor", "open_gguf", "read_gguf"]

_STORED_NAMES = {
    "embed_tokens": "token_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "input_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "post_attention_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def open_gguf(path: Path) -> ModelSource:
    """Return the checkpoint of a GGUF file; reads everything but the tensors."""
    gguf = read_gguf(path)
    metadata = Fields(gguf.metadata, str(path))
    arch = _arch_from_gguf(gguf, metadata)
    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    check_tensors(stored_shapes(arch, stored_name), shapes, str(path), _is_harmless)
    bos = metadata.token_ids("tokenizer.ggml.bos_token_id")
    eos = metadata.token_ids("tokenizer.ggml.eos_token_id") + metadata.token_ids("tokenizer.ggml.eot_token_id")
    return ModelSource(
        kind="gguf",
        path=path,
        arch=arch,
        checkpoint_dtype=_DTYPES.get(gguf.tensors[stored_name("layers.0.down.weight")].type, "float16"),
        generation_config={},
        eos_token_ids=unique_ids(eos),
        bos_token_id=bos[0] if bos else None,
        tokenizer_path=path,
        stream=lambda dtype: _stream(gguf, arch, dtype),
        gguf=gguf,
    )


def stored_name(part: str) -> str:
    """Return a part's name in GGUF: `layers.0.q.weight` is `blk.0.attn_q.weight`."""
    *layer, module, kind = part.split(".")
    prefix = f"blk.{layer[1]}." if layer else ""
    return f"{prefix}{_STORED_NAMES[module]}.{kind}"


def _is_harmless(name: str) -> bool:
    return name == _ROPE_FACTORS or name.endswith(".attn_rot_embd.weight")


def _stream(gguf: GgufFile, arch: ModelArch, dtype: torch.dtype) -> WeightStream:
    interleaved = family_of(arch).gguf_interleaves_qk
    with gguf.path.open("rb") as file:

        def read_part(part: str, out: torch.Tensor) -> None:
            is_rotated = interleaved and part.split(".")[-2] in ("q", "k")
            tensor = gguf.tensors[stored_name(part)]
            _read_tensor(gguf.path, file, tensor, out, arch.head_dim if is_rotated else 1)

        yield from stream_fused(arch, dtype, read_part)


def _read_tensor(path: Path, file: BinaryIO, tensor: GgufTensor, out: torch.Tensor, head_dim: int) -> None:
    """Fill `out` (contiguous, of the tensor's shape) a bounded number of rows at a time.

    With head_dim > 1 the rows of each head are brought back from interleaved order (0, d/2, 1, d/2 + 1, ...) to halves
    (0, 1, ..., d/2, ...), on the raw bytes, which are fewer.
    """
    import torch

    from llmengine.models.gguf_dequant import dequantize

    if out.dim() == 1 and tensor.type not in _DTYPES:
        raise UnsupportedModelError(f"{path}: vector {tensor.name!r} is quantized ({tensor.type})")
    num_columns = tensor.shape[-1]
    rows = out.view(-1, num_columns) if head_dim == 1 or out.dim() > 1 else out.view(-1, 1)
    row_bytes = tensor.size_bytes // rows.shape[0]
    step = max(1, COPY_ELEMENTS // (rows.shape[1] * head_dim)) * head_dim
    file.seek(tensor.offset)
    for piece in torch.split(rows, step):
        raw = torch.empty((piece.shape[0], row_bytes), dtype=torch.uint8)
        read_exactly(file, raw, f"{path}: tensor {tensor.name!r}")
        data = raw.numpy()
        if head_dim > 1:
            data = data.reshape(-1, head_dim // 2, 2, row_bytes).swapaxes(1, 2).reshape(-1, row_bytes)
        converted = piece if piece.dtype == torch.float32 else torch.empty(piece.shape)
        dequantize(data, tensor.type, converted.numpy())
        if converted is not piece:
            piece.copy_(converted)


def _arch_from_gguf(gguf: GgufFile, metadata: Fields) -> ModelArch:
    where = metadata.where
    name = metadata.string("general.architecture")
    family = next((family for family in FAMILIES if family.gguf_architecture == name), None)
    if family is None:
        raise unsupported_architecture(where, f"{name!r} (GGUF)")
    num_files = metadata.integer("split.count", 1)
    if num_files > 1:
        raise UnsupportedModelError(
            f"{where}: is one of {num_files} split files; merge them (llama-gguf-split --merge)"
        )
    if metadata.integer(f"{name}.expert_count", 0):
        raise UnsupportedModelError(f"{where}: mixture of experts ({name}.expert_count) is not supported")
    hidden_size = metadata.integer(f"{name}.embedding_length", low=1)
    num_heads = metadata.integer(f"{name}.attention.head_count", low=1, high=hidden_size)
    head_dim = metadata.integer(f"{name}.attention.key_length", hidden_size // num_heads, low=2)
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if metadata.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(f"{where}: {key}={metadata.integer(key)} differs from the head size {head_dim}")
    embedding = gguf.tensors.get("token_embd.weight")
    max_positions = metadata.integer(f"{name}.context_length", low=1)
    arch = ModelArch(
        architecture=family.architecture,
        vocab_size=metadata.integer(f"{name}.vocab_size", embedding.shape[0] if embedding else None, low=1),
        hidden_size=hidden_size,
        intermediate_size=metadata.integer(f"{name}.feed_forward_length", low=1),
        num_layers=metadata.integer(f"{name}.block_count", low=1, high=len(gguf.tensors)),
        num_heads=num_heads,
        num_kv_heads=metadata.integer(f"{name}.attention.head_count_kv", num_heads, low=1, high=num_heads),
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=metadata.number(f"{name}.attention.layer_norm_rms_epsilon", above=0.0),
        hidden_act="silu",
        tie_word_embeddings="output.weight" not in gguf.tensors,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        attention_out_bias="blk.0.attn_output.bias" in gguf.tensors,
        mlp_bias="blk.0.ffn_down.bias" in gguf.tensors,
        rope=_rope_from_gguf(gguf, metadata, name, max_positions, head_dim),
    )
    check_arch(arch, where)
    return arch


def _rope_from_gguf(gguf: GgufFile, metadata: Fields, name: str, max_positions: int, head_dim: int) -> RopeConfig:
    """Return the rotary encoding; raises `UnsupportedModelError` for a scaling that `RopeConfig` cannot express."""
    rope = RopeConfig(
        theta=metadata.number(f"{name}.rope.freq_base", 10000.0, above=1.0),
        original_max_position_embeddings=max_positions,
    )
    scaling = f"{name}.rope.scaling"
    scaling_type = metadata.string(f"{scaling}.type", "none")
    factor = metadata.number(f"{scaling}.factor", metadata.number(f"{name}.rope.scale_linear", 1.0, above=0.0))
    if f"{name}.rope.scale_linear" in metadata.values and scaling_type == "none" and factor != 1.0:
        scaling_type = "linear"
    if scaling_type not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{metadata.where}: {scaling}.type={scaling_type!r} is not none, linear or yarn")
    if _ROPE_FACTORS in gguf.tensors:
        if scaling_type != "none":
            raise UnsupportedModelError(f"{metadata.where}: both {_ROPE_FACTORS} and {scaling}.type={scaling_type!r}")
        return _llama3_rope(gguf, rope, head_dim)
    if scaling_type == "none":
        return rope
    if factor <= 0.0:
        raise metadata.error(f"{scaling}.factor", "a number > 0")
    if scaling_type == "linear":
        return dataclasses.replace(rope, type="linear", factor=factor)
    for key, neutral in (("attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if metadata.number(f"{scaling}.{key}", neutral) != neutral:
            raise UnsupportedModelError(f"{metadata.where}: {scaling}.{key} other than {neutral:g} is not supported")
    return dataclasses.replace(
        rope,
        type="yarn",
        factor=factor,
        original_max_position_embeddings=metadata.integer(f"{scaling}.original_context_length", max_positions, low=1),
        beta_fast=metadata.number(f"{scaling}.yarn_beta_fast", 32.0, above=0.0),
        beta_slow=metadata.number(f"{scaling}.yarn_beta_slow", 1.0, above=0.0),
    )


def _llama3_rope(gguf: GgufFile, rope: RopeConfig, head_dim: int) -> RopeConfig:
    """Return the llama3 scaling whose frequency divisors the file stores.

    The converter stores the divisors but not what they come from. The low-frequency divisor is the factor; the rest
    is tried with the one set of values that Llama 3.1, 3.2 and 3.3 share, and rejected if it gives other divisors.
    """
    tensor = gguf.tensors[_ROPE_FACTORS]
    if tensor.shape != (head_dim // 2,) or tensor.type != "F32":
        raise CorruptFileError(
            f"{gguf.path}: tensor {_ROPE_FACTORS!r} is {tensor.type} {tensor.shape}, expected F32 ({head_dim // 2},)"
        )
    with gguf.path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(tensor.size_bytes)
    if len(raw) != tensor.size_bytes:
        raise CorruptFileError(f"{gguf.path}: tensor {_ROPE_FACTORS!r} is truncated")
    divisors = struct.unpack(f"<{head_dim // 2}f", raw)
    if not all(math.isfinite(value) and value > 0.0 for value in divisors):
        raise CorruptFileError(f"{gguf.path}: tensor {_ROPE_FACTORS!r} holds values that are no finite number > 0")
    llama3 = dataclasses.replace(
        rope,
        type="llama3",
        factor=max(divisors),
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    if any(
        not math.isclose(value, _llama3_divisor(llama3, 2 * index / head_dim), rel_tol=1e-4)
        for index, value in enumerate(divisors)
    ):
        raise UnsupportedModelError(
            f"{gguf.path}: tensor {_ROPE_FACTORS!r} is not Llama 3's scaling (low 1, high 4, original context 8192)"
        )
    return llama3


def _llama3_divisor(rope: RopeConfig, exponent: float) -> float:
    """Return what llama3 scaling divides the frequency theta ** -exponent by."""
    wavelength = 2 * math.pi * rope.theta**exponent
    context = rope.original_max_position_embeddings
    if wavelength < context / rope.high_freq_factor:
        return 1.0
    if wavelength > context / rope.low_freq_factor:
        return rope.factor
    smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return float(1.0 / ((1.0 - smooth) / rope.factor + smooth))
