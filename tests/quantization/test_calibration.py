"""Calibration from a checkpoint to quantized weights: families, folding, memory, seeds, interruption, messages."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmengine import LLM, ModelConfig, SamplingParams
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.source import ModelSource
from llmengine.engine.worker_threads import PreparationThreads
from llmengine.errors import ConfigError, ModelLoadError
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import finish_logits
from llmengine.quant_config import QuantConfig
from llmengine.quantization.calibration_layer import (
    MATRICES,
    CountedLinear,
    FoldedLayer,
    LayerForward,
    quantized_layer,
)
from llmengine.quantization.calibration_samples import calibration_samples
from llmengine.quantization.calibration_walk import CalibrationWalk
from llmengine.quantization.formats import TensorSpec
from llmengine.quantization.input_statistics import InputStatistics
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import matrix_shapes
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.backends.helpers import save_tiny
from tests.engine.helpers import WAIT_S
from tests.models.arch_helpers import SMALL_ARCH
from tests.models.family_helpers import FAMILIES, make_family

PROMPTS = [[(7 * index + 3 * position) % 98 + 3 for position in range(40)] for index in range(6)]
PRESETS = ("int4-awq", "int4-gptq", "w8a8")


def preset(name: str, **changes: Any) -> QuantConfig:
    """A preset that calibrates on `PROMPTS`."""
    settings = {"calibration_prompts": PROMPTS, "num_calibration_samples": len(PROMPTS), **changes}
    if name.startswith("int4"):
        settings.setdefault("group_size", 16)
    return QuantConfig.preset(name, **settings)  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    save_tiny(tmp_path / "tiny", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    return open_model(tmp_path / "tiny")


def layer_tensors(source: ModelSource, index: int) -> dict[str, torch.Tensor]:
    """Dense tensors of a layer, by their names without the layer's."""
    prefix = f"layers.{index}."
    weights = source.weights(torch.float32)
    return {name.removeprefix(prefix): tensor for name, tensor in weights if name.startswith(prefix)}


