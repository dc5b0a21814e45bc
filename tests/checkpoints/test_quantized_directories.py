"""Directories of older tools: what describes the quantization, and the names of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError, ModelLoadError
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from tests.checkpoints import quantized_files as files
from tests.checkpoints.quantized_files import QuantizedFiles, write_dense, write_quantized
from tests.checkpoints.quantized_layouts import AWQ, LAYOUTS, gptq, make, modelopt
from tests.checkpoints.test_quantized_huggingface import assert_stands_for

GPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": False, "sym": False, "true_sequential": True}
OLD_AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
PRODUCER = {"name": "modelopt", "version": "0.29.0"}
EXCLUDED = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
OLD: list[tuple[str, dict[str, Any], files.Packer, WeightFormat]] = [
    ("quantize_config.json", GPTQ, files.gptq(), Int4Groups(32)),
    ("quantize_config.json", {**GPTQ, "checkpoint_format": "gptq_v2"}, files.gptq(offset=0), Int4Groups(32)),
    ("quant_config.json", OLD_AWQ, files.awq(), Int4Groups(32)),
    ("quant_config.json", {**OLD_AWQ, "version": "GEMV"}, files.awq_gemv(), Int4Groups(32)),
    (
        "hf_quant_config.json",
        {"producer": PRODUCER, "quantization": EXCLUDED},
        files.fp8("tensor", input_scale="shared"),
        Fp8("channel", "tensor"),
    ),
]


def described(directory: Path, description: dict[str, Any] | None, **others: dict[str, Any]) -> None:
    """Set what config.json and other files, by their names less ".json", say about quantization."""
    path = directory / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "quantization_config"}
    path.write_text(json.dumps({**config, **({"quantization_config": description} if description else {})}))
    for name, values in others.items():
        (directory / f"{name}.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("name", "description", "pack", "expected"), OLD)
def test_the_file_of_an_older_tool_describes_what_config_json_does_not(
    tmp_path: Path, name: str, description: dict[str, Any], pack: files.Packer, expected: WeightFormat
) -> None:
    model, place = make(), tmp_path / "files"
    dense = write_quantized(place, model, QuantizedFiles(gptq(), pack))
    described(place, None, **{name.removesuffix(".json"): description})
    write_dense(tmp_path / "dense", model, dense)
    assert open_model(place).formats.of("layers.1.qkv") == expected
    assert_stands_for(place, tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "description", "other", "message"),
    [
        ("quantize_config", gptq(), {**GPTQ, "bits": 8}, "bits=4 contradicts bits=8"),
        ("quantize_config", gptq(), {**GPTQ, "group_size": -1}, "group_size=32 contradicts group_size=-1"),
        ("quantize_config", gptq(), {**GPTQ, "sym": True}, "sym=False contradicts sym=True"),
        ("quantize_config", AWQ, GPTQ, "quant_method='awq' contradicts quant_method='gptq'"),
        ("quant_config", AWQ, {**OLD_AWQ, "q_group_size": 64}, "group_size=32 contradicts group_size=64"),
        ("quant_config", AWQ, {**OLD_AWQ, "version": "GEMV"}, "version='gemm' contradicts version='GEMV'"),
        ("quant_config", None, {**OLD_AWQ, "bits": 8}, "w_bit=4 contradicts bits=8"),
        (
            "hf_quant_config",
            modelopt("NVFP4"),
            {"quantization": EXCLUDED},
            "quant_algo='NVFP4' contradicts quant_algo='FP8' .*hf_quant_config.json: quantization",
        ),
    ],
)
def test_descriptions_that_contradict_each_other_are_refused(
    tmp_path: Path, name: str, description: dict[str, Any] | None, other: dict[str, Any], message: str
) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["gptq"][0])
    described(tmp_path, description, **{name: other})
    with pytest.raises(CorruptFileError, match=message) as caught:
        open_model(tmp_path)
    assert f"{name}.json" in str(caught.value)


def test_descriptions_that_agree_are_one(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["awq"][0])
    described(tmp_path, {**AWQ, "version": "gemm"}, quant_config=OLD_AWQ)
    assert open_model(tmp_path).formats.of("layers.0.o") == Int4Groups(32)


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["gptq"][0])
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"quantize_config.json: not valid JSON"):
        open_model(tmp_path)


@pytest.mark.parametrize("name", ["gptq_model-4bit-128g.safetensors", "awq_model_w4_g128.safetensors", "model.st.bin"])
def test_files_may_be_named_after_the_quantization(tmp_path: Path, name: str) -> None:
    import torch

    model, place = make(), tmp_path / "files"
    write_dense(tmp_path / "dense", model, write_quantized(place, model, LAYOUTS["gptq"][0]))
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save(tensors, place / name)
    else:
        save_file(tensors, place / name)
    assert_stands_for(place, tmp_path / "dense")


def test_shards_may_be_named_after_the_quantization(tmp_path: Path) -> None:
    model, place = make(), tmp_path / "files"
    write_dense(tmp_path / "dense", model, write_quantized(place, model, LAYOUTS["gptq"][0]))
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    names = [f"gptq_model-4bit-128g-0000{index + 1}-of-00002.safetensors" for index in range(2)]
    weight_map = {name: names[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, place_ in weight_map.items() if place_ == file}, place / file)
    with pytest.raises(ModelLoadError, match=r"several files may have the weights: gptq_model-4bit-128g-00001-of-"):
        open_model(place)
    index = place / "gptq_model-4bit-128g.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_stands_for(place, tmp_path / "dense")


def test_other_names_are_not_guessed_for_dense_models(tmp_path: Path) -> None:
    model = make()
    write_dense(tmp_path, model, {name: tensor.float() for name, tensor in model.state_dict().items()})
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(ModelLoadError, match=r"no weights; .*found: consolidated.safetensors"):
        open_model(tmp_path)
