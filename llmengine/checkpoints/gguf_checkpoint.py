"""Models in GGUF files: the architecture from the metadata, the weights as canonical ones.

Quantized matrices are streamed as the file's blocks; `dequantized_source` makes dense ones of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmengine.checkpoints.canonical_weights import (
    COPY_ELEMENTS,
    NO_SLICES,
    StoredPart,
    check_tensors,
    read_exactly,
    stored_parts,
    stored_shapes,
    stream_fused,
)
from llmengine.checkpoints.end_token_ids import gguf_end_ids
from llmengine.checkpoints.gguf_arch import ROPE_TENSORS, arch_from_gguf
from llmengine.checkpoints.gguf_file import GgufFile, GgufTensor, read_gguf
from llmengine.checkpoints.gguf_split import read_split_gguf
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import ModelArch, fused_parts
from llmengine.models.families import family_of
from llmengine.models.sharding import Cut
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.gguf_blocks import BLOCK_SIZES, DENSE_TYPES, GGUF_BLOCKS, SCALE_OFFSETS
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.stacked import Stacked

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

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
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attention_out_norm": "post_attention_norm",
    "post_attention_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_out_norm": "post_ffw_norm",
}
_FUSED_NAMES = {**dict.fromkeys("qkv", "attn_qkv"), **dict.fromkeys(("gate", "up"), "ffn_up")}


def open_gguf(path: Path) -> ModelSource:
    """The checkpoint in a GGUF file, or in the files of a split one; `path` may be any of these.

    Reads everything but the tensors.
    """
    gguf = read_split_gguf(path)
    path = gguf.path
    metadata = Fields(gguf.metadata, str(path))
    arch = arch_from_gguf(gguf, metadata)
    stored_name = stored_names(arch)
    _check_tensors(gguf, stored_shapes(arch, stored_name))
    places = stored_parts(arch, stored_name)
    formats = _stored_formats(gguf, arch, places)
    stream = partial(_stream, gguf, arch, places, formats)
    bos = metadata.token_ids("tokenizer.ggml.bos_token_id")
    return ModelSource(
        kind="gguf",
        path=path,
        arch=arch,
        checkpoint_dtype=DENSE_TYPES.get(gguf.tensors[stored_name("layers.0.down.weight")].type, "float16"),
        generation_config={},
        eos_token_ids=gguf_end_ids(metadata, arch.vocab_size),
        bos_token_id=bos[0] if bos else None,
        tokenizer_path=path,
        stream=stream,
        stream_slices=stream,
        tokenizer_metadata=gguf.metadata,
        formats=formats,
    )


def stored_names(arch: ModelArch) -> Callable[[str], str]:
    """A function from a part's canonical name to its name in GGUF: `layers.0.q.weight` is `blk.0.attn_q.weight`."""
    names = _STORED_NAMES | (_FUSED_NAMES if family_of(arch).stored_fused else {})

    def stored_name(part: str) -> str:
        *layer, module, kind = part.split(".")
        prefix = f"blk.{layer[1]}." if layer else ""
        return f"{prefix}{names[module]}.{kind}"

    return stored_name


