"""Random weights for a config.json without weights, for benchmarks and tests that do not depend on the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llmengine.checkpoints.canonical_weights import NO_SLICES
from llmengine.checkpoints.huggingface_checkpoint import read_hf_metadata
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import model_dtype_name, torch_dtype
from llmengine.errors import UnsupportedModelError
from llmengine.models.arch import ModelArch
from llmengine.models.sharding import NOTHING, Cut
from llmengine.quantization.model_formats import DENSE_MODEL

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SEED = 0
_STD = 0.02
_NOISE_LENGTH = (1 << 20) + 7
_SHIFT = 8191


def open_dummy(directory: Path) -> ModelSource:
    """A source of random weights for the architecture in a directory's config.json. Reads no weight files.

    Raises `UnsupportedModelError` for a config.json of quantized weights.
    """
    metadata = read_hf_metadata(directory)
    if metadata.layouts is not None:
        raise UnsupportedModelError(
            f"{directory / 'config.json'}: quantization_config: load_format='dummy' makes no quantized weights; remove "
            "the key to get dense ones"
        )
    return ModelSource(
        kind="dummy",
        path=directory,
        arch=metadata.arch,
        checkpoint_dtype=metadata.dtype or "float32",
        generation_config=dict(metadata.generation_config.values),
        eos_token_ids=metadata.eos_token_ids,
        bos_token_id=metadata.bos_token_id,
        tokenizer_path=directory,
        stream=lambda dtype: stream_dummy(metadata.arch, dtype),
        stream_slices=lambda dtype, cuts: stream_dummy(metadata.arch, dtype, cuts),
    )


def stream_dummy(arch: ModelArch, dtype: torch.dtype, cuts: Mapping[str, Cut] = NO_SLICES) -> WeightStream:
    """Yield canonical weights drawn from N(0, 0.02), and norms of 1; every call yields the same.

    All tensors repeat one block of noise, rotated differently for each, because drawing every weight would take longer
    than reading a file. The block's odd length keeps the rows of a matrix different.

    Args:
        cuts: of the tensors that are wanted in part; only the part is made.
    """
    import torch

    layout = DENSE_MODEL.layout(arch, model_dtype_name(dtype))
    length = min(_NOISE_LENGTH, max(prod(spec.shape) for spec in layout.values()))
    noise = torch.empty(length).normal_(0.0, _STD, generator=torch.Generator().manual_seed(_SEED)).to(dtype)
    for index, (name, spec) in enumerate(layout.items()):
        cut = cuts.get(name, Cut())
        if cut == NOTHING:
            continue
        num_rows = sum(map(len, cut.ranges)) if cut.axis == "out" else spec.shape[0]
        shape = (num_rows, *spec.shape[1:])
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch_dtype(spec.dtype))
        elif cut.axis == "in":
            yield name, _noise_columns(noise, index * _SHIFT, spec.shape, cut.ranges)
        else:
            tensor = torch.empty(shape, dtype=torch_dtype(spec.dtype))
            row_size, begin = prod(spec.shape[1:]), 0
            for rows in cut.ranges or (range(spec.shape[0]),):
                end = begin + len(rows)
                _repeat(noise.roll(index * _SHIFT - rows.start * row_size), tensor[begin:end].view(-1))
                begin = end
            yield name, tensor


def _repeat(noise: Tensor, flat: Tensor) -> None:
    """Fill a tensor with noise, again and again."""
    length = len(noise)
    whole = flat.numel() // length
    # One copy: each of thousands of small ones would wait for the interpreter lock while other threads compile.
    flat[: whole * length].view(whole, length).copy_(noise.expand(whole, length))
    flat[whole * length :].copy_(noise[: flat.numel() - whole * length])


def _noise_columns(noise: Tensor, shift: int, shape: Sequence[int], ranges: Sequence[range]) -> Tensor:
    """Some columns of what `_repeat` would make of the shape."""
    import torch

    rows, columns = shape
    length = len(noise)
    parts = []
    for wanted in ranges:
        width = len(wanted)
        starts = (torch.arange(rows) * columns + wanted.start - shift) % length
        long_enough = noise.repeat(1 + -(-width // length))
        parts.append(long_enough.unfold(0, width, 1).index_select(0, starts))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
