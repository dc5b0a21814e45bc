"""TensorRT on several ranks: plans of all ranks, and real processes that run them on fakes, or not, together."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pretended_hosts import PretendedHosts
from llmengine import backends
from llmengine.backends import load_backend
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.backends.shared_cuda.loading import load_shared_cuda_backend
from llmengine.backends.tensorrt import shared
from llmengine.backends.tensorrt.backend import together
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.model_segments import shard_segments_of
from llmengine.backends.tensorrt.plan_set import SavedPlanSet
from llmengine.backends.tensorrt.shared import PlannedSegments, load_shared_tensorrt_or_torch, prepare_shared_plans
from llmengine.backends.tensorrt.spec import WeightMode, make_profiles, segments_by_plan
from llmengine.backends.tensorrt.verify import Verification
from llmengine.backends.tensorrt.verify_engine import verify_on_device
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.saved_files import PlanHolder
from llmengine.checkpoints.sharded_source import ShardPlan
from llmengine.checkpoints.source import ModelSource
from llmengine.cli.main import main
from llmengine.config import KvCacheConfig, ModelConfig, ParallelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError, CorruptFileError, EngineError
from llmengine.quantization.model_formats import DENSE_MODEL
from tests.backends.helpers import BackendDriver, reference_greedy, save_tiny
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library
from tests.backends.tensorrt.plan_fakes import ARCH, FakeBuild, content_of, get, make_request, make_source
from tests.backends.tensorrt.rank_fakes import fake_plans_of_ranks, planned
from tests.backends.tensorrt.segment_helpers import library_or_skip
from tests.models.family_helpers import make_family

MAX_ROWS, MAX_TOKENS = 4, 16
PROMPT = [5, 90, 17, 44, 23, 8, 71]
UNEVEN = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 48}
TWO_CPUS = [torch.device("cpu")] * 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs that plans are built for, one of which is asked for."""
    if 89 not in library_or_skip().features.target_capabilities:
        pytest.skip("the library builds for the GPU of the machine only")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def make_config(directory: Path, **settings: Any) -> ModelConfig:
    config = ModelConfig(
        directory,
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(
            max_batch_size=MAX_ROWS, max_tokens_per_step=MAX_TOKENS, max_tokens_per_mixed_step=MAX_TOKENS
        ),
        **{"dtype": "float32", **settings},
    )
    config.parallel_config.tp_size = 2
    return config.resolve()


