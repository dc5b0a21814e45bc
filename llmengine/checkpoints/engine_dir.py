"""Engine directories: what `LLM.save()` writes and `ModelConfig(model_dir=...)` loads.

::

    engine.json                    manifest: versions, dtype, architecture, size and sha256 of every other file
    weights.rank0.safetensors      canonical fused weights
    plans/*                        what a backend built for the model, where it built anything
    tokenizer/**                   the tokenizer's files

A directory appears under its name complete or not at all: it is written beside it, synced and renamed. engine.json
carries its own sha256 and is read only in the exact bytes that are written here, so that an altered one is found out
like any other file. Damaged weights, tokenizer files and manifests are refused; plans are only checked by the backend
that uses them, which can build them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from llmengine.checkpoints.arch_json import SAVED_FIELDS, arch_from_dict, arch_to_dict
from llmengine.checkpoints.atomic_directory import atomic_directory, files_below, sync_file
from llmengine.checkpoints.canonical_weights import check_tensors
from llmengine.checkpoints.end_token_ids import ids_in_vocabulary
from llmengine.checkpoints.metadata_fields import Fields, read_json_object
from llmengine.checkpoints.safetensors_file import DTYPE_NAMES, read_entries, read_tensor, write_tensors
from llmengine.checkpoints.saved_files import SavedFile, SavedPlans
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import MODEL_DTYPES, ModelDType, model_dtype_name, torch_dtype
from llmengine.errors import ConfigError, CorruptFileError, EngineError, ModelLoadError, UnsupportedModelError
from llmengine.models.arch import ModelArch, RopeConfig
from llmengine.quantization.formats import TensorSpec
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.quality_report import QualityReport

if TYPE_CHECKING:
    import torch

MANIFEST_NAME = "engine.json"
WEIGHTS_NAME = "weights.rank0.safetensors"
TOKENIZER_DIR = "tokenizer"
PLANS_DIR = "plans"
FORMAT_VERSION = 2
"""2 added `plans`; 1 is still read."""

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

_BACKENDS = ("torch", "tensorrt")
_COPY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class _Manifest:
    """The keys of engine.json.

    Attributes:
        backend: what saved it; every backend loads it.
        plans: `SavedPlans.facts`, None where there are no plans.
        quality: `QualityReport.to_json`; None, which is not written, where the model was not evaluated.
    """

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
    plans: dict[str, Any] | None
    quality: dict[str, Any] | None
    files: dict[str, dict[str, Any]]


def save_engine(
    directory: str | Path,
    *,
    arch: ModelArch,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype: ModelDType,
    formats: ModelFormats,
    generation_config: Mapping[str, Any],
    eos_token_ids: Sequence[int],
    bos_token_id: int | None,
    tokenizer_files: Mapping[str, bytes] | Path,
    plans: SavedPlans | None = None,
    quality: QualityReport | None = None,
) -> None:
    """Write an engine directory; `weights` come one at a time, as `formats.layout(arch, dtype)` orders.

    `tokenizer_files` maps file names to contents, or is a directory from which `TOKENIZER_FILES` are taken. An existing
    engine directory is replaced once the new one is complete, as `atomic_directory` does; a path that is not
    replaceable is refused with `ConfigError`. A failed write raises `EngineError` and leaves nothing behind.
    """
    import torch

    if dtype not in MODEL_DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(map(repr, MODEL_DTYPES))}")
    quantization = formats.to_json()
    manifest = _Manifest(
        format_version=FORMAT_VERSION,
        backend="torch" if plans is None else "tensorrt",
        llmengine_version=_package_version(),
        torch_version=str(torch.__version__),
        dtype=dtype,
        quantization=quantization,
        parallel={"tp_size": 1, "pp_size": 1},
        arch=arch_to_dict(arch),
        model_config_hash=model_config_hash(arch_to_dict(arch), dtype, quantization),
        generation_config=dict(generation_config),
        eos_token_ids=list(eos_token_ids),
        bos_token_id=bos_token_id,
        plans=None if plans is None else dict(plans.facts),
        quality=None if quality is None else quality.to_json(),
        files={},
    )
    target = require_replaceable(directory)
    try:
        with atomic_directory(target) as staging:
            (staging / TOKENIZER_DIR).mkdir()
            _write_tokenizer(staging, manifest, _tokenizer_contents(tokenizer_files))
            if plans is not None:
                _write_plans(staging, manifest, plans.files)
            _write_weights(staging, manifest, formats.layout(arch, dtype), weights)
            _write_manifest(staging, manifest)
            require_replaceable(target)  # once more: writing took long, and what was put there meanwhile is not ours
    except OSError as error:
        raise EngineError(f"{target}: saving failed, the directory is as it was before: {_reason(error)}") from error


def model_config_hash(arch: Mapping[str, Any], dtype: str, quantization: Mapping[str, Any]) -> str:
    """The sha256 (hex) of everything that decides whether an engine fits a model; `arch` as the manifest has it."""
    key = {"arch": dict(arch), "dtype": dtype, "quantization": dict(quantization)}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def open_engine(directory: Path) -> ModelSource:
    """The source of a saved engine directory.

    This checks the manifest, the presence and size of every file except plans, and the contents of the tokenizer's
    files. `weights` checks the contents of the weights file before it yields the first tensor, and a backend checks the
    plans that it uses. Raises `CorruptFileError` naming the file, what was found and what was expected;
    `UnsupportedModelError` for another format version, backend or parallel size.
    """
    fields = read_manifest(directory)
    files = read_files(directory, fields)
    source = described_engine(directory, fields, files)
    for name, file in files.items():
        if name == WEIGHTS_NAME:
            file.check_size()
        elif not _is_plan(name):
            file.check()
    return source


def described_engine(directory: Path, fields: Fields, files: Mapping[str, SavedFile]) -> ModelSource:
    """The source that a manifest describes, which was read as `fields` and `files`; looks at no file."""
    arch = arch_from_dict(_arch_values(fields), f"{fields.where}: arch")
    dtype = fields.choice("dtype", MODEL_DTYPES)
    quantization = fields.fields("quantization")
    formats = ModelFormats.from_json(quantization.values, arch, quantization.where)
    expected_hash = model_config_hash(fields.fields("arch").values, dtype, quantization.values)
    if fields.string("model_config_hash") != expected_hash:
        raise fields.error("model_config_hash", f"{expected_hash} for its arch, dtype and quantization")
    plans = {name.removeprefix(f"{PLANS_DIR}/"): file for name, file in files.items() if _is_plan(name)}
    bos = fields.token_ids("bos_token_id")
    return ModelSource(
        kind="engine",
        path=directory,
        arch=arch,
        checkpoint_dtype=dtype,
        generation_config=dict(fields.fields("generation_config").values),
        eos_token_ids=ids_in_vocabulary(fields, "eos_token_ids", arch.vocab_size),
        bos_token_id=bos[0] if bos else None,
        tokenizer_path=directory / TOKENIZER_DIR,
        stream=lambda wanted: _stream(
            directory / WEIGHTS_NAME,
            files[WEIGHTS_NAME],
            formats.layout(arch, dtype),
            formats.layout(arch, model_dtype_name(wanted)),
        ),
        formats=formats,
        plans=SavedPlans(dict(fields.fields("plans").values), plans) if fields.has("plans") else None,
        quality=read_quality(fields),
    )


def _sealed(content: Mapping[str, Any]) -> bytes:
    """The bytes of engine.json: `content`, followed by the sha256 of `content` alone."""
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
    """Whether `name` is a relative path in its canonical form."""
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and ".." not in path.parts and name != "."


def require_replaceable(directory: str | Path) -> Path:
    """The path, absolute and without links, to which an engine for `directory` is written.

    Raises `ConfigError` unless it is absent, an empty directory, or an engine directory with nothing else; and if the
    current directory is there, which would be gone after that.
    """
    try:
        target = Path(os.path.realpath(directory))
        if os.path.lexists(target):
            _check_replaceable(target)
    except OSError as error:
        raise ConfigError(f"{str(directory)!r}: no engine can be saved there: {_reason(error)}") from error
    return target


def _check_replaceable(target: Path) -> None:
    if not target.is_dir():
        raise ConfigError(f"{target}: exists and is not a directory; choose another name")
    if _current_directory().is_relative_to(target):
        raise ConfigError(f"{target}: would be replaced while it is, or holds, the current directory; choose another")
    if not any(target.iterdir()):
        return
    if not (target / MANIFEST_NAME).exists():
        raise ConfigError(f"{target}: is neither empty nor a saved engine; choose another directory")
    try:
        known = set(read_json_object(target / MANIFEST_NAME).fields("files").values)
    except ModelLoadError as error:
        raise ConfigError(f"{target}: is not overwritten because its manifest cannot be read: {error}") from error
    foreign = sorted(files_below(target) - known - {MANIFEST_NAME})
    if foreign:
        raise ConfigError(f"{target}: holds files that are not the saved engine's: {', '.join(foreign[:4])}")


def _current_directory() -> Path:
    """The current directory, an empty path if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path()


