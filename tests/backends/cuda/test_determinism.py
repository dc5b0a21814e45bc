"""`ModelConfig(deterministic=True)` on CUDA: results do not depend on the schedule, to the last bit.

On the GPU whole engines serve random schedules; through the interpreter a few steps are compared.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmengine import LLM, KvCacheConfig, ModelConfig, QuantConfig, SamplingParams, SchedulerConfig
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.backends.kv_layout import joint_kv_layout
from llmengine.batch import TokenLogprobs
from llmengine.checkpoints.opening import open_model
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_prefill import PrefillLaunch, prefill_attention, query_block_size
from llmengine.kernels.gemm_config import GemmShape, fixed_config
from llmengine.kernels.limits import max_shared_bytes
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.quant_config import KvQuantization
from tests.backends.cuda.helpers import load_cuda
from tests.backends.determinism_helpers import check_schedules
from tests.backends.helpers import BackendDriver, DrivenRequest, save_tiny
from tests.kernels.test_paged_attention import kv_blocks, make_case
from tests.models.family_helpers import make_family

SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
PROMPT = random.Random(0).choices(range(3, 101), k=9)
PARAMS = SamplingParams(logprobs=2, prompt_logprobs=3)


@pytest.fixture(autouse=True)
def products_by_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute products row by row in the interpreter: numpy adds rows up by their place, a GPU all alike."""
    if device == "cpu":
        monkeypatch.setattr(np, "matmul", partial(np.einsum, "mk,kn->mn"))


def take(driver: BackendDriver, request: DrivenRequest, *parts: tuple[DrivenRequest, int]) -> list[TokenLogprobs]:
    """Run a step and return all log-probabilities of one request."""
    result = driver.step(*parts)
    slot = request.slot
    return [*result.prompt_logprobs.get(slot, ()), *result.logprobs.get(slot, ())]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "olmo2", "smollm3_window"])
def test_chunks_mates_and_preemption(tmp_path: Path, device: str, family: str) -> None:
    if device == "cpu" and family not in ("llama", "gemma3"):
        pytest.skip("on a GPU only")
    if family == "llama":
        save_tiny(tmp_path, **SMALL)
    else:
        make_family(family, num_hidden_layers=2).save_pretrained(tmp_path)
    dtype = "float32" if device == "cpu" else "bfloat16"
    backend = load_cuda(tmp_path, device, max_tokens_per_step=10, deterministic=True, dtype=dtype)
    assert "deterministic" in backend.info.description
    driver = BackendDriver(backend)
    alone = driver.add(0, PROMPT, PARAMS)
    expected = [entry for count in (9, 1) for entry in take(driver, alone, (alone, count))]
    assert len(expected) == 10
    mate = driver.add(1, PROMPT[::-1] * 3)
    again = driver.add(3, PROMPT, PARAMS)
    driver.step((again, 3), (mate, 7))
    driver.release(again)
    again.num_computed_tokens, again.started = 0, False
    found = [*take(driver, again, (again, 4), (mate, 5)), *take(driver, again, (mate, 1), (again, 1))]
    found += [*take(driver, again, (mate, 2), (again, 4)), *take(driver, again, (again, 1), (mate, 1))]
    assert found == expected
    assert again.output_ids == alone.output_ids
    backend.close()


@pytest.mark.parametrize("operation", ["norm_linear", "linear_add", "norm_linear_silu"])
def test_products_of_any_number_of_rows_are_those_of_each_row(device: str, operation: Any) -> None:
    dtype = torch.float16 if device == "cpu" else torch.bfloat16
    rows, n, k = (70, 70, 136) if device == "cpu" else (517, 1096, 4104)
    kernels = LinearKernels(device)
    x, residual = (torch.randn(rows, size, device=device).to(dtype) for size in (k, n))
    weight = (torch.randn(2 * n if operation == "norm_linear_silu" else n, k, device=device) / k**0.5).to(dtype)
    norm_weight = torch.rand(k, device=device).to(dtype)

    def product(part: slice) -> torch.Tensor:
        shape = GemmShape(operation, part.stop - part.start, n, k, dtype, dtype)
        config = fixed_config(shape, max_shared_bytes(torch.device(device)))
        if operation == "linear_add":
            out = residual[part].clone()
            kernels.linear_add(x[part], weight, None, out, config)
        else:
            out = torch.empty_like(residual[part])
            getattr(kernels, operation)(x[part], norm_weight, 1e-5, weight, None, out, config)
        return out

    full = product(slice(0, rows))
    reference = linear_reference(
        operation,
        x,
        None if operation == "linear_add" else norm_weight,
        1e-5,
        weight,
        None,
        residual if operation == "linear_add" else None,
    )
    torch.testing.assert_close(full.float(), reference, rtol=0.02, atol=0.02)
    for part in (slice(0, 1), slice(rows - 3, rows), slice(1, 66), slice(64, 70)):
        assert torch.equal(product(part), full[part])