def devices_of(device: str) -> list[torch.device]:
    """Two devices of a type; skips the test if there are fewer."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    return [torch.device(device, rank) for rank in range(2)] if device == "cuda" else TWO_CPUS


@contextmanager
def on_ranks(
    config: ModelConfig, source: ModelSource, device: str, rank_1: str = "", mode: WeightMode = "inputs"
) -> Iterator[PreparingRanksBackend]:
    """Two processes that run fake plans; see `planned`."""
    plan = ShardPlan(source.arch, source.formats, 2)
    placed = shard_segments_of(plan, "float32", make_profiles(MAX_ROWS, MAX_TOKENS), mode)
    segments = planned(fake_plans_of_ranks(source, plan, placed), config.backend == "tensorrt", device, rank_1)
    backend = load_shared_cuda_backend(config, source, devices_of(device), segments=segments)
    try:
        yield backend
    finally:
        backend.close()


def answer(backend: PreparingRanksBackend, num_tokens: int = 3) -> list[int]:
    driver = BackendDriver(backend)
    request = driver.add(1, PROMPT)
    for count in (5, 2, *[1] * (num_tokens - 1)):
        driver.step((request, count))
    return request.output_ids


@pytest.mark.parametrize(
    ("shape", "mode"), [({}, "constants"), (UNEVEN, "inputs")], ids=["even, constants", "uneven, inputs"]
)
def test_plans_on_two_ranks_give_the_tokens_of_transformers(
    tmp_path: Path, device: str, shape: dict[str, Any], mode: Any
) -> None:
    model = save_tiny(tmp_path / "model", **shape, attention_bias=True)
    config, source = make_config(tmp_path / "model", backend="tensorrt"), open_model(tmp_path / "model")
    with on_ranks(config, source, device, mode=mode) as backend:
        assert "tensorrt 0.fake plans, KV cache" in backend.info.description
        assert "2 ranks share each matrix" in backend.info.description
        assert answer(backend) == reference_greedy(model, PROMPT, 3)
        assert isinstance(backend, PlanHolder)
        saved = backend.saved_plans()
        assert saved is not None
        found = Verification.from_dict(saved.facts["verification"])
        assert found is not None
        assert {check.plan for check in found.checks} == set(saved.facts["plans"])
        assert SavedPlanSet.read(saved, "plans").tp_size == 2
        weights = dict(backend.weights())
        assert all(torch.equal(weights[name], tensor) for name, tensor in source.weights(torch.float32))


def test_norms_after_sums_and_quantized_weights(tmp_path: Path, device: str) -> None:
    """Of Gemma 2 with int8, both of which the plans of a rank read in forms of their own."""
    model = make_family("gemma2")
    model.save_pretrained(tmp_path)
    config = make_config(tmp_path, backend="tensorrt", quant_config=QuantConfig(weights="int8"))
    source = quantized_source(open_model(tmp_path), config.quant_config)
    outputs = []
    with on_ranks(config, source, device) as backend:
        assert "plans" in backend.info.description
        outputs.append(answer(backend))
    backend = load_shared_cuda_backend(dataclasses.replace(config, backend="torch"), source, devices_of(device))
    outputs.append(answer(backend))
    backend.close()
    assert outputs[0] == outputs[1]


def test_weights_that_cannot_be_calibrated_end_all_ranks(tmp_path: Path, device: str) -> None:
    """The others wait for weights then, and for nothing else that rank 0 might tell them."""
    save_tiny(tmp_path, num_hidden_layers=1)
    quant = QuantConfig.preset("fp8-gptq", calibration_prompts=[PROMPT] * 3, num_calibration_samples=3)
    config = make_config(tmp_path, quant_config=quant)
    source = quantized_source(open_model(tmp_path), config.quant_config)

    def stream(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        yield next(iter(source.stream(dtype)))
        raise CorruptFileError("model: damaged")

    deadline = time.monotonic() + 120.0

    def check_wanted() -> None:
        assert time.monotonic() < deadline, "rank 0 waits for ranks that wait for it"

    placed = shard_segments_of(
        ShardPlan(source.arch, source.formats, 2), "float32", make_profiles(MAX_ROWS, MAX_TOKENS), "inputs"
    )
    plans = fake_plans_of_ranks(source, ShardPlan(source.arch, source.formats, 2), placed)
    damaged = dataclasses.replace(source, stream=stream)
    with pytest.raises(CorruptFileError, match=r"^model: damaged$"):
        load_shared_cuda_backend(
            config, damaged, devices_of(device), check_wanted, segments=planned(plans, is_required=False, device=device)
        )


@pytest.mark.parametrize(
    ("rank_1", "cause"),
    [
        ("deserialize_cuda_engine", "rank 1: plan 'first' cannot be loaded: .*_engine was told to fail"),
        ("create_execution_context", "rank 1: plan '[a-z]+' at .* cannot be prepared"),
        ("wrong", r"plans of tensorrt 0.fake disagree with torch on .*: .*\(limit "),
    ],
    ids=["not loaded", "not prepared", "wrong"],
)
def test_a_rank_whose_plans_cannot_be_used_decides_for_all(
    tmp_path: Path, device: str, rank_1: str, cause: str
) -> None:
    model = save_tiny(tmp_path, num_hidden_layers=1)
    source = open_model(tmp_path)
    with on_ranks(make_config(tmp_path), source, device, rank_1) as backend:
        assert re.search(rf"Triton \(TensorRT cannot be used: {cause}", backend.info.description)
        assert answer(backend, 1) == reference_greedy(model, PROMPT, 1)
    with (
        pytest.raises(ConfigError, match=f"backend='tensorrt' cannot be used: {cause}"),
        on_ranks(make_config(tmp_path, backend="tensorrt"), source, device, rank_1),
    ):
        pass


def test_rank_0_measures_for_all(tmp_path: Path, device: str) -> None:
    """On a CPU the times mean nothing, but every rank has to take what rank 0's say."""
    model = save_tiny(tmp_path, num_hidden_layers=1)
    with on_ranks(make_config(tmp_path), open_model(tmp_path), device) as backend:
        assert answer(backend, 1) == reference_greedy(model, PROMPT, 1)
        saved = backend.saved_plans()
    assert set(saved.facts["verification"]["step_us"]) == {"1", "4"}


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    class Pair:
        """Stands for two ranks, of which this is the second."""

        rank = 1

        def of_all(self, own: Any) -> list[Any]:
            return [(None, "sound"), pickle.loads(pickle.dumps(own))]

    def fail(error: Exception) -> None:
        raise error

    pair: Any = Pair()
    assert together(pair, lambda: "also") == ["sound", "also"]
    with pytest.raises(EngineError, match=r"^rank 1: out of memory$"):
        together(pair, partial(fail, torch.OutOfMemoryError("out of memory")))
    with pytest.raises(CorruptFileError, match=r"^model: damaged$"):
        together(pair, partial(fail, CorruptFileError("model: damaged")))
    with pytest.raises(ZeroDivisionError):
        together(pair, partial(fail, ZeroDivisionError()))


