"""Published directories and files that hold more, or less, than a model needs load as they do in transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError, ModelLoadError, UnsupportedModelError
from tests.checkpoints.helpers import assert_streams, canonical, edit_config, load_all, make_model, write_gguf

State = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
LAYER = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


@pytest.fixture
def directory(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(directory: Path, state: State, file: str = WEIGHTS) -> None:
    (directory / WEIGHTS).unlink(missing_ok=True)
    (save_file if file.endswith("safetensors") else torch.save)(state, directory / file)


def shard(directory: Path, state: State, files: int = 2) -> dict[str, str]:
    """Write the state in shards without an index, and return what the index would say."""
    (directory / WEIGHTS).unlink()
    names = sorted(state)
    places = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: state[name] for name in names[number::files]}, directory / file)
        places |= dict.fromkeys(names[number::files], file)
    return places


def write_index(directory: Path, weight_map: dict[str, str], **more: Any) -> None:
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map, **more}))


def assert_same_logits(directory: Path) -> None:
    """Assert that transformers reads the same weights from the directory."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_streams(directory, canonical(reference.state_dict()))


BUFFERS: dict[str, torch.Tensor] = {
    f"{LAYER}.rotary_emb.inv_freq": torch.ones(8),
    "rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb.original_inv_freq": torch.ones(8),
    f"{LAYER}.rotary_emb.cos_cached": torch.ones(1, 1, 4, 8),
    f"{LAYER}.masked_bias": torch.tensor(-1e4),
    f"{LAYER}.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    "model.embeddings.position_ids": torch.arange(8),
    "model.causal_mask": torch.ones(4, 4, dtype=torch.uint8),
    f"{LAYER}.k_scale": torch.ones(()),
    f"{LAYER}.kv_scale": torch.ones(1),
    "model.steps": torch.tensor(7, dtype=torch.int32),
    "model.frequencies": torch.ones(3, dtype=torch.complex64),
    f"{LAYER}.left_over": torch.ones(4, 4).to(torch.float8_e4m3fn),
    "model.empty": torch.ones(0, 64),
}


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_buffers_are_ignored(model: Any, directory: Path, name: str, file: str) -> None:
    rewrite(directory, {**model.state_dict(), name: BUFFERS[name]}, file)
    assert_streams(directory, canonical(model.state_dict()))
    assert_same_logits(directory)


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "vision_tower.layers.0.weight"])
def test_what_is_outside_of_the_language_model_is_warned_of(
    model: Any, directory: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(directory, {**model.state_dict(), name: torch.ones(4)})
    with caplog.at_level(logging.WARNING, "llmengine"):
        assert_streams(directory, canonical(model.state_dict()))
    assert f"ignoring tensors that are not part of the language model: {name}" in caplog.text


def test_a_weight_that_the_model_has_no_place_for_is_an_error(model: Any, directory: Path) -> None:
    for name in (f"{LAYER}.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "lm_head.bias"):
        rewrite(directory, {**model.state_dict(), name: torch.ones(4)})
        with pytest.raises(CorruptFileError, match=f"left over.*{name}"):
            open_model(directory)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_weights_of_other_types_are_named(model: Any, directory: Path, dtype: torch.dtype, file: str) -> None:
    name = f"{LAYER}.o_proj.weight"
    rewrite(directory, {**model.state_dict(), name: torch.zeros(64, 64).to(dtype)}, file)
    with pytest.raises(UnsupportedModelError, match=f"tensor '{name}' has dtype"):
        load_all(directory)


@pytest.mark.parametrize(
    "names", [("qweight", "qzeros", "scales"), ("weight_packed", "weight_scale"), ("weight_scale_inv",)]
)
def test_quantized_weights_without_a_word_in_the_config(model: Any, directory: Path, names: tuple[str, ...]) -> None:
    state = dict(model.state_dict())
    del state[f"{LAYER}.o_proj.weight"]
    rewrite(directory, {**state, **{f"{LAYER}.o_proj.{name}": torch.ones(4, dtype=torch.int32) for name in names}})
    with pytest.raises(
        UnsupportedModelError, match=f"o_proj.weight missing: weights are quantized .*{names[0]}.*quantization_config"
    ):
        open_model(directory)


PREFIXES: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "wrapped": lambda name: f"module.{name}",
    "wrapped twice": lambda name: f"module._orig_mod.{name}",
    "part of a larger model": lambda name: f"language_model.{name}",
    "inner part": lambda name: name.replace("model.", "model.language_model.", 1),
    "without a prefix": lambda name: name.removeprefix("model."),
    "head outside": lambda name: name if name.startswith("lm_head") else f"text.{name}",
}


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_prefixes_of_names(model: Any, directory: Path, kind: str, file: str) -> None:
    state = {PREFIXES[kind](name): tensor for name, tensor in model.state_dict().items()}
    rewrite(directory, state, file)
    assert_streams(directory, canonical(model.state_dict()))
    if kind == "without a prefix":
        assert_same_logits(directory)


def test_errors_name_tensors_as_the_file_does(model: Any, directory: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    name = f"module.{LAYER}.o_proj.weight"
    rewrite(directory, {**state, name: torch.zeros(64, 64, dtype=torch.int32)})
    with pytest.raises(UnsupportedModelError, match=f"'{name}' has dtype int32"):
        open_model(directory)


def test_an_index_may_name_too_much_or_too_little(model: Any, directory: Path) -> None:
    places = shard(directory, model.state_dict())
    for weight_map in (
        {**places, "model.surprise": places["lm_head.weight"], "vision_tower.x": places["lm_head.weight"]},
        {name: file for name, file in places.items() if "mlp" not in name},
        dict.fromkeys(places, "model-00001-of-00002.safetensors")
        | {"model.norm.weight": "model-00002-of-00002.safetensors"},
    ):
        write_index(directory, weight_map, metadata={"total_size": 1})
        assert_same_logits(directory)
    write_index(directory, {**places, "a": "other.safetensors"})
    with pytest.raises(CorruptFileError, match=r"do not exist: other\.safetensors"):
        open_model(directory)


@pytest.mark.parametrize("more", [{}, {"metadata": None}, {"metadata": {}}, {"metadata": {"total_size": "x"}, "b": 1}])
def test_what_else_an_index_says_does_not_matter(model: Any, directory: Path, more: dict[str, Any]) -> None:
    write_index(directory, shard(directory, model.state_dict(), 3), **more)
    assert_streams(directory, canonical(model.state_dict()))


def test_tensors_in_two_shards(model: Any, directory: Path) -> None:
    state = model.state_dict()
    places = shard(directory, state)
    name, (first, second) = "lm_head.weight", sorted(set(places.values()))
    other = second if places[name] == first else first
    save_file({**load_file(directory / other), name: torch.zeros(96, 64)}, directory / other)
    write_index(directory, places)
    assert_streams(directory, canonical(state))
    del places[name]
    write_index(directory, places)
    with pytest.raises(CorruptFileError, match=r"'lm_head\.weight' is also in .*, and the index names neither"):
        open_model(directory)


def test_shards_in_a_folder(model: Any, directory: Path) -> None:
    state = model.state_dict()
    (directory / "part").mkdir()
    save_file(state, directory / "part" / "x.safetensors")
    (directory / WEIGHTS).unlink()
    write_index(directory, dict.fromkeys(state, "part/x.safetensors"))
    assert_streams(directory, canonical(state))


def test_other_files_beside_do_not_matter(model: Any, directory: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.MD", "training_args.bin", "optimizer.pt"):
        (directory / name).write_bytes(b"\0")
    (directory / "original").mkdir()
    (directory / "checkpoint-5").mkdir()
    assert_streams(directory, canonical(model.state_dict()))
    (directory / WEIGHTS).unlink()
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ModelLoadError, match=r"no weights.*found: consolidated\.safetensors, optimizer\.pt"):
        open_model(directory)


def test_old_bin_files_are_no_archives(model: Any, directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_logits(directory)


def test_parameters_in_bin_files(model: Any, directory: Path) -> None:
    state = {name: torch.nn.Parameter(tensor) for name, tensor in model.state_dict().items()}
    rewrite(directory, state, "pytorch_model.bin")
    assert_streams(directory, canonical(model.state_dict()))
    assert not any(tensor.requires_grad for _, tensor in open_model(directory).weights(torch.float32))


def test_a_snapshot_of_links(model: Any, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("snapshot")
    blobs = tmp_path_factory.mktemp("blobs")
    for index, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"{index:x}")
        (place / file.name).symlink_to(Path("..") / blobs.name / f"{index:x}")
    assert_streams(place, canonical(model.state_dict()))


@pytest.mark.parametrize("tied", [True, False])
def test_rows_beyond_the_vocabulary_are_no_tokens(tmp_path: Path, tied: bool) -> None:
    model = make_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    wanted = canonical(state)
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        state[name] = torch.cat((state[name], torch.ones(32, 64)))
    for file in (WEIGHTS, "pytorch_model.bin"):
        rewrite(tmp_path, state, file)
        assert_streams(tmp_path, wanted)
    (tmp_path / "pytorch_model.bin").unlink()
    rewrite(tmp_path, {**state, "model.embed_tokens.weight": torch.ones(95, 64)})
    with pytest.raises(CorruptFileError, match=r"shape \(95, 64\), expected \(96, 64\)"):
        open_model(tmp_path)


CONFIGS: list[dict[str, Any]] = [
    {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    {"architectures": None},
    {"architectures": []},
    {"dtype": None},
    {"dtype": "half"},
    {"dtype": "float"},
    {"head_dim": None},
    {"rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"factor": 2.0}},
    {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "factor": 1.0}, "rope_theta": 10000},
    {"unknown_key": {"a": [1]}, "auto_map": {"AutoConfig": "x.Y"}},
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_configs_that_transformers_takes(directory: Path, changes: dict[str, Any]) -> None:
    edit_config(directory, **changes)
    assert_same_logits(directory)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 96.0},
        {"architectures": "LlamaForCausalLM"},
        {"num_hidden_layers": 2.0, "num_attention_heads": 4.0},
        {"dtype": "auto"},
        {"dtype": None, "torch_dtype": "auto"},
        {"dtype": "torch.float32"},
    ],
)
def test_configs_that_are_clear_though_transformers_refuses_them(
    model: Any, directory: Path, changes: dict[str, Any]
) -> None:
    edit_config(directory, **changes)
    assert_streams(directory, canonical(model.state_dict()))
    assert open_model(directory).checkpoint_dtype == "float32"


def test_byte_order_marks(model: Any, directory: Path) -> None:
    write_index(directory, shard(directory, model.state_dict()))
    for name in ("config.json", f"{WEIGHTS}.index.json", "generation_config.json"):
        path = directory / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_streams(directory, canonical(model.state_dict()))


def test_metadata_of_safetensors_is_not_read(model: Any, directory: Path) -> None:
    path = directory / WEIGHTS
    for metadata in (None, {}, {"format": 3}, [1], {"a": {"b": "c"}}):
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        header["__metadata__"] = metadata
        encoded = json.dumps(header).encode() + b"   "
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + size :])
        assert_streams(directory, canonical(model.state_dict()))


