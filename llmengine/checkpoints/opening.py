"""`open_model`: finds out what a path holds and opens it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from llmengine.checkpoints.dummy_weights import open_dummy
from llmengine.checkpoints.engine_dir import MANIFEST_NAME, open_engine
from llmengine.checkpoints.gguf_checkpoint import open_gguf
from llmengine.checkpoints.gguf_file import read_gguf
from llmengine.checkpoints.gguf_split import first_files
from llmengine.checkpoints.huggingface_checkpoint import WEIGHT_FILES, open_hf
from llmengine.checkpoints.source import ModelSource
from llmengine.checkpoints.unsupported_adapters import adapter_directories, refuse_adapters, refuse_gguf_adapter
from llmengine.errors import ConfigError, ModelLoadError

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_model(path: str | Path, load_format: Literal["auto", "dummy"] = "auto") -> ModelSource:
    """Open a saved engine directory, a Hugging Face directory, a `.gguf` file, any file of a split one, or a directory
    with one GGUF model.

    Reads metadata only, and without torch (except for .bin files whose config.json names no dtype).
    load_format="dummy" takes a directory's config.json and makes random weights. Raises `ModelLoadError` if there is no
    such model, `UnsupportedModelError` for one that is not supported, `CorruptFileError` for damaged files.
    """
    if load_format not in ("auto", "dummy"):
        raise ConfigError(f"load_format={load_format!r} is none of 'auto', 'dummy'")
    try:
        return _open(path, load_format)
    except OSError as error:
        raise ModelLoadError(f"model_dir={str(path)!r} cannot be read: {error.strerror or error}") from error


def _open(path: str | Path, load_format: Literal["auto", "dummy"]) -> ModelSource:
    place = Path(path).absolute()  # files are read later as well, then perhaps from another current directory
    if not place.exists():
        hint = ""
        if _HUB_ID.fullmatch(str(path)):
            hint = "; it looks like a hub id, but only local files are read: download it and give its directory"
        raise ModelLoadError(f"model_dir={str(path)!r} does not exist{hint}")
    if load_format == "dummy":
        if not (place / "config.json").is_file():
            raise ModelLoadError(f"{place}: load_format='dummy' needs a directory with a config.json")
        return open_dummy(place)
    if place.is_dir():
        return _open_directory(place)
    if place.suffix.lower() == ".gguf":
        return open_gguf(place)
    raise ModelLoadError(f"{place}: is a file but not a .gguf one; give a model's directory or a .gguf file")


def _one_model(directory: Path, gguf_files: list[Path]) -> Path:
    """The one file that is a model: projectors and importance matrices often lie beside it."""
    kinds = {file: _gguf_kind(file) for file in gguf_files} if len(gguf_files) > 1 else {}
    adapters = [file for file, kind in kinds.items() if kind == "adapter"]
    if adapters:
        refuse_gguf_adapter(str(adapters[0]), "beside a model")
    models = [file for file, kind in kinds.items() if kind == "model"] or gguf_files
    if len(models) > 1:
        listed = ", ".join(file.name for file in models)
        raise ModelLoadError(f"{directory}: holds several .gguf files, give the path of one: {listed}")
    return models[0]


def _gguf_kind(path: Path) -> str:
    try:
        return read_gguf(path).kind
    except ModelLoadError:  # damaged or unknown, so perhaps the one that is meant
        return "model"


def _open_directory(directory: Path) -> ModelSource:
    refuse_adapters(directory)
    if (directory / MANIFEST_NAME).is_file():
        return open_engine(directory)
    gguf_files = sorted(entry for entry in directory.iterdir() if entry.suffix.lower() == ".gguf")
    # A config.json beside a GGUF file may hold only the model's type; it does not make a checkpoint.
    has_weights = any((directory / name).exists() for name in WEIGHT_FILES)
    if (directory / "config.json").is_file() and (has_weights or not gguf_files):
        return open_hf(directory)
    if gguf_files:
        return open_gguf(_one_model(directory, first_files(gguf_files)))
    adapters = adapter_directories(directory.iterdir())
    hint = f"; its subdirectories with adapters are no models either: {', '.join(adapters)}" if adapters else ""
    raise ModelLoadError(f"{directory}: holds no model: neither engine.json, nor config.json, nor a .gguf file{hint}")
