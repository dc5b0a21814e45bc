"""An adapter beside a model, or inside its files, is refused by name and never ignored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmengine.checkpoints.opening import open_model
from llmengine.errors import ModelLoadError, UnsupportedModelError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def write_config(directory: Path, **values: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("peft_type", ["LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "LOHA", "OFT"])
def test_an_adapter_is_named_with_its_type(directory: Path, peft_type: str) -> None:
    write_config(directory, peft_type=peft_type, base_model_name_or_path="org/base")
    with pytest.raises(UnsupportedModelError, match=rf"adapter of type {peft_type} for 'org/base'.*merge_and_unload"):
        open_model(directory)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "ADAPTER_CONFIG.JSON",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "adapter_model-00001-of-00002.safetensors",
        "adapter_model.safetensors.index.json",
        "adapters.safetensors",
        "adapters.npz",
        "pytorch_adapter.bin",
        "pytorch_lora_weights.safetensors",
        "non_lora_trainables.bin",
    ],
)
def test_any_file_of_an_adapter_is_enough(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=rf"contains an adapter \({name}\); adapters are not supported"):
        open_model(directory)


@pytest.mark.parametrize("name", ["model_adapter_notes.md", "adapter.md", "adapter_model_card.txt", "my_adapters.json"])
def test_other_files_are_no_adapters(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"")
    open_model(directory)


def test_an_adapter_without_a_model(tmp_path: Path) -> None:
    write_config(tmp_path, peft_type="LORA")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"adapter of type LORA \(adapter_config\.json, adapter_model\.saf"):
        open_model(tmp_path)


def test_linked_files_count(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    (blobs / "abc").write_text("{}")
    (directory / "adapter_config.json").symlink_to(blobs / "abc")
    with pytest.raises(UnsupportedModelError, match="contains an adapter"):
        open_model(directory)


@pytest.mark.parametrize("below", ["checkpoint-500", "vision-lora"])
def test_what_a_training_run_left_below_a_model_is_warned_of(
    directory: Path, below: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_config(directory / below, peft_type="LORA")
    with caplog.at_level(logging.WARNING, "llmengine"):
        assert open_model(directory).kind == "huggingface"
    assert f"ignoring the adapters in {below}; adapters are not supported" in caplog.text


def test_adapters_below_a_directory_without_a_model_are_named(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-5"):
        write_config(tmp_path / name, peft_type="LORA")
    with pytest.raises(ModelLoadError, match="no models either: checkpoint-10, checkpoint-5"):
        open_model(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "names",
    [
        ("base_model.model.{}.base_layer.weight", "base_model.model.{}.lora_A.default.weight"),
        ("{}.weight", "{}.lora_B.weight"),
        ("{}.weight", "{}.ia3_l"),
        ("{}.weight", "base_model.model.lm_head.modules_to_save.default.weight"),
    ],
)
def test_weights_with_an_adapter_in_them(directory: Path, names: tuple[str, ...], file: str) -> None:
    state = load_file(directory / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    weight = state.pop(f"{module}.weight")
    state |= {name.format(module): weight.clone() for name in names}
    (directory / "model.safetensors").unlink()
    (save_file if file == "model.safetensors" else torch.save)(state, directory / file)
    with pytest.raises(UnsupportedModelError, match=r"tensors belong to an adapter that has not been merged"):
        list(open_model(directory).weights(torch.float32))


def write_gguf(path: Path, kind: str, architecture: str = "llama") -> None:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(kind)
    if kind == "adapter":
        writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((2, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_adapter(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "adapter")
    for place in (tmp_path, tmp_path / "a.gguf"):
        with pytest.raises(UnsupportedModelError, match=r": an adapter \(lora\), not a model.*llama-export-lora"):
            open_model(place)


@pytest.mark.parametrize("kind", ["mmproj", "imatrix"])
def test_other_kinds_of_gguf_files(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "a.gguf", kind)
    with pytest.raises(UnsupportedModelError, match=f"general.type='{kind}'"):
        open_model(tmp_path)
