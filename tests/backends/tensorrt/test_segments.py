"""`TensorRtSegments` in the CUDA backend, on the fake library: whole steps, shared memory, buckets, error paths."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends import load_backend
from llmengine.backends.cuda.fused_segments import SegmentsContext, SegmentsFactory, TunableSegments
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.runtime import PlanRuntime
from llmengine.backends.tensorrt.segments import TensorRtSegments, load_plans
from llmengine.backends.tensorrt.spec import WeightMode, make_profiles
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.dtypes import dtype_name
from llmengine.errors import EngineError
from llmengine.llm import LLM
from llmengine.models.arch import ModelArch
from llmengine.models.decoder import Segments
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs, save_tiny
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.segment_helpers import FAMILIES, ReferenceSegments, random_weights, tiny_arch

MAX_ROWS, MAX_TOKENS = 4, 32
SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}


@pytest.fixture
def fake(device: str) -> FakeTensorRt:
    return FakeTensorRt(torch.device(device, 0))


def make_config(directory: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(
        directory,
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(
            max_batch_size=MAX_ROWS, max_tokens_per_step=MAX_TOKENS, max_tokens_per_mixed_step=MAX_TOKENS
        ),
        **settings,
    ).resolve()


def build_segments(
    fake: FakeTensorRt, context: SegmentsContext, mode: WeightMode = "inputs", max_tokens: int = MAX_TOKENS
) -> TensorRtSegments:
    """Return segments whose plans are the fake's."""
    dtype: Any = dtype_name(context.weights.dtype)
    segments = segments_of(context.arch, dtype, make_profiles(MAX_ROWS, max_tokens), mode)
    plan_set = fake_plan_set(segments, context.weights.by_name)
    return TensorRtSegments.allocate(segments, load_plans(PlanRuntime.start(fake_library(fake)), plan_set), context)


def on_fake(fake: FakeTensorRt) -> SegmentsFactory:
    return lambda context: TunableSegments(build_segments(fake, context), "fake plans")


def make_context(arch: ModelArch, dtype: torch.dtype, device: torch.device) -> SegmentsContext:
    tensors = {name: tensor.to(device) for name, tensor in random_weights(arch, dtype).items()}
    logits = torch.zeros((MAX_ROWS, arch.vocab_size), device=device)
    return SegmentsContext(arch, CudaWeights.of(arch, tensors, dtype), make_config(Path("unused")), logits, pdl=False)


def make_prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(3, 101), k=length)


def run_all(segments: Segments, x: Tensor, attended: list[Tensor], sample_tokens: Tensor | None) -> list[Tensor]:
    """Return qkv and hidden states of each layer and the logits, for given results of the attentions."""
    qkv = segments.first(x)
    results = [qkv.clone()]
    for layer, values in enumerate(attended[:-1]):
        x, qkv = segments.mid(layer, values, x)
        results += [x.clone(), qkv.clone()]
    return [*results, segments.last(attended[-1], x, sample_tokens).clone()]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_equals_the_models_formulas_at_every_size(fake: FakeTensorRt, family: str) -> None:
    context = make_context(tiny_arch(**FAMILIES[family]), torch.float32, fake.device)
    arch = context.arch
    expected = ReferenceSegments(arch, {name: tensor.cpu() for name, tensor in context.weights.by_name.items()})
    segments = build_segments(fake, context)
    assert segments.num_layers == arch.num_layers
    for num_tokens, rows in ((3, None), (17, [16, 2]), (32, [5, 5, 31, 0])):
        x = torch.randn(num_tokens, arch.hidden_size, device=fake.device)
        attended = [torch.randn(num_tokens, arch.num_heads * arch.head_dim, device=fake.device) for _ in range(3)]
        sampled = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=fake.device)
        host_rows = torch.arange(num_tokens) if sampled is None else sampled.cpu()
        wanted = run_all(expected, x.cpu(), [values.cpu() for values in attended], host_rows)
        for found, value in zip(run_all(segments, x, attended, sampled), wanted, strict=True):
            torch.testing.assert_close(found.cpu().double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["inputs", "constants"])
def test_weights_are_used_where_they_are_or_in_the_plan(fake: FakeTensorRt, mode: WeightMode) -> None:
    context = make_context(tiny_arch(), torch.float32, fake.device)
    segments = build_segments(fake, context, mode)
    x = torch.randn(2, context.arch.hidden_size, device=fake.device)
    before = segments.first(x).clone()
    context.weights.by_name["layers.0.qkv.weight"].zero_()
    changed = not torch.equal(before, segments.first(x))
    assert changed == (mode == "inputs")


def test_contexts_are_made_once_for_each_size_and_serve_all_layers(fake: FakeTensorRt) -> None:
    context = make_context(tiny_arch(num_layers=5), torch.float32, fake.device)
    segments = build_segments(fake, context)
    for num_tokens in (2, 3, 2, 3):
        x = torch.randn(num_tokens, context.arch.hidden_size, device=fake.device)
        run_all(segments, x, [torch.randn(num_tokens, 64, device=fake.device)] * 5, None)
    assert fake.num_contexts == 2 * 3
    assert fake.executed == ["first", "mid", "mid", "mid", "mid", "last"] * 4


