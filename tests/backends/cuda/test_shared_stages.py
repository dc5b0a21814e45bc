"""Pipeline parallelism of the CUDA backend with real processes: on GPUs, or on a CPU through Triton's interpreter."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pretended_hosts import PretendedHosts
from llmengine import LLM, GenerationOutput
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.batch import SavableBackend
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, QuantConfig, SchedulerConfig
from llmengine.errors import EngineDeadError
from llmengine.sampling_params import SamplingParams
from tests.backends.cuda.helpers import check_steps_in_flight, load_cuda, load_shared, open_shared, ranks
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs, save_tiny
from tests.models.family_helpers import make_family

SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
PROMPTS = [[5, 90, 17, 44, 23, 8, 71], [3, 60], [99, 1, 45]]
CALIBRATED = QuantConfig.preset("int4-awq", group_size=16, calibration_prompts=PROMPTS, num_calibration_samples=3)


@dataclass(frozen=True)
class Staged:
    """A model in two stages, and transformers' own."""

    directory: Path
    reference: Any
    backend: PreparingRanksBackend
    driver: BackendDriver


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory, device: str) -> Iterator[Staged]:
    directory = tmp_path_factory.mktemp("tiny")
    reference = save_tiny(directory, **SMALL, attention_bias=True, mlp_bias=True)
    with load_shared(directory, device, pp_size=2) as backend:
        yield Staged(directory, reference, backend, BackendDriver(backend))


def test_tokens_of_steps_in_flight_are_those_of_one_process(staged: Staged) -> None:
    """The first stage gets the ids that the last one sampled while no host has seen them."""
    check_steps_in_flight(staged.reference, staged.backend, dict(enumerate(PROMPTS)))


def test_log_probabilities_of_prompts_and_scores(staged: Staged) -> None:
    """Neither leaves a stage waiting: another step follows each."""
    driver, prompt = staged.driver, PROMPTS[0]
    params = SamplingParams(temperature=1.0, top_k=1, logprobs=2, prompt_logprobs=2)
    request = driver.add(1, prompt, params)
    result = driver.step((request, len(prompt)))
    assert request.output_ids == reference_greedy(staged.reference, prompt, 1)
    expected = reference_logprobs(staged.reference, prompt)
    for entry, row, token in zip(result.prompt_logprobs[1], expected, prompt[1:], strict=False):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert entry.top_ids == tuple(row.topk(2).indices.tolist())
    for slot in (0, 2, 3, 0, 2):  # more often than hidden states have places
        scored = driver.add(slot, prompt)
        logits = [rows.float().cpu().clone() for rows in staged.backend.score(driver.batch((scored, len(prompt))))]
        torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)
        driver.release(scored)
    again = driver.add(3, prompt)
    assert driver.generate([again], 2) == [reference_greedy(staged.reference, prompt, 2)]


def test_quiet_moments_are_used_together(staged: Staged) -> None:
    assert staged.backend.prepare()
    request = staged.driver.add(0, PROMPTS[1])
    assert staged.driver.generate([request], 1) == [reference_greedy(staged.reference, PROMPTS[1], 1)]


def test_the_whole_model_comes_back(staged: Staged) -> None:
    given = dict(open_model(staged.directory).weights(torch.float32))
    for _ in range(2):
        found = dict(staged.backend.weights())
        assert found.keys() == given.keys()
        assert all(torch.equal(tensor, given[name]) for name, tensor in found.items())
    info = staged.backend.info
    assert "2 stages of 1 and 1 layers" in info.description
    assert info.vocab_size == SMALL["vocab_size"]
    assert info.weight_bytes == sum(tensor.nbytes for tensor in given.values())
    assert info.kv_bytes_per_block == 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, tokens, dimensions


def test_a_rank_that_dies_ends_all(tmp_path: Path, device: str) -> None:
    save_tiny(tmp_path, **SMALL)
    before = ranks()
    with load_shared(tmp_path, device, pp_size=2) as backend:
        (rank,) = ranks() - before
        driver = BackendDriver(backend)
        driver.generate([driver.add(0, PROMPTS[0])], 1)
        rank.kill()
        with pytest.raises(EngineDeadError, match=r"rank 1 of 2 .*SIGKILL"):
            driver.generate([driver.add(1, PROMPTS[0])], 2)
    assert ranks() == before