def test_plans_of_all_ranks_are_built_once_and_saved(tmp_path: Path) -> None:
    build, request = FakeBuild(), make_request(tp_size=3)
    plans = get(tmp_path / "cache", build, request)
    assert plans.tp_size == 3
    content_of(plans)
    assert build.built == list(plans.plans)
    names = {rank: set(plans.of_rank(rank).plans) for rank in range(3)}
    assert set().union(*names.values()) == set(plans.plans)
    assert names[0] == {"first", "o", "mlp", "next", "head"}
    again = get(tmp_path / "cache", build, request)
    assert len(build.built) == len(plans.plans), "the cache has all of them"
    assert again.plans == plans.plans
    saved = make_source(plans=plans.to_saved())
    loaded = get(tmp_path / "other", build, request, saved)
    assert len(build.built) == len(plans.plans)
    assert loaded.plans == plans.plans
    assert loaded.segments == plans.segments


@pytest.mark.parametrize(("built_for", "wanted"), [(2, 1), (1, 2), (2, 3)])
def test_saved_plans_for_another_number_of_ranks_are_rebuilt(
    tmp_path: Path, built_for: int, wanted: int, caplog: pytest.LogCaptureFixture
) -> None:
    build = FakeBuild()
    saved = make_source(plans=get(tmp_path / "one", build, make_request(tp_size=built_for)).to_saved())
    before = len(build.built)
    plans = get(tmp_path / "other", build, make_request(tp_size=wanted), saved)
    assert build.built[before:] == list(plans.plans)
    assert f"they were built for tp_size={built_for}, not for {wanted}" in caplog.text


def test_weights_in_plans_are_each_ranks_own_and_read_from_the_checkpoint(tmp_path: Path) -> None:
    build = FakeBuild()
    plans = get(tmp_path, build, make_request(tp_size=2, weight_mode="constants"))
    contents = content_of(plans)
    assert len({one["constants"] for one in contents.values()}) == len(contents) == 2 * (3 * ARCH.num_layers + 1)
    of_rank_0 = plans.of_rank(0).plans
    assert contents.keys() == {*of_rank_0, *(f"{name}.rank1" for name in of_rank_0)}
    again = get(tmp_path, build, make_request(tp_size=2, weight_mode="constants"))
    assert again.plans == plans.plans
    assert len(build.built) == len(contents)


