"""Choosing implementations by measurement, with a timer and a clock that the test sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmengine.kernels.gemm_choice import (
    ROW_BUCKETS,
    CudaTimer,
    GemmChoices,
    cache_dir,
    candidates,
    cuda_choices,
    heuristic,
)
from llmengine.kernels.linear import GemmShape, LinearKernels, Operation, SkinnyConfig

OPERATIONS: tuple[Operation, ...] = ("norm_linear", "linear_add", "norm_linear_silu")
SHAPE = GemmShape("norm_linear", 8, 960, 576, torch.bfloat16, torch.bfloat16)
OTHER = replace(SHAPE, n=32000)


class FakeTimer:
    """Every configuration but `fastest` takes twice as long; each measurement takes a second of `now`."""

    def __init__(self, fastest: SkinnyConfig | None) -> None:
        self.fastest = fastest
        self.now = 0.0
        self.num_calls = 0

    def __call__(self, shape: GemmShape, config: SkinnyConfig | None) -> float:
        self.now += 1.0
        self.num_calls += 1
        return 1.0 if config == self.fastest else 2.0

    def choices(self, file: Path) -> GemmChoices:
        return GemmChoices(file, clock=lambda: self.now)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "gemm.json"


@pytest.mark.parametrize("fastest", candidates(SHAPE), ids=str)
def test_the_fastest_is_chosen_for_its_bucket_and_kept(file: Path, fastest: SkinnyConfig | None) -> None:
    timer = FakeTimer(fastest)
    choices = timer.choices(file)
    assert choices.measure([replace(SHAPE, num_rows=5), SHAPE], budget_s=60.0, measure_us=timer) == 0
    assert timer.num_calls == len(candidates(SHAPE))
    again = timer.choices(file)
    assert again.measure([SHAPE], budget_s=60.0, measure_us=timer) == 0
    assert timer.num_calls == len(candidates(SHAPE))
    assert choices.choose(replace(SHAPE, num_rows=2)) == again.choose(SHAPE) == fastest


def test_the_budget_ends_measuring_between_configurations(file: Path) -> None:
    timer = FakeTimer(None)
    choices = timer.choices(file)
    assert choices.measure([SHAPE, OTHER], budget_s=len(candidates(SHAPE)) + 1.5, measure_us=timer) == 1
    assert timer.now == len(candidates(SHAPE)) + 2
    assert choices.choose(SHAPE) is None
    assert choices.choose(OTHER) == heuristic(OTHER)
    assert choices.measure([SHAPE, OTHER], budget_s=60.0, measure_us=timer) == 0
    assert choices.choose(OTHER) is None


def test_processes_keep_what_the_other_measured(file: Path) -> None:
    timer = FakeTimer(None)
    one, other = timer.choices(file), timer.choices(file)
    one.measure([SHAPE], budget_s=60.0, measure_us=timer)
    other.measure([OTHER], budget_s=60.0, measure_us=timer)
    num_calls = timer.num_calls
    assert timer.choices(file).measure([SHAPE, OTHER], budget_s=60.0, measure_us=timer) == 0
    assert timer.num_calls == num_calls


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "\xff",
        '{"version": 2}',
        '{"version": 2, "choices": 3}',
        '{"version": 2, "choices": {"a": 7}}',
        '{"version": 2, "choices": {"a": {"block_m": 1}}}',
    ],
)
def test_a_corrupt_file_is_reported_and_replaced(file: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    timer = FakeTimer(None)
    choices = timer.choices(file)
    assert str(file) in caplog.text
    assert choices.choose(SHAPE) == heuristic(SHAPE)
    choices.measure([SHAPE], budget_s=60.0, measure_us=timer)
    assert FakeTimer(None).choices(file).choose(SHAPE) is None


def test_measurements_of_other_kernels_are_not_used(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"version": 1, "choices": {}}')
    assert FakeTimer(None).choices(file).choose(SHAPE) == heuristic(SHAPE)


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    timer = FakeTimer(None)
    choices = timer.choices(tmp_path / "taken" / "gemm.json")
    assert choices.measure([SHAPE], budget_s=60.0, measure_us=timer) == 0
    assert choices.choose(SHAPE) is None
    assert "could not be kept" in caplog.text


def test_many_rows_go_to_cublas(file: Path) -> None:
    choices = FakeTimer(None).choices(file)
    for operation in OPERATIONS:
        shape = replace(SHAPE, operation=operation)
        assert choices.choose(replace(shape, num_rows=ROW_BUCKETS[-1] + 1)) is None
        for rows in (1, 3, 8):
            config = choices.choose(replace(shape, num_rows=rows))
            assert config is not None
            assert config.block_m >= rows


def test_a_single_candidate_is_not_measured(file: Path) -> None:
    timer = FakeTimer(None)
    choices = timer.choices(file)
    shape = replace(SHAPE, dtype=torch.float32, out_dtype=torch.float32)
    assert choices.measure([shape], budget_s=0.0, measure_us=timer) == 0
    assert timer.num_calls == 0
    assert choices.choose(shape) is None


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("n", "k"), [(576, 576), (576, 1536), (4096, 14336), (128256, 4096)])
def test_candidates_can_run(operation: Operation, n: int, k: int) -> None:
    for rows in ROW_BUCKETS:
        shape = GemmShape(operation, rows, n, k, torch.bfloat16, torch.bfloat16)
        configs = candidates(shape)
        assert None in configs
        assert len(set(configs)) == len(configs) <= 6
        for config in configs:
            if config is not None:
                assert config.block_m >= rows
                assert config.split_k == 1 or operation == "linear_add"


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", "/own")
    assert cache_dir() == Path("/own")
    monkeypatch.delenv("LLMENGINE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_dir() == Path("/cache/llmengine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "llmengine"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")
def test_measuring_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path))
    kernels = LinearKernels("cuda", pdl=torch.cuda.get_device_capability() >= (9, 0))
    device = torch.device("cuda", 0)
    choices = cuda_choices(kernels, device)
    shapes = [replace(SHAPE, operation=operation) for operation in OPERATIONS]
    assert choices.measure(shapes, budget_s=120.0, measure_us=CudaTimer(kernels, device)) == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert all(choices.choose(shape) in candidates(shape) for shape in shapes)