@pytest.mark.parametrize(
    ("tp_size", "hosts"), [(1, (0, 1)), pytest.param(2, (0, 0, 1, 1), marks=pytest.mark.slow)], ids=["2", "2x2"]
)
def test_stages_on_two_hosts_give_the_same_tokens(
    staged: Staged, device: str, tp_size: int, hosts: tuple[int, ...]
) -> None:
    """Hidden states go over a connection, and the ids that the first stage needs are told."""
    with load_shared(staged.directory, device, tp_size, 2, rank_hosts=PretendedHosts(hosts)) as backend:
        check_steps_in_flight(staged.reference, backend, dict(enumerate(PROMPTS)))
        driver = BackendDriver(backend)
        scored = driver.add(3, PROMPTS[0])
        logits = [rows.float().cpu().clone() for rows in backend.score(driver.batch((scored, len(PROMPTS[0]))))]
        expected = reference_logprobs(staged.reference, PROMPTS[0])
        torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 2])
def test_a_stage_that_dies_in_a_step_is_named(tmp_path: Path, device: str, victim: int) -> None:
    """The first of three and the one between: those that wait for it do not wait for ever."""
    save_tiny(tmp_path, **SMALL, num_hidden_layers=3)
    before = ranks()
    with load_shared(tmp_path, device, pp_size=3) as backend:
        driver = BackendDriver(backend)
        driver.generate([driver.add(0, PROMPTS[0])], 1)
        by_start = sorted(ranks() - before, key=lambda process: process.pid)
        by_start[victim - 1].suspend()
        timer = threading.Timer(0.3, by_start[victim - 1].kill)
        timer.start()
        with pytest.raises(EngineDeadError, match=rf"rank {victim} of 3 "):
            driver.generate([driver.add(1, PROMPTS[0])], 2)
        timer.join()
    assert ranks() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp_size", "pp_size", "settings"),
    [
        (1, 3, {}),
        (2, 2, {}),
        (2, 2, {"tie_word_embeddings": True}),
        (1, 2, {"deterministic": True}),
        (1, 2, {"quant_config": QuantConfig(weights="int8"), "tie_word_embeddings": True}),
        (2, 2, {"quant_config": QuantConfig.preset("int4-rtn", group_size=32)}),
        (1, 2, {"quant_config": CALIBRATED}),
    ],
    ids=["3", "2x2", "2x2 tied", "deterministic", "int8 tied", "2x2 int4", "awq"],
)
def test_options(tmp_path: Path, device: str, tp_size: int, pp_size: int, settings: dict[str, Any]) -> None:
    tied = settings.pop("tie_word_embeddings", False)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": tied}
    save_tiny(tmp_path, **{**SMALL, **sizes})
    with load_shared(tmp_path, device, tp_size, pp_size, **settings) as backend:
        driver = BackendDriver(backend)
        outputs = driver.generate([driver.add(slot, prompt) for slot, prompt in enumerate(PROMPTS)], 4)
        names = [name for name, _ in backend.weights()]
    alone = load_cuda(tmp_path, device, **settings)
    driver = BackendDriver(alone)
    assert outputs == driver.generate([driver.add(slot, prompt) for slot, prompt in enumerate(PROMPTS)], 4)
    assert names == [name for name, _ in alone.weights()]
    alone.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_models_of_generic_segments(tmp_path: Path, device: str, family: str) -> None:
    """Gemma 2 scales embeddings, in the first stage, and caps logits, in the last."""
    model = make_family(family)
    model.save_pretrained(tmp_path)
    with load_shared(tmp_path, device, 2, 2) as backend:
        driver = BackendDriver(backend)
        request = driver.add(1, PROMPTS[0])
        driver.generate([request], 2)
    assert request.output_ids == reference_greedy(model, PROMPTS[0], 2)


