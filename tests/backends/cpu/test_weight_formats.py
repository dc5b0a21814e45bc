"""Models in every weight format on a CPU: near the reference, saved and loaded bit-equal, deterministic."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from llmengine import LLM, ModelConfig, QuantConfig, SamplingParams
from llmengine.checkpoints.engine_dir import save_engine
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.quantization.model_formats import DENSE_MODEL, matrix_shapes
from tests.backends.cpu.test_determinism import check
from tests.backends.helpers import leave_products_to_torch, save_tiny
from tests.checkpoints import quantized_files as files
from tests.checkpoints.quantized_files import QuantizedFiles
from tests.checkpoints.quantized_layouts import TENSOR, compressed, gptq, group, make
from tests.checkpoints.test_quantized_huggingface import pair
from tests.models.family_helpers import FAMILIES, make_family

CONFIGS = {
    "int8": QuantConfig(weights="int8"),
    "int4": QuantConfig.preset("int4-rtn", group_size=32),
    "int4-symmetric": QuantConfig.preset("int4-rtn", group_size=64, symmetric=True),
    "int4-channel": QuantConfig(weights="int4", scales="channel"),
    "w8a8": QuantConfig.preset("w8a8", method="rtn"),
    "w8a8-tensor": QuantConfig(weights="int8", activations="token", scales="tensor", method="rtn"),
    "fp8": QuantConfig.preset("fp8"),
    "fp8-tensor": QuantConfig(weights="fp8", activations="token", scales="tensor"),
    "fp8-block": QuantConfig.preset("fp8-block"),
    "fp8-weights": QuantConfig(weights="fp8"),
    "mxfp4": QuantConfig.preset("mxfp4"),
}
PROMPTS = [[5 + index * 7 % 90 for index in range(40)], [3 + index * 11 % 90 for index in range(9)]]
OTHERS = [name for name in CONFIGS if name not in ("int4", "w8a8", "fp8")]
by_config = pytest.mark.parametrize("name", CONFIGS)


def error_of_logits(directory: Path, config: QuantConfig) -> float:
    """How far logits are from those of an engine with the dequantized weights, relative to their spread."""
    source = quantized_source(open_model(directory), config.resolve())
    stored = dict(source.weights(torch.float32))
    dense: dict[str, torch.Tensor] = {}
    for matrix, shape in matrix_shapes(source.arch).items():
        format = source.formats.of(matrix)
        tensors = {suffix: stored.pop(f"{matrix}.{suffix}") for suffix in format.tensors(shape, "float32")}
        dense[f"{matrix}.weight"] = format.dequantize(tensors)
    dense |= stored
    save_engine(
        directory / "dense",
        arch=source.arch,
        weights=((name, dense[name]) for name in DENSE_MODEL.layout(source.arch, "float32")),
        dtype="float32",
        formats=DENSE_MODEL,
        generation_config={},
        eos_token_ids=(),
        bos_token_id=None,
        tokenizer_files={},
    )
    found, expected = (
        prompt_logprobs(ModelConfig(path, quant_config=item, device="cpu"))
        for path, item in ((directory, config), (directory / "dense", QuantConfig()))
    )
    return float((found - expected).square().mean().sqrt() / expected.std())


def prompt_logprobs(config: ModelConfig) -> torch.Tensor:
    """The log-probabilities of the first prompt's tokens but the first."""
    params = SamplingParams(max_new_tokens=4, ignore_eos=True, prompt_logprobs=0)
    with LLM(config, enable_tokenizer=False) as llm:
        found = llm.generate([PROMPTS[0]], params)[0].prompt_logprobs
    assert found is not None
    return torch.tensor([item.logprob for item in found[1:] if item is not None])


NOISE = {"int8": 0.01, "int4": 0.1, "mxfp4": 0.1, "w8a8": 0.1, "fp8": 0.4}
"""What rounding activations to 16, to 8 bits or to e4m3 may change in random models, which damp nothing."""


