"""Adapters (LoRA, IA3, prompt tuning) beside a model or in its files: they are not computed, so they are refused."""

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
    """Raise `UnsupportedModelError` for a directory with an adapter's files; those below it are only warned of, since
    what a training run left in a subdirectory (`checkpoint-500`) is not part of the model."""
    entries = sorted(directory.iterdir())
    found = [entry.name for entry in entries if _FILE_NAME.fullmatch(entry.name) and entry.is_file()]
    if found:
        raise UnsupportedModelError(
            f"{directory}: holds {_kind(directory)} ({', '.join(found)}), and adapters are not applied: {_MERGE}, or "
            "move these files away to load the base model alone"
        )
    nested = adapter_directories(entries)
    if nested:
        logger.warning("%s: adapters in %s are not applied", directory, ", ".join(nested))


def adapter_directories(entries: Iterable[Path]) -> list[str]:
    """Names of those of a directory's `entries` that are directories with an adapter."""
    return sorted(entry.name for entry in entries if (entry / _CONFIG_NAME).is_file())


def refuse_adapter_tensors(names: Iterable[str], where: str) -> None:
    """Raise `UnsupportedModelError` for names of tensors of a model that was saved with an adapter in it."""
    found = [name for name in names if _TENSOR_NAME.search(name)]
    if found:
        raise UnsupportedModelError(
            f"{where}: {len(found)} tensors are an adapter's that is not merged ({', '.join(found[:3])}): {_MERGE}"
        )


def refuse_gguf_adapter(where: str, kind: str) -> None:
    """Raise `UnsupportedModelError` for a GGUF file that is an adapter of this kind ("lora")."""
    raise UnsupportedModelError(
        f"{where}: is an adapter ({kind}) and no model, and adapters are not applied: merge it into its base model "
        "first (llama-export-lora)"
    )


def _kind(directory: Path) -> str:
    """What adapter_config.json says that the adapter is."""
    try:
        config = read_json_object(directory / _CONFIG_NAME)
        kind = config.values.get("peft_type") or config.values.get("fine_tune_type")
        base = config.values.get("base_model_name_or_path")
    except LLMEngineError:  # it is not there or unreadable, and none the less an adapter's
        kind = base = None
    return f"an adapter{f' of type {kind}' if kind else ''}{f' for {base!r:.100}' if base else ''}"
