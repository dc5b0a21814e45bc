"""Three and four ranks on two GPUs, through the code that runs on as many GPUs as ranks; skipped where there are fewer.

Processes that share a GPU run in turns of a few milliseconds. What waits in a kernel for a rank of the same GPU uses
up its turn, so this is slow, and goes on all the same. NCCL refuses two ranks on a GPU, so those of a stage, which it
connects, are on different ones. `parallel_config.devices` refuses this: it is of no use but for these tests.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import torch

from llmengine import LLM, SamplingParams
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.config import KvCacheConfig, SchedulerConfig
from llmengine.errors import EngineDeadError
from tests.backends.cuda.helpers import check_steps_in_flight, load_cuda, load_shared, open_shared, ranks
from tests.backends.determinism_helpers import check_schedules
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs, save_tiny

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NUM_GPUS < 2, reason="needs two GPUs")]

SMALL = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
PROMPTS = [[5, 90, 17, 44, 23, 8, 71], [3, 60], [99, 1, 45]]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_new_tokens=12)

Layout = tuple[int, int]
"""Ranks that share each matrix, and stages of layers."""

LAYOUTS: list[Layout] = [(1, 3), (1, 4), (2, 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model's directory, and transformers' own."""
    directory = tmp_path_factory.mktemp("tiny")
    return directory, save_tiny(directory, **SMALL, num_hidden_layers=5, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def backend(request: pytest.FixtureRequest, model: tuple[Path, Any]) -> Iterator[PreparingRanksBackend]:
    with load_shared(model[0], "cuda", *request.param, num_gpus=2) as backend:
        yield backend


def open_llm(directory: Path, layout: Layout, **settings: Any) -> LLM:
    """An `LLM` for four requests at a time, which closes its ranks."""
    kv_cache = KvCacheConfig(block_size=16, max_bytes=1 << 20)
    scheduler = SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32)
    if layout == (1, 1):
        load: Any = partial(load_cuda, directory, "cuda", **settings)
    else:
        load = partial(open_shared, directory, "cuda", *layout, num_gpus=2, **settings)
    return LLM.from_backend(load, kv_cache_config=kv_cache, scheduler_config=scheduler)


def generate_for_ever(driver: BackendDriver) -> NoReturn:
    while True:
        request = driver.add(1, PROMPTS[1])
        driver.generate([request], 20)
        driver.release(request)


def test_tokens_of_steps_in_flight(model: tuple[Path, Any], backend: PreparingRanksBackend) -> None:
    """Also from graphs, and after a quiet moment."""
    for _ in range(3):
        check_steps_in_flight(model[1], backend, dict(enumerate(PROMPTS)))
    assert backend.prepare()
    driver = BackendDriver(backend)
    requests = [driver.add(slot, prompt) for slot, prompt in enumerate(PROMPTS)]
    assert driver.generate(requests, 9) == [reference_greedy(model[1], prompt, 9) for prompt in PROMPTS]


def test_log_probabilities_and_scores(model: tuple[Path, Any], backend: PreparingRanksBackend) -> None:
    driver, prompt = BackendDriver(backend), PROMPTS[0]
    params = SamplingParams(temperature=1.0, top_k=1, logprobs=2, prompt_logprobs=2)
    request, expected = driver.add(1, prompt, params), reference_logprobs(model[1], prompt)
    result = driver.step((request, len(prompt)))
    assert request.output_ids == reference_greedy(model[1], prompt, 1)
    for entry, row, token in zip(result.prompt_logprobs[1], expected, prompt[1:], strict=False):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
    for slot in (0, 2, 3, 0, 2, 3, 0, 2, 3):  # more often than hidden states have places
        scored = driver.add(slot, prompt)
        logits = [rows.float().cpu().clone() for rows in backend.score(driver.batch((scored, len(prompt))))]
        torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)
        driver.release(scored)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_streams_get_what_they_get_from_one_rank(model: tuple[Path, Any], layout: Layout) -> None:
    """Prompts in pieces, requests that end and begin in other micro-batches, and draws with seeds."""
    prompts = [[number, *PROMPTS[0] * (1 + number % 6)] for number in range(10, 22)]
    params = [GREEDY.replace(max_new_tokens=5 + number * 5 % 13) for number in range(12)]
    params[3] = params[3].replace(temperature=0.9, seed=5, logprobs=2)
    params[8] = params[8].replace(repetition_penalty=1.4, prompt_logprobs=1)
    said = []
    for each in ((1, 1), layout):
        with open_llm(model[0], each) as llm:
            outputs = [llm.generate(prompts, params) for _ in range(2)]  # the second time from graphs
            said.append([[output.token_ids for output in one] for one in outputs])
    assert said[0] == said[1]
    assert said[0][0] == said[0][1]


@pytest.mark.parametrize("layout", [(2, 1), *LAYOUTS], ids=str)
def test_the_order_of_additions_is_fixed(model: tuple[Path, Any], layout: Layout) -> None:
    """With `deterministic`, results are the same to the last bit whatever else a step computes."""
    prompts = [random.Random(seed).choices(range(3, 101), k=3 + 9 * seed) for seed in range(5)]

    def open_one(rng: random.Random | None) -> LLM:
        return open_llm(model[0], layout, deterministic=True)

    equal, _, _ = check_schedules(open_one, prompts, num_engines=1, num_waves=3)
    assert equal


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_is_named_within_5_seconds(model: tuple[Path, Any], layout: Layout, number: signal.Signals) -> None:
    """Any of those that are left may wait for it on its GPU; none is left, nor is their memory."""
    before, free = ranks(), [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    size = layout[0] * layout[1]
    victim, lost_at = size - 1, [0.0]
    with load_shared(model[0], "cuda", *layout, num_gpus=2) as backend:
        driver = BackendDriver(backend)
        driver.generate([driver.add(0, PROMPTS[0])], 3)
        processes = sorted(ranks() - before, key=lambda process: process.pid)

        def lose() -> None:
            lost_at[0] = time.monotonic()
            os.kill(processes[victim - 1].pid, number)

        timer = threading.Timer(0.3, lose)
        timer.start()
        with pytest.raises(EngineDeadError, match=rf"rank {victim} of {size} "):
            generate_for_ever(driver)
        assert time.monotonic() - lost_at[0] < 5
    assert ranks() == before
    assert not any(psutil.pid_exists(process.pid) for process in processes)
    torch.cuda.empty_cache()
    now = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    assert all(later >= earlier - (256 << 20) for later, earlier in zip(now, free, strict=True))
