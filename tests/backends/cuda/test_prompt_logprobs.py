"""Log-probabilities of prompt tokens on the CUDA backend against transformers, on a GPU or in the interpreter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llmengine.backends.cuda import sampling
from llmengine.batch import StepResult, TokenLogprobs
from llmengine.sampling_params import SamplingParams
from tests.backends.cuda.helpers import load_cuda
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs, save_tiny
from tests.models.family_helpers import make_family

SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
PROMPT, OTHER, PLAIN = (random.Random(seed).choices(range(3, 101), k=size) for seed, size in enumerate((21, 6, 4)))


def check(entries: Sequence[TokenLogprobs], model: Any, prompt: list[int], count: int) -> None:
    """Compare the entries of all of a prompt with transformers."""
    expected = reference_logprobs(model, prompt)[:-1]
    for entry, row, token_id in zip(entries, expected, prompt[1:], strict=True):
        values, ids = row.topk(count)
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=2e-4)
        assert list(entry.top_logprobs) == pytest.approx(values.tolist(), abs=2e-4)
        assert list(entry.top_ids) == ids.tolist()


def test_two_requests_in_chunks_beside_others(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits at a time, a chunk of one token, and decodes and chunks in the same steps that ask for none."""
    monkeypatch.setattr(sampling, "MAX_LOGITS", 4 * 101)
    model = save_tiny(tmp_path, **SMALL)
    backend = load_cuda(tmp_path, device)
    assert backend.info.has_prompt_logprobs
    driver = BackendDriver(backend, seed=1)
    plain = driver.add(0, PLAIN, SamplingParams(logprobs=2))
    long = driver.add(3, PROMPT, SamplingParams(prompt_logprobs=4, logprobs=1))
    short = driver.add(1, OTHER, SamplingParams(prompt_logprobs=0))
    steps = [
        ((plain, 3), (long, 11)),
        ((long, 1), (plain, 1)),
        ((long, 9), (short, 6), (plain, 1)),
        ((short, 1), (plain, 1), (long, 1)),
    ]
    results = [driver.step(*parts) for parts in steps]
    assert [sorted(result.prompt_logprobs) for result in results] == [[3], [3], [1, 3], []]
    check([entry for result in results for entry in result.prompt_logprobs.get(3, ())], model, PROMPT, 4)
    check(results[2].prompt_logprobs[1], model, OTHER, 0)
    for request, prompt in ((long, PROMPT), (short, OTHER), (plain, PLAIN)):
        assert request.output_ids == reference_greedy(model, prompt, len(request.output_ids))
    assert results[2].logprobs[3][0].logprob == pytest.approx(
        reference_logprobs(model, PROMPT)[-1].max().item(), abs=2e-4
    )
    backend.close()


def test_with_steps_in_flight_and_after_a_preemption(tmp_path: Path, device: str) -> None:
    model = save_tiny(tmp_path, **SMALL)
    backend = load_cuda(tmp_path, device)
    driver = BackendDriver(backend)
    asking = driver.add(2, PROMPT, SamplingParams(prompt_logprobs=3))
    driver.step((asking, 9))
    driver.release(asking)
    asking.num_computed_tokens, asking.started = 0, False
    results: list[StepResult] = []
    backend.launch(driver.batch((asking, 16)))
    backend.launch(driver.batch((asking, 5)))
    results.append(backend.collect())
    asking.token_ids.append(-1)  # known to the device alone
    backend.launch(driver.batch((asking, 1)))
    results += [backend.collect(), backend.collect()]
    check([entry for result in results for entry in result.prompt_logprobs.get(2, ())], model, PROMPT, 3)
    first, second = reference_greedy(model, PROMPT, 2)
    assert [result.token_ids.get(2) for result in results] == [None, (first,), (second,)]
    backend.close()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2", "qwen3"])
def test_of_other_families(tmp_path: Path, device: str, family: str) -> None:
    if device == "cpu" and family != "gemma2":
        pytest.skip("on a GPU only")
    model = make_family(family, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    backend = load_cuda(tmp_path, device)
    driver = BackendDriver(backend)
    request = driver.add(0, PROMPT, SamplingParams(prompt_logprobs=5))
    entries = [entry for count in (8, 13) for entry in driver.step((request, count)).prompt_logprobs[0]]
    check(entries, model, PROMPT, 5)
    backend.close()
