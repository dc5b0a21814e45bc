"""The backends "auto", "tensorrt" and "torch": which segments each makes, reports and keeps."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import backends
from llmengine.backends import load_backend
from llmengine.backends.cuda import loading
from llmengine.backends.cuda.fused_segments import FusedSegments, SegmentsContext
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.backends.tensorrt import backend as choosing
from llmengine.backends.tensorrt.backend import (
    SegmentsChoice,
    load_tensorrt_backend,
    load_tensorrt_or_torch,
    prepare_plans,
)
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import load_library
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.segments import TensorRtSegments
from llmengine.backends.tensorrt.spec import make_profiles
from llmengine.backends.tensorrt.verify import Verification
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.saved_files import PlanHolder
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError, EngineError
from tests.backends.helpers import BackendDriver, save_tiny
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.segment_helpers import library_or_skip
from tests.backends.tensorrt.torch_reference import reference

MAX_ROWS, MAX_TOKENS = 4, 16


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def fake(device: str) -> FakeTensorRt:
    return FakeTensorRt(torch.device(device, 0))


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    save_tiny(tmp_path / "model")
    return open_model(tmp_path / "model")


def make_config(source: ModelSource, **settings: Any) -> ModelConfig:
    return ModelConfig(
        source.path,
        dtype="float32",
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(
            max_batch_size=MAX_ROWS, max_tokens_per_step=MAX_TOKENS, max_tokens_per_mixed_step=MAX_TOKENS
        ),
        **settings,
    ).resolve()


def make_choice(
    fake: FakeTensorRt, source: ModelSource, *, is_required: bool = False, mode: Any = "inputs", rtx: bool = False
) -> SegmentsChoice:
    segments = segments_of(source.arch, "float32", make_profiles(MAX_ROWS, MAX_TOKENS), mode)
    weights = {name: tensor.to(fake.device) for name, tensor in source.weights(torch.float32)}
    cache = PlanCache()
    plan_set = cache.with_findings(fake_plan_set(segments, weights, rtx))
    return SegmentsChoice(lambda: fake_library(fake, rtx), plan_set, source, cache, is_required=is_required)


def make_context(fake: FakeTensorRt, source: ModelSource) -> SegmentsContext:
    tensors = {name: tensor.to(fake.device) for name, tensor in source.weights(torch.float32)}
    logits = torch.zeros((MAX_ROWS, source.arch.vocab_size), device=fake.device)
    return SegmentsContext(
        source.arch, CudaWeights.of(source.arch, tensors, torch.float32), make_config(source), logits, pdl=False
    )


def take_times(monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float) -> None:
    """Pretend that each step takes the given time, without running it."""

    def measured(segments: Any, context: SegmentsContext, num_tokens: int) -> float:
        return ours if isinstance(segments, TensorRtSegments) else theirs

    monkeypatch.setattr(choosing, "dense_step_us", measured)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was kept and needs no second look")


def wrong(spec: Any, feeds: Any) -> Any:
    return {name: tensor * 1.5 for name, tensor in reference(spec, feeds, torch.float32).items()}


def test_auto_takes_plans_that_are_right_and_not_slower(
    fake: FakeTensorRt, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_times(monkeypatch, 100.0, 100.0)
    tunable = make_choice(fake, source).build(make_context(fake, source))
    assert isinstance(tunable.segments, TensorRtSegments)
    assert tunable.description == "tensorrt 0.fake plans"
    # The next process finds both in the cache.
    monkeypatch.setattr(choosing, "verify_plans", never)
    monkeypatch.setattr(choosing, "dense_step_us", never)
    again = make_choice(fake, source)
    assert isinstance(again.build(make_context(fake, source)).segments, TensorRtSegments)
    kept = Verification.from_dict(again.plan_set.verification or {})
    assert kept is not None
    assert kept.step_us == {1: (100.0, 100.0), 4: (100.0, 100.0)}


def test_auto_takes_torch_where_it_is_faster_and_says_so(
    fake: FakeTensorRt, source: ModelSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    take_times(monkeypatch, 150.0, 100.0)
    caplog.set_level(logging.INFO)
    for _ in range(2):  # measured, and remembered
        tunable = make_choice(fake, source).build(make_context(fake, source))
        assert isinstance(tunable.segments, FusedSegments)
        assert tunable.description == "Triton (torch is 1.50 times as fast as tensorrt 0.fake)"
        monkeypatch.setattr(choosing, "dense_step_us", never)
    assert "with TensorRT and with torch: 1: 150 and 100, 4: 150 and 100" in caplog.text


def test_wrong_plans_are_never_used(
    fake: FakeTensorRt, source: ModelSource, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.execute = wrong
    tunable = make_choice(fake, source).build(make_context(fake, source))
    assert isinstance(tunable.segments, FusedSegments)
    assert "plans of tensorrt 0.fake disagree with torch on" in tunable.description
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "rms error" in warning.getMessage()
    # What was found is remembered as well, and by name it is an error.
    monkeypatch.setattr(choosing, "verify_plans", never)
    with pytest.raises(ConfigError, match=r"backend='tensorrt' cannot be used: .* (first|mid|last): .* \(limit "):
        make_choice(fake, source, is_required=True).build(make_context(fake, source))


def test_by_name_nothing_is_timed(fake: FakeTensorRt, source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "dense_step_us", never)
    tunable = make_choice(fake, source, is_required=True).build(make_context(fake, source))
    assert isinstance(tunable.segments, TensorRtSegments)


def test_plans_that_do_not_load_lead_to_torch_or_an_error(
    fake: FakeTensorRt, source: ModelSource, caplog: pytest.LogCaptureFixture
) -> None:
    fake.failing.add("deserialize_cuda_engine")
    tunable = make_choice(fake, source).build(make_context(fake, source))
    assert isinstance(tunable.segments, FusedSegments)
    assert "deserialize_cuda_engine was told to fail" in tunable.description
    assert "uses torch: TensorRT cannot be used: plan 'first' cannot be loaded" in caplog.text
    with pytest.raises(ConfigError, match="cannot be used: plan 'first' cannot be loaded"):
        make_choice(fake, source, is_required=True).build(make_context(fake, source))


def test_a_lack_of_memory_leads_to_torch(
    fake: FakeTensorRt, source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(choosing, "verify_plans", full)
    tunable = make_choice(fake, source).build(make_context(fake, source))
    assert tunable.description == "Triton (TensorRT cannot be used: the device is full)"


def test_plans_with_constants_are_verified_with_the_models_weights(fake: FakeTensorRt, source: ModelSource) -> None:
    context = make_context(fake, source)
    for tensor in context.weights.by_name.values():
        tensor.fill_(torch.nan)  # as allocated: nothing in them yet
    tunable = make_choice(fake, source, is_required=True, mode="constants").build(context)
    assert isinstance(tunable.segments, TensorRtSegments)


@pytest.mark.parametrize("plans_are_wrong", [False, True])
def test_plans_with_constants_are_loaded_with_one_reading_of_the_checkpoint(
    fake: FakeTensorRt, source: ModelSource, plans_are_wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[torch.dtype] = []

    def stream(dtype: torch.dtype) -> WeightStream:
        readings.append(dtype)
        return source.stream(dtype)

    counted = dataclasses.replace(source, stream=stream)
    choice = make_choice(fake, counted, mode="constants")
    del readings[:]
    take_times(monkeypatch, 100.0, 100.0)
    if plans_are_wrong:
        fake.execute = wrong
    backend = load_tensorrt_backend(make_config(source), counted, fake.device, choice)
    assert ("disagree with torch" in backend.info.description) == plans_are_wrong
    assert readings == [torch.float32]
    loaded = dict(backend.weights())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in source.weights(torch.float32))
    backend.close()


def test_the_backend_saves_its_plans_and_keeps_compiled_kernels(
    fake: FakeTensorRt, source: ModelSource, caplog: pytest.LogCaptureFixture
) -> None:
    choice = make_choice(fake, source, is_required=True, rtx=True)
    backend = load_tensorrt_backend(make_config(source), source, fake.device, choice)
    assert isinstance(backend, PlanHolder)
    saved = backend.saved_plans()
    assert saved is not None
    assert saved.facts["verification"]["library"] == "tensorrt_rtx 0.fake"
    assert backend.info.description.endswith("tensorrt_rtx 0.fake plans, KV cache in float32")
    backend.close()
    recalled = make_choice(fake, source, rtx=True).plan_set
    assert recalled.library_cache == choice.plan_set.library_cache == b"cache%d" % fake.num_contexts
    fake.failing.add("serialize")
    choice.store_compiled_kernels()
    assert "the runtime cache cannot be saved" in caplog.text


def test_plans_give_the_tokens_of_torch_with_a_quantized_kv_cache(fake: FakeTensorRt, source: ModelSource) -> None:
    config = make_config(source, quant_config=QuantConfig(kv_cache="fp8"))
    choice = make_choice(fake, source, is_required=True)
    outputs = []
    for backend in (
        load_tensorrt_backend(config, source, fake.device, choice),
        load_cuda_backend(config, source, fake.device),
    ):
        driver = BackendDriver(backend)
        request = driver.add(1, [5, 9, 200, 17, 30])
        for count in (3, 2, 1):
            driver.step((request, count))
        outputs.append((backend.info.kv_dtype, request.output_ids))
        backend.close()
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == "float8_e4m3fn"
    assert "mid" in fake.executed


def test_a_model_is_saved_without_plans_whose_files_have_gone(
    fake: FakeTensorRt, source: ModelSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice = make_choice(fake, source, is_required=True)
    plan = choice.plan_set.plans["mid"]
    (tmp_path / "mid.plan").write_bytes(plan.read())
    in_cache = dataclasses.replace(plan.file, content=tmp_path / "mid.plan")
    plans = {**choice.plan_set.plans, "mid": dataclasses.replace(plan, file=in_cache)}
    choice.plan_set = choice.plan_set.replace(plans=plans)
    backend = load_tensorrt_backend(make_config(source), source, fake.device, choice)
    assert backend.saved_plans() is not None
    (tmp_path / "mid.plan").unlink()
    assert backend.saved_plans() is None
    assert "the engine is saved without plans, and loading it will rebuild them: " in caplog.text
    assert "mid.plan: is missing" in caplog.text
    backend.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_real_plans_are_built_and_without_a_driver_torch_runs_the_model(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if 89 not in library_or_skip().features.target_capabilities:
        pytest.skip("the library builds for the GPU of the machine only")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    backend = load_tensorrt_or_torch(make_config(source), source, torch.device("cpu"))
    assert "Triton (TensorRT cannot be used: plan 'first' cannot be loaded: " in backend.info.description
    assert "install a newer NVIDIA driver" in caplog.text
    assert isinstance(backend, PlanHolder)
    saved = backend.saved_plans()
    assert saved is not None
    assert sorted(saved.files) == ["first.plan", "last.plan", "mid.plan"]
    backend.close()
    monkeypatch.setattr(subprocess, "Popen", never)  # nothing is built: the cache has the plans
    with pytest.raises(
        ConfigError, match=r"backend='tensorrt' cannot be used: plan 'first' cannot be loaded: .*driver"
    ):
        load_tensorrt_or_torch(make_config(source, backend="tensorrt"), source, torch.device("cpu"))


def test_a_device_that_the_library_does_not_run_on_is_refused_before_a_build(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_or_skip()
    monkeypatch.setattr(choosing, "obtain_plans", never)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if 90 in library.features.target_capabilities or not library.features.target_capabilities:
        pytest.skip(f"{library} runs there")
    with pytest.raises(ConfigError, match=r"does not support compute capability 9\.0"):
        prepare_plans(make_config(source), source, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"backend='tensorrt' cannot be used: .* does not support .*'torch'"):
        load_tensorrt_or_torch(make_config(source, backend="tensorrt"), source, torch.device("cuda"))


def test_saved_plans_that_cannot_be_built_again_are_named(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        failure = EngineError("no space left")
        failure.add_note("the saved plans cannot be used: they were built for SM89, not for SM120")
        raise failure

    monkeypatch.setattr(choosing, "prepare_plans", fail)
    monkeypatch.setattr(choosing, "load_cuda_backend", lambda config, source, device, make: make)
    monkeypatch.setattr(choosing, "cuda_segments_factory", lambda reason: reason)
    device = torch.device("cuda")
    said = "no space left; the saved plans cannot be used: they were built for SM89, not for SM120"
    assert load_tensorrt_or_torch(make_config(source), source, device) == f"TensorRT cannot be used: {said}"  # type: ignore[comparison-overlap]
    with pytest.raises(ConfigError, match=f"cannot be used: {said}; backend='auto'"):
        load_tensorrt_or_torch(make_config(source, backend="tensorrt"), source, device)


def test_without_a_library_auto_takes_torch_at_once_and_by_name_it_is_an_error(
    fake: FakeTensorRt, source: ModelSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    made: list[Any] = []
    monkeypatch.setattr(backends, "choose_device", lambda name: "cuda:0")
    monkeypatch.setattr(loading, "load_cuda_backend", lambda *arguments: made.append(arguments[3:]))
    folder = ModuleSpec("tensorrt", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder if name == "tensorrt" else None)
    for name in [name for name in sys.modules if name.startswith("llmengine.backends.tensorrt")]:
        monkeypatch.delitem(sys.modules, name)
    load_backend(make_config(source), source)
    assert not [name for name in sys.modules if name.startswith("llmengine.backends.tensorrt")]
    assert "backend='auto' uses torch: TensorRT is not installed (pip install llmengine[tensorrt])" in caplog.text
    context = make_context(fake, source)
    assert made[0][0](context).description == "Triton (TensorRT is not installed)"
    load_backend(make_config(source, backend="torch"), source)
    assert made[1] == ()


def test_by_name_a_missing_library_is_an_error_that_says_how_to_get_it(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "load_library", load_library.__wrapped__)  # not what an earlier call found
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install llmengine\[tensorrt\].*pip install llmengine\[tensorrt-rtx\]"):
        load_tensorrt_or_torch(make_config(source, backend="tensorrt"), source, torch.device("cuda"))


def test_on_a_cpu_tensorrt_is_refused_and_auto_says_nothing(
    source: ModelSource, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for name in [name for name in sys.modules if name.startswith("llmengine.backends.tensorrt")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match="backend='tensorrt' needs a CUDA device, but device is 'cpu'"):
        load_backend(make_config(source, device="cpu", backend="tensorrt"), source)
    load_backend(make_config(source, device="cpu"), source).close()
    assert "TensorRT" not in caplog.text
    assert not [name for name in sys.modules if name.startswith("llmengine.backends.tensorrt")]