def _check_tensors(gguf: GgufFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the file has the `expected` tensors in readable types and no others that would matter."""

    def is_harmless(name: str) -> bool:
        tensor = gguf.tensors[name]
        is_known = name in ROPE_TENSORS or name.endswith(".attn_rot_embd.weight")
        return is_known or tensor.type not in BLOCK_SIZES or 0 in tensor.shape

    for name in expected:
        tensor = gguf.tensors.get(name)
        if tensor is not None and tensor.type not in BLOCK_SIZES:
            raise UnsupportedModelError(
                f"{tensor.path}: tensor {name!r} is stored as {tensor.type}, which is not supported; supported: "
                f"{', '.join(BLOCK_SIZES)}"
            )
    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    padded = ("token_embd.weight", "output.weight")
    check_tensors(
        expected,
        shapes,
        str(gguf.path),
        is_harmless,
        lambda name: str(gguf.tensors[name].path),
        may_be_padded=padded,
    )


def _stored_formats(gguf: GgufFile, arch: ModelArch, places: Mapping[str, StoredPart]) -> ModelFormats:
    """Which blocks each matrix has; those that are not quantized are dense, in whatever dtype the model gets."""
    formats: dict[str, WeightFormat] = {}
    for name, parts in fused_parts(arch).items():
        if len(parts[0][1]) == 2:
            types = [gguf.tensors[places[part].tensor].type for part, _ in parts]
            found = [GGUF_BLOCKS.get(type_name, DENSE) for type_name in types]
            rows = [shape[0] for _, shape in parts]
            same = len(set(found)) == 1
            matrix = name.removesuffix(".weight")
            formats[matrix] = found[0] if same else Stacked.of_rows(list(zip(rows, found, strict=True)))
    if arch.tie_word_embeddings:
        formats["lm_head"] = formats["embed_tokens"]
    return ModelFormats.of_matrices(formats)


def _stream(
    gguf: GgufFile,
    arch: ModelArch,
    places: Mapping[str, StoredPart],
    formats: ModelFormats,
    dtype: torch.dtype,
    slices: Mapping[str, Cut] = NO_SLICES,
) -> WeightStream:
    interleaved = family_of(arch).gguf_interleaves_qk
    with ExitStack() as stack:
        paths = sorted({gguf.tensors[place.tensor].path for place in places.values()})
        files = {path: stack.enter_context(path.open("rb")) for path in paths}

        def read_part(part: str, out: torch.Tensor, first_row: int = 0, columns: range | None = None) -> None:
            is_rotated = interleaved and part.split(".")[-2] in ("q", "k")
            place = places[part]
            tensor = gguf.tensors[place.tensor].rows(place.first_row + first_row, out.shape[0])
            _read_tensor(files[tensor.path], tensor, out, arch.head_dim if is_rotated else 1, columns)

        yield from stream_fused(arch, dtype, read_part, formats, slices=slices)


def _check_scales(tensor: GgufTensor, data: NDArray[np.uint8]) -> None:
    """Raise `CorruptFileError` if blocks have scales that are not finite, which no tool writes."""
    import numpy as np

    _, block_bytes = BLOCK_SIZES[tensor.type]
    blocks = data.reshape(-1, block_bytes)
    for offset in SCALE_OFFSETS.get(tensor.type, ()):
        bits = np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<u2")
        if bool(((bits & 0x7C00) == 0x7C00).any()):
            raise CorruptFileError(f"{tensor.place} has a scale that is not finite: damaged?")


def _read_tensor(
    file: BinaryIO, tensor: GgufTensor, out: torch.Tensor, head_dim: int, columns: range | None = None
) -> None:
    """Fill `out` (contiguous) with a tensor's weights, or with its blocks if `out` is uint8; some rows at a time.

    With `columns`, `out` has only those of the weights.

    With head_dim > 1, the rows of each head are reordered from interleaved (0, d/2, 1, d/2 + 1, ...) to halves
    (0, 1, ..., d/2, ...). This is done on the raw bytes, of which there are fewer.
    """
    import torch

    from llmengine.quantization.gguf_dequantize import dequantize

    if out.dim() == 1 and tensor.type not in DENSE_TYPES:
        raise UnsupportedModelError(
            f"{tensor.path}: vector {tensor.name!r} is quantized ({tensor.type}), which is not supported"
        )
    num_columns = tensor.shape[-1]
    if is_blocks := out.dtype == torch.uint8:
        rows = out.flatten(1)
    else:
        rows = out if out.dim() > 1 else out.view(-1, num_columns if head_dim == 1 else 1)
    row_bytes = tensor.size_bytes // rows.shape[0]
    width = rows.shape[1] if columns is None else num_columns
    step = max(1, COPY_ELEMENTS // (width * head_dim)) * head_dim
    file.seek(tensor.offset)
    for piece in torch.split(rows, step):
        raw = torch.empty((piece.shape[0], row_bytes), dtype=torch.uint8)
        read_exactly(file, raw, tensor.place)
        data = raw.numpy()
        _check_scales(tensor, data)
        if head_dim > 1:
            data = data.reshape(-1, head_dim // 2, 2, row_bytes).swapaxes(1, 2).reshape(-1, row_bytes)
        if is_blocks:
            piece.numpy()[...] = data
            continue
        in_place = columns is None and piece.dtype == torch.float32
        converted = piece if in_place else torch.empty(piece.shape[0], width)
        dequantize(data, tensor.type, converted.numpy())
        if not in_place:
            piece.copy_(converted if columns is None else converted[:, columns.start : columns.stop])
