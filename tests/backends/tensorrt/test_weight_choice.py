"""Weights as inputs or as constants: a layer is built both ways and timed on the fake, and the faster way is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine.backends.tensorrt import build_engine as building
from llmengine.backends.tensorrt import weight_choice
from llmengine.backends.tensorrt.build_engine import BuildOptions, build_engine
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.constant_weights import map_constants
from llmengine.backends.tensorrt.obtain import obtain_plans
from llmengine.backends.tensorrt.weight_choice import LayerTimes, time_layer
from llmengine.errors import ConfigError, EngineError
from tests.backends.tensorrt.fake_runtime import DTYPES, FakeTensorRt, fake_library, fake_plan
from tests.backends.tensorrt.plan_fakes import make_request, make_source
from tests.backends.tensorrt.segment_helpers import tiny_arch


@pytest.fixture
def fake(device: str) -> FakeTensorRt:
    return FakeTensorRt(torch.device(device, 0))


@pytest.fixture
def built() -> list[str]:
    """Names of the plans that `build` built."""
    return []


@pytest.fixture
def build(fake: FakeTensorRt, built: list[str]) -> Callable[[Iterable[PlanJob], int], Iterator[BuiltPlan]]:
    """Stands for `build_plans`: builds what the fake runs."""

    def build_plans(jobs: Iterable[PlanJob], num_processes: int) -> Iterator[BuiltPlan]:
        for job in jobs:
            raw = map_constants(job.spec, job.weights)
            constants = {
                weight.name: torch.from_numpy(raw[weight.name].copy())
                .view(DTYPES[weight.dtype])
                .view(weight.shape)
                .to(fake.device)
                for weight in job.spec.weights
                if weight.name in raw
            }
            job.output.write_bytes(fake_plan(job.spec, constants))
            built.append(job.name)
            yield BuiltPlan(job.name, job.output, 0.1, job.output.stat().st_size, None, "fake")

    return build_plans


def test_a_layer_is_built_both_ways_run_and_timed(
    tmp_path: Path, fake: FakeTensorRt, build: Any, built: list[str]
) -> None:
    request, source, cache = make_request(max_batch_size=9, max_tokens_per_step=16), make_source(), PlanCache(tmp_path)
    times = time_layer(request, source, fake_library(fake), fake.device, cache, build)
    assert times is not None
    assert list(times.us) == [1, 8, 9]
    assert all(us > 0 for pair in times.us.values() for us in pair)
    assert built == ["mid.0", "mid"]
    assert set(fake.executed) == {"mid"}
    # The whole model takes the layer from the cache, either way.
    for mode, others in (("inputs", ["first", "last"]), ("constants", ["first", "mid.1", "mid.2", "last"])):
        del built[:]
        obtain_plans(make_request(**{"max_batch_size": 9, "weight_mode": mode}), source, 1, cache=cache, build=build)
        assert sorted(built) == sorted(others)


def test_each_layer_that_is_timed_has_weights_of_its_own(
    tmp_path: Path, fake: FakeTensorRt, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[tuple[int, ...]] = []
    execute = fake.execute

    def watch(spec: Any, feeds: Any) -> Any:
        fed.append(tuple(feeds[weight.name].data_ptr() for weight in spec.weights))
        return execute(spec, feeds)

    fake.execute = watch
    monkeypatch.setattr(weight_choice, "time_us", lambda functions, device: float(len(functions)))
    time_layer(make_request(), make_source(), fake_library(fake), fake.device, PlanCache(tmp_path), build)
    sizes, copies = [1, 4], 3
    assert len(fed) == 2 * len(sizes) * copies
    for begin in range(0, len(fed), copies):
        addresses = [address for layer in fed[begin : begin + copies] for address in layer]
        assert len(set(addresses)) == len(addresses), "a cache would hold them"


def test_a_model_of_one_layer_has_nothing_to_time(tmp_path: Path, fake: FakeTensorRt, build: Any) -> None:
    request = make_request(arch=tiny_arch(num_layers=1))
    source = make_source(request.arch)
    assert time_layer(request, source, fake_library(fake), fake.device, PlanCache(tmp_path), build) is None


def test_a_layer_that_does_not_run_is_an_error(tmp_path: Path, fake: FakeTensorRt, build: Any) -> None:
    fake.failing.add("execute_async_v3")
    with pytest.raises(EngineError, match=r"plan 'mid\.0' at T=1, S=1 cannot run"):
        time_layer(make_request(), make_source(), fake_library(fake), fake.device, PlanCache(tmp_path), build)


@pytest.mark.parametrize(
    ("us", "fastest"),
    [
        ({1: (10.0, 11.0), 8: (10.0, 11.0)}, "constants"),
        ({1: (10.0, 10.2), 8: (10.0, 10.2)}, "inputs"),
        ({1: (9.0, 10.0), 8: (10.0, 9.0)}, "inputs"),
    ],
)
def test_constants_must_be_faster_by_what_they_cost(us: dict[int, tuple[float, float]], fastest: str) -> None:
    times = LayerTimes(us)
    assert times.fastest == fastest
    assert f"1: {us[1][1]:.1f} and {us[1][0]:.1f}, 8:" in str(times)


@pytest.mark.parametrize("constants_us", [5.0, 20.0])
def test_a_build_measures_and_takes_the_fastest(
    tmp_path: Path, fake: FakeTensorRt, build: Any, monkeypatch: pytest.MonkeyPatch, constants_us: float
) -> None:
    asked: list[Sequence[Any]] = []

    def measured(*arguments: Any) -> LayerTimes:
        asked.append(arguments)
        return LayerTimes({1: (constants_us, 10.0)})

    monkeypatch.setattr(building, "load_library", lambda: fake_library(fake))
    monkeypatch.setattr(building, "time_layer", measured)
    monkeypatch.setattr(building, "obtain_plans", lambda *given, **named: obtain_plans(*given, **named, build=build))
    monkeypatch.setattr(building, "_first_gpu", lambda: ((89,), "NVIDIA L4"))
    options = BuildOptions(4, 16, weight_mode="fastest")
    made = build_engine(make_source(path=tmp_path), tmp_path / "e", options, None, cache=PlanCache(tmp_path / "cache"))
    assert len(asked) == 1
    mode = "constants" if constants_us < 10.0 else "inputs"
    assert {segment.spec.weight_mode for segment in made.plans.segments} == {mode}
    assert made.layer_times is not None
    assert made.layer_times.fastest == mode


def test_what_is_not_here_cannot_be_measured(
    tmp_path: Path, fake: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "load_library", lambda: fake_library(fake, rtx=True))
    options = BuildOptions(4, 16, compute_capabilities=(89, 120), weight_mode="fastest")
    for here, found in (((), "there is none"), ((89,), "SM89")):
        monkeypatch.setattr(building, "_first_gpu", lambda here=here: (here, None))
        with pytest.raises(
            ConfigError, match=rf"on this machine's GPU \({found}\) and cannot choose for SM89, SM120; set weight_mode"
        ):
            build_engine(make_source(path=tmp_path), tmp_path / "e", options, None, cache=PlanCache(tmp_path / "cache"))
    assert not (tmp_path / "e").exists()
