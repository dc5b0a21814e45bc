"""With dtype="auto", weights that bfloat16 holds exactly take two bytes, and their products stay those of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmengine import LLM, KvCacheConfig, ModelConfig, QuantConfig, SamplingParams
from llmengine.checkpoints.engine_dir import WEIGHTS_NAME
from tests.backends.helpers import leave_products_to_torch, save_tiny
from tests.models.family_helpers import make_family

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True, prompt_logprobs=1, logprobs=1)
PROMPT = [5 + index * 7 % 90 for index in range(150)]


def load(directory: Path, **settings: object) -> LLM:
    kv_cache = KvCacheConfig(max_bytes=4 << 20)
    config = ModelConfig(directory, device="cpu", num_threads=1, kv_cache_config=kv_cache, **settings)  # type: ignore[arg-type]
    return LLM(config, enable_tokenizer=False)


def found(llm: LLM) -> tuple[list[int], list[float]]:
    output = llm.generate([PROMPT[: llm.info.max_model_len - 10]], PARAMS)[0]
    assert output.prompt_logprobs is not None
    entries = (*output.prompt_logprobs, *output.logprobs)
    return output.token_ids, [entry.logprob for entry in entries if entry is not None]


def save_half(directory: Path, tied: bool = True) -> None:
    model = save_tiny(directory, hidden_size=64, vocab_size=512, tie_word_embeddings=tied)
    model.to(torch.bfloat16).save_pretrained(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_in_bfloat16(tmp_path: Path, tied: bool) -> None:
    save_half(tmp_path / "model", tied)
    with load(tmp_path / "model", dtype="float32") as llm:
        expected, full_bytes = found(llm), llm.info.weight_bytes
        assert "float32 weights" in llm.info.description
    with load(tmp_path / "model") as llm:
        assert "bfloat16 weights in layout native, steps in the native decoder" in llm.info.description
        assert llm.info.weight_bytes == pytest.approx(full_bytes / 2, rel=0.03)
        half = found(llm)
        llm.save(tmp_path / "engine")
    assert half[0] == expected[0]
    assert half[1] == pytest.approx(expected[1], abs=1e-4)
    with load(tmp_path / "engine") as llm:
        assert found(llm) == half
        llm.save(tmp_path / "again")
    assert (tmp_path / "engine" / WEIGHTS_NAME).read_bytes() == (tmp_path / "again" / WEIGHTS_NAME).read_bytes()


def test_a_family_between_torchs_operators(tmp_path: Path) -> None:
    make_family("gemma3").to(torch.bfloat16).save_pretrained(tmp_path)
    with load(tmp_path) as llm, load(tmp_path, dtype="float32") as full:
        assert "bfloat16 weights in layout native, no native decoder" in llm.info.description
        half, expected = found(llm), found(full)
    assert half[1] == pytest.approx(expected[1], abs=1e-4)


def test_other_values_stay_in_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with load(tmp_path) as llm:
        assert ", float32 weights in layout torch, steps" in llm.info.description


def test_without_the_library_weights_are_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_products_to_torch(monkeypatch)
    save_half(tmp_path)
    with load(tmp_path) as llm:
        assert ", float32 weights in layout" in llm.info.description


def test_the_embedding_beside_quantized_weights(tmp_path: Path) -> None:
    save_half(tmp_path)
    quantized = QuantConfig(weights="int8")
    with load(tmp_path, quant_config=quantized) as llm, load(tmp_path, dtype="float32", quant_config=quantized) as full:
        assert full.info.weight_bytes - llm.info.weight_bytes == 512 * 64 * 2
        assert found(llm) == found(full)