def test_streams_of_an_engine_with_preemptions(staged: Staged, device: str) -> None:
    """Requests take each other's blocks and slots while several steps are in flight."""
    prompts = [[number, *PROMPTS[0], *PROMPTS[0][: number % 7]] for number in range(10, 15)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_new_tokens=10)

    async def stream(llm: LLM, prompt: list[int]) -> list[int]:
        deltas = [output.token_ids async for output in llm.generate_async(prompt, params, streaming=True)]
        return list(deltas[-1])

    async def stream_all(llm: LLM) -> list[list[int]]:
        return await asyncio.gather(*(stream(llm, prompt) for prompt in prompts))

    kv_cache = KvCacheConfig(block_size=16, max_bytes=6 * 8192)
    load = partial(open_shared, staged.directory, device, pp_size=2, kv_cache_config=kv_cache, max_model_len=64)
    scheduler = SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32)
    with LLM.from_backend(load, kv_cache_config=kv_cache, scheduler_config=scheduler) as llm:
        found = asyncio.run(stream_all(llm))
        assert llm.stats().counters.num_preemptions > 0
    assert found == [reference_greedy(staged.reference, prompt, 10) for prompt in prompts]


SEVEN = SamplingParams(max_new_tokens=7, ignore_eos=True, temperature=0.0)
VARIED = [
    SEVEN.replace(temperature=0.9, seed=5),
    SEVEN.replace(temperature=1.1, seed=7, repetition_penalty=1.5, top_k=20),
    SEVEN.replace(presence_penalty=1.0, frequency_penalty=0.8, logprobs=2),
    SEVEN.replace(temperature=0.7, seed=1, top_p=0.9, logprobs=1, prompt_logprobs=1),
    SEVEN.replace(logit_bias={3: 4.0, 9: -2.0}),
    SEVEN.replace(temperature=0.8, seed=11, min_p=0.05, prompt_logprobs=0),
]


async def answer_varied(llm: LLM) -> list[GenerationOutput]:
    """Answers to more requests than there are slots, at once, of which that with a bias is aborted after 3 tokens."""

    async def answer(index: int) -> GenerationOutput:
        prompt = [*PROMPTS[index % 3] * (1 + 2 * (index % 2)), index + 1]
        handle = llm.generate_async(prompt, VARIED[index], streaming=True)
        async for output in handle:
            if index == 4 and len(output.token_ids) >= 3:
                handle.abort()
        return output

    return await asyncio.gather(*map(answer, range(len(VARIED))))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp_size", "pp_size", "hosts"), [(1, 3, None), (2, 2, None), (1, 2, (0, 1))], ids=["3", "2x2", "two hosts"]
)
def test_requests_of_all_kinds_get_what_they_get_alone(
    tmp_path: Path, device: str, tp_size: int, pp_size: int, hosts: tuple[int, ...] | None
) -> None:
    """Seeds, penalties, biases, log-probabilities and aborts, in micro-batches with others."""
    save_tiny(tmp_path, **SMALL, num_hidden_layers=3)
    rank_hosts = None if hosts is None else PretendedHosts(hosts)
    kv_cache = KvCacheConfig(block_size=16, max_bytes=1 << 20)
    scheduler = SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32)
    backends: list[Callable[[], SavableBackend]] = [
        lambda: load_cuda(tmp_path, device),
        partial(open_shared, tmp_path, device, tp_size, pp_size, rank_hosts=rank_hosts),
    ]
    answers = []
    for backend in backends:
        with LLM.from_backend(backend, kv_cache_config=kv_cache, scheduler_config=scheduler) as llm:
            answers.append(asyncio.run(answer_varied(llm)))
    for expected, found in zip(*answers, strict=True):
        num_tokens = 3 if found.finish_reason == "abort" else 7
        assert found.token_ids[:num_tokens] == expected.token_ids[:num_tokens]
        for name in ("logprobs", "prompt_logprobs"):
            entries = [getattr(output, name) or () for output in (expected, found)]
            logprobs = [[entry.logprob for entry in one if entry is not None] for one in entries]
            assert logprobs[1] == pytest.approx(logprobs[0], abs=1e-4)
