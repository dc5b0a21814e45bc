"""Plans are really built, in worker processes, for devices that this machine has not; none is executed."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from segment_helpers import DTYPES, FAMILIES, PROFILES, library_or_skip, placed, random_weights, raw, tiny_arch

from llmengine.backends.tensorrt.api import Library
from llmengine.backends.tensorrt.plans import (
    BuiltPlan,
    PlanJob,
    build_plan,
    build_plans,
    constant_offsets,
    default_workers,
    map_constants,
    serialize_segment,
    spool_weights,
)
from llmengine.backends.tensorrt.spec import (
    BuildTarget,
    PlacedSegment,
    WeightMode,
    plans_of,
    segments_of,
)
from llmengine.errors import ConfigError, EngineError
from llmengine.models.arch import ModelArch
from llmengine.models.dummy import stream_dummy

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
    segments = list(plans_of(segments_of(arch, dtype, PROFILES, mode)).values())  # type: ignore[arg-type]
    sources: Iterator[tuple[PlacedSegment, Path | None]] = iter([(segment, None) for segment in segments])
    if mode == "constants":
        sources = spool_weights(segments, random_weights(arch, DTYPES[dtype]).items(), directory)
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
@pytest.mark.parametrize("family", list(FAMILIES))
def test_builds_for_every_device(library: Library, tmp_path: Path, family: str, mode: WeightMode) -> None:
    arch = tiny_arch(**FAMILIES[family], num_layers=2)
    built = list(build_plans(jobs(arch, "bfloat16", mode, tmp_path), WORKERS))
    check(built, library)
    assert len(built) == 3
    assert sorted(tmp_path.iterdir()) == sorted(plan.path for plan in built), "weights are gone once a plan is built"


def test_builds_refittable(library: Library, tmp_path: Path) -> None:
    # A plan of its own for each device, and each takes a second or two: so not every family for every device.
    def chosen() -> Iterator[PlanJob]:
        for index, family in enumerate(FAMILIES):
            device = BuildTarget((ALL.compute_capabilities[index % 4],))
            arch = tiny_arch(**FAMILIES[family], num_layers=2)
            for job in jobs(arch, "bfloat16", "refit", tmp_path, [device]):
                if job.spec.kind == "mid" or family == "llama":
                    name = f"{family} {job.name}"
                    yield dataclasses.replace(job, name=name, output=tmp_path / name)

    check(list(build_plans(chosen(), WORKERS)), library)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_builds_in_every_type(library: Library, tmp_path: Path, dtype: str) -> None:
    arch = tiny_arch(attention_bias=True, num_layers=2)
    check(list(build_plans(jobs(arch, dtype, "inputs", tmp_path), WORKERS)), library)
    refit = placed(arch, dtype, "refit", "mid").spec
    check([build_plan(PlanJob("refit", refit, BuildTarget((89,)), tmp_path / "refit"))], library)


def test_no_weight_is_converted_or_copied_when_a_plan_runs(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Casts around a product choose its accumulator; where TensorRT does not see that, it converts the weight each time.
    arch = tiny_arch(hidden_size=2048, intermediate_size=8192, num_heads=16, head_dim=128, vocab_size=32000)
    for dtype in ("float16", "bfloat16"):
        for kind in ("first", "mid", "last"):
            segment = placed(arch, dtype, "inputs", kind)
            caplog.clear()
            with caplog.at_level(logging.DEBUG, "llmengine.tensorrt"):
                build_plan(PlanJob(kind, segment.spec, BuildTarget((89,)), tmp_path / kind))
            scratch = [int(size) for size in re.findall(r"Total Activation Memory: (\d+)", caplog.text)]
            assert scratch
            largest = max(weight.size_bytes for weight in segment.spec.weights)
            assert max(scratch) < 1.5 * largest, f"{kind}: {max(scratch) >> 20} MiB; in fp32 {2 * largest >> 20}"


def test_host_memory_is_bounded_by_a_layer(library: Library, tmp_path: Path) -> None:
    arch = tiny_arch(hidden_size=768, intermediate_size=3072, num_heads=16, head_dim=48, num_layers=8)
    segments = list(plans_of(segments_of(arch, "float16", PROFILES, "constants")).values())
    layer_bytes = sum(weight.size_bytes for weight in segments[1].spec.weights)
    stream = stream_dummy(arch, torch.float16)
    spooled = (
        PlanJob(segment.plan_name, segment.spec, BuildTarget((89,)), tmp_path / segment.plan_name, path)
        for segment, path in spool_weights(segments, stream, tmp_path)
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
    segments = list(plans_of(segments_of(arch, "bfloat16", PROFILES, "constants")).values())
    order = []
    for segment, path in spool_weights(segments, weights.items(), tmp_path):
        order.append(segment.plan_name)
        found = map_constants(segment.spec, path)
        assert found.keys() == constant_offsets(segment.spec).keys() == segment.weight_names().keys()
        for name, canonical in segment.weight_names().items():
            assert (found[name] == raw(weights[canonical])).all()
        path.unlink()
    assert order == ["first", "mid.0", "mid.1", "last"], "as soon as their last weight has come"


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    arch = tiny_arch()
    segments = list(plans_of(segments_of(arch, "float16", PROFILES, "constants")).values())
    weights = random_weights(arch, torch.float16)
    early = [(name, tensor) for name, tensor in weights.items() if name != "final_norm.weight"]
    with pytest.raises(EngineError, match=r"final_norm\.weight"):
        list(spool_weights(segments, early, tmp_path))
    wrong = {**weights, "layers.1.o.weight": weights["layers.1.o.weight"].float()}
    with pytest.raises(EngineError, match=r"'o\.weight' is \('float32'"):
        list(spool_weights(segments, wrong.items(), tmp_path))


def test_a_plan_for_an_unsupported_device_says_what_is(library: Library, tmp_path: Path) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    with pytest.raises(ConfigError, match=r"compute capability 9\.0, only .*8\.9.*llmengine\[tensorrt\]"):
        build_plan(PlanJob("first", spec, BuildTarget((90,)), tmp_path / "plan"))
    refit = placed(tiny_arch(), "float16", "refit", "first").spec
    with pytest.raises(ConfigError, match="one compute capability at a time, not for SM80, SM89"):
        build_plan(PlanJob("first", refit, BuildTarget((80, 89)), tmp_path / "plan"))
    assert not (tmp_path / "plan").exists()


def test_a_failed_build_quotes_the_library(library: Library, tmp_path: Path) -> None:
    # Turing has no bfloat16.
    spec = placed(tiny_arch(), "bfloat16", "inputs", "mid").spec
    with pytest.raises(EngineError, match=r"plan 'mid': .* could not build 'mid' for SM75: '.*\w{8,}"):
        build_plan(PlanJob("mid", spec, BuildTarget((75,)), tmp_path / "plan"))
    assert not (tmp_path / "plan").exists()
    check([build_plan(PlanJob("mid", spec, ALL, tmp_path / "plan"))], library)


def test_a_dead_worker_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="plan 'first': the process that built it ended with status 1"):
        build_plan(PlanJob("first", spec, ALL, tmp_path / "plan"))


def test_an_abandoned_build_leaves_no_worker(library: Library, tmp_path: Path) -> None:
    building = build_plans(jobs(tiny_arch(num_layers=3), "float16", "constants", tmp_path), WORKERS)
    next(building)
    assert worker_processes(psutil.Process())
    building.close()
    assert not worker_processes(psutil.Process())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c_ends_a_build_and_its_workers(library: Library, tmp_path: Path) -> None:
    script = f"""
        import itertools, sys
        from pathlib import Path
        from llmengine.backends.tensorrt.plans import PlanJob, build_plans
        from llmengine.backends.tensorrt.spec import BuildTarget
        from segment_helpers import placed, tiny_arch
        spec = placed(tiny_arch(), "float16", "inputs", "mid").spec
        jobs = (PlanJob("mid", spec, BuildTarget((89,)), Path({str(tmp_path)!r}) / str(i)) for i in itertools.count())
        for plan in build_plans(jobs, 2):
            print(plan.name, flush=True)
    """
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"mid\n"
        workers = worker_processes(psutil.Process(process.pid))
        assert workers
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert b"KeyboardInterrupt" in errors
    assert time.monotonic() - begin < 10
    assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]


def test_messages_of_a_build_reach_logging_with_the_plans_name(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = placed(tiny_arch(), "float16", "inputs", "first").spec
    with caplog.at_level(logging.DEBUG, "llmengine.tensorrt"):
        build_plan(PlanJob("first", spec, BuildTarget((89,)), tmp_path / "plan"))
    assert any(record.getMessage().startswith("first: ") for record in caplog.records)
    assert {record.name for record in caplog.records} == {"llmengine.tensorrt"}


def measuring(library: Library) -> Library:
    """The library as if it were one that measures while it builds; its calls for that exist in both."""
    return dataclasses.replace(library, features=dataclasses.replace(library.features, timing_cache=True))


def test_a_library_that_measures_builds_one_plan_at_a_time(library: Library) -> None:
    assert default_workers(measuring(library)) == 1
    assert 1 <= default_workers(library) <= 4


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
    return [child for child in process.children() if "llmengine.backends.tensorrt.worker" in child.cmdline()]
