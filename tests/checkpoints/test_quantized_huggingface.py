"""Quantized Hugging Face checkpoints: every layout gives the weights that its integers and scales stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmengine import LLM, ModelConfig, SamplingParams
from llmengine.checkpoints.opening import open_model
from llmengine.errors import CorruptFileError
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import matrix_shapes
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4
from llmengine.quantization.stacked import Stacked
from tests.backends.helpers import leave_products_to_torch
from tests.checkpoints import quantized_files as files
from tests.checkpoints.quantized_files import QuantizedFiles, write_dense, write_quantized
from tests.checkpoints.quantized_layouts import (
    BLOCKS,
    LAYOUTS,
    NVFP4,
    TENSOR,
    TOKEN,
    auto_round,
    compressed,
    gptq,
    group,
    make,
    modelopt,
)

PROMPTS = [[5, 9, 3], [7], list(range(3, 23))]
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)


def assert_stands_for(directory: Path, dense: Path) -> None:
    """The quantized directory has exactly the weights of the dense one, in canonical form."""
    source = open_model(directory)
    stored = dict(source.weights(torch.float32))
    shapes = matrix_shapes(source.arch)
    for name, expected in open_model(dense).weights(torch.float32):
        matrix = name.removesuffix(".weight")
        if matrix in shapes:
            wanted = source.formats.of(matrix)
            tensors = {suffix: stored[f"{matrix}.{suffix}"] for suffix in wanted.tensors(shapes[matrix], "float32")}
            assert torch.equal(Matrix(wanted, shapes[matrix], tensors).dequantized(), expected), name
        else:
            assert torch.equal(stored[name], expected), name


def tokens(place: Path, save: Path | None = None, **changes: Any) -> list[list[int]]:
    with LLM(ModelConfig(place, device="cpu", num_threads=1, **changes), enable_tokenizer=False) as llm:
        if save is not None:
            llm.save(save)
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(autouse=True)
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are compared without the native library: it rounds activations, which may change random models' tokens."""
    leave_products_to_torch(monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_exactly(tmp_path: Path, layout: str) -> None:
    model, (stored, expected) = make(), LAYOUTS[layout]
    write_dense(tmp_path / "dense", model, write_quantized(tmp_path / "files", model, stored))
    assert_stands_for(tmp_path / "files", tmp_path / "dense")
    formats = open_model(tmp_path / "files").formats
    assert formats.of("layers.1.qkv") == formats.of("layers.0.gate_up") == expected
    assert formats.of("lm_head") == formats.of("embed_tokens") == DENSE
    # Fused matrices have a scale for each row where their parts have one each; 96 columns are no multiple of 64.
    differs = expected in (Fp8("channel", "token"), Fp8("channel", "tensor"), Nvfp4("channel"), Bnb4Bit("nf4", 64))
    assert "layers.2.down" not in formats.exceptions or differs


INT4 = Int4Groups(32)
ORDERED = Int4Groups(32, input_order=True)


def pair(place: Path, model: Any, stored: QuantizedFiles, **values: Any) -> tuple[Path, Path]:
    """A quantized directory and the dense one that it stands for."""
    write_dense(place / "dense", model, write_quantized(place / "files", model, stored, **values))
    return place / "files", place / "dense"


@pytest.mark.parametrize(
    ("exceptions", "expected"),
    [
        ({"v_proj": None}, Stacked.of_rows([(64, INT4), (32, INT4), (32, DENSE)])),
        ({"[kv]_proj": None}, Stacked.of_rows([(64, INT4), (32, DENSE), (32, DENSE)])),
        (
            {"q_proj": files.gptq(act_order="own")},
            Stacked.of_rows([(64, ORDERED), (32, INT4), (32, INT4)]),
        ),
        (
            {"[qkv]_proj": files.gptq(act_order="own")},
            Stacked.of_rows([(64, ORDERED), (32, ORDERED), (32, ORDERED)]),
        ),
        ({"[qkv]_proj": files.gptq(act_order="shared")}, ORDERED),
        ({"[qkv]_proj": None}, DENSE),
    ],
)
def test_parts_that_are_stored_in_different_ways_are_stacked(
    tmp_path: Path, exceptions: dict[str, Any], expected: WeightFormat
) -> None:
    place, dense = pair(tmp_path, make(), QuantizedFiles(gptq(), files.gptq(), exceptions))
    assert_stands_for(place, dense)
    formats = open_model(place).formats
    assert formats.of("layers.1.qkv") == expected
    assert formats.default == formats.of("layers.1.gate_up") == INT4
    assert tokens(place) == tokens(dense)


def test_activation_scales_that_differ_keep_parts_apart(tmp_path: Path) -> None:
    scheme = group("float", 8, strategy="tensor", inputs=TENSOR)
    stored = QuantizedFiles(compressed("float-quantized", scheme), files.fp8("tensor", input_scale="own"))
    place, dense = pair(tmp_path, make(), stored)
    assert_stands_for(place, dense)
    formats, static = open_model(place).formats, Fp8("tensor", "tensor")
    assert formats.default == formats.of("layers.0.down") == static
    assert formats.of("layers.0.qkv") == Stacked.of_rows([(64, static), (32, static), (32, static)])


def test_blocks_of_rows_are_joined_where_they_meet_and_stacked_where_not(tmp_path: Path) -> None:
    stored = QuantizedFiles(BLOCKS, files.fp8("block", name="weight_scale_inv"))
    blocks = Fp8("block", "block")
    for heads, expected in ((2, blocks), (1, Stacked.of_rows([(256, blocks), (64, blocks), (64, blocks)]))):
        model = make("mistral", hidden_size=256, head_dim=64, num_key_value_heads=heads)
        place, dense = pair(tmp_path, model, stored)
        assert_stands_for(place, dense)
        assert open_model(place).formats.of("layers.2.qkv") == expected
        assert open_model(place).formats.of("layers.2.gate_up") == Stacked.of_rows([(96, blocks), (96, blocks)])


def test_heads_that_are_reordered_may_share_scales_within_themselves(tmp_path: Path) -> None:
    """Phi-4-mini: heads of 128 dimensions, some of which do not rotate, and blocks of 128 rows."""
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **factors}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = make("phi3_short", **sizes, intermediate_size=128, rope_parameters=rope)
    stored = QuantizedFiles(BLOCKS, files.fp8("block", name="weight_scale_inv"))
    place, dense = pair(tmp_path, model, stored)
    assert_stands_for(place, dense)
    assert open_model(place).formats.of("layers.0.qkv") == Fp8("block", "block")