def test_threads_that_share_a_stream_do_not_share_a_context_in_the_middle(fake: FakeTensorRt) -> None:
    context = make_context(tiny_arch(), torch.float32, fake.device)
    segments = build_segments(fake, context)
    stream = torch.cuda.current_stream(fake.device) if fake.device.type == "cuda" else None

    def run(_: int) -> None:
        x = torch.randn(2, context.arch.hidden_size, device=fake.device)
        with torch.cuda.stream(stream):
            run_all(segments, x, [torch.randn(2, 64, device=fake.device)] * 3, None)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(8)))
    assert len(fake.executed) == 8 * 4


def test_plans_that_are_too_small_or_of_other_weights_are_refused(fake: FakeTensorRt) -> None:
    context = make_context(tiny_arch(), torch.float32, fake.device)
    with pytest.raises(EngineError, match=r"plan 'first' was not built for T=32, S=4, only for .* prefill: T to 16"):
        build_segments(fake, context, max_tokens=16)
    other = make_context(tiny_arch(), torch.float32, fake.device)
    other.weights.by_name["layers.2.down.weight"] = torch.zeros(48, 96, device=fake.device)
    with pytest.raises(EngineError, match=r"weight 'layers.2.down.weight' is float32 \[48, 96\], .* \[48, 80\]"):
        build_segments(fake, other)


def test_requests_in_flight_get_the_tokens_of_transformers(tmp_path: Path, fake: FakeTensorRt) -> None:
    model = save_tiny(tmp_path, **SMALL)
    backend = load_cuda_backend(
        make_config(tmp_path, dtype="float32"), open_model(tmp_path), fake.device, on_fake(fake)
    )
    assert "fake plans, KV cache in float32" in backend.info.description
    driver = BackendDriver(backend, seed=3)
    prompts = [make_prompt(length) for length in (18, 1, 5)]
    every = SamplingParams(logprobs=20)
    first, second, third = (driver.add(slot, prompt, every) for slot, prompt in zip((3, 0, 2), prompts, strict=True))
    driver.step((first, 16))
    driver.step((second, 1), (first, 2))
    logprobs = driver.step((first, 1), (second, 1), (third, 5)).logprobs
    expected = {request.slot: reference_logprobs(model, request.token_ids)[-2] for request in (first, second, third)}
    for slot, row in expected.items():
        values, ids = row.topk(20)
        (entry,) = logprobs[slot]
        assert entry.top_ids == tuple(ids.tolist())
        torch.testing.assert_close(torch.tensor(entry.top_logprobs), values, rtol=0, atol=1e-4)
    outputs = driver.generate((first, second, third), 4)
    assert outputs == [reference_greedy(model, prompt, 4) for prompt in prompts]
    backend.close()


async def test_requests_that_join_while_others_stream_get_the_torch_backends_tokens(
    tmp_path: Path, fake: FakeTensorRt
) -> None:
    save_tiny(tmp_path, **SMALL)
    config, source = make_config(tmp_path, dtype="float32", backend="torch"), open_model(tmp_path)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    outputs = []
    for factory in (
        partial(load_cuda_backend, config, source, fake.device, on_fake(fake)),
        partial(load_backend, config, source),
    ):
        kv_cache = config.kv_cache_config
        async with LLM.from_backend(factory, scheduler_config=config.scheduler_config, kv_cache_config=kv_cache) as llm:
            handles = []
            for num_tokens in (20, 3, 5):  # each joins when the one before has begun to stream
                handles.append(llm.generate_async(make_prompt(num_tokens), params, streaming=True))
                await anext(handles[-1])
            outputs.append([list((await handle).token_ids) for handle in handles])
    assert outputs[0] == outputs[1]


def test_every_token_has_its_logits(tmp_path: Path, fake: FakeTensorRt) -> None:
    """More tokens at a time than the last plan has rows, while a step of another request is in flight."""
    model = save_tiny(tmp_path, **SMALL)
    backend = load_cuda_backend(
        make_config(tmp_path, dtype="float32"), open_model(tmp_path), fake.device, on_fake(fake)
    )
    driver = BackendDriver(backend)
    text, other = make_prompt(27), make_prompt(6)
    scored, beside = driver.add(3, text), driver.add(0, other)
    backend.launch(driver.batch((beside, 6)))
    logits: list[Tensor] = []
    for count in (17, 1, 9):
        parts = [rows.float().cpu().clone() for rows in backend.score(driver.batch((scored, count)))]
        assert sum(map(len, parts)) == count
        logits += parts
    torch.testing.assert_close(
        torch.log_softmax(torch.cat(logits), dim=-1), reference_logprobs(model, text), atol=2e-4, rtol=0
    )
    assert fake.executed.count("last") >= -(-len(text) // MAX_ROWS)
    beside.token_ids.extend(backend.collect().token_ids[0])
    driver.step((beside, 1))
    assert beside.output_ids == reference_greedy(model, other, 2)
    backend.close()


def test_a_plan_that_fails_in_a_step_ends_the_backend_with_the_librarys_words(
    tmp_path: Path, fake: FakeTensorRt
) -> None:
    save_tiny(tmp_path, **SMALL)
    backend = load_cuda_backend(
        make_config(tmp_path, dtype="float32"), open_model(tmp_path), fake.device, on_fake(fake)
    )
    driver = BackendDriver(backend)
    request = driver.add(0, make_prompt(3))
    fake.failing.add("execute_async_v3")
    with pytest.raises(EngineError, match=r"plan 'first' at T=16, S=1 cannot run: .*'execute_async_v3 was told"):
        driver.step((request, 3))
    backend.close()