def layer_output(arch: ModelArch, index: int, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    linears = {name: CountedLinear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), None) for name in MATRICES}
    vectors = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    return LayerForward(arch, len(x)).bind(index, vectors, linears)(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_pass_the_layers_as_in_transformers(tmp_path: Path, family: str) -> None:
    model = make_family(family)
    model.save_pretrained(tmp_path)
    source = open_model(tmp_path)
    arch, weights = source.arch, dict(source.weights(torch.float32))
    ids = torch.tensor(PROMPTS[0])
    x = weights["embed_tokens.weight"][ids] * arch.embedding_scale
    for index in range(arch.num_layers):
        x = layer_output(arch, index, layer_tensors(source, index), x)
    x = F.rms_norm(x, x.shape[1:], weights["final_norm.weight"], arch.rms_norm_eps)
    logits = x @ weights["embed_tokens.weight" if arch.tie_word_embeddings else "lm_head.weight"].t()
    finish_logits(logits, arch.logit_scale, arch.logit_soft_cap)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_factors_leave_a_layer_as_it_was(tmp_path: Path, family: str) -> None:
    make_family(family).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    arch, tensors = source.arch, layer_tensors(source, 0)
    generator = torch.Generator().manual_seed(0)
    names = ("o", "down") if arch.norm_placement == "post" else MATRICES
    factors = {name: torch.rand(tensors[f"{name}.weight"].shape[1], generator=generator) + 0.2 for name in names}
    heads = factors["o"].view(arch.num_kv_heads, -1, arch.head_dim)
    heads[:] = heads[:, :1].clone()
    x = torch.randn(20, arch.hidden_size, generator=generator)
    layer = FoldedLayer(arch, tensors, factors)
    folded = {**layer.vectors, **{f"{name}.weight": layer.matrix(name) for name in MATRICES}}
    torch.testing.assert_close(
        layer_output(arch, 0, folded, x), layer_output(arch, 0, tensors, x), rtol=1e-3, atol=1e-4
    )
    assert layer.factors.keys() == factors.keys()
    assert all(not torch.equal(folded[f"{name}.weight"], tensors[f"{name}.weight"]) for name in MATRICES)


def test_factors_of_a_rounded_norm_are_exact() -> None:
    """A bfloat16 norm cannot be divided by every factor; the matrix is multiplied by what it was divided by."""
    norm = torch.linspace(0.3, 1.7, SMALL_ARCH.hidden_size).to(torch.bfloat16)
    norm[3] = 0.0
    tensors = {"input_norm.weight": norm, "qkv.weight": torch.randn(8, norm.shape[0])}
    layer = FoldedLayer(SMALL_ARCH, tensors, {"qkv": torch.linspace(0.1, 3.0, norm.shape[0])})
    products = layer.vectors["input_norm.weight"].float() * layer.matrix("qkv")
    torch.testing.assert_close(products, norm.float() * tensors["qkv.weight"], rtol=1e-6, atol=0)
    assert torch.isfinite(layer.factors["qkv"]).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_method(tmp_path: Path, family: str, name: str) -> None:
    make_family(family, num_hidden_layers=2).save_pretrained(tmp_path)
    source, config = open_model(tmp_path), preset(name).resolve()
    quantized = quantized_source(source, config)
    weights = dict(quantized.weights(torch.float32))
    specs = {key: TensorSpec.of(tensor) for key, tensor in weights.items()}
    assert specs == quantized.formats.layout(source.arch, "float32")
    assert list(specs) == list(quantized.formats.layout(source.arch, "float32"))
    assert all(torch.isfinite(tensor.float()).all() for tensor in weights.values())
    needs_scales = source.arch.norm_placement == "post" and name != "int4-gptq"
    assert ("layers.0.qkv.input_scale" in weights) == needs_scales
    assert output_error(source, quantized) < 0.5 * (1 if name.startswith("int4") else 0.2)


def output_error(source: ModelSource, quantized: ModelSource) -> float:
    """Relative error of the hidden states after two layers on a text."""
    arch, shapes = source.arch, matrix_shapes(source.arch)
    weights = dict(quantized.weights(torch.float32))
    found = expected = dict(source.weights(torch.float32))["embed_tokens.weight"][torch.tensor(PROMPTS[1])]
    for index in range(arch.num_layers):
        tensors, prefix = layer_tensors(source, index), f"layers.{index}."
        expected = layer_output(arch, index, tensors, expected)
        for name in tensors:
            if tensors[name].ndim == 1:
                tensors[name] = weights[prefix + name]
        for name in MATRICES:
            own = prefix + name
            format = quantized.formats.of(own)
            parts = {suffix: weights[f"{own}.{suffix}"] for suffix in format.tensors(shapes[own], "float32")}
            tensors[f"{name}.weight"] = Matrix(format, shapes[own], parts).dequantized()
        found = layer_output(arch, index, tensors, found)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "fp8", "activations": "token"},
        {"weights": "fp8", "scales": "block", "activations": "token"},
        {"weights": "fp8", "scales": "tensor"},
        {"weights": "mxfp4"},
        {"weights": "int4", "scales": "channel"},
    ],
    ids=str,
)
def test_gptq_is_better_than_rounding_in_every_format(source: ModelSource, settings: dict[str, Any]) -> None:
    errors = {}
    for method in ("rtn", "gptq"):
        config = QuantConfig(method=method, calibration_prompts=PROMPTS, num_calibration_samples=6, **settings)
        quantized = quantized_source(source, config.resolve())
        specs = {name: TensorSpec.of(tensor) for name, tensor in quantized.weights(torch.float32)}
        assert specs == quantized.formats.layout(source.arch, "float32")
        errors[method] = output_error(source, quantized)
    assert errors["gptq"] < 0.95 * errors["rtn"]


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_smoothed_activations_and_their_scale(activations: Any) -> None:
    """With one scale for all activations, more of their outliers goes to the weights."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(16, 16, generator=generator) for name in MATRICES}
    x = torch.randn(200, 16, generator=generator)
    x[:, 3] *= 100.0
    statistics = InputStatistics(16, with_gram=False)
    statistics.add(x)
    formats = {**dict.fromkeys(MATRICES, INT8), "down": Int8W8A8("channel", activations)}
    layer = quantized_layer(SMALL_ARCH, "smoothquant", formats, tensors, {"down": statistics})
    alpha = 0.5 if activations == "token" else 0.9
    columns = tensors["down.weight"].abs().amax(dim=0)
    factors = x.abs().amax(dim=0) ** alpha / columns ** (1 - alpha)
    expected = Int8W8A8().quantize(tensors["down.weight"] * factors)
    if activations == "tensor":
        expected["activation_scale"] = ((x / factors).abs().max() / 127).view(1)
    assert layer.matrices["down"].keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(layer.matrices["down"][name], tensor, rtol=1e-5, atol=0)


def test_the_same_seed_gives_the_same_weights(source: ModelSource) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        config = preset("int4-awq", num_calibration_samples=3, calibration_seed=seed).resolve()
        return dict(quantized_source(source, config).weights(torch.float32))

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("name", PRESETS)
def test_saved_and_loaded_without_calibration(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path / "tiny", vocab_size=101)
    params = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    config = ModelConfig(tmp_path / "tiny", device="cpu", quant_config=preset(name))
    with LLM(config, enable_tokenizer=False) as llm:
        expected = llm.generate([PROMPTS[0]], params)[0].token_ids
        llm.save(tmp_path / "engine")
    weights = dict(
        quantized_source(open_model(tmp_path / "tiny"), config.resolve().quant_config).weights(torch.float32)
    )
    saved = dict(open_model(tmp_path / "engine").weights(torch.float32))
    assert list(saved) == list(weights)
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    with LLM(ModelConfig(tmp_path / "engine", device="cpu"), enable_tokenizer=False) as llm:
        assert llm.generate([PROMPTS[0]], params)[0].token_ids == expected


def test_skipped_matrices_stay_as_they_are(source: ModelSource) -> None:
    config = preset("int4-awq", skip_layers=["layers.0.*", "layers.1.qkv"]).resolve()
    weights = dict(quantized_source(source, config).weights(torch.float32))
    for name, tensor in layer_tensors(source, 0).items():
        assert torch.equal(weights[f"layers.0.{name}"], tensor)
    dense = layer_tensors(source, 1)
    rows = dense["qkv.weight"].shape[0] - source.arch.num_kv_heads * source.arch.head_dim
    # The rows of v take the factors of o; q and k stay.
    assert torch.equal(weights["layers.1.qkv.weight"][:rows], dense["qkv.weight"][:rows])
    assert torch.equal(weights["layers.1.input_norm.weight"], dense["input_norm.weight"])


def watched(source: ModelSource, alive: weakref.WeakSet[torch.Tensor], most: list[int]) -> ModelSource:
    """`source`, whose dense tensors are counted while they are alive: bytes at each moment that one more is read."""

    def stream(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.stream(dtype):
            if name.startswith("layers."):
                alive.add(tensor)
                most.append(sum(item.nbytes for item in list(alive)))
            yield name, tensor
            del tensor

    return dataclasses.replace(source, stream=stream)


@pytest.mark.parametrize("name", PRESETS)
def test_no_more_than_two_layers_are_in_memory(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path, num_hidden_layers=5)
    source = open_model(tmp_path)
    most: list[int] = []
    for _ in quantized_source(watched(source, weakref.WeakSet(), most), preset(name).resolve()).weights(torch.float32):
        pass
    layer = sum(tensor.nbytes for tensor in layer_tensors(source, 0).values())
    assert max(most) <= 2 * layer


@pytest.mark.parametrize("limit", [1, 3, len(PROMPTS) + 2, len(PROMPTS) + 6])
def test_the_caller_can_end_the_stream_within_a_layer(source: ModelSource, limit: int) -> None:
    """`check` comes for each text and each matrix, so that nobody waits for the rest of a layer."""
    calls = iter(range(limit))

    def check() -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    weights = quantized_source(source, preset("int4-awq").resolve(), check=check).weights(torch.float32)
    assert next(weights)[0] == "embed_tokens.weight"
    with pytest.raises(KeyboardInterrupt):
        next(weights)


def test_an_interruption_ends_the_stream(source: ModelSource) -> None:
    closed: list[str] = []

    def stream(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for name, tensor in source.stream(dtype):
                if name.startswith("layers.1.gate_up"):
                    raise KeyboardInterrupt
                yield name, tensor
        finally:
            closed.append("dense")

    weights = quantized_source(dataclasses.replace(source, stream=stream), preset("int4-awq").resolve())
    with pytest.raises(KeyboardInterrupt):
        dict(weights.weights(torch.float32))
    assert closed == ["dense"]
    unfinished = quantized_source(dataclasses.replace(source, stream=stream), preset("int4-awq").resolve()).stream(
        torch.float32
    )
    next(unfinished)
    unfinished.close()  # type: ignore[attr-defined]
    assert closed == ["dense", "dense"]


def test_a_tokenizer_that_cannot_be_loaded_ends_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than after hours of it."""
    save_tiny(tmp_path)  # without a tokenizer
    begun: list[Future[Any]] = []
    finished: list[None] = []
    call, embed, quantize = PreparationThreads.call, CalibrationWalk.embed, CalibrationWalk.quantize

    def record(threads: PreparationThreads, work: Any) -> Future[Any]:
        begun.append(call(threads, work))
        return begun[-1]

    def embed_late(walk: CalibrationWalk, embedding: torch.Tensor) -> None:
        assert wait(begun, WAIT_S).not_done == set()
        embed(walk, embedding)

    def count(walk: CalibrationWalk, *arguments: Any) -> Any:
        layer = quantize(walk, *arguments)
        finished.append(None)
        return layer

    monkeypatch.setattr(PreparationThreads, "call", record)
    monkeypatch.setattr(CalibrationWalk, "embed", embed_late)
    monkeypatch.setattr(CalibrationWalk, "quantize", count)
    with pytest.raises(ModelLoadError, match="no tokenizer"):
        LLM(ModelConfig(tmp_path, device="cpu", quant_config=preset("w8a8")))
    assert not finished