FAMILIES = ["mistral", "qwen2", "qwen3", "phi3", "phi3_short", "granite", "smollm3", "gemma2", "gemma3", "olmo2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_dequantized_weights_do(tmp_path: Path, family: str) -> None:
    sizes = {"num_hidden_layers": 5, "num_key_value_heads": 4 if family.startswith("phi3") else 2}
    model = make(family, **{**sizes, "intermediate_size": 64})
    turns = ["gptq-8", "gptq", "gptq-order", "gptq-sym"]
    own = {f"layers.{index}.": LAYOUTS[turns[index % 4]][0].pack for index in range(4)}
    dynamic = {"+:.*layers.0": {"bits": 8}, "+:.*layers.2": {"desc_act": True}, "+:.*layers.3": {"sym": True}}
    place, dense = pair(tmp_path, model, QuantizedFiles(gptq(dynamic=dynamic), files.gptq(), own))
    assert_stands_for(place, dense)
    formats = open_model(place).formats
    assert formats.of("layers.0.qkv") == formats.of("layers.0.down") == Int8Groups(32)
    assert formats.of("layers.2.o") == ORDERED
    assert formats.of("layers.3.gate_up") == Int4Groups(32, False)
    assert tokens(place) == tokens(dense)


SAVED = {name: LAYOUTS[name][0] for name in ("awq", "gptq-8-row", "w8a8", "fp8-static", "fp8", "mxfp4", "int8-groups")}
SAVED |= {name: LAYOUTS[name][0] for name in ("nvfp4", "bnb-double")}
SAVED["stacked"] = QuantizedFiles(gptq(), files.gptq(), {"q_proj": files.gptq(act_order="own"), "v_proj": None})


@pytest.mark.parametrize("layout", SAVED)
def test_saved_engines_have_the_same_bytes(tmp_path: Path, layout: str) -> None:
    place, _ = pair(tmp_path, make("qwen2"), SAVED[layout])
    found = tokens(place, save=tmp_path / "engine")
    assert tokens(tmp_path / "engine") == found
    source, engine = open_model(place), open_model(tmp_path / "engine")
    assert engine.formats == source.formats
    engine_weights = dict(engine.weights(torch.float32))
    for name, tensor in source.weights(torch.float32):
        assert torch.equal(tensor.view(torch.uint8), engine_weights[name].view(torch.uint8)), name
    tokens(tmp_path / "engine", save=tmp_path / "again")
    again = sorted((tmp_path / "again").glob("*.safetensors"))
    assert [file.read_bytes() for file in again] == [(tmp_path / "engine" / file.name).read_bytes() for file in again]


INT_TOKEN = {**TOKEN, "type": "int"}
BY_ROW = {"strategy": "channel"}
UNROUNDED: list[tuple[dict[str, Any], files.Packer, WeightFormat]] = [
    (
        compressed("pack-quantized", group(strategy="group", group_size=32, inputs=INT_TOKEN)),
        files.compressed(),
        Int4Groups(32, False, scale_dtype="bfloat16"),
    ),
    (
        compressed("int-quantized", group(bits=8, **BY_ROW, inputs={**INT_TOKEN, "symmetric": False})),
        files.int8(),
        INT8,
    ),
    (
        compressed(
            "int-quantized", group(bits=8, **BY_ROW, inputs={**INT_TOKEN, "group_size": 32, "strategy": "group"})
        ),
        files.int8(),
        INT8,
    ),
    (
        compressed("int-quantized", group(bits=8, **BY_ROW, symmetric=False, inputs=INT_TOKEN)),
        files.int8(symmetric=False),
        Int8Groups(-1, scale_dtype="bfloat16"),
    ),
    (
        compressed("float-quantized", group("float", 8, **BY_ROW, inputs={**TOKEN, "strategy": "tensor"})),
        files.fp8(),
        Fp8("channel", "none"),
    ),
    (
        compressed("nvfp4-pack-quantized", {**NVFP4, "input_activations": {**NVFP4["weights"], "dynamic": "local"}}),
        files.nvfp4(),
        Nvfp4("channel"),
    ),
    (
        compressed(
            "mxfp4-pack-quantized",
            group("float", 4, group_size=32, inputs={**TOKEN, "num_bits": 4, "group_size": 32, "strategy": "group"}),
        ),
        files.mxfp4("weight_packed", "weight_scale"),
        Mxfp4(),
    ),
    (modelopt("NVFP4"), files.nvfp4("weight", "weight_scale_2", is_divisor=False), Nvfp4("channel")),
]


@pytest.mark.parametrize(("config", "pack", "expected"), UNROUNDED)
def test_activations_that_no_format_rounds_are_used_as_they_are_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, config: dict[str, Any], pack: files.Packer, expected: WeightFormat
) -> None:
    place, dense = pair(tmp_path, make(), QuantizedFiles(config, pack))
    assert open_model(place).formats.of("layers.1.qkv") == expected
    (message,) = caplog.messages
    assert "products use activations as they are" in message
    assert str(place / "config.json") in message
    assert_stands_for(place, dense)


