"""Choosing matrix products on a model's own weights: which candidates are timed, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine.backends.cuda import fused_segments
from llmengine.backends.cuda.fused_segments import FusedSegments
from llmengine.backends.cuda.weights import CudaWeights
from llmengine.checkpoints.opening import open_model
from llmengine.config import SchedulerConfig
from llmengine.kernels.cublaslt import CublasConfig
from llmengine.kernels.gemm_choice import GemmChoices
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, SkinnyConfig
from llmengine.models.arch import canonical_shapes
from tests.backends.helpers import save_tiny

SKINNY = SkinnyConfig(block_m=1, block_n=8, block_k=256, num_warps=1, num_stages=1)
LIMITS = SchedulerConfig(max_batch_size=4, max_tokens_per_step=16, max_tokens_per_mixed_step=16)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates for every shape of one row."""

    def of(shape: GemmShape, *_: int) -> list[LinearConfig]:
        return [CublasConfig(0, shape.num_rows), SKINNY] if shape.num_rows == 1 else [CublasConfig()]

    monkeypatch.setattr("llmengine.kernels.gemm_choice.candidates", of)


def build_segments(
    directory: Path, device: str, choices: GemmChoices, monkeypatch: pytest.MonkeyPatch
) -> FusedSegments:
    """Return segments of a tiny model that ask `choices`, on any device."""
    save_tiny(directory)
    arch = open_model(directory).arch
    tensors = {
        name: torch.randn(shape, device=device).mul_(0.1).half() for name, shape in canonical_shapes(arch).items()
    }
    monkeypatch.setattr(fused_segments, "_choices_of", lambda *_: choices)
    if device == "cpu":  # the interpreter compiles nothing
        monkeypatch.setattr(FusedSegments, "_compile", lambda *_: None)
    logits = torch.zeros(4, arch.vocab_size, device=device)
    return FusedSegments(arch, CudaWeights.of(arch, tensors, torch.float16), LIMITS, logits, pdl=False)


@pytest.mark.usefixtures("candidates")
def test_each_product_of_each_size_is_timed_in_the_chain_of_all(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = GemmChoices(tmp_path / "choices.json", 227 << 10)
    segments = build_segments(tmp_path, device, choices, monkeypatch)
    used: list[set[LinearConfig]] = []
    widths: list[set[int]] = []
    kernels = segments._kernels
    real_add, real_norm = kernels.linear_add, kernels.norm_linear

    def linear_add(*arguments: Any) -> None:
        used[-1].add(arguments[4])
        real_add(*arguments)

    def norm_linear(*arguments: Any) -> None:
        widths[-1].add(arguments[-2].shape[1])
        real_norm(*arguments)

    def time_graph(functions: Sequence[Callable[[], None]]) -> float:
        used.append(set())
        widths.append(set())
        for function in functions:
            function()
        return 1.0 if SKINNY in used[-1] else 2.0

    monkeypatch.setattr(kernels, "linear_add", linear_add)
    monkeypatch.setattr(kernels, "norm_linear", norm_linear)
    monkeypatch.setattr(fused_segments, "time_graph", time_graph)
    segments.tune(60.0)
    # qkv, o, gate_up, down and the LM head have two candidates each, of one row. All but o's take equally long, and are
    # measured in three more rounds.
    assert len(used) == 2 + 4 * 2 * (1 + 3)
    with_head = [segments._head.shape[0] in chain for chain in widths]
    assert with_head == [False] * (len(used) - 8) + [True] * 8, "the LM head is timed behind a layer, and only itself"
    for shape in segments._shapes(1):
        # The first that was fastest stays: with SKINNY in o, whatever the others do costs the same.
        expected = SKINNY if shape.operation == "linear_add" and shape.k == 64 else CublasConfig(0, 1)
        assert choices.choose(shape) == expected, shape
    used.clear()
    segments.tune(60.0)
    assert not used, "what is known is not timed again"


@pytest.mark.usefixtures("candidates")
def test_without_time_nothing_is_timed(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = GemmChoices(tmp_path / "choices.json", 227 << 10)
    segments = build_segments(tmp_path, device, choices, monkeypatch)
    monkeypatch.setattr(fused_segments, "time_graph", lambda functions: pytest.fail("there is no time"))
    segments.tune(0.0)
    assert choices.missing(segments._shapes(1))


@pytest.mark.usefixtures("candidates")
@pytest.mark.parametrize("will_tune", [False, True])
def test_what_is_measured_first_is_compiled_with_the_rest(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, will_tune: bool
) -> None:
    choices = GemmChoices(tmp_path / "choices.json", 227 << 10)
    segments = build_segments(tmp_path, device, choices, monkeypatch)
    compiled: list[LinearConfig] = []
    monkeypatch.setattr(FusedSegments, "_compile", lambda _, shape, config: compiled.append(config))
    for call in segments.compilations(will_tune=will_tune):
        call()
    num_products = 5  # qkv, o, gate_up, down and the LM head, of one row
    assert compiled == [SKINNY] * (num_products if will_tune else 0)
    monkeypatch.setattr(fused_segments, "time_graph", lambda functions: 1.0)
    segments.tune(60.0)
    compiled.clear()
    for call in segments.compilations(will_tune=True):
        call()
    assert not compiled, "what is known needs no candidates"
