"""Engine directories: what `LLM.save()` writes and `ModelConfig(model_dir=...)` loads.

::

    engine.json                    manifest: versions, dtype, architecture, size and sha256 of every other file
    weights.rank0.safetensors      canonical fused weights
    tokenizer/**                   the tokenizer's files

A directory appears under its name complete or not at all: it is written beside it, synced and renamed. engine.json
carries its own sha256 and is read only in the exact bytes that are written here, so that an altered one is found out
like any other file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llmengine.errors import ConfigError, CorruptFileError, EngineError, ModelLoadError, UnsupportedModelError
from llmengine.models.arch import ModelArch, arch_from_dict, arch_to_dict
from llmengine.models.fields import Fields, read_json_object
from llmengine.models.fused import ModelSource, WeightStream, check_tensors, weight_layout
from llmengine.models.safetensors_file import DTYPE_NAMES, read_entries, read_tensor, write_tensors

if TYPE_CHECKING:
    import torch

MANIFEST_NAME = "engine.json"
WEIGHTS_NAME = "weights.rank0.safetensors"
TOKENIZER_DIR = "tokenizer"
FORMAT_VERSION = 1
_SEAL = "manifest_sha256"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What is taken from a source directory, where present."""

_BACKENDS = ("torch",)
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class _Manifest:
    """The keys of engine.json."""

    format_version: int
    backend: str
    llmengine_version: str
    torch_version: str
    dtype: str
    quantization: dict[str, Any]
    parallel: dict[str, int]
    arch: dict[str, Any]
    model_config_hash: str
    generation_config: dict[str, Any]
    eos_token_ids: list[int]
    bos_token_id: int | None
    files: dict[str, dict[str, Any]]


def save_engine(
    directory: str | Path,
    *,
    arch: ModelArch,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
    quantization: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    eos_token_ids: Sequence[int],
    bos_token_id: int | None,
    tokenizer_files: Mapping[str, bytes] | Path,
    backend: str = "torch",
) -> None:
    """Write an engine directory; `weights` come one at a time, as `weight_layout(arch, dtype, quantization)` orders.

    `tokenizer_files` maps file names to contents, or is a directory from which `TOKENIZER_FILES` are taken. An existing
    engine directory is replaced once the new one is complete (a kill between two renames leaves it beside, named
    `.NAME.*.old`); any other non-empty path is refused with `ConfigError`. A failed write raises `EngineError` and
    leaves nothing behind.
    """
    import torch

    if dtype not in _DTYPES or backend not in _BACKENDS:
        raise ConfigError(f"dtype={dtype!r}, backend={backend!r}: expected one of {_DTYPES} and one of {_BACKENDS}")
    layout = weight_layout(arch, dtype, quantization)
    manifest = _Manifest(
        format_version=FORMAT_VERSION,
        backend=backend,
        llmengine_version=_package_version(),
        torch_version=str(torch.__version__),
        dtype=dtype,
        quantization=dict(quantization),
        parallel={"tp_size": 1, "pp_size": 1},
        arch=arch_to_dict(arch),
        model_config_hash=model_config_hash(arch, dtype, quantization),
        generation_config=dict(generation_config),
        eos_token_ids=list(eos_token_ids),
        bos_token_id=bos_token_id,
        files={},
    )
    target = Path(os.path.realpath(directory))
    _require_replaceable(target)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _write_files(staging, manifest, _tokenizer_contents(tokenizer_files), layout, weights)
        _move_into_place(staging, target)
    except OSError as error:
        raise EngineError(
            f"{target}: saving failed, the directory is as it was before: {error.strerror or error}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_model(
    directory: str | Path,
    source: ModelSource,
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: str,
    quantization: Mapping[str, Any],
    tokenizer: object,
) -> None:
    """Write a loaded model as an engine directory; raises as `save_engine` does.

    `weights` are the canonical weights as a backend uses them; those in float are stored in `dtype`. A `tokenizer`
    with a method save(directory) writes its files; without one those beside the source are copied.
    """
    import torch

    stored: torch.dtype = getattr(torch, dtype)

    def save(tokenizer_files: Mapping[str, bytes] | Path) -> None:
        save_engine(
            directory,
            arch=source.arch,
            weights=((name, _as_stored(name, tensor, stored)) for name, tensor in weights),
            dtype=dtype,
            quantization=quantization,
            generation_config=source.generation_config,
            eos_token_ids=source.eos_token_ids,
            bos_token_id=source.bos_token_id,
            tokenizer_files=tokenizer_files,
        )

    write_tokenizer = getattr(tokenizer, "save", None)
    if write_tokenizer is None:
        save(source.tokenizer_path if source.tokenizer_path.is_dir() else {})
        return
    with tempfile.TemporaryDirectory(prefix="llmengine-") as scratch:
        write_tokenizer(Path(scratch))
        written = (path for path in Path(scratch).rglob("*") if path.is_file())
        save({path.relative_to(scratch).as_posix(): path.read_bytes() for path in written})