@pytest.mark.parametrize("mode", ["inputs", "constants"])
def test_a_saved_engines_plans_of_all_ranks_are_run_where_they_can_be(tmp_path: Path, mode: Any) -> None:
    arch = dataclasses.replace(ARCH, num_layers=2, num_heads=6, num_kv_heads=3)
    source, plan = make_source(arch, path=tmp_path), ShardPlan(arch, DENSE_MODEL, 2)
    placed = shard_segments_of(plan, "float16", make_profiles(4, 16), mode)
    plans = fake_plans_of_ranks(source, plan, placed)
    problems, text = verify_on_device(plans, source, fake_library(FakeTensorRt(TWO_CPUS[0])), TWO_CPUS[0])
    assert problems == []
    num_outputs = sum(len(one.spec.outputs) for one in segments_by_plan(placed).values())
    assert f"{num_outputs} outputs compared" in text


def test_the_command_builds_plans_of_two_ranks(
    tmp_path: Path, gpus: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", **UNEVEN, num_hidden_layers=1)
    engine = tmp_path / "engine"
    command = ["build", str(tmp_path / "model"), "--tp", "2", "--backend", "tensorrt", "--sm", "89"]
    limits = ["--max-batch-size", str(MAX_ROWS), "--max-tokens-per-step", str(MAX_TOKENS)]
    assert main([*command, *limits, "--dtype", "float32", "-o", str(engine)]) == 0
    assert "[7/7] " in capsys.readouterr().err
    assert main(["inspect", str(engine)]) == 0
    printed = capsys.readouterr().out
    names = ["first", "o", "mlp", "head", "first.rank1", "o.rank1", "head.rank1"]
    assert all(f" {name} " in printed for name in names)
    assert "of 2 ranks" in printed
    assert main(["verify", str(engine)]) == 0
    assert main([*command, "--weights", "fastest", "-o", str(tmp_path / "other")]) == 2
    assert "weight_mode='fastest' measures on one GPU, and tp_size=2" in capsys.readouterr().err
    monkeypatch.setattr(subprocess, "Popen", None)  # what was saved is loaded, though the cache has gone
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "empty"))
    loaded = prepare_shared_plans(make_config(engine, backend="tensorrt"), open_model(engine), TWO_CPUS)
    assert len(loaded.plan_set.plans) == 7


