"""GGUF files whose blocks are damaged: errors name the file, the tensor and its type."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from llmengine import LLM, ModelConfig
from llmengine.checkpoints.gguf_file import read_gguf
from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError
from llmengine.quantization.gguf_blocks import BLOCK_SIZES, SCALE_OFFSETS
from tests.models.family_helpers import make_family, write_family_gguf
from tests.quantization.random_blocks import HALVES

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
NAMES = ["token_embd.weight", "blk.0.attn_k.weight", "blk.0.ffn_down.weight"]


def write(path: Path, types: str) -> None:
    write_family_gguf(path, make_family("mistral", head_dim=64, sliding_window=None, **SIZES), types)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("type_name", HALVES)
def test_a_scale_that_is_not_finite(tmp_path: Path, type_name: str, name: str, value: float) -> None:
    path = tmp_path / "model.gguf"
    write(path, type_name)
    tensor = read_gguf(path).tensors[name]
    assert SCALE_OFFSETS[type_name] == HALVES[type_name]
    block_bytes = BLOCK_SIZES[type_name][1]
    with path.open("r+b") as file:  # the last scale of the last block
        file.seek(tensor.offset + tensor.size_bytes - block_bytes + HALVES[type_name][-1])
        file.write(np.float16(value).tobytes())
    with pytest.raises(
        CorruptFileError, match=rf"model\.gguf: tensor '{name}' \({type_name}\) has a scale that is not"
    ):
        list(open_model(path).weights(torch.float32))


@pytest.mark.parametrize("settings", [{}, {"dtype": "float32"}, {"quant": "int8"}, {"quant": "stored"}])
def test_an_engine_does_not_start(tmp_path: Path, settings: dict[str, str]) -> None:
    path = tmp_path / "model.gguf"
    write(path, "Q4_0")
    tensor = read_gguf(path).tensors["blk.0.attn_output.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\xff")
    with pytest.raises(CorruptFileError, match=r"'blk\.0\.attn_output\.weight' \(Q4_0\) has a scale"):
        LLM(ModelConfig(path, device="cpu", **settings), enable_tokenizer=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("type_name", ["Q4_1", "Q6_K"])
def test_a_file_that_ends_early(tmp_path: Path, type_name: str) -> None:
    path = tmp_path / "model.gguf"
    write(path, type_name)
    source, whole = open_model(path), path.read_bytes()
    last = max(read_gguf(path).tensors.values(), key=lambda tensor: tensor.offset if len(tensor.shape) > 1 else 0)
    path.write_bytes(whole[: last.offset + last.size_bytes - 1])
    place = rf"tensor '{last.name}' \({type_name}\)"
    with pytest.raises(CorruptFileError, match=rf"{place}: 1 of \d+ bytes are missing: truncated\?"):
        list(source.weights(torch.float32))
    with pytest.raises(CorruptFileError, match=rf"{place} ends at byte \d+, but .*truncated\?"):
        open_model(path)


def test_rows_that_are_not_whole_blocks(tmp_path: Path) -> None:
    path, name = tmp_path / "model.gguf", b"blk.0.ffn_up.weight"
    write_family_gguf(path, make_family("mistral", sliding_window=None), "F32")
    raw = path.read_bytes()
    place = raw.index(name) + len(name) + 4 + 16  # behind the name, the number of dimensions, and two sizes
    path.write_bytes(raw[:place] + struct.pack("<I", 12) + raw[place + 4 :])
    with pytest.raises(CorruptFileError, match=r"'blk\.0\.ffn_up\.weight' has shape .* multiple of 256 \(Q4_K\)"):
        open_model(path)
