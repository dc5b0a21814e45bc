"""Models that several GPUs share, through the public face; skipped where there are fewer than two."""

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
from llmengine.config import KvCacheConfig, SchedulerConfig

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
PROMPTS = ["The capital of France is", "To tell a story, one must", "def add(a, b):"]
GREEDY = SamplingParams(max_new_tokens=32, temperature=0.0, ignore_eos=True)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]


Layout = tuple[int, int]
"""Ranks that share each matrix, and stages of layers."""

ONE: Layout = (1, 1)
LAYOUTS: list[Layout] = [(2, 1), (1, 2)]


def load(layout: Layout, model: Path | None = None, dtype: str = "float32", **options: object) -> LLM:
    config = ModelConfig(
        model or find_demo_model(),
        device="cuda",
        dtype=dtype,  # type: ignore[arg-type]
        tuning_budget_s=0.0,
        parallel_config=ParallelConfig(*layout),
        kv_cache_config=KvCacheConfig(max_bytes=1 << 28),
        **options,  # type: ignore[arg-type]
    )
    return LLM(config)


def texts(llm: LLM) -> list[str]:
    return [output.text for output in llm.generate(PROMPTS, GREEDY)]


def free_bytes() -> list[int]:
    return [torch.cuda.mem_get_info(index)[0] for index in range(NUM_GPUS)]


def layouts() -> list[Layout]:
    found = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2)]
    return [(tp_size, pp_size) for tp_size, pp_size in found if tp_size * pp_size <= NUM_GPUS]


@pytest.mark.parametrize("layout", layouts(), ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_text_as_one_gpu(layout: Layout, deterministic: bool) -> None:
    said = []
    for each in (ONE, layout):
        with load(each, deterministic=deterministic) as llm:
            said.append(texts(llm))
            assert texts(llm) == said[-1]  # from graphs, which were captured meanwhile
    assert said[0] == said[1]


@pytest.mark.parametrize("layout", [one for one in layouts() if one[0] == 1], ids=str)
def test_many_requests_at_once_in_stages(layout: Layout) -> None:
    """Prompts that are divided, requests that end and begin, log-probabilities and scores between steps in flight."""
    prompts = [f"{number} {'and so on ' * (number % 13 * 20)}" for number in range(60)]
    params = [GREEDY.replace(max_new_tokens=5 + number * 7 % 60) for number in range(60)]
    params[7] = params[7].replace(logprobs=2, prompt_logprobs=2)
    scheduler = SchedulerConfig(max_batch_size=16, max_tokens_per_step=256, max_tokens_per_mixed_step=256)
    said = []
    for each in (ONE, layout):
        with load(each, scheduler_config=scheduler, deterministic=True) as llm:
            outputs = llm.generate(prompts, params)
            score = llm.evaluate(windows=2, measure_speed=False).model.perplexity
            again = llm.generate(prompts, params)
            assert [one.text for one in again] == [one.text for one in outputs]
            logprobs = [entry.logprob for entry in outputs[7].prompt_logprobs or () if entry is not None]
            said.append(([one.text for one in outputs], [score, *logprobs]))
    assert said[0][0] == said[1][0]
    assert said[0][1] == pytest.approx(said[1][1], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("preset", ["int4-rtn", "int8", "fp8"])
def test_quantized_models_are_saved_whole(layout: Layout, preset: str, tmp_path: Path) -> None:
    quant = QuantConfig.preset(preset, group_size=64) if preset == "int4-rtn" else QuantConfig(weights=preset)
    with load(layout, dtype="bfloat16", quant_config=quant) as llm:
        said = texts(llm)
        llm.save(tmp_path / "engine")
    with load(layout, tmp_path / "engine", dtype="auto") as llm:
        assert texts(llm) == said
    with load(ONE, tmp_path / "engine", dtype="auto") as llm:
        assert all(texts(llm))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_close_gives_all_memory_back(layout: Layout) -> None:
    load(layout).close()  # what the first use of CUDA takes in this process stays
    before = free_bytes()
    llm = load(layout)
    assert sum(free_bytes()) < sum(before)
    llm.close()
    assert all(now >= then - (64 << 20) for now, then in zip(free_bytes(), before, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_within_5_seconds(layout: Layout, number: signal.Signals) -> None:
    """Rank 0's device waits in a sum or for hidden states, which ends when connections are aborted."""
    known = set(psutil.Process().children(recursive=True))
    lost_at = 0.0
    llm = load(layout)
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