def test_real_plans_of_two_ranks_are_built_and_without_a_driver_torch_runs_on_both(
    tmp_path: Path, gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    model = save_tiny(tmp_path / "model", **UNEVEN, num_hidden_layers=1)
    source = open_model(tmp_path / "model")
    backend = load_shared_tensorrt_or_torch(make_config(tmp_path / "model"), source, TWO_CPUS)
    assert "Triton (TensorRT cannot be used: rank 0: plan 'first' cannot be loaded: " in backend.info.description
    assert "; rank 1: plan 'first.rank1' cannot be loaded: " in backend.info.description
    assert answer(backend, 1) == reference_greedy(model, PROMPT, 1)
    saved = backend.saved_plans()
    assert {"first.plan", "first.rank1.plan", "mlp.plan", "head.plan"} <= saved.files.keys()
    assert len({file.sha256 for file in saved.files.values()}) == len(saved.files)
    backend.close()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the cache has the plans, and no rank is started")

    monkeypatch.setattr(shared, "load_shared_cuda_backend", lambda *arguments: arguments[-1])
    monkeypatch.setattr(subprocess, "Popen", never)
    required: Any = load_shared_tensorrt_or_torch(make_config(tmp_path / "model", backend="tensorrt"), source, TWO_CPUS)
    assert isinstance(required, PlannedSegments)
    assert required.is_required
    assert required.plan_set.plans.keys() == {name.removesuffix(".plan") for name in saved.files}


def test_what_cannot_be_is_refused_before_ranks_are_started(
    tmp_path: Path, gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("no rank is started, and nothing is built")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shared, "obtain_plans", never)
    save_tiny(tmp_path, hidden_size=64, intermediate_size=128)
    source = open_model(tmp_path)

    def refused(expected: str, hosts: Any = None, devices: Sequence[torch.device] = TWO_CPUS, **settings: Any) -> None:
        config = make_config(tmp_path, backend="tensorrt", **settings)
        quantized = quantized_source(source, config.quant_config)
        monkeypatch.setattr(shared, "load_shared_cuda_backend", never)
        with pytest.raises(ConfigError, match=f"backend='tensorrt' cannot be used: .*{expected}.*'auto'"):
            load_shared_tensorrt_or_torch(config, quantized, devices, rank_hosts=hosts)
        monkeypatch.setattr(shared, "load_shared_cuda_backend", lambda *arguments: arguments[-1])
        auto = dataclasses.replace(config, backend="auto")
        chosen: Any = load_shared_tensorrt_or_torch(auto, quantized, devices, rank_hosts=hosts)
        assert chosen.reason.startswith("TensorRT cannot be used: ")

    int4 = QuantConfig.preset("int4-rtn", group_size=32)
    refused("contain weights in these formats, which are not sent to ranks", PretendedHosts((0, 1)), quant_config=int4)
    gptq = QuantConfig.preset("int4-gptq", group_size=32)
    refused("excludes calibrating such weights while they load; save", quant_config=gptq)
    refused("no product with weights in format 'mxfp4", quant_config=QuantConfig(weights="mxfp4"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.type}")
    others = [torch.device("cpu"), torch.device("meta")]
    refused("rank 0 has GPU cpu and rank 1 has GPU meta", devices=others)
    one_head = dataclasses.replace(source, arch=dataclasses.replace(source.arch, num_heads=1, num_kv_heads=1))
    with pytest.raises(ConfigError, match=r"tp_size=2: .*sizes that work: 1$"):
        load_shared_tensorrt_or_torch(make_config(tmp_path), one_head, TWO_CPUS)


def test_ranks_on_other_hosts_get_plans_without_files(tmp_path: Path, gpus: None) -> None:
    save_tiny(tmp_path, num_hidden_layers=1)
    made = prepare_shared_plans(make_config(tmp_path), open_model(tmp_path), TWO_CPUS, PretendedHosts((0, 1)))
    assert all(isinstance(plan.file.content, bytes) for plan in made.plan_set.plans.values())
    sent = pickle.loads(pickle.dumps(made))
    assert sent.plan_set == made.plan_set
    assert PlanCache().with_findings(made.plan_set).plans == made.plan_set.plans


def test_a_model_that_ranks_share_asks_for_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    save_tiny(tmp_path)
    source = open_model(tmp_path)
    monkeypatch.setattr(backends, "choose_device", lambda name: "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backends, "_has_tensorrt", lambda: True)
    monkeypatch.setattr(shared, "load_shared_tensorrt_or_torch", lambda *arguments: asked.append(arguments))
    for name in ("auto", "tensorrt"):
        config: Any = make_config(tmp_path, backend=name)
        load_backend(config, source)
    assert [(config.backend, devices) for config, _, devices, *_ in asked] == [
        (name, [torch.device("cuda", 0), torch.device("cuda", 1)]) for name in ("auto", "tensorrt")
    ]
    with pytest.raises(ConfigError, match="deterministic=True excludes backend='tensorrt'"):
        load_backend(make_config(tmp_path, backend="tensorrt", deterministic=True), source)
    with pytest.raises(ConfigError, match=r"hosts=\[0, 1, 1\] must have a number for each of 2 ranks"):
        load_backend(make_config(tmp_path), source, rank_hosts=PretendedHosts((0, 1, 1)))
    assert len(asked) == 2, "nothing is built for such hosts"
    stages = make_config(tmp_path, backend="tensorrt", parallel_config=ParallelConfig(pp_size=2))
    with pytest.raises(ConfigError, match=r"not cut into stages, but parallel_config.pp_size=2; .*tp_size alone"):
        load_backend(stages, source)
