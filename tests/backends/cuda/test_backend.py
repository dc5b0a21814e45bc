"""The whole CUDA backend against transformers: on a GPU, or in fp32 through Triton's interpreter on a CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from llmengine.backends.cuda import loading
from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.backends.cuda.stream import HostStream
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs, save_tiny
from tests.backends.sampling_helpers import SlotHistory

ALL_LOGPROBS = SamplingParams(logprobs=20)
SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}


def load(directory: Path, device: str, **settings: Any) -> CudaBackend:
    config = ModelConfig(
        directory,
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32),
        dtype="float32",
        **settings,
    ).resolve()
    return load_cuda_backend(config, open_model(directory), torch.device(device, 0))


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 101), k=length)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}])
def test_equals_transformers_in_chunks_and_decodes(tmp_path: Path, device: str, changes: dict[str, Any]) -> None:
    model = save_tiny(tmp_path, **SMALL, **changes)
    backend = load(tmp_path, device)
    driver = BackendDriver(backend)
    prompt = make_prompt(21)
    request = driver.add(1, prompt, ALL_LOGPROBS)
    logprobs = []
    for num_tokens in (11, 1, 9, 1, 1, 1):
        logprobs += driver.step((request, num_tokens)).logprobs.get(request.slot, ())
    assert request.output_ids == reference_greedy(model, prompt, 4)
    expected = reference_logprobs(model, request.token_ids)[20:-1]
    for entry, row in zip(logprobs, expected, strict=True):
        values, ids = row.topk(20)
        assert entry.top_ids == tuple(ids.tolist())
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), values, rtol=0, atol=1e-4)
        assert entry.logprob == entry.top_logprobs[0]
    backend.close()


def test_requests_join_in_flight_with_mixed_steps(tmp_path: Path, device: str) -> None:
    model = save_tiny(tmp_path, **SMALL)
    backend = load(tmp_path, device)
    driver = BackendDriver(backend, seed=3)
    prompts = [make_prompt(length, length) for length in (18, 1, 5)]
    first, second, third = (driver.add(slot, prompt) for slot, prompt in zip((3, 0, 2), prompts, strict=True))
    driver.step((first, 16))
    driver.step((second, 1), (first, 2))
    driver.step((first, 1), (second, 1), (third, 5))
    outputs = driver.generate((first, second, third), 4)
    assert outputs == [reference_greedy(model, prompt, 4) for prompt in prompts]
    driver.release(first)
    # The slot and the blocks of a finished request serve the next one.
    late = driver.add(3, make_prompt(7, 9))
    assert driver.generate([late], 3) == [reference_greedy(model, late.token_ids[:7], 3)]
    backend.close()


def launch_ahead(driver: BackendDriver, requests: Sequence[Any], num_tokens: int) -> None:
    """Decode with two steps in flight: the second is launched before the first is collected."""
    backend = driver.backend
    backend.launch(driver.batch(*[(request, 1) for request in requests]))
    for _ in range(num_tokens - 1):
        for request in requests:
            request.token_ids.append(-1)
        backend.launch(driver.batch(*[(request, 1) for request in requests]))
        result = backend.collect()
        for request in requests:
            [request.token_ids[-1]] = result.token_ids[request.slot]
    result = backend.collect()
    for request in requests:
        request.token_ids.extend(result.token_ids[request.slot])


def test_steps_in_flight_feed_each_other_on_the_device(tmp_path: Path, device: str) -> None:
    model = save_tiny(tmp_path, **SMALL)
    backend = load(tmp_path, device)
    assert backend.info.max_steps_in_flight >= 2
    driver = BackendDriver(backend)
    prompts = [make_prompt(3, 1), make_prompt(6, 2)]
    requests = [driver.add(slot, prompt) for slot, prompt in enumerate(prompts)]
    driver.step(*[(request, len(request.token_ids)) for request in requests])
    launch_ahead(driver, requests, 5)
    assert [request.output_ids for request in requests] == [reference_greedy(model, prompt, 6) for prompt in prompts]
    backend.close()


def test_sampling_and_forbidden_stops_depend_on_the_request_alone(tmp_path: Path, device: str) -> None:
    model = save_tiny(tmp_path, **SMALL)
    backend = load(tmp_path, device)
    driver = BackendDriver(backend)
    prompt = make_prompt(4, 5)
    likeliest = reference_greedy(model, prompt, 1)[0]
    drawn = SamplingParams(temperature=1.5, top_k=20, top_p=0.9)
    alone = driver.add(0, prompt, drawn, seed=7)
    expected = driver.generate([alone], 3)[0]
    driver.release(alone)
    again = driver.add(2, prompt, drawn, seed=7)
    other = driver.add(1, prompt, drawn, seed=8)
    greedy = driver.add(3, prompt)
    assert driver.generate([other, greedy, again], 3)[2] == expected
    assert greedy.output_ids[0] == likeliest
    driver.release(greedy)
    forbidding = SamplingParams(min_new_tokens=2)
    held = driver.add(3, prompt, forbidding, stop_token_ids=[likeliest, *range(60, 90)])
    driver.generate([held], 2)
    assert held.output_ids[0] not in {likeliest, *range(60, 90)}
    backend.close()


def test_penalties_count_tokens_that_only_the_device_knows(tmp_path: Path, device: str) -> None:
    """In chunks, with two steps in flight, and after the request was preempted; logprobs are the model's."""
    model = save_tiny(tmp_path, **SMALL)
    backend = load(tmp_path, device)
    driver = BackendDriver(backend)
    plain = make_prompt(14, 6)
    params = SamplingParams(
        repetition_penalty=1.8,
        frequency_penalty=0.6,
        logit_bias={plain[3]: 2.5},
        bad_words=[(token_id,) for token_id in reference_greedy(model, plain, 3)],
        logprobs=1,
    )
    history = SlotHistory(0, plain, params)
    expected = history.expect_greedy(lambda token_ids: model(torch.tensor([token_ids])).logits[0, -1].detach(), 10)
    assert expected != reference_greedy(model, plain, 10)
    held, other = driver.add(0, plain, params), driver.add(1, make_prompt(3, 7))
    driver.step((held, 9), (other, 3))
    driver.step((held, 5), (other, 1))
    launch_ahead(driver, (held, other), 4)
    assert held.output_ids == expected[:5]
    driver.release(held)
    held.num_computed_tokens, held.started = 0, False
    driver.step((held, 12), (other, 1))
    result = driver.step((held, 7), (other, 1))
    driver.generate([held], 10)
    assert held.output_ids == expected
    assert other.output_ids == reference_greedy(model, other.token_ids[:3], len(other.output_ids))
    reference = reference_logprobs(model, held.token_ids[:19])[-1]
    assert result.logprobs[0][0].logprob == pytest.approx(float(reference[expected[5]]), abs=1e-4)
    assert result.logprobs[0][0].top_logprobs[0] == pytest.approx(float(reference.max()), abs=1e-4)
    backend.close()