@pytest.mark.parametrize(("window", "kv_dtype"), [(0, None), (20, None), (20, torch.int8), (20, torch.float8_e4m3fn)])
def test_attention_is_the_same_however_a_row_is_cut(device: str, window: int, kv_dtype: torch.dtype | None) -> None:
    """Also where a window begins within a tile, and where earlier queries have tiles that the last ones do not have."""
    small = device == "cpu"
    config = AttentionConfig(4, 2, 16 if small else 128, sliding_window=window)
    launch = PrefillLaunch(rows=16, tile=16, num_warps=4, num_stages=1) if small else None
    size = 8 if small else query_block_size(config, torch.bfloat16)
    length, num_tokens = (61, 22) if small else (1000, 300)
    dtype = torch.float32 if small else torch.bfloat16
    case = make_case(config, [], [(length, num_tokens)], device, dtype)
    case = replace(case, kv=kv_blocks(torch.randn(case.kv.numbers.shape, device=device), kv_dtype or dtype))

    def attend(begin: int, end: int) -> torch.Tensor:
        starts = range(0, end - begin, size)
        used = {
            "counts": [end - begin, 1, 0, len(starts), 0, 0, 0, 0],
            "row_starts": [0, end - begin],
            "context_lens": [length - num_tokens + end],
            "query_block_rows": [0] * len(starts),
            "query_block_starts": starts,
        }
        arrays = {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in used.items()}
        out = torch.empty_like(case.out[begin:end])
        prefill_attention(replace(case.step, **arrays), case.qkv[begin:end], case.kv, config, out, launch=launch)
        return out

    whole = attend(0, num_tokens)
    for begin, end in ((0, 7), (7, 8), (8, num_tokens), (num_tokens - 1, num_tokens)):
        assert torch.equal(attend(begin, end), whole[begin:end])


LONG = [3 + index * 7919 % 998 for index in range(400)]
PROMPTS = [
    [7],
    [9, 8, 7, 6],
    LONG[:130],
    [*LONG[:96], 3, 4, 5],
    LONG[:390],
    [*LONG[:200], 90, 91, 92, *LONG[100:190]],
    LONG[50:215],
    [*LONG[:64], 41],
]
"""On the GPU; most begin alike."""


GPU_SHAPE = {
    "vocab_size": 1001,
    "hidden_size": 512,
    "intermediate_size": 1088,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}


def open_llm(directory: Path, rng: random.Random | None, kv_cache: KvQuantization = "none", **settings: Any) -> LLM:
    """Return an LLM on the GPU; see `determinism_helpers.OpenLLM`."""
    batch_size = rng.choice((2, 3, 8, 70)) if rng else 1
    mixed = max(batch_size, rng.choice((8, 33, 100, 256)) if rng else 512)
    step = max(mixed, rng.choice((16, 64, 200, 512)) if rng else 512)
    num_blocks = rng.choice((29, 34, 80)) if rng else 80
    source = open_model(directory)
    layout = joint_kv_layout(source.arch, 16, torch.bfloat16 if kv_cache == "none" else torch.int8)
    config = ModelConfig(
        directory,
        quant_config=QuantConfig(kv_cache=kv_cache),
        scheduler_config=SchedulerConfig(
            max_batch_size=batch_size, max_tokens_per_mixed_step=mixed, max_tokens_per_step=step
        ),
        kv_cache_config=KvCacheConfig(
            block_size=16, max_bytes=num_blocks * layout.bytes_per_block, enable_prefix_caching=rng is not None
        ),
        **{"deterministic": True, "dtype": "bfloat16", "tuning_budget_s": 0.0, **settings},
    )
    return LLM.from_backend(
        lambda: load_cuda_backend(config.resolve(accelerator=True), source, torch.device("cuda", 0)),
        scheduler_config=config.scheduler_config,
        kv_cache_config=config.kv_cache_config,
    )


@pytest.mark.parametrize(
    ("family", "num_engines", "kv_cache"),
    [("llama", 6, "none"), ("gemma3", 2, "none"), ("olmo2", 2, "none"), ("llama", 2, "int8"), ("llama", 2, "fp8")],
)
def test_random_schedules_of_whole_engines(
    tmp_path: Path, device: str, family: str, num_engines: int, kv_cache: KvQuantization
) -> None:
    if device == "cpu":
        pytest.skip("on a GPU only")
    if family == "llama":
        save_tiny(tmp_path, **GPU_SHAPE)
    else:
        sizes = {"vocab_size": 1001, "hidden_size": 256, "max_position_embeddings": 512}
        make_family(family, **sizes).save_pretrained(tmp_path)
    equal, cached, preemptions = check_schedules(
        partial(open_llm, tmp_path, kv_cache=kv_cache), PROMPTS, num_engines, 25
    )
    assert cached > 0
    assert preemptions > 0
    assert equal


def test_without_it_schedules_differ(tmp_path: Path, device: str) -> None:
    """Otherwise the test above would prove nothing."""
    if device == "cpu":
        pytest.skip("on a GPU only")
    save_tiny(tmp_path, **GPU_SHAPE)
    assert not check_schedules(partial(open_llm, tmp_path, deterministic=False), PROMPTS, 2, 10)[0]
