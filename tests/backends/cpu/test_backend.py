"""The CPU backend against transformers: numerics, chunking, mixed steps, isolation, formats."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import LLM, llm_parts
from llmengine.backends import load_backend
from llmengine.backends.cpu.linear import dense_layouts, padded_tokens
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY
from llmengine.checkpoints.engine_dir import save_engine
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.config import KvCacheConfig, ModelConfig
from llmengine.errors import ConfigError, OutOfMemoryError
from llmengine.models.arch import canonical_shapes
from llmengine.quantization.formats import DENSE
from llmengine.quantization.int8 import INT8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import ModelFormats
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, reference_greedy, reference_logprobs, save_tiny

ALL_LOGPROBS = SamplingParams(logprobs=20)

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "wide_heads": {"head_dim": 22},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    **{f"rope_{name}": {"rope_parameters": rope} for name, rope in ROPES.items()},
}


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 311), k=length)


@pytest.fixture(params=["native", "torch"])
def native_directory(request: pytest.FixtureRequest) -> Path:
    """The directory of the native decoder, if it is built, and one without it."""
    return NATIVE_DIRECTORY if request.param == "native" else NO_NATIVE


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_transformers_in_chunks_and_decodes(tmp_path: Path, native_directory: Path, shape: str) -> None:
    model = save_tiny(tmp_path, **SHAPES[shape])
    driver = BackendDriver(load_tiny(tmp_path, native_directory=native_directory))
    prompt = make_prompt(37)
    request = driver.add(0, prompt, ALL_LOGPROBS)
    logprobs = []
    for num_tokens in (11, 1, 25, *[1] * 12):
        logprobs += driver.step((request, num_tokens)).logprobs.get(request.slot, ())
    assert request.output_ids == reference_greedy(model, prompt, 13)
    expected = reference_logprobs(model, request.token_ids)[36:-1]
    for entry, row in zip(logprobs, expected, strict=True):
        values, ids = row.topk(20)
        assert entry.top_ids == tuple(ids.tolist())
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), values, rtol=0, atol=1e-4)
        assert entry.logprob == entry.top_logprobs[0]


def test_requests_join_in_flight_with_scattered_blocks_and_mixed_steps(tmp_path: Path, native_directory: Path) -> None:
    model = save_tiny(tmp_path)
    driver = BackendDriver(load_tiny(tmp_path, native_directory=native_directory), seed=3)
    prompts = [make_prompt(length, length) for length in (70, 1, 9, 33)]
    first, second, third, fourth = (
        driver.add(slot, prompt) for slot, prompt in zip((5, 0, 7, 2), prompts, strict=True)
    )
    driver.step((first, 30))
    driver.step((second, 1), (first, 30))
    driver.step((first, 10), (second, 1), (third, 9))
    driver.step((fourth, 20), (third, 1), (second, 1), (first, 1))
    driver.step((first, 1), (second, 1), (third, 1), (fourth, 13))
    outputs = driver.generate((first, second, third, fourth), 10)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == reference_greedy(model, prompt, 10)


def test_decodes_of_very_different_lengths_share_a_step(tmp_path: Path, native_directory: Path) -> None:
    model = save_tiny(tmp_path)
    driver = BackendDriver(load_tiny(tmp_path, block_size=4, native_directory=native_directory))
    prompts = [make_prompt(length, length) for length in (2, 200, 17, 60, 3)]
    requests = [driver.add(slot, prompt) for slot, prompt in enumerate(prompts)]
    for request in requests:
        driver.step((request, len(request.token_ids)))
    outputs = driver.generate(requests, 6)
    assert outputs == [reference_greedy(model, prompt, 6) for prompt in prompts]


def test_a_resumed_request_recomputes_and_goes_on(tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    driver = BackendDriver(load_tiny(tmp_path))
    prompt = make_prompt(20)
    request = driver.add(1, prompt)
    driver.generate([request], 5)
    driver.release(request)
    request.num_computed_tokens, request.started = 0, False
    driver.step((request, 15))
    driver.step((request, 10))
    assert driver.generate([request], 9) == [reference_greedy(model, prompt, 9)]


def test_non_finite_logits_fail_their_row_alone_and_leave_nothing_behind(
    tmp_path: Path, native_directory: Path
) -> None:
    model = save_tiny(tmp_path)
    poison = 300
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan
    model.save_pretrained(tmp_path)
    for quant in ("none", "int8"):
        driver = BackendDriver(load_tiny(tmp_path, quant=quant, native_directory=native_directory))
        alone = driver.add(0, make_prompt(20, 4))
        wanted = driver.generate([alone], 8)[0]
        driver.release(alone)
        good, bad = driver.add(0, make_prompt(20, 4)), driver.add(1, [*make_prompt(12, 5), poison, 7])
        result = driver.step((good, 20), (bad, 14))
        assert list(result.token_ids) == [0]
        assert list(result.errors) == [1]
        assert "position 14" in result.errors[1]
        driver.release(bad)
        late = driver.add(2, make_prompt(20, 4))
        assert driver.generate([good, late], 8) == [wanted, wanted]


def test_int8_is_close_and_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, attention_bias=True)
    driver = BackendDriver(load_tiny(tmp_path, quant="int8"))
    assert "int8" in driver.backend.info.description
    prompt = make_prompt(40)
    request = driver.add(0, prompt, ALL_LOGPROBS)
    entry = driver.step((request, 40)).logprobs[0][0]
    expected = reference_logprobs(model, prompt)[-1]
    found = torch.tensor(entry.top_logprobs)
    # Two layers of random weights, which damp nothing: a tenth of the logits' spread.
    error = (found - expected[list(entry.top_ids)]).square().mean().sqrt()
    assert float(error) < 0.1 * float(expected.std())
    alone = driver.add(1, prompt, ALL_LOGPROBS)
    others = [driver.add(slot, make_prompt(30, slot)) for slot in (2, 3)]
    parts = [(others[0], 30), (alone, 40), (others[1], 30)]
    assert driver.step(*parts).logprobs[1][0] == entry


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_exactly(tmp_path: Path, native_directory: Path, tied: bool) -> None:
    save_tiny(tmp_path, attention_bias=True, tie_word_embeddings=tied)
    source = open_model(tmp_path)
    expected = dict(source.weights(torch.float32))
    found = dict(load_tiny(tmp_path, native_directory=native_directory).weights())
    assert list(found) == list(canonical_shapes(source.arch))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_int8_weights_come_back_as_int8_with_scales(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    weights = dict(load_tiny(tmp_path, quant="int8").weights())
    dense = dict(open_model(tmp_path).weights(torch.float32))
    scale = weights["layers.1.gate_up.weight_scale"]
    values = weights["layers.1.gate_up.weight"]
    assert values.dtype == torch.int8
    assert int(values.abs().max()) == 127
    restored = values.float() * scale[:, None]
    assert float((restored - dense["layers.1.gate_up.weight"]).abs().max()) <= 0.51 * float(scale.max())
    assert weights["embed_tokens.weight"].dtype == torch.float32


def test_a_saved_int8_engine_gives_the_same_tokens(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", attention_bias=True)
    backend = load_tiny(tmp_path / "model", quant="int8")
    source = open_model(tmp_path / "model")
    save_engine(
        tmp_path / "engine",
        arch=source.arch,
        weights=backend.weights(),
        dtype="float32",
        formats=ModelFormats(INT8),
        generation_config={},
        eos_token_ids=[2],
        bos_token_id=1,
        tokenizer_files={},
    )
    entries = []
    for again in (backend, load_tiny(tmp_path / "engine"), load_tiny(tmp_path / "engine", quant="int8")):
        driver = BackendDriver(again)
        request = driver.add(0, make_prompt(30), ALL_LOGPROBS)
        entries.append([driver.step((request, count)).logprobs[0][0] for count in (30, 1, 1, 1)])
    assert entries[0] == entries[1] == entries[2]


def test_matrices_of_different_formats_run_side_by_side(tmp_path: Path, native_directory: Path) -> None:
    save_tiny(tmp_path / "model")
    source = open_model(tmp_path / "model")
    formats = ModelFormats(INT8, {"layers.1.down": DENSE, "lm_head": DENSE})
    quantized = dict(load_tiny(tmp_path / "model", quant="int8").weights())
    dense = dict(source.weights(torch.float32))
    weights = {name: quantized.get(name, dense.get(name)) for name in formats.layout(source.arch, "float32")}
    weights |= {name: dense[name] for name in ("layers.1.down.weight", "lm_head.weight")}
    save_engine(
        tmp_path / "engine",
        arch=source.arch,
        weights=[(name, tensor) for name, tensor in weights.items() if tensor is not None],
        dtype="float32",
        formats=formats,
        generation_config={},
        eos_token_ids=[2],
        bos_token_id=1,
        tokenizer_files={},
    )
    entries = []
    for quant in ("none", "int8"):
        backend = load_tiny(tmp_path / "engine", quant=quant, native_directory=native_directory)
        found = dict(backend.weights())
        assert list(found) == list(weights)
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items() if tensor is not None)
        driver = BackendDriver(backend)
        request = driver.add(0, make_prompt(30), ALL_LOGPROBS)
        entries.append(driver.step((request, 30)).logprobs[0][0])
    assert entries[0] == entries[1], "matrices that are dense by name stay so"
    driver = BackendDriver(load_tiny(tmp_path / "model", native_directory=native_directory))
    exact = driver.step((driver.add(0, make_prompt(30), ALL_LOGPROBS), 30)).logprobs[0][0]
    near = dict(zip(entries[0].top_ids, entries[0].top_logprobs, strict=True))
    pairs = zip(exact.top_ids, exact.top_logprobs, strict=True)
    errors = [abs(near[token] - value) for token, value in pairs if token in near]
    assert len(errors) > len(near) // 2
    assert 0 < max(errors) < 0.2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_stay_near(tmp_path: Path, dtype: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = save_tiny(tmp_path)
    with caplog.at_level(logging.WARNING):
        driver = BackendDriver(load_tiny(tmp_path, dtype=dtype))
    prompt = make_prompt(20)
    entry = driver.step((driver.add(0, prompt, ALL_LOGPROBS), 20)).logprobs[0][0]
    expected = reference_logprobs(model, prompt)[-1]
    assert float((torch.tensor(entry.top_logprobs) - expected[list(entry.top_ids)]).abs().max()) < 0.2


def test_the_kv_cache_is_sized_by_memory_and_by_use(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    info = load_tiny(tmp_path, max_batch_size=2).info
    assert info.num_blocks == 2 * 256 // 8 + 1
    assert info.kv_bytes_per_block == 2 * 4 * 2 * 2 * 16 * 8
    assert (info.max_model_len, info.vocab_size) == (256, 311)
    assert load_tiny(tmp_path, max_model_len=100).info.max_model_len == 100
    source = open_model(tmp_path)
    small = KvCacheConfig(block_size=8, max_bytes=10 * info.kv_bytes_per_block)
    config = ModelConfig(model_dir=tmp_path, device="cpu", kv_cache_config=small)
    backend = load_backend(config.resolve(), source)
    assert (backend.info.num_blocks, backend.info.max_model_len) == (10, 72)
    backend.close()
    backend.close()
    small.max_bytes = 4 * info.kv_bytes_per_block
    with pytest.raises(OutOfMemoryError, match=r"KV cache.*kv_cache_config\.max_bytes"):
        load_backend(config.resolve(), source)


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_a_scaled_rope_serves_the_length_it_is_stretched_to(tmp_path: Path, rope: str) -> None:
    """Qwen extends contexts so: `rope_scaling` is added, and `max_position_embeddings` stays."""
    model = save_tiny(tmp_path, max_position_embeddings=64, rope_parameters=ROPES[rope])
    assert load_tiny(tmp_path).info.max_model_len == 64
    driver = BackendDriver(load_tiny(tmp_path, max_model_len=256))
    prompt = make_prompt(200)
    assert driver.generate([driver.add(0, prompt)], 6) == [reference_greedy(model, prompt, 6)]
    with pytest.raises(ConfigError, match="max_position_embeddings=64 and above the 256"):
        load_tiny(tmp_path, max_model_len=257)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cpu", "backend": "tensorrt"}, "needs a CUDA device"),
        ({"device": "cuda:99"}, "finds [0-9]+ CUDA devices"),
        ({"quant": "int4-gptq"}, "quant_config.method='gptq' calibrates on texts, which needs a tokenizer"),
        ({"max_model_len": 257}, "max_position_embeddings=256"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_tiny(tmp_path)
    config = ModelConfig(tmp_path, **{"device": "cpu", **settings}).resolve()
    with pytest.raises(ConfigError, match=message):
        load_backend(config, quantized_source(open_model(tmp_path), config.quant_config))


def test_linears_see_few_different_numbers_of_rows() -> None:
    sizes = {num_tokens: padded_tokens(num_tokens) for num_tokens in range(1, 4097)}
    assert all(num_tokens <= size <= max(16, 1.18 * num_tokens) for num_tokens, size in sizes.items())
    assert len(set(sizes.values())) < 100
    weight = torch.randn(24, 12)
    for linear in (item.pack(Matrix.dense(weight), None) for item in dense_layouts(torch.float32)):
        x, residual = torch.randn(37, 12), torch.randn(37, 24)
        torch.testing.assert_close(linear(x, residual.clone()), x @ weight.T + residual)


def test_the_garbage_collection_that_imports_made_due_comes_while_the_first_model_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    llm_parts._collect_garbage_once.cache_clear()
    collected: list[int] = []
    monkeypatch.setattr(llm_parts.gc, "collect", lambda: collected.append(1))
    for _ in range(2):
        LLM(tmp_path, enable_tokenizer=False).close()
    assert len(collected) == 1

    llm_parts._collect_garbage_once.cache_clear()
    monkeypatch.setattr(llm_parts.gc, "isenabled", lambda: False)
    LLM(tmp_path, enable_tokenizer=False).close()
    assert len(collected) == 1, "a program that collects no garbage is left alone"