@pytest.mark.parametrize("dtype", [np.float64, np.int8, np.int16, np.int32, np.int64])
def test_gguf_tensors_of_other_types(model: Any, tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32", {"some.buffer": np.ones((2, 3), dtype=dtype)})
    assert_streams(path, canonical(model.state_dict()))


def test_gguf_weights_of_unknown_types_are_named(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "BF16")
    raw = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    place = raw.index(name) + len(name) + 4 + 16
    path.write_bytes(raw[:place] + (99).to_bytes(4, "little") + raw[place + 4 :])
    with pytest.raises(
        UnsupportedModelError,
        match=r"'blk\.0\.ffn_up\.weight' is stored as ggml type 99, which is not supported; supported: F32",
    ):
        open_model(path)


def test_a_big_endian_gguf_file_is_named(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32")
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + path.read_bytes()[8:])
    with pytest.raises(UnsupportedModelError, match=r": big-endian \(GGUF version 3\)"):
        open_model(path)


def test_gguf_version_2_is_version_3(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "Q8_0")
    weights = dict(without_blocks(open_model(path)).weights(torch.float32))
    path.write_bytes(b"GGUF" + (2).to_bytes(4, "little") + path.read_bytes()[8:])
    assert_streams(path, weights)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_gguf_alignments(model: Any, tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32", alignment=alignment)
    assert_streams(path, canonical(model.state_dict()))


def test_gguf_rows_beyond_the_vocabulary(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, "F32", vocab_size=90)
    wanted = canonical(model.state_dict())
    for name in ("embed_tokens.weight", "lm_head.weight"):
        wanted[name] = wanted[name][:90]
    assert_streams(path, wanted)


def test_upper_case_suffix_and_files_beside_a_gguf_model(model: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "Tiny.GGUF", model, "F32")
    write_gguf(tmp_path / "mmproj-Tiny.gguf", model, "F32", kind="mmproj")
    write_gguf(tmp_path / "imatrix.gguf", model, "F32", kind="imatrix")
    assert open_model(tmp_path).path.name == "Tiny.GGUF"
    write_gguf(tmp_path / "lora.gguf", model, "F32", kind="adapter")
    with pytest.raises(UnsupportedModelError, match=r"lora\.gguf: an adapter"):
        open_model(tmp_path)
    (tmp_path / "lora.gguf").unlink()
    write_gguf(tmp_path / "Other.gguf", model, "F32", kind="model")
    with pytest.raises(ModelLoadError, match=r"several \.gguf files, give the path of one: Other\.gguf, Tiny\.GGUF$"):
        open_model(tmp_path)