def _as_stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if name.endswith("weight_scale") or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def model_config_hash(arch: ModelArch, dtype: str, quantization: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of what decides whether a built engine fits a model."""
    key = {"arch": arch_to_dict(arch), "dtype": dtype, "quantization": dict(quantization)}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def open_engine(directory: Path) -> ModelSource:
    """Return the source of a saved engine directory.

    Checks here: manifest, presence and size of every file, contents of the tokenizer's. `weights` checks the
    contents of the weights file before it yields the first tensor. Raises `CorruptFileError` naming file, found and
    expected; `UnsupportedModelError` for another format version, backend or parallel size.
    """
    fields = _read_manifest(directory / MANIFEST_NAME)
    arch = arch_from_dict(fields.fields("arch").values, f"{fields.where}: arch")
    dtype = fields.string("dtype")
    quantization = dict(fields.fields("quantization").values)
    layout = weight_layout(arch, dtype, quantization)
    expected_hash = model_config_hash(arch, dtype, quantization)
    if fields.string("model_config_hash") != expected_hash:
        raise fields.error("model_config_hash", f"{expected_hash} for its arch, dtype and quantization")
    files = _read_file_table(fields.fields("files"))
    for name, (size_bytes, _) in files.items():
        _check_size(directory / name, size_bytes)
    for name, (_, sha256) in files.items():
        if name != WEIGHTS_NAME:
            _check_contents(directory / name, sha256)
    bos = fields.token_ids("bos_token_id")
    return ModelSource(
        kind="engine",
        path=directory,
        arch=arch,
        checkpoint_dtype=dtype,
        generation_config=dict(fields.fields("generation_config").values),
        eos_token_ids=fields.token_ids("eos_token_ids"),
        bos_token_id=bos[0] if bos else None,
        tokenizer_path=directory / TOKENIZER_DIR,
        stream=lambda wanted: _stream(directory / WEIGHTS_NAME, files[WEIGHTS_NAME][1], layout, wanted),
        quantization=quantization,
    )


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of engine.json: `content`, and the sha256 of `content` as it is written without it."""
    digest = hashlib.sha256(_encode(content)).hexdigest()
    return _encode({**content, _SEAL: digest})


def _encode(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _package_version() -> str:
    try:
        return importlib.metadata.version("llmengine")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _tokenizer_contents(source: Mapping[str, bytes] | Path) -> dict[str, bytes]:
    if isinstance(source, Path):
        return {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    for name in source:
        if not _is_inside(name):
            raise ConfigError(f"tokenizer file {name!r} is not a relative path")
    return dict(source)


def _is_inside(name: str) -> bool:
    """Return whether `name` is a plain relative path, written in the one canonical way."""
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and ".." not in path.parts and name != "."


def _require_replaceable(target: Path) -> None:
    """Raise `ConfigError` unless `target` is absent, an empty directory, or an engine directory with nothing else."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target}: exists and is no directory; choose another name")
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    if not found:
        return
    if MANIFEST_NAME not in found:
        raise ConfigError(f"{target}: is neither empty nor a saved engine; choose another directory")
    try:
        known = set(read_json_object(target / MANIFEST_NAME).fields("files").values)
    except ModelLoadError as error:
        raise ConfigError(f"{target}: is not overwritten because its manifest cannot be read: {error}") from error
    foreign = sorted(found - known - {MANIFEST_NAME})
    if foreign:
        raise ConfigError(f"{target}: holds files that are not the saved engine's: {', '.join(foreign[:4])}")


def _write_files(
    staging: Path,
    manifest: _Manifest,
    tokenizer: Mapping[str, bytes],
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """Write and sync the whole directory; the manifest last."""
    (staging / TOKENIZER_DIR).mkdir(parents=True)
    for name, contents in tokenizer.items():
        (staging / TOKENIZER_DIR / name).parent.mkdir(parents=True, exist_ok=True)
        sha256 = _write_file(staging / TOKENIZER_DIR / name, contents)
        manifest.files[f"{TOKENIZER_DIR}/{name}"] = {"size_bytes": len(contents), "sha256": sha256}
    with (staging / WEIGHTS_NAME).open("wb") as file:
        sha256 = write_tensors(file, layout, weights)
        file.flush()
        os.fsync(file.fileno())
        manifest.files[WEIGHTS_NAME] = {"size_bytes": file.tell(), "sha256": sha256}
    _write_file(staging / MANIFEST_NAME, _sealed(dataclasses.asdict(manifest)))
    for folder in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
        _sync_directory(folder)


def _write_file(path: Path, contents: bytes) -> str:
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(contents).hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; a replaced engine is put back if that fails."""
    if not (target / MANIFEST_NAME).exists():
        staging.rename(target)
    else:
        replaced = staging.with_suffix(".old")
        target.rename(replaced)
        try:
            staging.rename(target)
        except OSError:
            replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    _sync_directory(target.parent)


def _read_manifest(path: Path) -> Fields:
    fields = read_json_object(path)
    version = fields.integer("format_version")
    if version != FORMAT_VERSION:
        age = "a newer" if version > FORMAT_VERSION else "an older"
        raise UnsupportedModelError(
            f"{path}: format_version {version} is of {age} llmengine, this one reads {FORMAT_VERSION}: save the "
            "engine again from its checkpoint"
        )
    fields.require_only({item.name for item in dataclasses.fields(_Manifest)} | {_SEAL})
    content = {key: value for key, value in fields.values.items() if key != _SEAL}
    if path.read_bytes() != _sealed(content):
        raise CorruptFileError(f"{path}: its contents are not those expected by its {_SEAL}: altered after saving")
    for key in ("llmengine_version", "torch_version"):
        fields.string(key)
    if fields.string("dtype") not in _DTYPES:
        raise fields.error("dtype", f"one of {', '.join(_DTYPES)}")
    if fields.string("backend") not in _BACKENDS:
        raise UnsupportedModelError(
            f"{path}: backend {fields.string('backend')!r} is not supported; supported: {', '.join(_BACKENDS)}"
        )
    parallel = fields.fields("parallel")
    parallel.require_only({"tp_size", "pp_size"})
    if (sizes := (parallel.integer("tp_size"), parallel.integer("pp_size"))) != (1, 1):
        raise UnsupportedModelError(f"{path}: saved for tp_size={sizes[0]}, pp_size={sizes[1]}; only 1 x 1 runs")
    return fields


def _read_file_table(table: Fields) -> dict[str, tuple[int, str]]:
    """Return file name -> (size, sha256); every name is checked to stay inside the directory."""
    files: dict[str, tuple[int, str]] = {}
    for name in table.values:
        if name != WEIGHTS_NAME and not (name.startswith(f"{TOKENIZER_DIR}/") and _is_inside(name)):
            raise CorruptFileError(f"{table.where}: {name!r} is not a file of an engine directory")
        entry = table.fields(name)
        entry.require_only({"size_bytes", "sha256"})
        files[name] = (entry.integer("size_bytes"), entry.string("sha256"))
    if WEIGHTS_NAME not in files:
        raise table.error(WEIGHTS_NAME, "size and sha256 of the weights")
    return files


def _check_size(path: Path, size_bytes: int) -> None:
    if not path.is_file():
        raise CorruptFileError(f"{path}: is missing, expected {size_bytes} bytes")
    found = path.stat().st_size
    if found != size_bytes:
        raise CorruptFileError(f"{path}: has {found} bytes, expected {size_bytes}")


def _check_contents(path: Path, sha256: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    if found != sha256:
        raise CorruptFileError(f"{path}: has sha256 {found}, expected {sha256}")


def _stream(
    path: Path, sha256: str, layout: Mapping[str, tuple[str, tuple[int, ...]]], wanted: torch.dtype
) -> WeightStream:
    """Yield the saved tensors, floating-point ones converted to `wanted`, integers and scales as they are."""
    import torch

    _check_contents(path, sha256)
    entries = read_entries(path)
    shapes = {name: shape for name, (_, shape) in layout.items()}
    check_tensors(shapes, {name: entry.shape for name, entry in entries.items()}, str(path))
    for name, (dtype, _) in layout.items():
        if (found := DTYPE_NAMES[entries[name].dtype]) != dtype:
            raise CorruptFileError(f"{path}: tensor {name!r} is {found}, expected {dtype}")
    with path.open("rb") as file:
        for name, (dtype, shape) in layout.items():
            keeps = dtype == "int8" or name.endswith("_scale")
            tensor = torch.empty(shape, dtype=getattr(torch, dtype) if keeps else wanted)
            read_tensor(file, entries[name], tensor)
            yield name, tensor
