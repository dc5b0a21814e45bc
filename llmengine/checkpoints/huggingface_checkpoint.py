"""Hugging Face directories: config.json with safetensors or pytorch_model.bin files, single or sharded."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic

from llmengine.checkpoints.canonical_weights import NO_SLICES, stored_parts, stream_fused
from llmengine.checkpoints.end_token_ids import hf_end_ids
from llmengine.checkpoints.huggingface_arch import arch_from_hf_config
from llmengine.checkpoints.huggingface_descriptions import LayoutChoice, quantization_description
from llmengine.checkpoints.huggingface_matrices import QuantizedMatrices, quantized_linears, quantized_matrices
from llmengine.checkpoints.huggingface_quantization import layout_choice
from llmengine.checkpoints.huggingface_tensors import (
    EMBEDDING,
    HEAD,
    NORM,
    StoredTensor,
    TensorT,
    check_weights,
    indexed_shards,
    language_model_tensors,
    merge_shards,
    stored_names,
)
from llmengine.checkpoints.metadata_fields import Fields, read_json_object
from llmengine.checkpoints.safetensors_file import DTYPE_NAMES, TensorEntry, holds_same, read_entries, read_tensor
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import MODEL_DTYPES, ModelDType, dtype_name, torch_dtype
from llmengine.errors import CorruptFileError, InvalidRequestError, ModelLoadError, UnsupportedModelError
from llmengine.generation_config import generation_keys
from llmengine.models.arch import ModelArch
from llmengine.models.families import family_of
from llmengine.models.sharding import Cut
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats
from llmengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that may contain a directory's weights or an index of them, in order of preference."""

_QUANTIZED_SUFFIXES = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
"""Ends of such names in old quantized directories, in order of preference."""

_OTHER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
"""Suffixes of files that may contain weights in another format; an error about missing weights lists them."""

_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    AssertionError,
    OverflowError,
)
"""Exceptions that torch.load raises for damaged files; it has none of its own."""


@dataclass(frozen=True, slots=True)
class HfMetadata:
    """Contents of config.json and generation_config.json.

    Attributes:
        layouts: how linears are stored; None if none is quantized.
    """

    arch: ModelArch
    layouts: LayoutChoice | None
    dtype: ModelDType | None
    generation_config: Fields
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_hf_metadata(directory: Path) -> HfMetadata:
    """Metadata from config.json and, if it exists, generation_config.json."""
    config = read_json_object(directory / "config.json")
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
        generation = read_json_object(generation_path)
    else:
        generation = Fields(generation_keys(config.values), config.where)
    _check_generation(generation)
    bos = generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")
    arch = arch_from_hf_config(config.values, config.where)
    description = quantization_description(directory, config)
    return HfMetadata(
        arch=arch,
        layouts=None if description is None else layout_choice(description),
        dtype=_config_dtype(config),
        generation_config=generation,
        eos_token_ids=hf_end_ids(config, generation, arch.vocab_size),
        bos_token_id=bos[0] if bos else None,
    )


def _check_generation(generation: Fields) -> None:
    """Raise `CorruptFileError` for malformed values; `LLM` reports keys that it cannot honour."""
    try:
        SamplingParams.from_generation_config(generation.values)
    except InvalidRequestError as error:
        raise CorruptFileError(f"{generation.where}: {error}") from error
    except UnsupportedModelError:
        pass


def open_hf(directory: Path) -> ModelSource:
    """The checkpoint in a Hugging Face directory. Reads only JSON files and the headers of safetensors files."""
    metadata = read_hf_metadata(directory)
    arch = metadata.arch
    file_name = _weight_file(directory, is_quantized=metadata.layouts is not None)
    shards = indexed_shards(directory, file_name)
    formats = DENSE_MODEL
    if "safetensors" in file_name:
        weights = _model_weights(metadata, directory, merge_shards(directory, shards, _read_safetensors), _load_entry)
        formats, found = weights.formats, weights.dense_dtype
    elif metadata.dtype is None or metadata.layouts is not None:
        bin_weights = _bin_weights(directory, metadata, shards)
        formats, found = bin_weights.formats, bin_weights.dense_dtype

    def stream(dtype: torch.dtype, slices: Mapping[str, Cut] = NO_SLICES) -> WeightStream:
        if "safetensors" in file_name:
            return _stream_safetensors(arch, weights, dtype, slices)
        return _stream_bin(arch, _bin_weights(directory, metadata, shards), dtype, slices)

    return ModelSource(
        kind="huggingface",
        path=directory,
        arch=arch,
        checkpoint_dtype=metadata.dtype or _supported_dtype(found, str(directory)),
        generation_config=dict(metadata.generation_config.values),
        eos_token_ids=metadata.eos_token_ids,
        bos_token_id=metadata.bos_token_id,
        tokenizer_path=directory,
        stream=stream,
        stream_slices=stream,
        formats=formats,
    )


