"""Every model family against transformers: logits, tokens, chunks, windows, prefix hits; safetensors and GGUF."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from llmengine import LLM, KvCacheConfig, ModelConfig, SamplingParams
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY
from llmengine.checkpoints.arch_json import arch_to_dict
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.errors import UnsupportedModelError
from llmengine.models import doc
from llmengine.quantization.model_formats import DENSE_MODEL
from tests import ROOT
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, reference_greedy, reference_logprobs
from tests.models.family_helpers import FAMILIES, make_family, write_family_gguf

MODELS_PAGE = ROOT / "docs" / "models.md"
ALL_LOGPROBS = SamplingParams(logprobs=20)
NATIVE = ("qwen2", "phi3_short", "phi3_long")
"""Families that the native decoder computes."""


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 101), k=length)


def assert_equals_transformers(model: Any, path: Path, native_directory: Path) -> None:
    """Compare logits and tokens over a prompt in chunks and decodes; blocks and chunks cross the windows."""
    driver = BackendDriver(load_tiny(path, block_size=4, dtype="float32", native_directory=native_directory))
    prompt = make_prompt(29)
    request = driver.add(0, prompt, ALL_LOGPROBS)
    logprobs = []
    for num_tokens in (11, 1, 17, 1, 1, 1, 1, 1):
        logprobs += driver.step((request, num_tokens)).logprobs.get(request.slot, ())
    assert request.output_ids == reference_greedy(model, prompt, 6)
    expected = reference_logprobs(model, request.token_ids)[28:-1]
    for entry, row in zip(logprobs, expected, strict=True):
        values, ids = row.topk(20)
        assert entry.top_ids == tuple(ids.tolist())
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_in_chunks_and_decodes(tmp_path: Path, family: str) -> None:
    model = make_family(family)
    model.save_pretrained(tmp_path)
    assert_equals_transformers(model, tmp_path, NO_NATIVE)
    if family in NATIVE:
        assert_equals_transformers(model, tmp_path, NATIVE_DIRECTORY)


@pytest.mark.parametrize("family", ["mistral", "qwen2_window", "gemma2", "gemma3", "smollm3_window", "olmo2"])
def test_requests_of_different_lengths_share_steps(tmp_path: Path, family: str) -> None:
    model = make_family(family)
    model.save_pretrained(tmp_path)
    driver = BackendDriver(load_tiny(tmp_path, block_size=4, native_directory=NO_NATIVE), seed=3)
    prompts = [make_prompt(length, length) for length in (40, 1, 9, 23)]
    first, second, third, fourth = (
        driver.add(slot, prompt) for slot, prompt in zip((5, 0, 7, 2), prompts, strict=True)
    )
    driver.step((first, 30))
    driver.step((second, 1), (first, 5))
    driver.step((first, 5), (second, 1), (third, 9))
    driver.step((fourth, 20), (third, 1), (second, 1), (first, 1))
    driver.step((first, 1), (second, 1), (third, 1), (fourth, 3))
    outputs = driver.generate((first, second, third, fourth), 8)
    assert outputs == [reference_greedy(model, prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith(("window", "short"))])
def test_prefix_hits_change_nothing(tmp_path: Path, family: str) -> None:
    model = make_family(family)
    model.save_pretrained(tmp_path)
    shared = make_prompt(20)
    prompts = [shared + make_prompt(length, length) for length in (3, 9)]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    config = ModelConfig(tmp_path, kv_cache_config=KvCacheConfig(block_size=4, max_bytes=1 << 20))
    with LLM(config, enable_tokenizer=False) as llm:
        outputs = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert [output.token_ids for output in outputs] == [reference_greedy(model, prompt, 6) for prompt in prompts]
    assert outputs[1].num_cached_tokens == 20


GGUF_FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("qwen2", "qwen3", "phi3", "phi3_short", "phi3_long", "granite", "smollm3", "olmo2")},
    # What the format has no key for is what llama.cpp takes.
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 6},
}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_gguf_gives_the_same_model(tmp_path: Path, family: str) -> None:
    model = make_family(family, **GGUF_FAMILIES[family])
    model.save_pretrained(tmp_path / "model")
    write_family_gguf(tmp_path / "model.gguf", model)
    expected, found = open_model(tmp_path / "model"), open_model(tmp_path / "model.gguf")
    assert_close({**arch_to_dict(expected.arch), "architecture": found.arch.architecture}, arch_to_dict(found.arch))
    for (name, one), (_, other) in zip(found.weights(torch.float32), expected.weights(torch.float32), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)


def assert_close(one: Any, other: Any) -> None:
    """Compare nested data; GGUF stores numbers as float32."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for item, counterpart in zip(one, other, strict=True):
            assert_close(item, counterpart)
    else:
        assert one == (pytest.approx(other, rel=1e-6) if isinstance(other, float) else other)


