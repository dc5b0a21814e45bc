"""The report for people with a supported GPU: complete on the fake library, clear where TensorRT cannot run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tensorrt_report
from llmengine import backends
from llmengine.backends import load_backend
from llmengine.backends.tensorrt.backend import SegmentsChoice, load_tensorrt_backend
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.plan_set import SavedPlanSet
from llmengine.backends.tensorrt.spec import make_profiles
from llmengine.backends.tensorrt.weight_choice import LayerTimes
from llmengine.batch import Backend
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.rank_hosts import RankHosts
from tests.backends.tensorrt.fake_runtime import FakeTensorRt, fake_library, fake_plan_set

ARGUMENTS = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--concurrency", "2", "--prompt-tokens", "3"]


@pytest.fixture
def fake(device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRt:
    """Let `LLM` load the CUDA backend, with the fake library wherever TensorRT is asked for."""
    fake = FakeTensorRt(torch.device(device, 0))
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "choose_device", lambda name: device if device == "cpu" else f"{device}:0")
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def load(
        config: ModelConfig, source: ModelSource, check_wanted: Callable[[], None], rank_hosts: RankHosts | None
    ) -> Backend:
        if config.backend == "torch":
            return load_backend(config, source, check_wanted)
        scheduler = config.scheduler_config
        profiles = make_profiles(scheduler.max_batch_size, scheduler.max_tokens_per_step)
        plan_set = fake_plan_set(segments_of(source.arch, "float32", profiles))
        if source.plans is not None:
            plan_set = plan_set.replace(verification=SavedPlanSet.read(source.plans, "plans").verification)
        is_required = config.backend == "tensorrt"
        choice = SegmentsChoice(lambda: fake_library(fake), plan_set, source, PlanCache(), is_required=is_required)
        return load_tensorrt_backend(config, source, fake.device, choice)

    monkeypatch.setattr(backends, "load_backend", load)
    # The load itself is tested with the other benchmarks; Triton's interpreter takes seconds for a token.
    figures = {"output_tokens_per_s": 100.0, "ttft_p50_ms": 5.0, "tpot_p50_ms": 2.0}
    monkeypatch.setattr(tensorrt_report, "run_once", lambda llm, load, seed: figures)
    monkeypatch.setattr(tensorrt_report, "measure_layer", lambda model, scheduler: LayerTimes({1: (8.0, 10.0)}))
    return fake


def report(tmp_path: Path, *more: str) -> tuple[int, str]:
    output = tmp_path / "report.md"
    code = tensorrt_report.main([*ARGUMENTS, "--output-tokens", "2", "--output", str(output), *more])
    return code, output.read_text()


def test_the_report_has_plans_errors_figures_and_the_choice(fake: FakeTensorRt, tmp_path: Path) -> None:
    code, text = report(tmp_path)
    assert code == 0
    for title in ("Plans", "Errors against torch", "Streaming, 3 prompt", "Dense part of a decode step", "One layer"):
        assert f"## {title}" in text
    assert "greedy tokens before the first difference between TensorRT and torch: 8 of 8" in text
    assert "plans of tensorrt 0.fake for SM [80]" in text
    assert "auto chooses: " in text
    assert "llmengine build --weights fastest takes constants" in text


def test_a_failure_is_part_of_the_report(fake: FakeTensorRt, tmp_path: Path) -> None:
    fake.failing.add("create_execution_context")
    code, text = report(tmp_path)
    assert code == 1
    assert "failed: ConfigError: backend='tensorrt' cannot be used: plan 'first' at T=1, S=1 cannot be prepared" in text


def test_without_a_gpu_the_reason_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tensorrt_report.main(["--shape", "tiny"]) == 2
    assert "TensorRT cannot run here: torch" in capsys.readouterr().err


def test_agreement_counts_up_to_the_first_difference() -> None:
    text: Any = tensorrt_report._agreement([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]])
    assert text.endswith("4 of 6")
