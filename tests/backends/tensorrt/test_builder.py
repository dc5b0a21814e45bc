"""Plans are really built, in worker processes, for devices that this machine does not have. None is executed."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmengine.backends.tensorrt import builder_process
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob, build_plan, build_plans, default_num_processes
from llmengine.backends.tensorrt.builder_process import serialize_segment
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.constant_weights import constant_offsets, map_constants, spool_constants
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.obtain import obtain_plans
from llmengine.backends.tensorrt.spec import BuildTarget, PlacedSegment, WeightMode, segments_by_plan
from llmengine.checkpoints.dummy_weights import stream_dummy
from llmengine.errors import ConfigError, EngineError
from llmengine.models.arch import ModelArch
from tests.backends.tensorrt.plan_fakes import make_request, make_source
from tests.backends.tensorrt.segment_helpers import (
    DTYPES,
    FAMILIES,
    PROFILES,
    library_or_skip,
    placed,
    random_weights,
    raw,
    tiny_arch,
)

ALL = BuildTarget((80, 86, 89, 120))
WORKERS = 2


@pytest.fixture(scope="module")
def library() -> Library:
    found = library_or_skip()
    if not found.features.target_capabilities:
        pytest.skip(f"{found} builds for the device of this machine only")
    return found


def jobs(
    arch: ModelArch, dtype: str, mode: WeightMode, directory: Path, targets: Sequence[BuildTarget] = (ALL,)
) -> Iterator[PlanJob]:
    segments = list(segments_by_plan(segments_of(arch, dtype, PROFILES, mode)).values())  # type: ignore[arg-type]
    sources: Iterator[tuple[PlacedSegment, Path | None]] = iter([(segment, None) for segment in segments])
    if mode == "constants":
        sources = spool_constants(segments, random_weights(arch, DTYPES[dtype]).items(), directory)
    for segment, weights in sources:
        for target in targets:
            name = f"{segment.plan_name} in {dtype} for {target}"
            yield PlanJob(name, segment.spec, target, directory / f"{name}.plan", weights)


def check(built: Sequence[BuiltPlan], library: Library) -> None:
    for plan in built:
        assert plan.path.stat().st_size == plan.size_bytes > 1000
        assert plan.library == str(library)
        assert plan.seconds > 0
        assert plan.peak_host_bytes is None or plan.peak_host_bytes > 1 << 20


@pytest.mark.parametrize("mode", ["inputs", "constants"])
def test_builds_for_every_device(library: Library, tmp_path: Path, mode: WeightMode) -> None:
    wanted = [(family, "bfloat16") for family in FAMILIES]
    wanted += [("all_biases", "float16"), ("all_biases", "float32")]

    def every_job() -> Iterator[PlanJob]:
        for family, dtype in wanted:
            directory = tmp_path / f"{family} {dtype}"
            directory.mkdir()
            for job in jobs(tiny_arch(**FAMILIES[family], num_layers=2), dtype, mode, directory):
                yield dataclasses.replace(job, name=f"{family}: {job.name}")

    built = list(build_plans(every_job(), WORKERS))
    check(built, library)
    assert len(built) == 3 * len(wanted)
    assert sorted(tmp_path.glob("*/*")) == sorted(plan.path for plan in built), "weights are gone once a plan is built"


def test_no_weight_is_converted_or_copied_when_a_plan_runs(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Casts around a product choose its accumulator; where TensorRT does not see that, it converts the weight each time.
    arch = tiny_arch(hidden_size=2048, intermediate_size=8192, num_heads=16, head_dim=128, vocab_size=32000)
    largest = {}
    wanted = []
    for dtype in ("float16", "bfloat16"):
        for kind in ("first", "mid", "last"):
            spec = placed(arch, dtype, "inputs", kind).spec
            name = f"{kind} in {dtype}"
            largest[name] = max(weight.size_bytes for weight in spec.weights)
            wanted.append(PlanJob(name, spec, BuildTarget((89,)), tmp_path / name))
    with caplog.at_level(logging.DEBUG, "llmengine.tensorrt"):
        list(build_plans(wanted, WORKERS))
    found = re.findall(r"(\w+ in \w+): .*Total Activation Memory: (\d+)", caplog.text)
    assert {name for name, _ in found} == largest.keys()
    for name, size in found:
        assert int(size) < 1.5 * largest[name], f"{name}: {int(size) >> 20} MiB; in fp32 {2 * largest[name] >> 20}"


def test_host_memory_is_bounded_by_a_layer(library: Library, tmp_path: Path) -> None:
    arch = tiny_arch(hidden_size=768, intermediate_size=3072, num_heads=16, head_dim=48, num_layers=8)
    segments = list(segments_by_plan(segments_of(arch, "float16", PROFILES, "constants")).values())
    layer_bytes = sum(weight.size_bytes for weight in segments[1].spec.weights)
    stream = stream_dummy(arch, torch.float16)
    spooled = (
        PlanJob(segment.plan_name, segment.spec, BuildTarget((89,)), tmp_path / segment.plan_name, path)
        for segment, path in spool_constants(segments, stream, tmp_path)
    )
    process = psutil.Process()
    next(iter(stream_dummy(arch, torch.float16)))
    before = process.memory_info().rss
    peaks, resident, on_disk = {}, [], []
    for plan in build_plans(spooled, 1):
        peaks[plan.name] = plan.peak_host_bytes
        resident.append(process.memory_info().rss - before)
        on_disk.append(sum(file.stat().st_size for file in tmp_path.glob("*.weights")))
    if None in peaks.values():
        pytest.skip("this system does not tell a process's peak memory")
    # The worker that built `first` has loaded the library. What it needs more: the layer as mapped file, the plan that
    # holds it and two copies of TensorRT's.
    more = [peak - (peaks["first"] or 0) for name, peak in peaks.items() if name.startswith("mid") and peak]
    assert max(more) < 4 * layer_bytes + (64 << 20), f"{max(more) / layer_bytes:.1f} layers"
    assert more[-1] - more[0] < 2 * layer_bytes, "memory grows from layer to layer"
    assert max(resident) < 4 * layer_bytes, "this process keeps weights"
    assert max(on_disk) <= 2.5 * layer_bytes


def test_a_spooled_file_holds_each_constant_at_its_offset(tmp_path: Path) -> None:
    arch = tiny_arch(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    weights = random_weights(arch, torch.bfloat16)
    segments = list(segments_by_plan(segments_of(arch, "bfloat16", PROFILES, "constants")).values())
    order = []
    for segment, path in spool_constants(segments, weights.items(), tmp_path):
        order.append(segment.plan_name)
        found = map_constants(segment.spec, path)
        assert found.keys() == constant_offsets(segment.spec).keys() == segment.weight_names().keys()
        for name, canonical in segment.weight_names().items():
            assert (found[name] == raw(weights[canonical])).all()
        path.unlink()
    assert order == ["first", "mid.0", "mid.1", "last"], "as soon as their last weight has come"


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    arch = tiny_arch()
    segments = list(segments_by_plan(segments_of(arch, "float16", PROFILES, "constants")).values())
    weights = random_weights(arch, torch.float16)
    early = [(name, tensor) for name, tensor in weights.items() if name != "final_norm.weight"]
    with pytest.raises(EngineError, match=r"final_norm\.weight"):
        list(spool_constants(segments, early, tmp_path))
    wrong = {**weights, "layers.1.o.weight": weights["layers.1.o.weight"].float()}
    with pytest.raises(EngineError, match=r"'o\.weight' is float32 \[48, 64\], but the plan needs float16"):
        list(spool_constants(segments, wrong.items(), tmp_path))


def test_a_plan_for_an_unsupported_device_says_what_is(library: Library, tmp_path: Path) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    with pytest.raises(ConfigError, match=r"compute capability 9\.0, only .*8\.9.*llmengine\[tensorrt\]"):
        build_plan(PlanJob("first", spec, BuildTarget((90,)), tmp_path / "plan"))
    assert not (tmp_path / "plan").exists()


def test_a_failed_build_quotes_the_library(library: Library, tmp_path: Path) -> None:
    # Turing has no bfloat16.
    spec = placed(tiny_arch(), "bfloat16", "inputs", "mid").spec
    with pytest.raises(
        EngineError, match=r"plan 'mid': .* could not build 'mid' for SM75: TensorRT refused .*'.*\w{8,}"
    ):
        build_plan(PlanJob("mid", spec, BuildTarget((75,)), tmp_path / "plan"))
    assert not (tmp_path / "plan").exists()
    check([build_plan(PlanJob("mid", spec, ALL, tmp_path / "plan"))], library)


def test_an_error_of_the_bindings_is_a_failed_build(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no CUDA context")

    monkeypatch.setattr(builder_process, "define_segment", fail)
    spec = placed(tiny_arch(), "float16", "inputs", "mid").spec
    with pytest.raises(EngineError, match="could not build 'mid' for SM89: no CUDA context"):
        serialize_segment(library, spec, BuildTarget((89,)), {})


def test_a_dead_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="plan 'first': the process that was building it exited with status 1"):
        build_plan(PlanJob("first", spec, ALL, tmp_path / "plan"))


def test_an_abandoned_build_leaves_no_worker(library: Library, tmp_path: Path) -> None:
    building = build_plans(jobs(tiny_arch(num_layers=3), "float16", "constants", tmp_path), WORKERS)
    next(building)
    assert worker_processes(psutil.Process())
    building.close()
    assert not worker_processes(psutil.Process())


def test_messages_of_a_build_reach_logging_with_the_plans_name(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    with caplog.at_level(logging.DEBUG, "llmengine.tensorrt"):
        build_plan(PlanJob("first", spec, BuildTarget((89,)), tmp_path / "plan"))
    assert any(record.getMessage().startswith("first: ") for record in caplog.records)
    assert {record.name for record in caplog.records} == {"llmengine.tensorrt"}


def test_a_worker_measures_on_the_gpu_of_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[PlanJob] = []

    def record(given: Iterable[PlanJob], num_processes: int) -> Iterator[BuiltPlan]:
        jobs.extend(given)
        raise EngineError("enough")
        yield

    with pytest.raises(EngineError, match="enough"):
        obtain_plans(make_request(device_uuid="GPU-7"), make_source(), 1, cache=PlanCache(tmp_path), build=record)
    assert {job.device_uuid for job in jobs} == {"GPU-7"}

    def load() -> Library:
        raise ConfigError(f"sees {os.environ['CUDA_VISIBLE_DEVICES']}")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(builder_process, "load_library", load)
    for device_uuid, seen in ((None, "0,1"), ("GPU-7", "GPU-7")):
        with pytest.raises(ConfigError, match=f"sees {seen}"):
            builder_process._run_job({"device_uuid": device_uuid})


def measuring(library: Library) -> Library:
    """The library, made to look like one that measures while it builds; its calls for that exist in both."""
    return dataclasses.replace(library, features=dataclasses.replace(library.features, timing_cache=True))


def test_a_library_that_measures_builds_one_plan_at_a_time(library: Library) -> None:
    assert default_num_processes(measuring(library)) == 1
    assert 1 <= default_num_processes(library) <= 4


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")
def test_the_timing_cache_is_kept_in_a_file_and_a_damaged_one_replaced(library: Library, tmp_path: Path) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    cache = tmp_path / "timing.cache"
    for content in (None, "as it was written", b"damaged"):
        if isinstance(content, bytes):
            cache.write_bytes(content)
        assert serialize_segment(measuring(library), spec, BuildTarget((89,)), {}, cache).nbytes > 1000
        assert cache.stat().st_size > len(b"damaged")
    serialize_segment(library, spec, BuildTarget((89,)), {}, tmp_path / "unused")
    assert list(tmp_path.iterdir()) == [cache]


def worker_processes(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "llmengine.backends.tensorrt.builder_process" in child.cmdline()]