def test_groups_that_quantize_no_weights_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = {"targets": ["re:.*[kv]_proj"], "weights": None, "output_activations": TENSOR}
    linear = {**group(strategy="group", group_size=32), "output_activations": TENSOR}
    config = compressed("pack-quantized", linear, {**cache, "targets": ["LlamaAttention"]})
    place, dense = pair(tmp_path, make(), QuantizedFiles(config, files.compressed()))
    assert_stands_for(place, dense)
    assert any("group_1: ignored, since it quantizes no weights" in message for message in caplog.messages)
    assert any("group_0: output_activations are ignored" in message for message in caplog.messages)


def test_a_format_that_stores_weights_as_they_were(tmp_path: Path) -> None:
    """llm-compressor saves so on request: the scheme, and weights that are rounded but not packed."""
    model = make()
    config = compressed("dense", group(strategy="group", group_size=32))
    place, dense = pair(tmp_path, model, QuantizedFiles(config, files.compressed(), {"": None}))
    assert open_model(place).formats.is_dense
    assert_stands_for(place, dense)


def test_exponents_as_scales_of_fp8_blocks(tmp_path: Path) -> None:
    """DeepSeek's scale_fmt "ue8m0"."""
    model = make("mistral", hidden_size=256, head_dim=64, num_key_value_heads=2)
    stored = QuantizedFiles({**BLOCKS, "scale_fmt": "ue8m0"}, files.fp8("block", name="weight_scale_inv"))
    place, dense = pair(tmp_path, model, stored)
    file, state = place / "model.safetensors", load_file(dense / "model.safetensors")
    tensors = load_file(file)
    for index, name in enumerate(name for name in tensors if name.endswith("_inv")):
        exponents = torch.randint(115, 120, tensors[name].shape, dtype=torch.uint8)
        factors = torch.exp2(exponents.float() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = name.removesuffix("_scale_inv")
        rows, columns = tensors[weight].shape
        state[weight] = tensors[weight].float() * factors[:rows, :columns]
        tensors[name] = exponents.view(torch.float8_e8m0fnu) if index % 2 else exponents
    save_file(tensors, file)
    write_dense(dense, model, state)
    assert_stands_for(place, dense)


def test_blocks_of_fp8_as_modelopt_has_them(tmp_path: Path) -> None:
    model = make("mistral", hidden_size=256, head_dim=64, num_key_value_heads=2, intermediate_size=256)
    place, dense = pair(tmp_path, model, QuantizedFiles(modelopt("fp8_pb_wo"), files.fp8("block")))
    file = place / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("weight_scale")]:
        tensors[name] = tensors[name][:, None, :, None].contiguous()
    save_file(tensors, file)
    assert_stands_for(place, dense)
    assert open_model(place).formats.of("layers.0.o") == Fp8("block", "none")