def _weight_file(directory: Path, *, is_quantized: bool) -> str:
    """The file of a directory that has the weights or an index of them.

    Old tools named it after the quantization ("gptq_model-4bit-128g.safetensors"), so in a directory that describes one
    any single file will do.
    """
    names = sorted(entry.name for entry in directory.iterdir())
    usual = next((name for name in WEIGHT_FILES if name in names), None)
    if usual is not None:
        return usual
    others = [name for name in names if name.endswith(_OTHER_SUFFIXES)]
    for suffix in _QUANTIZED_SUFFIXES if is_quantized else ():
        found = [name for name in names if name.endswith(suffix)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ModelLoadError(
                f"{directory}: several files may have the weights: {', '.join(found[:8])}; keep one, or call the one "
                f"that is meant {WEIGHT_FILES[0]}"
            )
    raise ModelLoadError(
        f"{directory}: config.json but no weights; looked for {', '.join(WEIGHT_FILES)}"
        f"{'; found: ' + ', '.join(others[:8]) if others else ''}; load_format='dummy' creates random weights"
    )


def _config_dtype(config: Fields) -> ModelDType | None:
    """The dtype that config.json names; None if it names none, so that the files decide."""
    key = next((key for key in ("dtype", "torch_dtype") if config.has(key)), None)
    name = config.string(key).removeprefix("torch.") if key else "auto"
    return None if name == "auto" else _supported_dtype(_DTYPE_ALIASES.get(name, name), config.where)


def _supported_dtype(name: str, where: str) -> ModelDType:
    for dtype in MODEL_DTYPES:
        if name == dtype:
            return dtype
    raise UnsupportedModelError(f"{where}: dtype={name!r} is not supported; supported: {', '.join(MODEL_DTYPES)}")


def _read_safetensors(path: Path) -> Iterator[StoredTensor[TensorEntry]]:
    for name, entry in read_entries(path).items():
        yield StoredTensor(path, name, DTYPE_NAMES.get(entry.dtype, entry.dtype), entry.shape, entry)


def _load_entry(stored: StoredTensor[TensorEntry]) -> torch.Tensor:
    import torch

    entry = stored.tensor
    out = torch.empty(entry.shape, dtype=torch_dtype(DTYPE_NAMES[entry.dtype]))
    with entry.path.open("rb") as file:
        read_tensor(file, entry, out)
    return out


def _model_weights(
    metadata: HfMetadata,
    directory: Path,
    tensors: Mapping[str, StoredTensor[TensorT]],
    load: Callable[[StoredTensor[TensorT]], torch.Tensor],
) -> HfWeights[TensorT]:
    """The model's weights among `tensors`, checked; `load` reads one as it is stored."""
    arch = metadata.arch
    named = language_model_tensors(directory, tensors)
    linears = quantized_linears(arch, str(directory), named, metadata.layouts, load) if metadata.layouts else {}
    check_weights(arch, directory, named, linears, lambda tensor: not load(tensor).any())
    return HfWeights(named, quantized_matrices(arch, linears))


@dataclass(frozen=True, slots=True)
class HfWeights(Generic[TensorT]):
    """A directory's weights by the names that transformers gives them."""

    named: Mapping[str, StoredTensor[TensorT]]
    matrices: QuantizedMatrices

    @property
    def formats(self) -> ModelFormats:
        """How the matrices are stored."""
        return self.matrices.formats

    @property
    def dense_dtype(self) -> str:
        """The dtype of the embedding, or of the last norm if the embedding is quantized."""
        return self.named[EMBEDDING if EMBEDDING in self.named else NORM].dtype


def _stream_safetensors(
    arch: ModelArch, weights: HfWeights[TensorEntry], dtype: torch.dtype, slices: Mapping[str, Cut]
) -> WeightStream:
    places, read_norm = stored_parts(arch, stored_names(arch)), _norm_weights(arch)
    named = weights.named
    with ExitStack() as stack:
        paths = sorted({weight.path for weight in named.values()})
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        num_rows = arch.vocab_size
        _check_tied(arch, named, lambda one, two: holds_same(files, one.rows(0, num_rows), two.rows(0, num_rows)))

        def read_part(part: str, out: torch.Tensor, first_row: int = 0, columns: range | None = None) -> None:
            place = places[part]
            entry = named[place.tensor].tensor.rows(place.first_row + first_row, out.shape[0])
            read_tensor(files[entry.path], entry, out, columns)
            read_norm(part, out)

        read_matrix = weights.matrices.reader(dtype, read_part)
        yield from stream_fused(arch, dtype, read_part, weights.formats, read_matrix, slices)


def _check_tied(
    arch: ModelArch, weights: Mapping[str, StoredTensor[TensorT]], are_equal: Callable[[TensorT, TensorT], bool]
) -> None:
    """Raise `CorruptFileError` if a stored output projection differs from the embedding to which it is tied."""
    if not arch.tie_word_embeddings or HEAD not in weights or EMBEDDING not in weights:
        return
    head, embedding = weights[HEAD], weights[EMBEDDING]
    if not are_equal(head.tensor, embedding.tensor):
        raise CorruptFileError(
            f"{head.path.parent}: tensors {head.name!r} and {embedding.name!r} differ, although config.json has "
            "tie_word_embeddings=true; set it to false to use both"
        )


def _norm_weights(arch: ModelArch) -> Callable[[str, torch.Tensor], None]:
    """A function that turns a norm's stored weights, in place, into the factors of x; other parts stay as they are."""
    adds = family_of(arch).norms_plus_one

    def add(part: str, out: torch.Tensor) -> None:
        if adds and part.endswith("norm.weight"):
            out.add_(1.0)

    return add


def _bin_weights(directory: Path, metadata: HfMetadata, shards: Mapping[str, set[str]]) -> HfWeights[torch.Tensor]:
    """The model's weights in .bin files, checked, and memory-mapped where the format allows it."""
    tensors = merge_shards(directory, shards, _read_bin)
    return _model_weights(metadata, directory, tensors, lambda stored: stored.tensor.clone())


def _read_bin(path: Path) -> Iterator[StoredTensor[torch.Tensor]]:
    for name, tensor in _load_state_dict(path).items():
        yield StoredTensor(path, name, dtype_name(tensor.dtype), tuple(tensor.shape), tensor.detach())


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _UNPICKLING_ERRORS as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise CorruptFileError(f"{path}: torch.load(weights_only=True) failed: {reason}") from error
    if not isinstance(state, dict):
        raise CorruptFileError(f"{path}: contains a {type(state).__name__}, expected a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CorruptFileError(f"{path}: {name!r} must be a tensor, not a {type(tensor).__name__}")
    return state


def _stream_bin(
    arch: ModelArch, weights: HfWeights[torch.Tensor], dtype: torch.dtype, slices: Mapping[str, Cut]
) -> WeightStream:
    named, num_rows = weights.named, arch.vocab_size
    _check_tied(arch, named, lambda one, other: one.dtype == other.dtype and one[:num_rows].equal(other[:num_rows]))
    places, read_norm = stored_parts(arch, stored_names(arch)), _norm_weights(arch)

    def read_part(part: str, out: torch.Tensor, first_row: int = 0, columns: range | None = None) -> None:
        place = places[part]
        first = place.first_row + first_row
        rows = named[place.tensor].tensor[first : first + out.shape[0]]
        out.copy_(rows if columns is None else rows[:, columns.start : columns.stop])
        read_norm(part, out)

    read_matrix = weights.matrices.reader(dtype, read_part)
    yield from stream_fused(arch, dtype, read_part, weights.formats, read_matrix, slices)
