"""GGUF files on the CUDA backend: blocks stay where kernels multiply them, and give what they stand for."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import LLM
from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny
from tests.models.family_helpers import make_family, write_family_gguf

PROMPT = random.Random(0).choices(range(3, 101), k=9)
STORED = QuantConfig(weights="stored")


def write_small(path: Path, types: Any, family: str = "qwen2", **changes: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    write_family_gguf(path, make_family(family, **{**sizes, **changes}), types)


def load(path: Path, device: str, **settings: Any) -> CudaBackend:
    config = ModelConfig(
        path,
        device="cuda",
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32),
        **settings,
    ).resolve()
    return load_cuda_backend(config, source_in_use(config, open_model(path)), torch.device(device, 0))


def logprobs_of(backend: Any) -> tuple[list[int], list[dict[int, float]]]:
    """Two tokens, and the log-probabilities of the likeliest at each."""
    driver = BackendDriver(backend)
    request = driver.add(1, PROMPT, SamplingParams(logprobs=20))
    entries = [driver.step((request, count)).logprobs[request.slot][0] for count in (len(PROMPT), 1)]
    backend.close()
    return request.output_ids, [dict(zip(entry.top_ids, entry.top_logprobs, strict=True)) for entry in entries]


def mixed(name: str, columns: int) -> str:
    """Types that differ from matrix to matrix, and within those that are fused."""
    types = {"attn_q": "Q8_0", "attn_k": "Q4_1", "attn_v": "F16", "ffn_up": "Q4_0", "token_embd": "Q5_1"}
    return types.get(name.split(".")[-2], "Q8_0")


def like_q4_k_m(name: str, columns: int) -> str:
    """The types of a file of llama.cpp's type Q4_K_M."""
    if columns % 256:
        return "Q8_0"
    return "Q6_K" if name.startswith(("token_embd", "output")) or "attn_v" in name else "Q4_K"


@pytest.mark.parametrize(("family", "types", "hidden_size"), [("qwen2", mixed, 64), ("mistral", like_q4_k_m, 256)])
def test_equals_the_dequantized_weights(tmp_path: Path, device: str, family: str, types: Any, hidden_size: int) -> None:
    """With an embedding that computes the logits as well, and with a matrix of its own for them."""
    path = tmp_path / "model.gguf"
    write_small(path, types, family, hidden_size=hidden_size)
    expected_ids, expected = logprobs_of(load_tiny(path, dtype="float32", native_directory=NO_NATIVE))
    ids, found = logprobs_of(load(path, device, quant_config=STORED, dtype="float32"))
    assert ids == expected_ids
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_blocks_come_back_and_are_named(tmp_path: Path, device: str) -> None:
    path = tmp_path / "model.gguf"
    write_small(path, mixed)
    backend, source = load(path, device), open_model(path)
    assert "gguf-q8_0" in backend.info.description
    assert "dequantized" not in backend.info.description
    for (name, tensor), (wanted_name, wanted) in zip(backend.weights(), source.weights(torch.float16), strict=True):
        assert name == wanted_name
        assert torch.equal(tensor, wanted), name
    backend.close()


def test_a_saved_engine_loads_with_its_blocks(tmp_path: Path, device: str) -> None:
    path, engine = tmp_path / "model.gguf", tmp_path / "engine"
    write_small(path, mixed)
    with LLM(ModelConfig(path, device="cpu", num_threads=1, quant_config=STORED), enable_tokenizer=False) as llm:
        llm.save(engine)
    backend, source = load(engine, device), open_model(path)
    for (name, tensor), (_, wanted) in zip(backend.weights(), source.weights(torch.float32), strict=True):
        assert torch.equal(tensor, wanted), name
    backend.close()


def test_types_without_a_kernel_are_dequantized_beside_the_others(tmp_path: Path, device: str) -> None:
    path = tmp_path / "model.gguf"
    types = {256: lambda name: "TQ1_0" if "attn_v" in name or "token_embd" in name else "Q8_0", 64: lambda _: "Q8_0"}
    write_small(path, lambda name, columns: types[columns](name), hidden_size=256)
    backend = load(path, device)
    text = backend.info.description
    assert "stacked(gguf-q8_0, gguf-q8_0, none)" in text
    assert "gguf-tq1_0 dequantized: no kernel multiplies by them" in text
    backend.close()
    with pytest.raises(ConfigError, match=r"weights in format 'gguf-tq1_0' are not available on CUDA.*embed_tokens"):
        load(path, device, quant_config=STORED)