def test_mixed_precision_of_modelopt(tmp_path: Path) -> None:
    floats, nvfp4 = {"quant_algo": "FP8"}, {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    model = make()
    layers = {
        name: floats if "layers.0" in name else nvfp4
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers.2" not in name and name != "lm_head"
    }
    own = {"layers.0": files.fp8("tensor", input_scale="shared"), "layers.2": None}
    pack = files.nvfp4("weight", "weight_scale_2", is_divisor=False)
    place, dense = pair(
        tmp_path, model, QuantizedFiles(modelopt("MIXED_PRECISION", quantized_layers=layers), pack, own)
    )
    assert_stands_for(place, dense)
    formats = open_model(place).formats
    assert formats.of("layers.0.down") == Fp8("tensor", "tensor")
    assert formats.of("layers.1.o") == Nvfp4()
    assert formats.of("layers.2.o") == DENSE


def test_modules_that_auto_round_names_differ(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.down_proj": {"bits": 8, "sym": True}, ".*layers.1.*o_proj": {"bits": 16}}
    own = {"layers.0.mlp.down_proj": files.gptq(8, symmetric=True), "layers.1.*o_proj": None}
    config = auto_round("auto_gptq", extra_config=extra)
    place, dense = pair(tmp_path, make(), QuantizedFiles(config, files.gptq(), own))
    assert_stands_for(place, dense)
    formats = open_model(place).formats
    assert formats.of("layers.0.down") == Int8Groups(32, False)
    assert formats.of("layers.1.o") == DENSE


@pytest.mark.parametrize(
    ("order", "is_stored"), [("static", False), ("weight", False), ("dynamic", True), (True, True)]
)
def test_orders_of_columns_by_every_name(tmp_path: Path, order: str | bool, is_stored: bool) -> None:
    """Of two kinds: columns are reordered for calibration alone, or groups are of columns that are not consecutive."""
    config = compressed("pack-quantized", group(strategy="group", group_size=32, actorder=order))
    place, dense = pair(tmp_path, make(), QuantizedFiles(config, files.compressed(act_order=is_stored)))
    assert_stands_for(place, dense)
    expected = Int4Groups(32, False, input_order=is_stored, scale_dtype="bfloat16")
    assert open_model(place).formats.of("layers.1.qkv") == expected


def test_zero_points_that_do_nothing_are_left_out(tmp_path: Path) -> None:
    """Older versions of compressed-tensors saved them for symmetric weights too."""
    place, dense = pair(tmp_path, make(), LAYOUTS["w4a16"][0])
    file, name = place / "model.safetensors", "model.layers.1.self_attn.o_proj.weight_zero_point"
    tensors = load_file(file)
    for zeros in (torch.zeros(64, 2, dtype=torch.int8), torch.full((8, 2), 0x88888888 - (1 << 32), dtype=torch.int32)):
        save_file({**tensors, name: zeros}, file)
        assert_stands_for(place, dense)
    save_file({**tensors, name: torch.ones(64, 2, dtype=torch.int8)}, file)
    with pytest.raises(CorruptFileError, match=f"{name}' has zero points other than 0, .*symmetric=true"):
        assert_stands_for(place, dense)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_that_of_the_file(tmp_path: Path, layout: str) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 32}
    model, (stored, _) = make("mistral", **wide, num_key_value_heads=32), LAYOUTS[layout]
    write_quantized(tmp_path, model, stored)
    # GPTQ files have zero points that are all alike, and the groups of columns that are in order.
    config = stored.config
    idle = (*(("qzeros",) if config.get("sym") else ()), *(("g_idx",) if not config.get("desc_act") else ()), "-")
    tensors = load_file(tmp_path / "model.safetensors")
    in_file = sum(item.nbytes for name, item in tensors.items() if "_proj." in name and not name.endswith(idle))
    source = open_model(tmp_path)
    linears = ("qkv", "o", "gate_up", "down")
    size = sum(item.nbytes for name, item in source.weights(torch.float32) if name.split(".")[-2] in linears)
    # AutoAWQ's gemv fills up scales; scales of bitsandbytes that are quantized themselves become float32.
    assert (
        (0.8 if layout == "awq-gemv" else 0.97) * in_file <= size <= (1.1 if layout == "bnb-double" else 1.03) * in_file
    )


def test_int8_rows_whose_least_weight_is_minus_128(tmp_path: Path) -> None:
    """The native decoder makes its own weights of at most 127; those of files reach -128."""
    stored, expected = LAYOUTS["w8a16"]
    place, dense = pair(tmp_path, make("qwen2", head_dim=16), stored)
    assert expected == INT8
    assert (
        min(int(tensor.min()) for name, tensor in open_model(place).weights(torch.float32) if "weight" in name) == -128
    )
    assert tokens(place) == tokens(dense)


def test_embedding_and_output_matrix_may_be_quantized(tmp_path: Path) -> None:
    both = {**group(bits=8, strategy="channel"), "targets": ["Embedding", "lm_head", "re:.*self_attn.*"]}
    config = compressed("pack-quantized", both, group(strategy="group", group_size=32), ignore=[])
    own = {"lm_head|self_attn": files.compressed(8, -1)}
    model = make()
    stored = QuantizedFiles(config, files.compressed(), own)
    dense = write_quantized(tmp_path / "files", model, stored)
    write_dense(tmp_path / "dense", model, dense)
    formats = open_model(tmp_path / "files").formats
    assert formats.of("lm_head") == formats.of("layers.0.qkv") == INT8
    assert formats.of("embed_tokens") == DENSE  # the file has it so
    assert_stands_for(tmp_path / "files", tmp_path / "dense")
    file = tmp_path / "files" / "model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng(3)
    packed, weight = files.compressed(8, -1)(rng, *tensors.pop("model.embed_tokens.weight").shape)
    save_file({**tensors, **{f"model.embed_tokens.{suffix}": item for suffix, item in packed.items()}}, file)
    write_dense(tmp_path / "dense", model, {**dense, "model.embed_tokens.weight": torch.from_numpy(weight)})
    assert open_model(tmp_path / "files").formats.of("embed_tokens") == INT8
    assert_stands_for(tmp_path / "files", tmp_path / "dense")
    assert tokens(tmp_path / "files") == tokens(tmp_path / "dense")


def test_bin_files(tmp_path: Path) -> None:
    place, dense = pair(tmp_path, make("qwen2"), LAYOUTS["gptq-order"][0])
    file = place / "model.safetensors"
    torch.save(load_file(file), place / "pytorch_model.bin")
    file.unlink()
    assert open_model(place).formats.of("layers.0.qkv") == ORDERED
    assert_stands_for(place, dense)


def test_linears_are_found_by_name_then_pattern_then_class(tmp_path: Path) -> None:
    weights = {"strategy": "channel"}
    groups = [
        group(strategy="group", group_size=32),
        {**group(bits=8, **weights), "targets": ["re:.*mlp.*"]},
        {**group("float", 8, **weights), "format": "float-quantized", "targets": ["model.layers.1.mlp.down_proj"]},
    ]
    config = compressed("pack-quantized", *groups, ignore=["lm_head", "re:.*layers.2.*"])
    own = {"layers.2": None, "layers.1.mlp.down_proj": files.fp8(), "mlp": files.compressed(8, -1)}
    place, dense = pair(tmp_path, make(), QuantizedFiles(config, files.compressed(), own))
    assert_stands_for(place, dense)
    formats = open_model(place).formats
    assert formats.of("layers.0.o") == Int4Groups(32, False, scale_dtype="bfloat16")
    assert formats.of("layers.1.gate_up") == formats.of("layers.0.down") == INT8
    assert formats.of("layers.1.down") == Fp8("channel", "none")
    assert {formats.of(f"layers.2.{name}") for name in ("qkv", "o", "gate_up", "down")} == {DENSE}


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_modules_may_be_called_as_in_the_larger_model(tmp_path: Path, prefix: str) -> None:
    """Descriptions have the names that modules had when the tool ran, files those of the version that saved them."""
    down = f"{prefix}{'' if prefix.startswith('model') else 'model.'}layers.1.mlp.down_proj"
    names = [f"re:{prefix}.*layers.0.*", down]
    in_groups = {**group(strategy="group", group_size=32), "targets": ["re:.*layers.*"]}
    config = compressed("pack-quantized", {**group(bits=8, strategy="channel"), "targets": names}, in_groups, ignore=[])
    own = {"layers.0|layers.1.mlp.down_proj": files.compressed(8, -1)}
    place, dense = pair(tmp_path, make(), QuantizedFiles(config, files.compressed(), own))
    file = place / "model.safetensors"
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    assert_stands_for(place, dense)
    formats = open_model(place).formats
    assert formats.of("layers.0.qkv") == formats.of("layers.1.down") == INT8
    assert formats.of("layers.1.o") == Int4Groups(32, False, scale_dtype="bfloat16")


def test_fp8_blocks_as_transformers_dequantizes_them(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    stored = QuantizedFiles(BLOCKS, files.fp8("block", name="weight_scale_inv"))
    place, dense = pair(tmp_path, make("mistral", hidden_size=256, head_dim=64, intermediate_size=256), stored)
    config = FineGrainedFP8Config(dequantize=True, modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, quantization_config=config)
    state = load_file(dense / "model.safetensors")
    found = {name: item for name, item in model.state_dict().items() if name.endswith("_proj.weight")}
    assert found.keys() == {name for name in state if "_proj" in name}
    assert all(torch.equal(state[name], item) for name, item in found.items())
    assert_stands_for(place, dense)


def test_biases_of_zeros_are_left_out(tmp_path: Path) -> None:
    """AutoGPTQ gave every linear a bias, whether the model has one or not."""
    place, dense = pair(tmp_path, make(), LAYOUTS["gptq"][0])
    file, name = place / "model.safetensors", "model.layers.1.self_attn.o_proj.bias"
    tensors = load_file(file)
    save_file({**tensors, name: torch.zeros(64)}, file)
    assert_stands_for(place, dense)
    save_file({**tensors, name: torch.ones(64)}, file)
    with pytest.raises(CorruptFileError, match=f"left over .*{name}"):
        open_model(place)


def test_exponents_of_mxfp4_may_have_a_dtype_of_their_own(tmp_path: Path) -> None:
    place, dense = pair(tmp_path, make(), LAYOUTS["mxfp4"][0])
    file = place / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_scales")]:
        tensors[name] = tensors[name].view(torch.float8_e8m0fnu)
    save_file(tensors, file)
    assert_stands_for(place, dense)
