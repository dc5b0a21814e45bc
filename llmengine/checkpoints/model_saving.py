"""Saving a loaded model: in which dtype, with which tokenizer, from the weights as a backend uses them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmengine.checkpoints.canonical_weights import COPY_ELEMENTS
from llmengine.checkpoints.end_token_ids import unique_ids
from llmengine.checkpoints.engine_dir import save_engine
from llmengine.checkpoints.saved_files import SavedPlans
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.dtypes import ModelDType, torch_dtype
from llmengine.errors import ModelLoadError
from llmengine.quantization.formats import TensorSpec
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.quality_report import QualityReport
from llmengine.tokenizer.end_tokens import tokenizer_end_ids

if TYPE_CHECKING:
    import torch

    Weights = Iterable[tuple[str, torch.Tensor]]


def dtype_to_save(
    config: ModelConfig, source: ModelSource, formats: ModelFormats, weights: Callable[[], Weights]
) -> ModelDType:
    """The dtype in which weights that are not quantized are saved so that loading them gives the same tokens.

    With `dtype="auto"` it is the checkpoint's. A CPU computes with float32 weights then, which may hold more than the
    checkpoint's dtype says (a GGUF file with quantized weights); those are saved as float32.
    """
    if config.dtype != "auto":
        return config.dtype
    dtype = source.checkpoint_dtype
    is_kept = config.device != "cpu" or keeps_values(formats.layout(source.arch, dtype), weights())
    return dtype if is_kept else "float32"


def keeps_values(layout: Mapping[str, TensorSpec], weights: Weights) -> bool:
    """Whether weights, as a backend uses them, are the same when they are stored in `layout`."""
    import torch

    return all(
        torch.equal(piece, piece.to(torch_dtype(layout[name].dtype)).to(piece.dtype))
        for name, tensor in weights
        if tensor.dtype != torch_dtype(layout[name].dtype)
        for piece in tensor.reshape(-1).split(COPY_ELEMENTS)
    )


def save_model(
    directory: str | Path,
    source: ModelSource,
    weights: Weights,
    *,
    dtype: ModelDType,
    formats: ModelFormats,
    tokenizer: object,
    plans: SavedPlans | None = None,
    quality: QualityReport | None = None,
) -> None:
    """Write a loaded model as an engine directory; raises as `save_engine` does.

    `weights` are the canonical weights as a backend uses them, in `formats`; those that are not quantized are stored
    in `dtype`. A `tokenizer` with a method save(directory) writes its files; without one those of the source are
    copied. What it names as ends of an answer is kept beside what the source names.
    """
    layout = formats.layout(source.arch, dtype)
    ends = sorted(tokenizer_end_ids(tokenizer, source.arch.vocab_size))

    def save(tokenizer_files: Mapping[str, bytes] | Path) -> None:
        save_engine(
            directory,
            arch=source.arch,
            weights=((name, _as_stored(tensor, layout[name])) for name, tensor in weights),
            dtype=dtype,
            formats=formats,
            generation_config=source.generation_config,
            eos_token_ids=unique_ids((*source.eos_token_ids, *ends)),
            bos_token_id=source.bos_token_id,
            tokenizer_files=tokenizer_files,
            plans=plans,
            quality=quality,
        )

    write_tokenizer = getattr(tokenizer, "save", None)
    if write_tokenizer is None:
        save(_source_tokenizer(source))
        return
    with tempfile.TemporaryDirectory(prefix="llmengine-") as scratch:
        write_tokenizer(Path(scratch))
        save(_read_tree(Path(scratch)))


def _source_tokenizer(source: ModelSource) -> Mapping[str, bytes] | Path:
    if source.kind == "engine":
        if not source.tokenizer_path.is_dir():
            raise ModelLoadError(f"{source.tokenizer_path}: has gone since the model was loaded, it cannot be saved")
        return _read_tree(source.tokenizer_path)
    return source.tokenizer_path if source.tokenizer_path.is_dir() else {}


def _read_tree(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def _as_stored(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Floating-point tensors in the dtype of the file; others have it already."""
    stored = torch_dtype(spec.dtype)
    return tensor.to(stored) if tensor.is_floating_point() and stored.is_floating_point else tensor