def test_a_matrix_whose_error_is_far_above_the_others_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_tiny(tmp_path, num_hidden_layers=5)
    with torch.no_grad():
        for layer in model.model.layers[:3] + model.model.layers[4:]:
            layer.mlp.down_proj.weight.copy_(torch.randint(0, 2, layer.mlp.down_proj.weight.shape) * 0.1875)
    model.save_pretrained(tmp_path)
    config = preset("int4-gptq").resolve()
    with caplog.at_level(logging.WARNING, "llmengine.quantization.calibration"):
        for _ in quantized_source(open_model(tmp_path), config).weights(torch.float32):
            pass
    (record,) = caplog.records
    assert "quantizing layers.3.down changes its product by" in record.getMessage()
    assert "skip_layers=['layers.3.down']" in record.getMessage()


class Tokenizer(ByteTokenizer):
    """Bytes, with a chat template that records what it was asked."""

    def __init__(self) -> None:
        self.chats: list[Any] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] * add_special_tokens + super().encode(text)

    def apply_chat_template(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        assert not add_generation_prompt
        self.chats.append(messages)
        return "".join(message["content"] for message in messages)


def test_samples_of_the_package() -> None:
    tokenizer = Tokenizer()
    config = QuantConfig.preset("int4-awq").resolve()
    samples = calibration_samples(config, 258, 2048, lambda: tokenizer)
    assert [len(ids) for ids in samples] == [512] * 128
    assert 64 < sum(ids[0] == 256 and 256 not in ids[1:] for ids in samples) < 128, (
        "texts begin as prompts do, chats as their template says"
    )
    assert len(tokenizer.chats) == 66
    assert samples == calibration_samples(config, 258, 2048, lambda: tokenizer)
    assert {len(ids) for ids in calibration_samples(config, 258, 64, lambda: tokenizer)} == {64}
    plain = calibration_samples(config, 258, 2048, ByteTokenizer)
    assert len(plain) == 128


@pytest.mark.parametrize(
    ("settings", "tokenizer", "message"),
    [
        ({"calibration_prompts": None}, None, "method='awq' calibrates on texts, which needs a tokenizer"),
        ({"calibration_prompts": ["a text"]}, None, "which needs a tokenizer"),
        (
            {"calibration_prompts": ["a text", "b"], "num_calibration_samples": 3},
            ByteTokenizer(),
            "num_calibration_samples=3 exceeds the 2 samples .* that calibration_prompts have; .*=2 or give more",
        ),
        ({"calibration_prompts": None, "num_calibration_samples": 9999}, ByteTokenizer(), "that the package's texts"),
        (
            {"calibration_prompts": [[1, 400]], "num_calibration_samples": 1},
            None,
            r"token id 400, outside the vocabulary \[0, 258\)",
        ),
    ],
)
def test_prompts_that_do_not_do(settings: dict[str, Any], tokenizer: Any, message: str) -> None:
    config = preset("int4-awq", **settings).resolve()
    with pytest.raises(ConfigError, match=message):
        calibration_samples(config, 258, 2048, lambda: tokenizer)


def test_chats_of_the_caller() -> None:
    chats = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]] * 2
    config = preset("int4-awq", calibration_prompts=chats, num_calibration_samples=2).resolve()
    assert calibration_samples(config, 258, 60, Tokenizer) == [[97, 98, 99]] * 2
    with pytest.raises(ConfigError, match="calibration_prompts hold chats, but the tokenizer has no chat template"):
        calibration_samples(config, 258, 60, ByteTokenizer)


def test_long_prompts_are_cut_into_samples() -> None:
    prompts = [list(range(100)), [7] * 10]
    config = preset("int4-awq", calibration_prompts=prompts, num_calibration_samples=3).resolve()
    samples = calibration_samples(config, 258, 60, lambda: None)
    assert sorted(samples, key=lambda ids: (len(ids), ids)) == [[7] * 10, list(range(60, 100)), list(range(60))]