def check_logits(directory: Path, name: str, is_native: bool = True) -> None:
    # An output matrix that is tied would be an int8 copy in one engine only.
    config = CONFIGS[name]
    if open_model(directory).arch.tie_word_embeddings:
        config = dataclasses.replace(config, skip_layers=["lm_head"])
    rounds = config.activations != "none" or (is_native and config.weights in ("int4", "mxfp4"))
    kind = name.partition("-")[0] if rounds else "int8"
    assert error_of_logits(directory, config) < NOISE[kind]


@by_config
@pytest.mark.parametrize("is_native", [False, True])
def test_logits_are_those_of_the_dequantized_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_native: bool
) -> None:
    if not is_native:
        leave_products_to_torch(monkeypatch)
    save_tiny(tmp_path, attention_bias=True)
    check_logits(tmp_path, name, is_native)


@by_config
def test_a_saved_engine_gives_the_same_weights_and_tokens(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path / "model", tie_word_embeddings=name in ("int4", "fp8"))
    config = ModelConfig(tmp_path / "model", quant_config=CONFIGS[name], device="cpu", deterministic=True)
    params = SamplingParams(max_new_tokens=12, ignore_eos=True, logprobs=2)
    with LLM(config, enable_tokenizer=False) as llm:
        before = llm.generate(PROMPTS, params)
        description = llm.info.description
        assert "slow" not in description
        llm.save(tmp_path / "engine")
    source = quantized_source(open_model(tmp_path / "model"), CONFIGS[name].resolve())
    saved = open_model(tmp_path / "engine")
    assert saved.formats == source.formats
    for (key, one), (other_key, other) in zip(source.weights(torch.float32), saved.weights(torch.float32), strict=True):
        assert key == other_key
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), key
    for quant_config in (QuantConfig(), CONFIGS[name]):
        again = ModelConfig(tmp_path / "engine", quant_config=quant_config, device="cpu", deterministic=True)
        with LLM(again, enable_tokenizer=False) as llm:
            after = llm.generate(PROMPTS, params)
            assert llm.info.description == description
        for one_output, other_output in zip(before, after, strict=True):
            assert one_output.token_ids == other_output.token_ids
            assert one_output.logprobs == other_output.logprobs


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_in_int4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, is_native: bool) -> None:
    if not is_native:
        leave_products_to_torch(monkeypatch)
    make_family(family).save_pretrained(tmp_path)
    check_logits(tmp_path, "int4", is_native)


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
@by_config
def test_families_in_every_format(tmp_path: Path, family: str, name: str) -> None:
    make_family(family).save_pretrained(tmp_path)
    check_logits(tmp_path, name)


@pytest.mark.parametrize(
    "name", ["int4", "w8a8", "fp8", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_deterministic_schedules(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path, num_hidden_layers=1)
    assert check(tmp_path, 3, 5, quant_config=CONFIGS[name])


OWN_ORDERS = QuantizedFiles(gptq(), files.gptq(), {"[qkv]_proj": files.gptq(act_order="own")})
OWN_SCALES = QuantizedFiles(
    compressed("float-quantized", group("float", 8, strategy="tensor", inputs=TENSOR)),
    files.fp8("tensor", input_scale="own"),
)


@pytest.mark.parametrize("stored", [OWN_ORDERS, OWN_SCALES], ids=["orders", "scales"])
def test_the_native_decoder_arranges_activations_for_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: QuantizedFiles
) -> None:
    place, _ = pair(tmp_path, make("qwen2"), stored)
    logprobs, descriptions = [], []
    for is_native in (True, False):
        if not is_native:
            leave_products_to_torch(monkeypatch)
        config = ModelConfig(place, device="cpu", deterministic=True)
        with LLM(config, enable_tokenizer=False) as llm:
            params = SamplingParams(max_new_tokens=1, ignore_eos=True, prompt_logprobs=0)
            found = llm.generate([PROMPTS[0]], params)[0].prompt_logprobs
            descriptions.append(llm.info.description)
        assert found is not None
        logprobs.append(torch.tensor([item.logprob for item in found[1:] if item is not None]))
    assert "native decoder (" in descriptions[0]
    assert "native decoder (" not in descriptions[1]
    assert float((logprobs[0] - logprobs[1]).square().mean().sqrt() / logprobs[1].std()) < 0.1
