"""Plans of quantized models: which are built, what they hold, and that they run, are saved and load again."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.backends.tensorrt import backend as choosing
from llmengine.backends.tensorrt.backend import SegmentsChoice, load_tensorrt_backend, load_tensorrt_or_torch
from llmengine.backends.tensorrt.build_engine import BuildOptions, build_engine
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.constant_weights import constant_offsets, spool_constants
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.plan_weights import streamed_weights
from llmengine.backends.tensorrt.spec import BuildTarget, make_profiles
from llmengine.backends.tensorrt.verify_engine import verify_on_device
from llmengine.checkpoints.engine_dir import open_engine
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source, rounded_weights
from llmengine.checkpoints.source import ModelSource
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int8 import INT8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.mxfp4 import Mxfp4
from tests.backends.helpers import BackendDriver, save_tiny
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.plan_fakes import RTX_89, FakeBuild, content_of, get, make_request
from tests.backends.tensorrt.segment_helpers import library_or_skip

MAX_ROWS, MAX_TOKENS = 4, 16
TENSORRT = dataclasses.replace(RTX_89, flavour="tensorrt", device_name="NVIDIA L4")

CONFIGS = {
    "int8": QuantConfig("int8"),
    "int4": QuantConfig("int4", scales="group", group_size=32, method="rtn"),
    "int4, symmetric": QuantConfig("int4", scales="group", group_size=32, symmetric=True, method="rtn"),
    "w8a8": QuantConfig("int8", activations="token", method="rtn"),
    "fp8": QuantConfig("fp8", activations="token", method="rtn"),
    "fp8-block": QuantConfig("fp8", scales="block", activations="token", method="rtn"),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def fake(device: str) -> FakeTensorRt:
    return FakeTensorRt(torch.device(device, 0))


@pytest.fixture
def dense(tmp_path: Path) -> ModelSource:
    """A model with tied embeddings, whose output matrix is rounded from the embedding."""
    save_tiny(tmp_path / "model", tie_word_embeddings=True)
    return open_model(tmp_path / "model")


def quantized(dense: ModelSource, name: str) -> ModelSource:
    return quantized_source(dense, CONFIGS[name].resolve())


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


def plan_weights(source: ModelSource, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(streamed_weights(source.weights(dtype), source.formats, source.arch, dtype))


def make_choice(fake: FakeTensorRt, source: ModelSource, mode: Any, *, is_required: bool = True) -> SegmentsChoice:
    segments = segments_of(source.arch, "float32", make_profiles(MAX_ROWS, MAX_TOKENS), mode, source.formats)
    weights = {name: tensor.to(fake.device) for name, tensor in plan_weights(source).items()}
    plan_set = fake_plan_set(segments, weights, rtx=True)
    return SegmentsChoice(lambda: fake_library(fake, rtx=True), plan_set, source, PlanCache(), is_required=is_required)


def stored(source: ModelSource, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(source.weights(dtype))


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu().view(torch.uint8), tensor.view(torch.uint8)), name


def generated(backend: Any) -> list[int]:
    driver = BackendDriver(backend)
    request = driver.add(1, [5, 9, 200, 17, 30])
    for count in (3, 2, 1, 1):
        driver.step((request, count))
    backend.close()
    return list(request.output_ids)


@pytest.mark.parametrize("name", ["int8", "int4", "w8a8", "fp8-block"])
def test_a_quantized_model_runs_on_plans_and_keeps_what_it_was_stored_as(
    device: str, dense: ModelSource, name: str
) -> None:
    source = quantized(dense, name)
    expected = generated(load_cuda_backend(make_config(source), source, torch.device(device, 0)))
    modes: tuple[Any, ...] = ("inputs", "constants")
    for mode in modes:
        fake = FakeTensorRt(torch.device(device, 0))
        backend = load_tensorrt_backend(make_config(source), source, fake.device, make_choice(fake, source, mode))
        assert str(source.formats.default) in backend.info.description
        assert "tensorrt_rtx 0.fake plans" in backend.info.description
        assert_same(dict(backend.weights()), stored(source))
        assert generated(backend) == expected, mode
        assert {"first", "mid", "last"} <= set(fake.executed)


def test_auto_that_takes_torch_has_loaded_the_weights_once(
    fake: FakeTensorRt, dense: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[torch.dtype] = []

    def stream(dtype: torch.dtype) -> Any:
        readings.append(dtype)
        return dense.stream(dtype)

    source = quantized(dataclasses.replace(dense, stream=stream), "int4")
    choice = make_choice(fake, source, "inputs", is_required=False)
    del readings[:]
    monkeypatch.setattr(choosing, "dense_step_us", lambda segments, *_: 2.0 if "TensorRt" in str(segments) else 1.0)
    backend = load_tensorrt_backend(make_config(source), source, fake.device, choice)
    assert "torch is 2.00 times as fast" in backend.info.description
    assert readings == [torch.float32]
    assert_same(dict(backend.weights()), stored(source))
    backend.close()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_build_gets_the_constants_that_plans_read(dense: ModelSource, name: str, tmp_path: Path) -> None:
    source = quantized(dense, name)
    wanted = plan_weights(source, torch.float16)
    segments = segments_of(source.arch, "float16", make_profiles(4, 16), "constants", source.formats)
    stream = streamed_weights(source.weights(torch.float16), source.formats, source.arch, torch.float16)
    files = {segment.plan_name: path for segment, path in spool_constants(segments, stream, tmp_path)}
    assert files.keys() == {segment.plan_name for segment in segments}
    for segment in segments:
        content, names = files[segment.plan_name].read_bytes(), segment.weight_names()
        for weight in segment.spec.constant_weights:
            begin = constant_offsets(segment.spec)[weight.name]
            tensor = wanted[names[weight.name]]
            assert content[begin : begin + weight.size_bytes] == bytes(tensor.view(-1).view(torch.uint8).numpy())


def request_for(source: ModelSource, **changes: Any) -> Any:
    return make_request(**{"arch": source.arch, "formats": source.formats, **changes})


def test_plans_are_found_by_the_formats_of_their_matrices(dense: ModelSource, tmp_path: Path) -> None:
    build = FakeBuild()
    for name in ("int8", "int4", "int8"):
        source = quantized(dense, name)
        plans = get(tmp_path / "plans", build, request_for(source), source)
        assert content_of(plans)
    assert build.built == ["first", "mid", "last", "first", "mid.0", "last"], "int4 as constants"


def test_tensorrt_gets_quantized_weights_as_constants(dense: ModelSource, tmp_path: Path) -> None:
    source, build = quantized(dense, "int8"), FakeBuild()
    plans = get(tmp_path / "plans", build, request_for(source, producer=TENSORRT), source)
    assert plans.has_constants
    assert build.built == ["first", *(f"mid.{layer}" for layer in range(source.arch.num_layers - 1)), "last"]
    with pytest.raises(ConfigError, match=r"tensorrt dequantizes weights that a plan contains, not inputs; set"):
        get(tmp_path / "plans", build, request_for(source, producer=TENSORRT, weight_mode="inputs"), source)


@pytest.mark.parametrize(
    ("weight_format", "capability", "message"),
    [
        (
            Fp8(),
            80,
            r"need compute capability 8\.9, and the target is SM80, SM120; use quant_config.weights='int8' or 'int4'",
        ),
        (Mxfp4(), 89, r"no product with weights in format 'mxfp4'; use .* or backend='torch'"),
    ],
)
def test_formats_that_do_not_build_are_refused_before_a_build(
    dense: ModelSource, tmp_path: Path, weight_format: Any, capability: int, message: str
) -> None:
    source, build = dataclasses.replace(dense, formats=ModelFormats(weight_format)), FakeBuild()
    producer = dataclasses.replace(RTX_89, target=BuildTarget((capability, 120)))
    with pytest.raises(ConfigError, match=message):
        get(tmp_path / "plans", build, request_for(source, producer=producer), source)
    assert not build.built


def test_auto_says_why_torch_runs_a_format_without_plans(
    dense: ModelSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = library_or_skip()
    if 89 not in library.features.target_capabilities:
        pytest.skip("the library builds for the GPU of the machine only")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    source = quantized_source(dense, QuantConfig("mxfp4").resolve())
    backend = load_tensorrt_or_torch(make_config(source), source, torch.device("cpu"))
    said = "TensorRT cannot be used: TensorRT plans have no product with weights in format 'mxfp4'"
    assert said in backend.info.description
    assert f"backend='auto' uses torch: {said}" in caplog.text
    backend.close()
    with pytest.raises(ConfigError, match="backend='tensorrt' cannot be used: TensorRT plans have no product with"):
        load_tensorrt_or_torch(make_config(source, backend="tensorrt"), source, torch.device("cpu"))


def saved_engine(source: ModelSource, directory: Path) -> ModelSource:
    weights = source.weights(torch.float16)
    save_model(directory, source, weights, dtype="float16", formats=source.formats, tokenizer=None)
    return open_engine(directory)


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_an_engine_with_plans_is_built_saved_and_loaded_again(dense: ModelSource, name: str, tmp_path: Path) -> None:
    library = library_or_skip()
    if not library.features.target_capabilities:
        pytest.skip(f"{library} builds for the device at hand only")
    source = saved_engine(quantized(dense, name), tmp_path / "quantized")
    options = BuildOptions(4, 16, (89,), dtype="float16")
    built = build_engine(source, tmp_path / "engine", options, None, cache=PlanCache(tmp_path / "plans"))
    engine = open_engine(tmp_path / "engine")
    assert engine.formats == source.formats
    assert_same(stored(engine, torch.float16), stored(source, torch.float16))
    request = request_for(source, producer=built.plans.producer)
    build = FakeBuild()
    again = get(tmp_path / "other plans", build, request, engine)
    assert build.built == []
    assert again.segments == built.plans.segments
    assert {name: plan.file.sha256 for name, plan in again.plans.items()} == {
        name: plan.file.sha256 for name, plan in built.plans.plans.items()
    }


@pytest.mark.parametrize("mode", ["inputs", "constants"])
def test_plans_of_a_saved_quantized_engine_are_run_where_they_can_be(
    dense: ModelSource, tmp_path: Path, device: str, mode: Any
) -> None:
    source = saved_engine(quantized(dense, "int4"), tmp_path / "quantized")
    segments = segments_of(source.arch, "float16", make_profiles(4, 16), mode, source.formats)
    place = torch.device(device)
    weights = {name: tensor.to(place) for name, tensor in plan_weights(source, torch.float16).items()}
    plans = fake_plan_set(segments, weights)
    problems, text = verify_on_device(plans, source, fake_library(FakeTensorRt(place)), place)
    assert problems == []
    assert "outputs compared" in text


def test_output_matrices_of_tied_models_are_found_in_the_stream(dense: ModelSource) -> None:
    source = quantized(dense, "int8")
    weights = plan_weights(source)
    wanted = INT8.quantize(weights["embed_tokens.weight"])
    assert torch.equal(weights["lm_head.weight"].T, wanted["weight"])
    assert torch.equal(weights["lm_head.weight_scale"], wanted["weight_scale"])


@pytest.mark.parametrize("mode", ["inputs", "constants"])
@pytest.mark.parametrize("head", [DENSE, Int8Groups(32)])
def test_a_quantized_embedding_computes_logits_too(
    fake: FakeTensorRt, dense: ModelSource, mode: Any, head: WeightFormat
) -> None:
    """Tied, in its own format where the output matrix has none, else in that one."""
    formats = ModelFormats(DENSE, {"embed_tokens": Int8Groups(32), "lm_head": head, "layers.0.o": INT8})
    source = dataclasses.replace(
        dense, formats=formats, stream=lambda dtype: rounded_weights(dense.arch, formats, dense.weights(dtype))
    )
    backend = load_tensorrt_backend(make_config(source), source, fake.device, make_choice(fake, source, mode))
    assert_same(dict(backend.weights()), stored(source))
    assert generated(backend) == generated(load_cuda_backend(make_config(source), source, fake.device))
