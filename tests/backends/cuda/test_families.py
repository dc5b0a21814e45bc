"""Model families on the CUDA backend against transformers: on a GPU, or through Triton's interpreter on a CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.batch import TokenLogprobs
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs
from tests.models.family_helpers import FAMILIES, make_family

IN_INTERPRETER = ("gemma2", "gemma3", "qwen3", "granite", "smollm3_window", "olmo2")
"""Each is seconds there; they have what differs on a device once. On a GPU all are run."""

PROMPT = random.Random(0).choices(range(3, 101), k=13)


def run(directory: Path, device: str, dtype: Any, prompt: list[int] = PROMPT) -> tuple[list[int], list[TokenLogprobs]]:
    """Run the prompt in two chunks; return it with two greedy tokens, and the logprobs of those tokens."""
    config = ModelConfig(
        directory,
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32),
        dtype=dtype,
    ).resolve()
    backend = load_cuda_backend(config, open_model(directory), torch.device(device, 0))
    driver = BackendDriver(backend)
    request = driver.add(1, prompt, SamplingParams(logprobs=20))
    logprobs = [
        entry
        for count in (7, len(prompt) - 7, 1)
        for entry in driver.step((request, count)).logprobs.get(request.slot, ())
    ]
    backend.close()
    return request.token_ids, logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_in_chunks_and_decodes(tmp_path: Path, device: str, family: str) -> None:
    if device == "cpu" and family not in IN_INTERPRETER:
        pytest.skip("on a GPU only")
    model = make_family(family, num_hidden_layers=4 if family == "smollm3" else 2)
    model.save_pretrained(tmp_path)
    # transformers takes the long factors from the original context length on, which is 20 tokens here.
    prompt = PROMPT * 2 if family == "phi3_long" else PROMPT
    token_ids, logprobs = run(tmp_path, device, "float32", prompt)
    assert token_ids[len(prompt) :] == reference_greedy(model, prompt, 2)
    for entry, row in zip(logprobs, reference_logprobs(model, token_ids)[len(prompt) - 1 : -1], strict=True):
        values, ids = row.topk(20)
        assert entry.top_ids == tuple(ids.tolist())
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "olmo2", "qwen3"])
def test_half_precision_rounds_no_more_than_transformers(tmp_path: Path, device: str, family: str) -> None:
    if device == "cpu" and family != "gemma3":
        pytest.skip("on a GPU only")
    model = make_family(family, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    token_ids, logprobs = run(tmp_path, device, str(dtype).removeprefix("torch."))
    exact = reference_logprobs(model, token_ids)[12:-1]
    theirs = (reference_logprobs(model.to(dtype), token_ids)[12:-1] - exact).abs().mean()
    rows = zip(logprobs, exact, strict=True)
    ours = torch.stack([torch.tensor(entry.top_logprobs) - row[list(entry.top_ids)] for entry, row in rows])
    assert float(ours.abs().mean()) < 2 * float(theirs)
