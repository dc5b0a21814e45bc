"""Models that several GPUs share, through the public face; skipped where there are fewer than two."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from llmengine import LLM, EngineDeadError, ModelConfig, ParallelConfig, QuantConfig, SamplingParams
from llmengine.cli.demo import find_demo_model
from llmengine.config import KvCacheConfig, SchedulerConfig
from tests import ROOT
from tests.backends.ranks.helpers import is_gone

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
PROMPTS = ["The capital of France is", "To tell a story, one must", "def add(a, b):"]
GREEDY = SamplingParams(max_new_tokens=32, temperature=0.0, ignore_eos=True)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]


Layout = tuple[int, int]
"""Ranks that share each matrix, and stages of layers."""

ONE: Layout = (1, 1)
LAYOUTS: list[Layout] = [(2, 1), (1, 2)]

# Without a guard: it must not run again in a rank. It interrupts itself when graphs are about to be captured, and says
# how many processes are left, and how many MiB are taken beyond what a closed LLM leaves: of tensors, and of a GPU.
SCRIPT = """
import gc, logging, os, signal, sys, threading
import psutil
import torch
from llmengine import LLM, ModelConfig, ParallelConfig, SamplingParams
from llmengine.config import KvCacheConfig

def tell_ranks():
    found = psutil.Process().children(recursive=True)
    print(*(one.pid for one in found if any("ranks/process.py" in word for word in one.cmdline())), flush=True)

def free():
    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]

def tensor_bytes():
    found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes for one in found if one.is_cuda}.values())

class Interrupt(logging.Handler):
    def emit(self, record):
        if "choosing matrix products took" in record.getMessage():
            tell_ranks()
            threading.Timer(float(sys.argv[5]), os.kill, (os.getpid(), signal.SIGINT)).start()

meanwhile, layout = sys.argv[2], (int(sys.argv[3]), int(sys.argv[4]))
config = ModelConfig(sys.argv[1], device="cuda", parallel_config=ParallelConfig(*layout), tuning_budget_s=0.0)
config.kv_cache_config = KvCacheConfig(max_bytes=1 << 30)
if meanwhile == "loading":
    LLM(config).close()  # modules and workspaces, which CUDA keeps for a process, stay
    logger = logging.getLogger("llmengine.backends.cuda.backend")
    logger.setLevel(logging.INFO)
    logger.addHandler(Interrupt())
gc.collect()
torch.cuda.empty_cache()
before, tensors_before = free(), tensor_bytes()
try:
    with LLM(config) as llm:
        tell_ranks()
        while True:
            llm.generate(["Once"], SamplingParams(max_new_tokens=100, ignore_eos=True))
except KeyboardInterrupt:
    held = max(then - now for then, now in zip(before, free()))
    gc.collect()
    tensors = tensor_bytes() - tensors_before
    print("interrupted", len(psutil.Process().children()), tensors >> 20, held >> 20, flush=True)
"""


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
    found = [(2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (1, 3), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2)]
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


@pytest.mark.parametrize("layout", layouts(), ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_within_5_seconds(layout: Layout, number: signal.Signals) -> None:
    """Rank 0's device waits in a sum or for hidden states, which ends when connections are aborted."""
    known = set(psutil.Process().children(recursive=True))
    lost_at = 0.0
    llm = load(layout)
    ranks = [
        one
        for one in set(psutil.Process().children(recursive=True)) - known
        if any("ranks/process.py" in word for word in one.cmdline())
    ]
    size = layout[0] * layout[1]
    assert len(ranks) == size - 1
    last = max(ranks, key=lambda one: one.pid)

    async def main() -> None:
        nonlocal lost_at
        async for output in llm.generate_async("Once", GREEDY.replace(max_new_tokens=2000), streaming=True):
            if output.num_tokens >= 8 and not lost_at:
                lost_at = time.monotonic()
                os.kill(last.pid, number)

    with pytest.raises(EngineDeadError, match=f"rank {size - 1} of {size}"):
        asyncio.run(main())
    assert time.monotonic() - lost_at < 5
    llm.close()
    assert not any(rank.is_running() for rank in ranks)
    assert float(torch.ones(8, device="cuda").sum()) == 8.0  # the caller's own work goes on


@contextmanager
def script(meanwhile: str, layout: Layout, after_s: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program that generates for ever, and its ranks; "loading": it interrupts itself while graphs are captured."""
    model, sizes = str(find_demo_model()), map(str, layout)
    command = [sys.executable, "-c", SCRIPT, model, meanwhile, *sizes, str(after_s)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            pids = [int(word) for word in process.stdout.readline().split()]
            assert len(pids) == layout[0] * layout[1] - 1
            yield process, pids
        finally:
            process.kill()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.3])
def test_ctrl_c_while_graphs_are_captured_leaves_nothing(layout: Layout, after_s: float) -> None:
    with script("loading", layout, after_s) as (process, pids):
        assert process.stdout is not None
        *_, what, num_children, tensors, held = process.stdout.read().split()
        assert (what, num_children) == ("interrupted", "0")
        assert int(tensors) <= 0, "MiB of weights, or of the KV cache"
        assert int(held) < 64, "MiB of these, or of a communicator of NCCL"
        assert process.wait(60) == 0
    assert all(map(is_gone, pids))


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_ranks_die_with_a_program_that_is_killed(layout: Layout) -> None:
    before = free_bytes()
    with script("generating", layout) as (process, pids):
        time.sleep(0.5)
        process.kill()
        assert all(is_gone(pid, 10.0) for pid in pids)
        process.wait(60)
    assert all(now >= then - (64 << 20) for now, then in zip(free_bytes(), before, strict=True))