def _reason(error: OSError) -> str:
    """The reason why a system call failed, and the file where it is known."""
    reason = error.strerror or str(error)
    return reason if error.filename is None else f"{reason}: {os.fsdecode(error.filename)}"


def _write_tokenizer(staging: Path, manifest: _Manifest, tokenizer: Mapping[str, bytes]) -> None:
    for name, contents in tokenizer.items():
        _write_file(staging, manifest, f"{TOKENIZER_DIR}/{name}", SavedFile.of(contents))


def _write_plans(staging: Path, manifest: _Manifest, files: Mapping[str, SavedFile]) -> None:
    for name, file in files.items():
        _write_file(staging, manifest, f"{PLANS_DIR}/{name}", file)


def _write_weights(
    staging: Path,
    manifest: _Manifest,
    layout: Mapping[str, TensorSpec],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> None:
    with (staging / WEIGHTS_NAME).open("wb") as file:
        sha256 = write_tensors(file, layout, weights)
        sync_file(file)
        manifest.files[WEIGHTS_NAME] = {"size_bytes": file.tell(), "sha256": sha256}


def _write_manifest(staging: Path, manifest: _Manifest) -> None:
    """Write the manifest, the last of the files."""
    with (staging / MANIFEST_NAME).open("wb") as file:
        content = dataclasses.asdict(manifest)
        if manifest.quality is None:
            del content["quality"]
        file.write(_sealed(content))
        sync_file(file)


def _write_file(staging: Path, manifest: _Manifest, name: str, source: SavedFile) -> None:
    """Write and sync a copy of `source`, and enter it in the manifest; raises `CorruptFileError` for an altered one."""
    target = staging / name
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for piece in _pieces(source):
            digest.update(piece)
            file.write(piece)
        sync_file(file)
        written = (file.tell(), digest.hexdigest())
    if written != (source.size_bytes, source.sha256):
        raise CorruptFileError(f"{source.content!s:.200}: was altered since it was built or loaded; it is not saved")
    manifest.files[name] = {"size_bytes": written[0], "sha256": written[1]}


def _pieces(source: SavedFile) -> Iterator[bytes]:
    if isinstance(source.content, bytes):
        yield source.content
        return
    with source.content.open("rb") as file:
        while piece := file.read(_COPY_BYTES):
            yield piece


def read_manifest(directory: Path) -> Fields:
    """The checked manifest of an engine directory; raises as `open_engine` does."""
    path = directory / MANIFEST_NAME
    fields = read_json_object(path)
    version = fields.integer("format_version")
    if not 1 <= version <= FORMAT_VERSION:
        age, remedy = ("a newer", "update llmengine, or") if version > FORMAT_VERSION else ("an older", "please")
        raise UnsupportedModelError(
            f"{path}: format_version {version} is from {age} llmengine; this one reads 1 to {FORMAT_VERSION}: {remedy} "
            "save the engine again from its checkpoint"
        )
    fields.require_only(_keys(version) | {_SEAL} | ({"quality"} if fields.has("quality") else set()))
    content = {key: value for key, value in fields.values.items() if key != _SEAL}
    if path.read_bytes() != _sealed(content):
        raise CorruptFileError(f"{path}: its contents do not match its {_SEAL}: it was altered after saving")
    for key in ("llmengine_version", "torch_version"):
        fields.string(key)
    fields.choice("dtype", MODEL_DTYPES)
    if fields.string("backend") not in _BACKENDS:
        raise UnsupportedModelError(
            f"{path}: backend {fields.string('backend')!r} is not supported; supported: {', '.join(_BACKENDS)}"
        )
    parallel = fields.fields("parallel")
    parallel.require_only({"tp_size", "pp_size"})
    if (sizes := (parallel.integer("tp_size"), parallel.integer("pp_size"))) != (1, 1):
        raise UnsupportedModelError(f"{path}: saved for tp_size={sizes[0]}, pp_size={sizes[1]}; only 1 x 1 runs")
    return fields


def _keys(version: int) -> set[str]:
    """The keys that a manifest must have, without its seal."""
    keys = {item.name for item in dataclasses.fields(_Manifest)}
    return keys - ({"quality"} if version == FORMAT_VERSION else {"plans", "quality"})


def read_quality(manifest: Fields) -> QualityReport | None:
    """The quality report in a manifest; None where there is none, or one of another version of llmengine."""
    if not manifest.has("quality"):
        return None
    quality = manifest.fields("quality")
    return QualityReport.from_json(quality.values, quality.where)


def read_files(directory: Path, manifest: Fields) -> dict[str, SavedFile]:
    """The files that the manifest lists, by name; every name is checked to stay inside the directory."""
    table = manifest.fields("files")
    files: dict[str, SavedFile] = {}
    for name in table.values:
        if name != WEIGHTS_NAME and not (_is_inside(name) and (name.startswith(f"{TOKENIZER_DIR}/") or _is_plan(name))):
            raise CorruptFileError(f"{table.where}: {name!r} is not a file of an engine directory")
        entry = table.fields(name)
        entry.require_only({"size_bytes", "sha256"})
        files[name] = SavedFile(directory / name, entry.integer("size_bytes"), entry.string("sha256"))
    if WEIGHTS_NAME not in files:
        raise table.error(WEIGHTS_NAME, "size and sha256 of the weights")
    return files


def _arch_values(manifest: Fields) -> dict[str, Any]:
    """The architecture; in an engine of format 1, fields that were added since have their defaults."""
    values = dict(manifest.fields("arch").values)
    if manifest.integer("format_version") > 1:
        return values
    rope = {**_defaults(RopeConfig), **manifest.fields("arch").fields("rope").values}
    defaults = {name: value for name, value in _defaults(ModelArch).items() if name in SAVED_FIELDS}
    return {**defaults, **values, "rope": rope}


def _defaults(kind: type[ModelArch] | type[RopeConfig]) -> dict[str, Any]:
    defaults = {item.name: item.default for item in dataclasses.fields(kind)}
    known = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def _is_plan(name: str) -> bool:
    return name.startswith(f"{PLANS_DIR}/")


def _stream(
    path: Path,
    saved: SavedFile,
    layout: Mapping[str, TensorSpec],
    wanted: Mapping[str, TensorSpec],
) -> WeightStream:
    """Yield the tensors, saved in `layout`, in the layout `wanted`; only floating-point dtypes may differ."""
    import torch

    saved.check()
    entries = read_entries(path)
    shapes = {name: spec.shape for name, spec in layout.items()}
    check_tensors(shapes, {name: entry.shape for name, entry in entries.items()}, str(path))
    for name, spec in layout.items():
        if (found := DTYPE_NAMES.get(entries[name].dtype, entries[name].dtype)) != spec.dtype:
            raise CorruptFileError(f"{path}: tensor {name!r} is {found}, expected {spec.dtype}")
    with path.open("rb") as file:
        for name, spec in wanted.items():
            tensor = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
            read_tensor(file, entries[name], tensor)
            yield name, tensor
