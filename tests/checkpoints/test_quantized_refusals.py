"""Quantized Hugging Face checkpoints that are damaged or not supported: errors name the layer and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError, ModelLoadError, UnsupportedModelError
from tests.checkpoints import quantized_files as files
from tests.checkpoints.helpers import edit_config, load_all
from tests.checkpoints.quantized_files import QuantizedFiles, write_quantized
from tests.checkpoints.quantized_layouts import (
    AWQ,
    BLOCKS,
    BNB8,
    FP8,
    LAYOUTS,
    TOKEN,
    auto_round,
    bnb4,
    compressed,
    gptq,
    group,
    make,
    modelopt,
)

Change = Callable[[dict[str, torch.Tensor]], object]
O_PROJ = "model.layers.1.self_attn.o_proj"
Q_PROJ = "model.layers.0.self_attn.q_proj"
INT_TOKEN = {**TOKEN, "type": "int"}
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


def removed(suffix: str) -> Change:
    return lambda tensors: tensors.pop(f"{O_PROJ}.{suffix}")


def changed(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    name = f"{O_PROJ}.{suffix}"
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


DAMAGES: list[tuple[str, Change, type[ModelLoadError], str]] = [
    ("awq", removed("scales"), CorruptFileError, f"layer '{O_PROJ}': tensor '{O_PROJ}.scales' is missing; .* qweight"),
    ("awq", removed("qweight"), UnsupportedModelError, f"{O_PROJ}.weight missing: weights are quantized"),
    (
        "gptq",
        changed("scales", lambda item: item[:1]),
        CorruptFileError,
        r"safetensors: .*scales' has shape \(1, 64\), expected \(2, 64\) for a layer of 64 x 64",
    ),
    (
        "gptq",
        changed("qweight", torch.Tensor.float),
        UnsupportedModelError,
        "safetensors: .*o_proj.qweight' has dtype float32, .*supported: int32",
    ),
    (
        "gptq-sym",
        changed("qzeros", lambda item: item + 1),
        CorruptFileError,
        "safetensors: .*o_proj.qzeros' has zero points other than 8, .*sym=true",
    ),
    ("gptq-8", changed("qzeros", lambda item: item | 255), CorruptFileError, "qzeros' has a zero point of 256"),
    ("gptq-order", removed("g_idx"), CorruptFileError, "o_proj.g_idx' is missing"),
    (
        "gptq-order",
        changed("g_idx", torch.zeros_like),
        UnsupportedModelError,
        f"layer '{O_PROJ}': the groups in g_idx have other sizes than group_size=32",
    ),
    ("gptq-order", changed("g_idx", lambda item: item + 1), CorruptFileError, r"g_idx' names groups outside \[0, 1\]"),
    (
        "w4a16",
        changed("weight_shape", lambda item: item + 1),
        CorruptFileError,
        r"o_proj.weight_shape' says \(65, 65\), .*\(64, 64\)",
    ),
    ("w4a16-order", removed("weight_g_idx"), CorruptFileError, "o_proj.weight_g_idx' is missing"),
    ("w4a16-asym", removed("weight_zero_point"), CorruptFileError, "o_proj.weight_zero_point' is missing"),
    ("w8a8-static", removed("input_scale"), CorruptFileError, "o_proj.input_scale' is missing"),
    (
        "fp8",
        changed("weight", lambda item: item.float().to(torch.float8_e5m2)),
        UnsupportedModelError,
        "o_proj.weight' has dtype F8_E5M2, which is not supported; supported: float8_e4m3fn",
    ),
    ("fp8", removed("weight_scale"), CorruptFileError, "o_proj.weight_scale' is missing"),
    (
        "mxfp4",
        changed("weight_scales", lambda item: item[:, :1]),
        CorruptFileError,
        r"o_proj.weight_scales' has shape \(64, 1\), expected \(64, 2\)",
    ),
    ("awq", removed("qzeros"), CorruptFileError, "o_proj.qzeros' is missing"),
    ("bnb-nf4", removed("weight.absmax"), CorruptFileError, f"layer '{O_PROJ}': tensor .*weight.absmax' is missing"),
    ("bnb-nf4", removed(NF4_STATE), CorruptFileError, f"o_proj.{NF4_STATE}' is missing; the layer has"),
    ("bnb-nf4", removed("weight"), CorruptFileError, "o_proj.weight' is missing; the layer has weight.absmax"),
    ("bnb-double", removed("weight.nested_absmax"), CorruptFileError, "weight.nested_absmax' is missing"),
    (
        "bnb-nf4",
        changed(NF4_STATE, lambda item: item[:-3]),
        CorruptFileError,
        rf"safetensors: tensor '{O_PROJ}.{NF4_STATE}' is not valid JSON",
    ),
    (
        "bnb-nf4",
        changed(NF4_STATE, lambda item: item.new_tensor(list(bytes(item.tolist()).replace(b"64]", b"96]")))),
        CorruptFileError,
        r"has shape \[64, 96\], but the layer has \(64, 64\) weights",
    ),
    (
        "bnb-nf4",
        changed("weight.quant_map", torch.zeros_like),
        CorruptFileError,
        f"'{O_PROJ}.weight.quant_map' is not the table of nf4",
    ),
    ("bnb-8", removed("SCB"), CorruptFileError, "o_proj.SCB' is missing"),
    ("bnb-8", changed("weight_format", lambda item: item + 2), UnsupportedModelError, "weight_format=2 is not supp"),
    (
        "nvfp4",
        changed("weight_scale", lambda item: item[:, :2]),
        CorruptFileError,
        r"o_proj.weight_scale' has shape \(64, 2\), expected \(64, 4\)",
    ),
    (
        "nvfp4-modelopt",
        lambda tensors: tensors.update({f"{O_PROJ}.pre_quant_scale": torch.ones(64)}),
        UnsupportedModelError,
        f"layer '{O_PROJ}': factors of its inputs",
    ),
    (
        "fp8",
        lambda tensors: tensors.update({f"{O_PROJ}.smooth_scale": torch.ones(64)}),
        CorruptFileError,
        f"layer '{O_PROJ}': tensors are left over that its quantization does not have: smooth_scale",
    ),
]


@pytest.mark.parametrize(("layout", "change", "error", "message"), DAMAGES)
def test_damaged_layers_are_named(
    tmp_path: Path, layout: str, change: Change, error: type[ModelLoadError], message: str
) -> None:
    write_quantized(tmp_path, make(), LAYOUTS[layout][0])
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(error, match=message):
        load_all(tmp_path)


def packed(scheme: dict[str, Any], **values: Any) -> dict[str, Any]:
    return compressed("pack-quantized", scheme, **values)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "hqq"},
        "config.json: quantization_config: quant_method='hqq' is not supported; supported: awq, gptq, "
        "auto-round, compressed-tensors, fp8, mxfp4, bitsandbytes, modelopt; load the unquantized",
    ),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type='nf3' .*; supported: nf4, fp4"),
    (modelopt("W4A8_AWQ"), "quant_algo='W4A8_AWQ' is not supported; supported: FP8, .*NVFP4"),
    (modelopt("NVFP4", group_size=32), "group_size=32 is not supported; supported: 16"),
    (auto_round("llm_compressor"), "packing_format='auto_round:llm_compressor' is not .*: auto_round:auto_gptq"),
    (auto_round("gptqmodel"), "packing_format='auto_round:gptqmodel' is not supported"),
    (
        {"quant_method": "intel/auto-round", "backend": "autoround:exllamav2", "bits": 4},
        "backend='autoround:exllamav2' is not supported",
    ),
    (auto_round("auto_gptq", data_type="mx_fp"), "data_type='mx_fp' is not supported; supported: int"),
    (gptq(is_marlin_format=True), "checkpoint_format='marlin' is not supported"),
    ({**AWQ, "version": "gemv_fast"}, "version='gemv_fast' is not supported; supported: gemm, gemv"),
    ({**AWQ, "bits": 8}, "bits=8 is not supported; supported: 4"),
    ({**AWQ, "group_size": 48}, f"layer '{Q_PROJ}': group_size=48 does not divide its 64 inputs"),
    (gptq(3), "bits=3 is not supported; supported: 4, 8"),
    (gptq(2), "bits=2 is not supported; supported: 4, 8"),
    (gptq(checkpoint_format="marlin"), "checkpoint_format='marlin' is not supported; supported: gptq, gptq_v2"),
    (gptq(dynamic={"+:(a+)+b": {}}), r"dynamic: pattern '\(a\+\)\+b' is not supported"),
    ({**FP8, "weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\] .*supported: \[128, 128\]"),
    ({**BLOCKS, "activation_scheme": "static"}, "activation_scheme='static' is not supported; .*dynamic with"),
    ({**FP8, "fmt": "e5m2"}, "fmt='e5m2' is not supported; supported: e4m3"),
    ({**BLOCKS, "scale_fmt": "ue4m3"}, "scale_fmt='ue4m3' is not supported; supported: float, ue8m0"),
    (compressed("marlin-24", group()), "group_0: format='marlin-24' is not supported; supported: pack-quantized, int-"),
    (packed(group(bits=2)), "group_0: weights: num_bits='int2' is not supported; supported: int4, int8"),
    (packed(group(inputs={**INT_TOKEN, "strategy": "all"})), "input_activations: strategy='all' is not supported"),
    (packed(group(), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: format='sparse-24-bitmask'"),
    (packed(group(), transform_config={"config_groups": {}}), "transform_config is not supported"),
    (packed(group(), quantization_status="calibration"), "quantization_status='calibration' is not supported"),
    (
        compressed("float-quantized", group("float", 8, symmetric=False)),
        "symmetric=False .*supported: true in format 'float-",
    ),
    (compressed("mxfp4-pack-quantized", group("float", 4, group_size=16)), "group_size=16 .*; supported: 32"),
    (compressed("nvfp4-pack-quantized", group("float", 4, group_size=32)), "group_size=32 .*; supported: 16"),
    (packed(group(actorder="column")), "actorder='column' is not supported; supported: group, dynamic, weight, static"),
    (compressed("mxfp8-quantized", group("float", 8)), "format='mxfp8-quantized' is not supported"),
    (
        compressed("float-quantized", group("float", 8, strategy="block", block_structure=[64, 64])),
        r"block_structure=\[64, 64\]",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSALS)
def test_what_is_not_supported_says_what_is(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["awq"][0])
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=message):
        load_all(tmp_path)


def test_a_group_size_that_no_format_has(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(), QuantizedFiles(gptq(4, 24), files.gptq(4, 24)))
    message = f"layer '{Q_PROJ}': group_size=24 is not supported; supported: 16, 32, 64, 128, -1"
    with pytest.raises(UnsupportedModelError, match=message):
        load_all(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 4}, "quantization_config: quant_method: expected a string, but the key is missing"),
        ({**gptq(), "bits": "four"}, "quantization_config: bits: expected an integer"),
        (gptq(4, 0), "quantization_config: group_size: expected an integer in"),
        (packed(group(), ignore=["re:("]), "pattern: expected a regular expression .*found"),
        (packed(group(strategy="group")), "weights: group_size: expected a positive integer with strategy 'group'"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "config_groups: expected an object"),
        ({"quant_method": "bitsandbytes"}, "load_in_4bit: expected the opposite of load_in_8bit=false, but the key is"),
        ({**BNB8, "load_in_4bit": True}, "load_in_4bit: expected the opposite of load_in_8bit=true, found True"),
    ],
)
def test_malformed_descriptions_are_corrupt_files(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["awq"][0])
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(CorruptFileError, match=message):
        load_all(tmp_path)


@pytest.mark.parametrize("repeated", [True, False])
def test_the_format_of_mlx_is_named(tmp_path: Path, repeated: bool) -> None:
    """mlx-lm writes the same object under two keys, older versions under one."""
    write_quantized(tmp_path, make(), LAYOUTS["gptq"][0])
    own = {"group_size": 64, "bits": 4}
    edit_config(tmp_path, quantization=own, quantization_config=own if repeated else None)
    with pytest.raises(UnsupportedModelError, match=r"config.json: quantization: the format of MLX is not supported;"):
        load_all(tmp_path)


def test_a_table_that_config_json_does_not_name(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["bnb-fp4"][0])
    edit_config(tmp_path, quantization_config=bnb4("nf4"))
    message = f"'{Q_PROJ}.weight.quant_state.bitsandbytes__fp4' is of fp4, although .*bnb_4bit_quant_type='nf4'"
    with pytest.raises(CorruptFileError, match=message):
        load_all(tmp_path)


def test_rows_that_do_not_fill_words(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(head_dim=18), LAYOUTS["gptq"][0])
    with pytest.raises(UnsupportedModelError, match=r"'.*k_proj': GPTQ stores 8 weights in a word; .* not 36 and 64"):
        load_all(tmp_path)


def test_an_embedding_whose_rows_share_scales(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(), QuantizedFiles(BLOCKS, files.fp8("block", name="weight_scale_inv")))
    tensors = load_file(tmp_path / "model.safetensors")
    shape = tensors["model.embed_tokens.weight"].shape
    tensors["model.embed_tokens.weight"] = torch.ones(shape).to(torch.float8_e4m3fn)
    tensors["model.embed_tokens.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"layer 'model.embed_tokens': rows of an embedding .* must not share scales"
    with pytest.raises(UnsupportedModelError, match=message):
        load_all(tmp_path)


def test_heads_that_are_reordered_cannot_share_scales(tmp_path: Path) -> None:
    write_quantized(tmp_path, make("phi3_short"), QuantizedFiles(BLOCKS, files.fp8("block", name="weight_scale_inv")))
    message = "layer 'model.layers.0.self_attn.qkv_proj': 128 rows share a scale, .* only 8 dimensions rotate"
    with pytest.raises(UnsupportedModelError, match=message):
        load_all(tmp_path)


def test_dummy_weights_are_not_made_for_quantized_models(tmp_path: Path) -> None:
    write_quantized(tmp_path, make(), LAYOUTS["awq"][0])
    with pytest.raises(UnsupportedModelError, match=r"config.json: quantization_config: load_format='dummy'"):
        load_all(tmp_path, "dummy")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_model(tmp_path, "dummy").formats.is_dense


def test_a_quantized_kv_cache_is_left_to_quant_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored, _ = LAYOUTS["w4a16"]
    write_quantized(tmp_path, make(), stored)
    load_all(tmp_path)
    assert not caplog.messages
    edit_config(tmp_path, quantization_config={**stored.config, "kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    load_all(tmp_path)
    where = f"{tmp_path / 'config.json'}: quantization_config"
    assert caplog.messages == [
        f"{where}: kv_cache_scheme is ignored: quant_config says whether the KV cache is quantized"
    ]
