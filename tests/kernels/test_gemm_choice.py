"""Choosing implementations of products by measurement, with a timer and a clock that the test sets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmengine.kernels.cublaslt import CublasConfig, TileConfig
from llmengine.kernels.gemm_candidates import ROW_BUCKETS, candidates
from llmengine.kernels.gemm_choice import GemmChoices, cache_dir
from llmengine.kernels.gemm_config import (
    GemmShape,
    LinearConfig,
    Operation,
    SkinnyConfig,
    fixed_config,
    parse_config,
    shared_bytes,
)
from llmengine.quantization.formats import DENSE
from llmengine.quantization.int8 import INT8
from llmengine.quantization.matrix import Matrix

OPERATIONS: tuple[Operation, ...] = ("norm_linear", "linear_add", "norm_linear_silu", "linear", "linear_silu")
SHAPE = GemmShape("norm_linear", 8, 960, 576, torch.bfloat16, torch.bfloat16)
OTHER = replace(SHAPE, n=32000)
FASTEST = CublasConfig(1, 16)
MAX_SHARED = 227 << 10
"""Of a program on an H100, in bytes; 99 KiB on a GPU of compute capability 8.6 or 8.9."""
NUM_SMS = 132
"""Of an H100."""


class FakeTimer:
    """A timer of steps: one microsecond for each of `SHAPE` and `OTHER` that runs `fastest`, two for any other.

    Each measurement advances `now` by a second.
    """

    def __init__(self, file: Path, fastest: LinearConfig = FASTEST) -> None:
        self.now = 0.0
        self.num_calls = 0
        self.choices = GemmChoices(file, MAX_SHARED, clock=lambda: self.now)
        self._fastest = fastest

    def measure(self, shapes: Sequence[GemmShape], budget_s: float = 60.0) -> int:
        return self.choices.measure(shapes, budget_s, self._time_us)

    def _time_us(self, timed: GemmShape) -> float:
        self.now += 1.0
        self.num_calls += 1
        used = [self.choices.choose(replace(shape, num_rows=timed.num_rows)) for shape in (SHAPE, OTHER)]
        return sum(1.0 if config == self._fastest else 2.0 for config in used)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "gemm.json"


@pytest.mark.parametrize("fastest", candidates(SHAPE, MAX_SHARED), ids=str)
def test_the_fastest_is_chosen_for_its_bucket_and_kept(file: Path, fastest: LinearConfig) -> None:
    timer = FakeTimer(file, fastest)
    assert timer.measure([replace(SHAPE, num_rows=5), SHAPE]) == 0
    assert timer.num_calls == len(candidates(SHAPE, MAX_SHARED))
    again = FakeTimer(file)
    assert again.measure([SHAPE]) == 0
    assert again.num_calls == 0
    assert timer.choices.choose(replace(SHAPE, num_rows=2)) == again.choices.choose(SHAPE) == fastest


def test_the_budget_ends_measuring_between_configurations(file: Path) -> None:
    timer = FakeTimer(file)
    whole_s = len(candidates(SHAPE, MAX_SHARED))
    assert timer.measure([SHAPE, OTHER], budget_s=whole_s + 1.5) == 1
    assert timer.now == whole_s + 2
    assert timer.choices.choose(SHAPE) == FASTEST
    assert timer.choices.choose(OTHER) == candidates(OTHER, MAX_SHARED)[0]
    assert timer.measure([SHAPE, OTHER]) == 0
    assert timer.choices.choose(OTHER) == FASTEST


@pytest.mark.parametrize("budget_s", [0.0, -0.4])
def test_a_budget_that_is_spent_already_leaves_the_heuristics(file: Path, budget_s: float) -> None:
    timer = FakeTimer(file)
    assert timer.measure([SHAPE], budget_s) == 1
    assert timer.num_calls == 0
    assert timer.choices.choose(SHAPE) == candidates(SHAPE, MAX_SHARED)[0]


def test_processes_keep_what_the_other_measured(file: Path) -> None:
    one, other = FakeTimer(file), FakeTimer(file)
    one.measure([SHAPE])
    other.measure([OTHER])
    both = FakeTimer(file)
    assert both.measure([SHAPE, OTHER]) == 0
    assert both.num_calls == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "\xff",
        '{"version": 9}',
        '{"version": 9, "choices": 3}',
        '{"version": 9, "choices": {"a": 7}}',
        '{"version": 9, "choices": {"a": "m1n4"}}',
        '{"version": 9, "choices": {"a": "tile7x64c1x1"}}',
        '{"version": 9, "choices": {"a": "tile64x64c9x1"}}',
        '{"version": 9, "choices": {"a": "hopper-m8s3c2w8p1"}}',
    ],
)
def test_a_corrupt_file_is_reported_and_replaced(file: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    timer = FakeTimer(file)
    assert str(file) in caplog.text
    assert timer.choices.choose(SHAPE) == candidates(SHAPE, MAX_SHARED)[0]
    timer.measure([SHAPE])
    assert FakeTimer(file).choices.choose(SHAPE) == FASTEST


def test_measurements_of_other_kernels_are_not_used(file: Path) -> None:
    file.parent.mkdir()
    file.write_text('{"version": 1, "choices": {}}')
    assert FakeTimer(file).choices.choose(SHAPE) == candidates(SHAPE, MAX_SHARED)[0]


def test_a_file_that_cannot_be_written_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    timer = FakeTimer(tmp_path / "taken" / "gemm.json")
    assert timer.measure([SHAPE]) == 0
    assert timer.choices.choose(SHAPE) == FASTEST
    assert "could not be kept" in caplog.text


def test_many_rows_go_to_cublas(file: Path) -> None:
    choices = FakeTimer(file).choices
    for operation in OPERATIONS:
        shape = replace(SHAPE, operation=operation)
        assert choices.choose(replace(shape, num_rows=ROW_BUCKETS[-1] + 1)) == CublasConfig()
        for rows in (1, 3, 8):
            config = choices.choose(replace(shape, num_rows=rows))
            assert isinstance(config, SkinnyConfig)
            assert config.block_m >= rows


def test_a_single_candidate_is_not_measured(file: Path) -> None:
    timer = FakeTimer(file)
    shape = replace(SHAPE, dtype=torch.float32, out_dtype=torch.float32)
    assert timer.measure([shape], budget_s=0.0) == 0
    assert timer.num_calls == 0
    assert timer.choices.choose(shape) == CublasConfig()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("n", "k"), [(576, 576), (576, 1536), (4096, 14336), (128256, 4096)])
def test_candidates_can_run(operation: Operation, n: int, k: int) -> None:
    for rows in ROW_BUCKETS:
        shape = GemmShape(operation, rows, n, k, torch.bfloat16, torch.bfloat16)
        configs = candidates(shape, MAX_SHARED, NUM_SMS)
        assert CublasConfig(0, 16 if rows == 8 else rows) in configs
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert parse_config(str(config)) == config
            if isinstance(config, SkinnyConfig):
                assert config.any_rows or config.block_m >= rows
                assert config.split_k == 1 or shape.splits_k


@pytest.mark.parametrize("max_shared", [MAX_SHARED, 99 << 10])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_chosen_without_measuring_fits_into_a_program(operation: Operation, max_shared: int) -> None:
    for rows in ROW_BUCKETS:
        shape = GemmShape(operation, rows, 14336, 4096, torch.bfloat16, torch.bfloat16)
        for config in (*candidates(shape, max_shared), fixed_config(shape, max_shared)):
            assert shared_bytes(shape, config) <= max_shared
    # It is the loads in flight that are fewer, not the order of sums.
    assert replace(fixed_config(shape, max_shared), num_stages=4) == fixed_config(shape, MAX_SHARED)


@pytest.mark.parametrize(
    ("operation", "rows", "n", "k", "fast"),
    [
        ("linear_add", 256, 4096, 14336, ["tile64x128c1x2", "tile128x64c2x1"]),
        ("linear_add", 256, 4096, 4096, ["tile64x128c1x1", "tile128x64c2x1"]),
        ("norm_linear", 256, 6144, 4096, ["tile96x128c1x2"]),
        ("norm_linear_silu", 256, 14336, 4096, ["tile112x128c1x2"]),
        ("linear_add", 64, 2048, 8192, ["tile32x64c1x1"]),
        ("linear_add", 8192, 4096, 14336, ["tile256x128c2x1"]),
    ],
)
def test_tiles_that_were_fast_on_an_h100_are_tried_there(
    operation: Operation, rows: int, n: int, k: int, fast: list[str]
) -> None:
    shape = GemmShape(operation, rows, n, k, torch.bfloat16, torch.bfloat16)
    tried = [str(config) for config in candidates(shape, MAX_SHARED, NUM_SMS)]
    assert set(fast) <= set(tried)
    assert len(tried) <= 20
    elsewhere = candidates(shape, MAX_SHARED, num_sms=0)
    assert not any(isinstance(config, TileConfig) for config in elsewhere)


@pytest.mark.parametrize(
    ("slow_at_first", "lucky_at_first", "rounds"),
    [
        ([1.01, 1.0, 0.98, 1.0], [1.0, 1.0, 1.0, 0.99], 3),  # close: the least of all rounds decides
        ([1.06, 0.9], [1.0, 1.0], 0),  # clear: no other rounds
    ],
)
def test_what_is_close_is_measured_in_more_rounds(
    file: Path, slow_at_first: list[float], lucky_at_first: list[float], rounds: int
) -> None:
    timer = FakeTimer(file)
    slow, lucky, *others = candidates(SHAPE, MAX_SHARED)
    times = {slow: slow_at_first[:], lucky: lucky_at_first[:], **{config: [2.0] for config in others}}
    timed: list[LinearConfig] = []

    def time_us(shape: GemmShape) -> float:
        timed.append(timer.choices.choose(shape))
        return times[timed[-1]].pop(0)

    assert timer.choices.measure([SHAPE], 60.0, time_us) == 0
    assert timed[len(times) :] == [lucky, slow] * rounds, "taken in turns"
    assert timer.choices.choose(SHAPE) == (slow if rounds else lucky)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", "/own")
    assert cache_dir() == Path("/own")
    monkeypatch.delenv("LLMENGINE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_dir() == Path("/cache/llmengine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "llmengine"


def test_choices_are_kept_for_each_weight_format(file: Path) -> None:
    """A measured dense product is found under the key that it had before there were other formats."""
    timer = FakeTimer(file)
    timer.measure([SHAPE])
    (key,) = json.loads(file.read_text())["choices"]
    assert key == "norm_linear 16x960x576 bfloat16->bfloat16"
    quantized = replace(SHAPE, weight_format=INT8)
    again = GemmChoices(file, MAX_SHARED)
    assert not again.missing([SHAPE])
    assert again.missing([quantized]) == [replace(quantized, num_rows=8)]


def test_a_shape_is_that_of_the_matrix() -> None:
    matrix = Matrix.dense(torch.zeros(48, 16)).quantized(INT8)
    assert GemmShape.of("norm_linear_silu", 3, matrix, torch.float16, torch.float32) == GemmShape(
        "norm_linear_silu", 3, 24, 16, torch.float16, torch.float32, INT8
    )
    assert GemmShape.of("linear_add", 3, Matrix.dense(torch.zeros(48, 16)), torch.float16, torch.float16) == GemmShape(
        "linear_add", 3, 48, 16, torch.float16, torch.float16, DENSE
    )
