"""KV caches of 8 bits on a CPU: near float32 for every family, and the same however a prompt is cut into steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from llmengine import LLM, KvCacheConfig, ModelConfig, QuantConfig, SamplingParams
from llmengine.backends import load_backend
from llmengine.backends.cpu.backend import CpuBackend
from llmengine.batch import TokenLogprobs
from llmengine.checkpoints.opening import open_model
from llmengine.quant_config import KvQuantization
from tests.backends.helpers import BackendDriver, load_tiny, save_tiny
from tests.models.family_helpers import FAMILIES, make_family

NumberFormat = Literal["int8", "fp8"]
FORMATS: tuple[NumberFormat, ...] = ("int8", "fp8")
DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}
MOST_KL = {"int8": 0.003, "fp8": 0.06}
"""Mean KL divergence in nats from random models with a float32 cache, which react to every rounding."""

TEXT = [3 + index * 7 % 90 for index in range(60)]


def load(directory: Path, kv_cache: KvQuantization, max_bytes: int = 1 << 20) -> CpuBackend:
    config = ModelConfig(
        directory,
        device="cpu",
        quant_config=QuantConfig(kv_cache=kv_cache),
        kv_cache_config=KvCacheConfig(block_size=8, max_bytes=max_bytes),
    )
    backend = load_backend(config.resolve(), open_model(directory))
    assert isinstance(backend, CpuBackend)
    return backend


def scored(backend: CpuBackend, chunks: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after every token of `TEXT`, which is computed in chunks."""
    driver = BackendDriver(backend)
    request = driver.add(1, TEXT)
    logits = [rows.clone() for count in chunks for rows in backend.score(driver.batch((request, count)))]
    return torch.log_softmax(torch.cat(logits), dim=-1)


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_every_family_stays_near_float32_however_a_prompt_is_cut(tmp_path: Path, family: str) -> None:
    if family == "llama":
        save_tiny(tmp_path)
    else:
        make_family(family).save_pretrained(tmp_path)
    exact = scored(load(tmp_path, "none"), [60])
    for kv_cache in FORMATS:
        found = scored(load(tmp_path, kv_cache), [60])
        divergence = float((exact.exp() * (exact - found)).sum(dim=-1).mean())
        assert 0 < divergence < MOST_KL[kv_cache]
        # A step's own tokens are seen as the cache holds them. What differs is the order of sums, and a rounding of a
        # key that lay between two numbers.
        cut = scored(load(tmp_path, kv_cache), [20, 1, 1, 38])
        assert float((cut - found).abs().median()) < 1e-5


@pytest.mark.parametrize("kv_cache", FORMATS)
def test_a_reused_block_keeps_nothing_of_its_former_request(tmp_path: Path, kv_cache: NumberFormat) -> None:
    save_tiny(tmp_path)
    block_bytes = load(tmp_path, kv_cache).info.kv_bytes_per_block
    driver = BackendDriver(load(tmp_path, kv_cache, max_bytes=9 * block_bytes))
    params = SamplingParams(logprobs=5)

    def results(slot: int) -> list[list[TokenLogprobs]]:
        request = driver.add(slot, TEXT, params)
        steps = [driver.step((request, count)).logprobs for count in (50, 10, 1, 1)]
        assert len(request.blocks) == driver.backend.info.num_blocks - 1
        driver.release(request)
        return [step.get(slot, []) for step in steps]

    expected = results(0)
    other = driver.add(2, [index % 300 for index in range(5, 195, 3)])
    driver.step((other, 63))
    driver.release(other)
    assert results(1) == expected


@pytest.mark.parametrize("kv_cache", FORMATS)
def test_what_the_cache_holds_is_told_and_takes_a_third_of_the_memory(tmp_path: Path, kv_cache: NumberFormat) -> None:
    save_tiny(tmp_path)
    exact, found = load_tiny(tmp_path).info, load(tmp_path, kv_cache).info
    assert (exact.kv_dtype, found.kv_dtype) == ("float32", DTYPES[kv_cache])
    # A head has 16 dimensions here; with 64, it is 27 %.
    assert found.kv_bytes_per_block == exact.kv_bytes_per_block * (16 + 4) / (4 * 16)
    assert f"KV cache in {DTYPES[kv_cache]}" in found.description


@pytest.mark.parametrize("kv_cache", FORMATS)
def test_prefixes_are_reused_and_prompts_scored(tmp_path: Path, kv_cache: NumberFormat) -> None:
    save_tiny(tmp_path)
    config = ModelConfig(
        tmp_path,
        quant_config=QuantConfig(kv_cache=kv_cache),
        kv_cache_config=KvCacheConfig(block_size=8, max_bytes=1 << 20),
    )
    params = SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)
    with LLM(config, enable_tokenizer=False) as llm:
        assert llm.info.kv_dtype == DTYPES[kv_cache]
        first, second = (llm.generate([TEXT], params)[0] for _ in range(2))
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 56)
        assert first.token_ids == second.token_ids
        scored = llm.generate([TEXT], SamplingParams(max_new_tokens=1, prompt_logprobs=1))[0]
        assert scored.prompt_logprobs is not None
        assert len(scored.prompt_logprobs) == len(TEXT)
