"""Models and KV caches that do not fit, and what a failed load leaves behind."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from llmengine.backends.cuda import loading, sampling, warmup
from llmengine.backends.cuda.memory_errors import memory_returned_on_failure
from llmengine.backends.cuda.sampling import DeviceSampler, SamplerTensors
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.batch import Batch, SlotInit
from llmengine.config import KvCacheConfig, SchedulerConfig
from llmengine.engine.engine import Engine
from llmengine.errors import ConfigError, EngineDeadError, OutOfMemoryError, UnsupportedModelError
from llmengine.kernels.sampling import MAX_VOCAB
from llmengine.sampling_params import SamplingParams
from tests.backends.cuda.helpers import load_cuda
from tests.backends.helpers import BackendDriver, reference_greedy, save_tiny


def test_heads_of_any_even_size_and_blocks_of_any_size_are_served(tmp_path: Path, device: str) -> None:
    model = save_tiny(tmp_path, vocab_size=101, head_dim=18, max_position_embeddings=64)
    backend = load_cuda(tmp_path, device, kv_cache_config=KvCacheConfig(block_size=2, max_bytes=1 << 20))
    driver = BackendDriver(backend)
    prompt = list(range(3, 10))
    request = driver.add(0, prompt)
    assert driver.generate([request], 3) == [reference_greedy(model, prompt, 3)]
    backend.close()


def test_a_vocabulary_beyond_the_kernels_is_refused_when_it_is_loaded(tmp_path: Path, device: str) -> None:
    save_tiny(tmp_path, vocab_size=MAX_VOCAB + 1, hidden_size=8, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=f"vocab_size={MAX_VOCAB + 1} is above the {MAX_VOCAB}"):
        load_cuda(tmp_path, device)


@pytest.mark.parametrize(
    ("function", "num_dims", "message"),
    [
        ("empty", 2, r"weights: \d+ MiB in float32 do not fit .* 3 of 80 MiB .*smaller dtype or model"),
        ("zeros", 2, r"activations: .*max_tokens_per_step=32 and max_batch_size=4 do not fit .* 3 of 80 MiB"),
        ("zeros", 6, r"KV cache: \d+ MiB.* do not fit .* 3 of 80 MiB .*kv_cache_config.free_memory_fraction"),
    ],
)
def test_a_full_device_is_an_error_that_names_component_and_knob(
    tmp_path: Path, device: str, function: str, num_dims: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    real = getattr(torch, function)

    def allocate(size: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None and isinstance(size, tuple) and len(size) == num_dims:
            raise torch.OutOfMemoryError("CUDA out of memory")
        tensor: torch.Tensor = real(size, *args, **kwargs)
        return tensor

    monkeypatch.setattr(torch, function, allocate)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 20, 80 << 20))
    with pytest.raises(OutOfMemoryError, match=message):
        load_cuda(tmp_path, device)


def test_a_smaller_gpu_is_an_error_that_says_so(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)

    def run_out(*_: Any) -> None:
        raise OutOfResources(122880, 101376, "shared memory")

    monkeypatch.setattr(warmup, "load_weights", run_out)  # as a kernel does that is launched meanwhile
    with pytest.raises(ConfigError, match=r"needs 122880 of shared memory, of which there are 101376"):
        load_cuda(tmp_path, device)


def test_log_probabilities_of_many_rows_are_made_of_a_few_at_a_time(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_slots, vocab, rows_at_once = 8, 100, []
    real = torch.log_softmax

    def log_softmax(logits: torch.Tensor, dim: int) -> torch.Tensor:
        rows_at_once.append(len(logits))
        return real(logits, dim=dim)

    monkeypatch.setattr(sampling, "MAX_LOGITS", 3 * vocab)
    monkeypatch.setattr(torch, "log_softmax", log_softmax)
    tensors = SamplerTensors.allocate(num_slots, num_slots, vocab, torch.device(device))
    sampler = DeviceSampler(tensors, vocab)
    params = SamplingParams(logprobs=2)
    sampler.prepare(Batch(1, (), [SlotInit(slot, (1,), 1, params, 0, frozenset()) for slot in range(num_slots)]))
    logits = torch.randn(num_slots, vocab, generator=torch.Generator().manual_seed(0)).to(device)
    sampler.ids.copy_(logits.argmin(dim=1))
    sampled = [5, -1, 3, 7, 0, 1, 2, 4]
    pending = sampler.logprobs(logits, sampled)
    if device == "cuda":
        torch.cuda.synchronize()
    assert pending is not None
    entries = pending.collect()
    assert rows_at_once == [3, 3, 1]
    for row, slot in enumerate(sampled):
        if slot >= 0:
            expected = real(logits[row], dim=0).cpu()
            values, ids = expected.topk(2)
            [entry] = entries[slot]
            assert entry.logprob == pytest.approx(float(expected.min()))
            assert entry.top_ids == tuple(ids.tolist())
            assert entry.top_logprobs == pytest.approx(values.tolist())
    assert len(entries) == 7


def test_a_load_that_failed_keeps_no_memory_while_its_error_is_handled(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    weights: list[weakref.ref[torch.Tensor]] = []
    real = loading.allocate_weights

    def allocate_weights(*args: Any) -> CudaWeights:
        allocated = real(*args)
        weights.extend(map(weakref.ref, allocated.by_name.values()))
        return allocated

    monkeypatch.setattr(loading, "allocate_weights", allocate_weights)
    nothing = KvCacheConfig(block_size=16, max_bytes=1)
    engine = Engine(lambda: load_cuda(tmp_path, device, kv_cache_config=nothing), SchedulerConfig(), nothing)
    with pytest.raises(OutOfMemoryError) as failure:
        engine.start()
    gc.collect()
    assert weights
    assert not any(weight() is not None for weight in weights), failure.value


def test_a_load_that_failed_meanwhile_keeps_no_memory_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where rank 0 fails because another rank has, whose error is the cause of the one that is raised."""
    kept, alive = list[weakref.ref[torch.Tensor]](), list[bool]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.extend(one() is not None for one in kept))

    def load_parts() -> None:
        weight = torch.zeros(1)
        kept.append(weakref.ref(weight))
        raise RuntimeError("a sum was broken off")

    def load() -> None:
        try:
            load_parts()
        except RuntimeError:
            raise EngineDeadError("rank 1 failed") from OutOfMemoryError("the weights do not fit on rank 1")

    with pytest.raises(EngineDeadError, match="rank 1") as failure, memory_returned_on_failure():
        load()
    assert isinstance(failure.value.__context__, RuntimeError)
    assert alive == [False]
