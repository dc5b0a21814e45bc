"""Hugging Face directories: config.json with safetensors or pytorch_model.bin files, single or sharded."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llmengine.errors import CorruptFileError, InvalidRequestError, ModelLoadError, UnsupportedModelError
from llmengine.generation_config import generation_keys
from llmengine.models.adapters import refuse_adapter_tensors
from llmengine.models.arch import ModelArch
from llmengine.models.end_ids import hf_end_ids
from llmengine.models.families import family_of
from llmengine.models.fields import Fields, read_json_object
from llmengine.models.fused import (
    ModelSource,
    WeightStream,
    check_tensors,
    stored_parts,
    stored_shapes,
    stream_fused,
)
from llmengine.models.hf_config import arch_from_hf_config
from llmengine.models.safetensors_file import DTYPE_NAMES, TensorEntry, holds_same, read_entries, read_tensor
from llmengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    import torch

_Stored = TypeVar("_Stored")

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What a directory's weights are in, or the index that names their files; the first that is there counts."""

_HARMLESS_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
_HEAD = "lm_head.weight"
_STORED_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "attention_out_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_SANDWICH_NAMES = {"post_attention_norm": "pre_feedforward_layernorm"}
_FUSED_NAMES = {
    **dict.fromkeys("qkv", "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}

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
"""What torch.load raises for damaged files; it has no error of its own."""


def stored_names(arch: ModelArch) -> Callable[[str], str]:
    """Return what gives a part's name in Hugging Face's files.

    `layers.0.q.weight` is `model.layers.0.self_attn.q_proj.weight`; all parts of a tensor have its name.
    """
    names = dict(_STORED_NAMES)
    if arch.norm_placement == "both":
        names |= _SANDWICH_NAMES
    if family_of(arch).stored_fused:
        names |= _FUSED_NAMES

    def stored_name(part: str) -> str:
        *layer, module, kind = part.split(".")
        prefix = f"model.{'.'.join(layer)}." if layer else ""
        return f"{prefix}{names[module]}.{kind}"

    return stored_name


@dataclass(frozen=True, slots=True)
class HfMetadata:
    """What the JSON files of a Hugging Face directory say."""

    arch: ModelArch
    dtype: str | None
    generation_config: Fields
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def read_hf_metadata(directory: Path) -> HfMetadata:
    """Read config.json and generation_config.json, the second optional."""
    config = read_json_object(directory / "config.json")
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
        generation = read_json_object(generation_path)
    else:
        generation = Fields(generation_keys(config.values), config.where)
    _check_generation(generation)
    bos = generation.token_ids("bos_token_id") or config.token_ids("bos_token_id")
    arch = arch_from_hf_config(config.values, config.where)
    return HfMetadata(
        arch=arch,
        dtype=_config_dtype(config),
        generation_config=generation,
        eos_token_ids=hf_end_ids(config, generation, arch.vocab_size),
        bos_token_id=bos[0] if bos else None,
    )


def _check_generation(generation: Fields) -> None:
    """Raise `CorruptFileError` for malformed values; `LLM` tells of keys that cannot be honoured."""
    try:
        SamplingParams.from_generation_config(generation.values)
    except InvalidRequestError as error:
        raise CorruptFileError(f"{generation.where}: {error}") from error
    except UnsupportedModelError:
        pass


def open_hf(directory: Path) -> ModelSource:
    """Return the checkpoint of a Hugging Face directory; reads JSON files and safetensors headers only."""
    metadata = read_hf_metadata(directory)
    arch = metadata.arch
    file_name = next((name for name in WEIGHT_FILES if (directory / name).exists()), None)
    if file_name is None:
        raise ModelLoadError(
            f"{directory}: has config.json but no weights; looked for {', '.join(WEIGHT_FILES)} "
            "(load_format='dummy' makes random ones)"
        )
    shards = _shards(directory, file_name)
    if "safetensors" in file_name:
        entries = _safetensors_entries(directory, arch, shards)
        first = entries[stored_names(arch)("embed_tokens.weight")].dtype
        dtype = metadata.dtype or _supported_dtype(DTYPE_NAMES[first], str(directory))
    else:
        dtype = metadata.dtype or _bin_dtype(directory, arch, shards)

    def stream(dtype: torch.dtype) -> WeightStream:
        if "safetensors" in file_name:
            return _stream_safetensors(arch, entries, dtype)
        return _stream_bin(directory, arch, shards, dtype)

    return ModelSource(
        kind="huggingface",
        path=directory,
        arch=arch,
        checkpoint_dtype=dtype,
        generation_config=dict(metadata.generation_config.values),
        eos_token_ids=metadata.eos_token_ids,
        bos_token_id=metadata.bos_token_id,
        tokenizer_path=directory,
        stream=stream,
    )


def _config_dtype(config: Fields) -> str | None:
    key = next((key for key in ("dtype", "torch_dtype") if config.has(key)), None)
    return _supported_dtype(config.string(key).removeprefix("torch."), config.where) if key else None


def _supported_dtype(name: str, where: str) -> str:
    if name not in ("float32", "float16", "bfloat16"):
        raise UnsupportedModelError(f"{where}: dtype {name!r} is not supported; use float32, float16 or bfloat16")
    return name


def _shards(directory: Path, file_name: str) -> dict[str, set[str] | None]:
    """Return file -> names of the tensors that the index places there, None without an index."""
    if not file_name.endswith(".index.json"):
        return {file_name: None}
    index = read_json_object(directory / file_name)
    weight_map = index.fields("weight_map")
    shards: dict[str, set[str] | None] = {}
    for tensor in weight_map.values:
        file = weight_map.string(tensor)
        if Path(file).name != file:
            raise weight_map.error(tensor, "the name of a file in the same directory")
        names = shards.setdefault(file, set())
        assert names is not None
        names.add(tensor)
    if not shards:
        raise index.error("weight_map", "at least one tensor")
    missing = [file for file in shards if not (directory / file).is_file()]
    if missing:
        raise CorruptFileError(f"{index.where}: names files that are not there: {', '.join(sorted(missing))}")
    return shards


def _check_index(path: Path, found: set[str], indexed: set[str] | None) -> None:
    if indexed is not None and found != indexed:
        name = min(found ^ indexed)
        side = "has" if name in found else "lacks"
        raise CorruptFileError(f"{path}: {side} tensor {name!r}, contrary to the index")


def _check_all(
    directory: Path, arch: ModelArch, shapes: Mapping[str, tuple[int, ...]], files: Mapping[str, Path]
) -> None:
    def is_harmless(name: str) -> bool:
        return name.endswith(_HARMLESS_SUFFIXES) or (name == _HEAD and arch.tie_word_embeddings)

    refuse_adapter_tensors(shapes, str(directory))
    expected = stored_shapes(arch, stored_names(arch))
    check_tensors(expected, shapes, str(directory), is_harmless, lambda name: str(files[name]))


def _safetensors_entries(
    directory: Path, arch: ModelArch, shards: Mapping[str, set[str] | None]
) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file, indexed in shards.items():
        found = read_entries(directory / file)
        _check_index(directory / file, set(found), indexed)
        entries.update(found)
    shapes = {name: entry.shape for name, entry in entries.items()}
    _check_all(directory, arch, shapes, {name: entry.path for name, entry in entries.items()})
    for entry in entries.values():
        if entry.dtype == "I8":
            raise UnsupportedModelError(f"{entry.path}: tensor {entry.name!r} is int8, expected floating point")
    return entries


def _stream_safetensors(arch: ModelArch, entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> WeightStream:
    places, read_norm = stored_parts(arch, stored_names(arch)), _plus_one(arch)
    with ExitStack() as stack:
        paths = sorted({entry.path for entry in entries.values()})
        files = {path: stack.enter_context(path.open("rb")) for path in paths}
        _check_tied(paths[0].parent, arch, entries, lambda one, other: holds_same(files, one, other))

        def read_part(part: str, out: torch.Tensor) -> None:
            place = places[part]
            entry = entries[place.tensor].rows(place.first_row, place.num_rows)
            read_tensor(files[entry.path], entry, out)
            read_norm(part, out)

        yield from stream_fused(arch, dtype, read_part)


def _check_tied(
    directory: Path, arch: ModelArch, tensors: Mapping[str, _Stored], are_equal: Callable[[_Stored, _Stored], bool]
) -> None:
    """Raise `CorruptFileError` for a stored output projection that differs from the embedding that it is tied to."""
    embedding = stored_names(arch)("embed_tokens.weight")
    if arch.tie_word_embeddings and _HEAD in tensors and not are_equal(tensors[_HEAD], tensors[embedding]):
        raise CorruptFileError(
            f"{directory}: tensors {_HEAD!r} and {embedding!r} differ, contrary to tie_word_embeddings=true in "
            "config.json; set that to false to use both"
        )


def _plus_one(arch: ModelArch) -> Callable[[str, torch.Tensor], None]:
    """Return what makes a norm's stored weights those that x is multiplied by."""
    adds = family_of(arch).norms_plus_one

    def add(part: str, out: torch.Tensor) -> None:
        if adds and part.endswith("norm.weight"):
            out.add_(1.0)

    return add


def _load_bin(directory: Path, arch: ModelArch, shards: Mapping[str, set[str] | None]) -> dict[str, torch.Tensor]:
    """Return name -> memory-mapped tensor of all shards, checked."""
    tensors: dict[str, torch.Tensor] = {}
    files: dict[str, Path] = {}
    for file, indexed in shards.items():
        found = _load_state_dict(directory / file)
        _check_index(directory / file, set(found), indexed)
        tensors.update(found)
        files.update(dict.fromkeys(found, directory / file))
    _check_all(directory, arch, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, files)
    return tensors


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _UNPICKLING_ERRORS as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise CorruptFileError(f"{path}: torch.load(weights_only=True, mmap=True) refuses it: {reason}") from error
    if not isinstance(state, dict):
        raise CorruptFileError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise CorruptFileError(f"{path}: {name!r} is no floating-point tensor")
    return state


def _bin_dtype(directory: Path, arch: ModelArch, shards: Mapping[str, set[str] | None]) -> str:
    tensor = _load_bin(directory, arch, shards)[stored_names(arch)("embed_tokens.weight")]
    return _supported_dtype(str(tensor.dtype).removeprefix("torch."), str(directory))


def _stream_bin(
    directory: Path, arch: ModelArch, shards: Mapping[str, set[str] | None], dtype: torch.dtype
) -> WeightStream:
    tensors = _load_bin(directory, arch, shards)
    _check_tied(directory, arch, tensors, lambda one, other: one.dtype == other.dtype and one.equal(other))
    places, read_norm = stored_parts(arch, stored_names(arch)), _plus_one(arch)

    def read_part(part: str, out: torch.Tensor) -> None:
        place = places[part]
        out.copy_(tensors[place.tensor][place.first_row : place.first_row + place.num_rows])
        read_norm(part, out)

    yield from stream_fused(arch, dtype, read_part)
