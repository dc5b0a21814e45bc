"""Adapters (LoRA, IA3, prompt tuning) beside a model or in its files. They are not supported, so they are refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from llmengine.checkpoints.metadata_fields import read_json_object
from llmengine.errors import LLMEngineError, UnsupportedModelError

logger = logging.getLogger(__name__)

_CONFIG_NAME = "adapter_config.json"
_FILE_NAME = re.compile(
    r"adapter_config\.json|adapter_model\b.*\.(safetensors|bin|pt|index\.json)|adapters?\.(safetensors|npz|bin|pt)"
    r"|pytorch_(adapter|lora_weights)\.(safetensors|bin)|non_lora_trainables\.bin",
    re.IGNORECASE,
)
_TENSOR_NAME = re.compile(
    r"\.base_layer\.|\blora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|\bia3_l\b|\bprompt_embeddings\b"
    r"|\b(hada_w\d|lokr_w\d|oft_r|boft_r|vera_lambda_)|\.original_module\.|\.modules_to_save\."
)
_MERGE = (
    "merge it into the weights first (peft: PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained())"
)


def refuse_adapters(directory: Path) -> None:
    """Raise `UnsupportedModelError` for a directory that contains an adapter's files.

    Adapters in subdirectories only cause a warning: what a training run left in `checkpoint-500` is not part of the
    model.
    """
    entries = sorted(directory.iterdir())
    found = [entry.name for entry in entries if _FILE_NAME.fullmatch(entry.name) and entry.is_file()]
    if found:
        raise UnsupportedModelError(
            f"{directory}: contains {_description(directory)} ({', '.join(found)}); adapters are not supported; "
            f"{_MERGE}, or move these files away to load the base model alone"
        )
    nested = adapter_directories(entries)
    if nested:
        logger.warning("%s: ignoring the adapters in %s; adapters are not supported", directory, ", ".join(nested))


def adapter_directories(entries: Iterable[Path]) -> list[str]:
    """Names of the subdirectories among a directory's `entries` that contain an adapter."""
    return sorted(entry.name for entry in entries if (entry / _CONFIG_NAME).is_file())


def refuse_adapter_tensors(names: Iterable[str], where: str) -> None:
    """Raise `UnsupportedModelError` if tensor names show that a model was saved with an adapter in it."""
    found = [name for name in names if _TENSOR_NAME.search(name)]
    if found:
        raise UnsupportedModelError(
            f"{where}: {len(found)} tensors belong to an adapter that has not been merged ({', '.join(found[:3])}); "
            f"{_MERGE}"
        )


def refuse_gguf_adapter(where: str, kind: str) -> None:
    """Raise `UnsupportedModelError` for a GGUF file that is an adapter of this kind ("lora")."""
    raise UnsupportedModelError(
        f"{where}: an adapter ({kind}), not a model; adapters are not supported; merge it into its base model first "
        "(llama-export-lora)"
    )


def _description(directory: Path) -> str:
    """The adapter's type and base model, as far as adapter_config.json names them."""
    try:
        config = read_json_object(directory / _CONFIG_NAME)
        kind = config.values.get("peft_type") or config.values.get("fine_tune_type")
        base = config.values.get("base_model_name_or_path")
    except LLMEngineError:  # missing or unreadable; the other files are an adapter's all the same
        kind = base = None
    return f"an adapter{f' of type {kind}' if kind else ''}{f' for {base!r:.100}' if base else ''}"