def test_non_finite_logits_fail_their_row_alone(tmp_path: Path, device: str) -> None:
    model = save_tiny(tmp_path, **SMALL)
    with torch.no_grad():
        model.model.embed_tokens.weight[100] = torch.nan
    model.save_pretrained(tmp_path)
    backend = load(tmp_path, device)
    driver = BackendDriver(backend)
    good, bad = driver.add(0, make_prompt(4, 4)), driver.add(1, [*make_prompt(3, 5), 100, 7])
    result = driver.step((good, 4), (bad, 5))
    assert list(result.token_ids) == [0]
    assert list(result.errors) == [1]
    assert "position 5" in result.errors[1]
    driver.release(bad)
    late = driver.add(2, make_prompt(4, 4))
    driver.generate([late], 2)
    assert late.output_ids == driver.generate([good], 2)[0]
    backend.close()


class ThreadStream(HostStream):
    """As on a GPU, kernels are queued in the stream that the thread has claimed last: copies must be as well."""

    current: ClassVar[ThreadStream]

    def __init__(self) -> None:
        self.claim()

    def claim(self) -> None:
        ThreadStream.current = self

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert ThreadStream.current is self
        super().copy(target, source)


def test_backends_take_turns_on_a_thread(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps do not run in the stream of the backend that was loaded or used last, which may be busy."""
    monkeypatch.setattr(loading, "HostStream", ThreadStream)  # on a GPU there are real ones
    model = save_tiny(tmp_path, **SMALL)
    drivers = [BackendDriver(load(tmp_path, device)) for _ in range(2)]
    prompt = make_prompt(5)
    expected = reference_logprobs(model, prompt)

    def occupy_current_stream() -> None:
        if device == "cuda":
            torch.cuda._sleep(50_000_000)

    for slot, params in enumerate((SamplingParams(prompt_logprobs=1), SamplingParams())):
        for driver in drivers:
            occupy_current_stream()
            assert driver.generate([driver.add(slot, prompt, params)], 2) == [reference_greedy(model, prompt, 2)]
    for driver in drivers:
        assert isinstance(driver.backend, CudaBackend)
        occupy_current_stream()
        driver.backend.prepare()
        occupy_current_stream()
    for driver in drivers:
        assert isinstance(driver.backend, CudaBackend)
        logits = [rows.cpu().clone() for rows in driver.backend.score(driver.batch((driver.add(2, prompt), 5)))]
        torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)
    for driver in drivers:
        driver.backend.close()
