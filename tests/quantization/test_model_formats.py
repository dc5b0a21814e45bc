"""Which matrix has which format, and what follows: layout, manifest, what a configuration asks for."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine.checkpoints.dummy_weights import stream_dummy
from llmengine.checkpoints.engine_dir import model_config_hash, save_engine
from llmengine.checkpoints.model_saving import keeps_values
from llmengine.checkpoints.opening import open_model
from llmengine.config import QuantConfig
from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.quantization.formats import DENSE, TensorSpec, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats, formats_in_use, matrix_shapes
from llmengine.quantization.mxfp4 import Mxfp4
from tests.models.arch_helpers import SMALL_ARCH

ARCH = dataclasses.replace(SMALL_ARCH, attention_bias=True)
INT8_MODEL = ModelFormats(INT8)
MIXED = ModelFormats(INT8, {"layers.0.down": DENSE, "lm_head": DENSE})


def test_a_dense_layout_is_the_canonical_weights() -> None:
    layout = DENSE_MODEL.layout(ARCH, "bfloat16")
    assert {name: spec.shape for name, spec in layout.items()} == canonical_shapes(ARCH)
    assert {spec.dtype for spec in layout.values()} == {"bfloat16"}
    norms = dataclasses.replace(ARCH, float32_norms=True)
    assert DENSE_MODEL.layout(norms, "bfloat16")["final_norm.weight"].dtype == "float32"


def test_further_tensors_follow_their_weight() -> None:
    names = list(INT8_MODEL.layout(ARCH, "bfloat16"))
    first = names.index("layers.0.qkv.weight")
    assert names[first : first + 3] == ["layers.0.qkv.weight", "layers.0.qkv.weight_scale", "layers.0.qkv.bias"]


def test_exceptions_and_the_embedding_keep_their_own_format() -> None:
    layout = MIXED.layout(ARCH, "float16")
    dense = ("embed_tokens.weight", "layers.0.down.weight", "lm_head.weight")
    assert [layout[name].dtype for name in dense] == ["float16"] * 3
    assert layout["layers.1.down.weight"].dtype == "int8"
    assert not MIXED.is_dense
    assert DENSE_MODEL.is_dense
    assert (str(DENSE_MODEL), str(INT8_MODEL), str(MIXED)) == ("none", "int8", "int8 but for 2 matrices")


@pytest.mark.parametrize("formats", [DENSE_MODEL, INT8_MODEL, MIXED], ids=str)
def test_manifests_round_trip(formats: ModelFormats) -> None:
    assert ModelFormats.from_json(formats.to_json(), ARCH, "here") == formats


def test_the_manifests_of_format_2_are_as_they_were() -> None:
    assert (DENSE_MODEL.to_json(), INT8_MODEL.to_json()) == ({}, {"weights": "int8"})
    assert ModelFormats.from_json({"weights": "none"}, ARCH, "here") == DENSE_MODEL
    assert (
        model_config_hash({}, "float32", INT8_MODEL.to_json())
        == "03d81a6bb47817556d1f3a801dec8dbea7ddb21a27e2261d2366e2ffe5889c57"
    )


def test_exceptions_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(CorruptFileError, match=r"here: exceptions: the model has no matrix 'layers\.99\.down'"):
        ModelFormats.from_json({"exceptions": {"layers.99.down": {"weights": "int8"}}}, ARCH, "here")
    with pytest.raises(CorruptFileError, match="here: exceptions: expected an object"):
        ModelFormats.from_json({"exceptions": ["lm_head"]}, ARCH, "here")
    with pytest.raises(UnsupportedModelError, match="here: lm_head: weights in format 'int3'"):
        ModelFormats.from_json({"exceptions": {"lm_head": {"weights": "int3"}}}, ARCH, "here")


def test_a_mixed_engine_is_saved_and_loaded(tmp_path: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    shapes = matrix_shapes(ARCH)
    for name, tensor in stream_dummy(ARCH, torch.float32):
        matrix = name.removesuffix(".weight")
        if name.endswith(".weight") and matrix in shapes:
            weights |= Matrix.dense(tensor).quantized(MIXED.of(matrix)).named_tensors(matrix)
        else:
            weights[name] = tensor
    assert {name: TensorSpec.of(tensor) for name, tensor in weights.items()} == MIXED.layout(ARCH, "float32")
    save_engine(
        tmp_path / "engine",
        arch=ARCH,
        weights=weights.items(),
        dtype="float32",
        formats=MIXED,
        generation_config={},
        eos_token_ids=(),
        bos_token_id=None,
        tokenizer_files={},
    )
    source = open_model(tmp_path / "engine")
    assert source.formats == MIXED
    loaded = dict(source.weights(torch.float32))
    assert list(loaded) == list(weights)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    specs = MIXED.layout(ARCH, "float32").values()
    data_bytes = sum(prod(spec.shape) * (1 if spec.dtype == "int8" else 4) for spec in specs)
    assert sum(spec.size_bytes for spec in specs) == data_bytes
    assert 0 < (tmp_path / "engine" / "weights.rank0.safetensors").stat().st_size - data_bytes < 10_000


def test_what_a_configuration_asks_for() -> None:
    int8, none = QuantConfig(weights="int8").resolve(), QuantConfig().resolve()
    assert formats_in_use(DENSE_MODEL, none, ARCH) == DENSE_MODEL
    assert formats_in_use(DENSE_MODEL, int8, ARCH) == INT8_MODEL
    assert formats_in_use(MIXED, none, ARCH) is MIXED
    assert formats_in_use(MIXED, int8, ARCH) is MIXED
    with pytest.raises(ConfigError, match=r"asks for weights in format 'int8', but .* stored as 'int4\(.*\)'; set"):
        formats_in_use(ModelFormats(Int4Groups(16)), int8, ARCH)
    int4 = QuantConfig.preset("int4-awq", group_size=32).resolve()
    reordered = ModelFormats(Int4Groups(32, input_order=True, input_scale=True))
    assert formats_in_use(reordered, int4, ARCH) is reordered
    of_a_file = ModelFormats(Int4Groups(32, scale_dtype="bfloat16"))
    assert formats_in_use(of_a_file, int4, ARCH) is of_a_file
    with pytest.raises(ConfigError, match=r"'int4\(group_size=32, zero_points\)', but .*'int4\(group_size=64"):
        formats_in_use(ModelFormats(Int4Groups(64)), int4, ARCH)


@pytest.mark.parametrize(
    ("settings", "format"),
    [
        ({"weights": "int8", "activations": "token"}, Int8W8A8("channel", "token")),
        ({"weights": "int8", "activations": "tensor", "scales": "tensor"}, Int8W8A8("tensor", "tensor")),
        ({"weights": "int4"}, Int4Groups(128)),
        ({"weights": "int4", "group_size": 32, "symmetric": True}, Int4Groups(32, zero_points=False)),
        ({"weights": "int4", "scales": "channel"}, Int4Groups(-1)),
        ({"weights": "fp8"}, Fp8("channel", "none")),
        ({"weights": "fp8", "activations": "token", "scales": "tensor"}, Fp8("tensor", "token")),
        ({"weights": "fp8", "activations": "token", "scales": "block"}, Fp8("block", "block")),
        ({"weights": "mxfp4"}, Mxfp4()),
    ],
)
def test_settings_and_their_formats(settings: dict[str, Any], format: WeightFormat) -> None:
    found = formats_in_use(DENSE_MODEL, QuantConfig(**settings).resolve(), ARCH)
    assert found == ModelFormats(format, {"lm_head": INT8})
    assert found.in_use == {format, INT8}


def test_skipped_layers_stay_as_they_are() -> None:
    def skipping(*patterns: str, arch: ModelArch = ARCH) -> ModelFormats:
        return formats_in_use(DENSE_MODEL, QuantConfig(weights="int8", skip_layers=patterns).resolve(), arch)

    assert skipping("lm_head") == ModelFormats(INT8, {"lm_head": DENSE})
    tied = dataclasses.replace(ARCH, tie_word_embeddings=True)
    assert skipping("lm_head", arch=tied) == ModelFormats(INT8, {"lm_head": DENSE})
    assert list(skipping("layers.0.*").exceptions) == [f"layers.0.{name}" for name in ("qkv", "o", "gate_up", "down")]
    downs = [f"layers.{index}.down" for index in range(ARCH.num_layers)]
    assert list(skipping("*.down", "layers.0.down").exceptions) == downs
    with pytest.raises(ConfigError, match=r"skip_layers: 'layers\.9\.\*' fits no matrix .*layers\.0\.qkv.*lm_head"):
        skipping("lm_head", "layers.9.*")


def test_values_that_a_dtype_cannot_hold_are_noticed() -> None:
    layout = DENSE_MODEL.layout(ARCH, "bfloat16")
    assert keeps_values(layout, [("lm_head.weight", torch.full((2, 3), 1.5))])
    assert not keeps_values(layout, [("lm_head.weight", torch.full((2, 3), 1.001))])
