"""Tensor parallelism on GPUs through the public face; skipped where there are fewer than two."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from llmengine import LLM, EngineDeadError, ModelConfig, ParallelConfig, QuantConfig, SamplingParams
from llmengine.cli.demo import find_demo_model
from llmengine.config import KvCacheConfig

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
PROMPTS = ["The capital of France is", "To tell a story, one must", "def add(a, b):"]
GREEDY = SamplingParams(max_new_tokens=32, temperature=0.0, ignore_eos=True)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]


def load(tp_size: int, model: Path | None = None, dtype: str = "float32", **options: object) -> LLM:
    config = ModelConfig(
        model or find_demo_model(),
        device="cuda",
        dtype=dtype,  # type: ignore[arg-type]
        tuning_budget_s=0.0,
        parallel_config=ParallelConfig(tp_size=tp_size),
        kv_cache_config=KvCacheConfig(max_bytes=1 << 28),
        **options,  # type: ignore[arg-type]
    )
    return LLM(config)


def texts(llm: LLM) -> list[str]:
    return [output.text for output in llm.generate(PROMPTS, GREEDY)]


def free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(index)[0] for index in range(NUM_GPUS)]


def sizes() -> list[int]:
    return [size for size in (2, 3, 4) if size <= NUM_GPUS]


@pytest.mark.parametrize("tp_size", sizes())
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_text_as_one_gpu(tp_size: int, deterministic: bool) -> None:
    said = []
    for size in (1, tp_size):
        with load(size, deterministic=deterministic) as llm:
            said.append(texts(llm))
            assert texts(llm) == said[-1]  # from graphs, which were captured meanwhile
    assert said[0] == said[1]


@pytest.mark.parametrize("preset", ["int4-rtn", "int8", "fp8"])
def test_quantized_models_are_saved_whole(preset: str, tmp_path: Path) -> None:
    quant = QuantConfig.preset(preset, group_size=64) if preset == "int4-rtn" else QuantConfig(weights=preset)
    with load(2, dtype="bfloat16", quant_config=quant) as llm:
        said = texts(llm)
        llm.save(tmp_path / "engine")
    with load(2, tmp_path / "engine", dtype="auto") as llm:
        assert texts(llm) == said
    with load(1, tmp_path / "engine", dtype="auto") as llm:
        assert all(texts(llm))


def test_close_gives_all_memory_back() -> None:
    load(2).close()  # what the first use of CUDA takes in this process stays
    before = free_bytes()
    llm = load(2)
    assert sum(free_bytes()) < sum(before)
    llm.close()
    assert all(now >= then - (64 << 20) for now, then in zip(free_bytes(), before, strict=True))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_within_5_seconds(number: signal.Signals) -> None:
    """Rank 0's device waits in a sum, which ends when the communicator is aborted."""
    known = set(psutil.Process().children(recursive=True))
    lost_at = 0.0
    llm = load(2)
    (rank,) = [
        one
        for one in set(psutil.Process().children(recursive=True)) - known
        if any("ranks/process.py" in word for word in one.cmdline())
    ]

    async def main() -> None:
        nonlocal lost_at
        async for output in llm.generate_async("Once", GREEDY.replace(max_new_tokens=2000), streaming=True):
            if output.num_tokens >= 8 and not lost_at:
                lost_at = time.monotonic()
                os.kill(rank.pid, number)

    with pytest.raises(EngineDeadError, match="rank 1 of 2"):
        asyncio.run(main())
    assert time.monotonic() - lost_at < 5
    llm.close()
    assert not rank.is_running()
    assert float(torch.ones(8, device="cuda").sum()) == 8.0  # the caller's own work goes on