@pytest.mark.parametrize(("layers", "scale"), [(46, (64 / 4) ** -0.5), (45, None)])
def test_gguf_scale_of_gemmas_largest_model(tmp_path: Path, layers: int, scale: float | None) -> None:
    model = make_family("gemma2", num_hidden_layers=layers, head_dim=8, intermediate_size=8)
    write_family_gguf(tmp_path / "model.gguf", model)
    assert open_model(tmp_path / "model.gguf").arch.attention_scale == scale


def test_gguf_windows_of_other_families_are_refused(tmp_path: Path) -> None:
    model = make_family("olmo2")
    write_family_gguf(tmp_path / "model.gguf", model, sliding_window=16)
    with pytest.raises(UnsupportedModelError, match=r"olmo2\.attention\.sliding_window=16.*Olmo2ForCausalLM"):
        open_model(tmp_path / "model.gguf")


@pytest.mark.parametrize("matrix_type", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_gguf_fused_and_quantized(tmp_path: Path, matrix_type: str) -> None:
    model = make_family("phi3_short", intermediate_size=64)
    write_family_gguf(tmp_path / "model.gguf", model, matrix_type)
    kind = gguf.GGMLQuantizationType[matrix_type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                packed = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()))
    assert_equals_transformers(model, tmp_path / "model.gguf", NATIVE_DIRECTORY)


@pytest.mark.parametrize("family", ["gemma3", "phi3_short"])
def test_saved_engines_and_pickles_hold_the_same_weights(tmp_path: Path, family: str) -> None:
    model = make_family(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    source = open_model(tmp_path / "model")
    weights = list(source.weights(torch.bfloat16))
    norm_dtype = torch.float32 if family == "gemma3" else torch.bfloat16
    assert all(tensor.dtype == norm_dtype for name, tensor in weights if name.endswith("norm.weight"))
    save_model(tmp_path / "engine", source, iter(weights), dtype="bfloat16", formats=DENSE_MODEL, tokenizer=None)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    for path in (tmp_path / "engine", tmp_path / "model"):
        again = open_model(path)
        assert again.arch == source.arch
        for (name, one), (_, other) in zip(weights, again.weights(torch.bfloat16), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name


def test_int8_serves_families_without_the_native_decoder(tmp_path: Path) -> None:
    model = make_family("gemma3", hidden_size=64)
    model.save_pretrained(tmp_path)
    prompt = make_prompt(29)
    driver = BackendDriver(load_tiny(tmp_path, quant="int8", block_size=4))
    entry = driver.step((driver.add(0, prompt, ALL_LOGPROBS), 29)).logprobs[0][0]
    expected = reference_logprobs(model, prompt)[-1]
    error = (torch.tensor(entry.top_logprobs) - expected[list(entry.top_ids)]).square().mean().sqrt()
    assert float(error) < 0.2 * float(expected.std())


def test_the_page_of_models_is_current() -> None:
    assert MODELS_PAGE.read_text(encoding="utf-8") == doc.page(), "python -m llmengine.models.doc > docs/models.md"
