"""Random weights for a config.json without weights, for benchmarks and tests that do not depend on the text."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from llmengine.checkpoints.huggingface_checkpoint import read_hf_metadata
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import model_dtype_name, torch_dtype
from llmengine.errors import UnsupportedModelError
from llmengine.models.arch import ModelArch
from llmengine.quantization.model_formats import DENSE_MODEL

if TYPE_CHECKING:
    import torch

_SEED = 0
_STD = 0.02
_NOISE_LENGTH = (1 << 20) + 7


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
    )


def stream_dummy(arch: ModelArch, dtype: torch.dtype) -> WeightStream:
    """Yield canonical weights drawn from N(0, 0.02), and norms of 1; every call yields the same.

    All tensors repeat one block of noise, rotated differently for each, because drawing every weight would take longer
    than reading a file. The block's odd length keeps the rows of a matrix different.
    """
    import torch

    layout = DENSE_MODEL.layout(arch, model_dtype_name(dtype))
    length = min(_NOISE_LENGTH, max(prod(spec.shape) for spec in layout.values()))
    noise = torch.empty(length).normal_(0.0, _STD, generator=torch.Generator().manual_seed(_SEED)).to(dtype)
    for index, (name, spec) in enumerate(layout.items()):
        tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        else:
            shifted = noise.roll(index * 8191)
            flat, whole = tensor.view(-1), tensor.numel() // length
            # One copy: each of thousands of small ones would wait for the interpreter lock while other threads compile.
            flat[: whole * length].view(whole, length).copy_(shifted.expand(whole, length))
            flat[whole * length :].copy_(shifted[: flat.numel() - whole * length])
        yield name, tensor
