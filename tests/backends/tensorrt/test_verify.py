"""Verification: right plans pass in every type and family, slightly wrong ones fail, and JSON keeps the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.runtime import PlanRuntime, Sizes
from llmengine.backends.tensorrt.segments import load_plans
from llmengine.backends.tensorrt.spec import PlacedSegment, ProfileSpec, Range, SegmentSpec
from llmengine.backends.tensorrt.verify import Verification, checked_sizes, verify_plans
from llmengine.models.arch import ModelArch
from tests.backends.tensorrt.fake_runtime import DTYPES, FakeTensorRt, fake_library, fake_plan_set
from tests.backends.tensorrt.segment_helpers import (
    FAMILIES,
    PROFILES,
    ReferenceSegments,
    random_weights,
    tiny_arch,
    weight_feeds,
)
from tests.backends.tensorrt.torch_reference import reference

Outputs = Mapping[str, Tensor]


def verify(
    device: str, arch: ModelArch, dtype: Any, execute: Callable[..., Outputs] | None = None, mode: Any = "inputs"
) -> Verification:
    fake = FakeTensorRt(torch.device(device), execute)
    segments = segments_of(arch, dtype, PROFILES, mode)
    weights = {name: tensor.to(device) for name, tensor in random_weights(arch, DTYPES[dtype]).items()}
    plans = load_plans(PlanRuntime.start(fake_library(fake)), fake_plan_set(segments, weights))
    return verify_plans(segments, plans, fake.device, None if mode == "inputs" else partial(of_segment, weights))


def of_segment(weights: Mapping[str, Tensor], segment: PlacedSegment) -> dict[str, Tensor]:
    return {name: weights[canonical] for name, canonical in segment.weight_names().items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float32") for family in FAMILIES), *((next(iter(FAMILIES)), dtype) for dtype in list(DTYPES)[1:3])],
)
def test_right_plans_pass(device: str, family: str, dtype: str) -> None:
    verification = verify(device, tiny_arch(**FAMILIES[family]), dtype)
    assert not verification.failures
    found = [(check.plan, check.output) for check in verification.checks]
    assert found == [("first", "qkv"), ("mid", "x_out"), ("mid", "qkv"), ("last", "logits")]


def test_plans_with_constants_are_compared_with_the_models_weights(device: str) -> None:
    verification = verify(device, tiny_arch(), "float16", mode="constants")
    assert not verification.failures
    assert [check.plan for check in verification.checks] == ["first", "mid.0", "mid.0", "mid.1", "mid.1", "last"]


def test_values_that_must_be_zero_have_no_rounding(device: str) -> None:
    """The embedding of a padding token is a row of zeros, and tied to the output matrix."""
    arch, place = tiny_arch(tie_word_embeddings=True), torch.device(device)
    weights = {name: tensor.to(device) for name, tensor in random_weights(arch, torch.float32).items()}
    weights["embed_tokens.weight"][3] = 0
    segments = segments_of(arch, "float32", PROFILES, "constants")

    def off(spec: SegmentSpec, feeds: Outputs) -> Outputs:
        outputs = computed_in(spec, feeds, torch.float32)
        if spec.kind == "last":
            outputs["logits"][:, 3] = 1e-30
        return outputs

    for execute, failing in ((None, set()), (off, {"last"})):
        fake = FakeTensorRt(place, execute)
        plans = load_plans(PlanRuntime.start(fake_library(fake)), fake_plan_set(segments, weights))
        found = verify_plans(segments, plans, place, partial(of_segment, weights)).failures
        assert {check.plan for check in found} == failing


def computed_in(spec: SegmentSpec, feeds: Outputs, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in reference(spec, feeds, dtype).items()}


def with_other_weights(spec: SegmentSpec, feeds: Outputs) -> Outputs:
    changed = {"o.weight": feeds["o.weight"] * 1.05} if "o.weight" in feeds else {}
    return computed_in(spec, {**feeds, **changed}, torch.float32)


def with_one_wrong_element(spec: SegmentSpec, feeds: Outputs) -> Outputs:
    outputs = computed_in(spec, feeds, torch.float32)
    if spec.kind == "mid":
        outputs["x_out"][-1, -1] += 0.5
    return outputs


def with_a_row_unwritten(spec: SegmentSpec, feeds: Outputs) -> Outputs:
    outputs = computed_in(spec, feeds, torch.float32)
    if spec.kind == "last":
        outputs["logits"][-1] = torch.nan
    return outputs


def with_coarse_operands(spec: SegmentSpec, feeds: Outputs) -> Outputs:
    coarse = {
        name: value if value.dtype == torch.int32 else (value.float() * 16).round().div(16).to(value.dtype)
        for name, value in feeds.items()
    }
    return computed_in(spec, coarse, torch.float32)


@pytest.mark.parametrize(
    ("execute", "failing"),
    [
        (with_other_weights, {"mid", "last"}),
        (with_one_wrong_element, {"mid"}),
        (with_a_row_unwritten, {"last"}),
        (with_coarse_operands, {"first", "mid", "last"}),
    ],
)
def test_wrong_plans_fail(device: str, execute: Callable[..., Outputs], failing: set[str]) -> None:
    verification = verify(device, tiny_arch(), "bfloat16", execute)
    assert {check.plan for check in verification.failures} == failing
    ratios = [check.ratio for check in verification.failures]
    assert ratios == sorted(ratios, reverse=True)
    worst = str(verification.failures[0])
    assert "is not finite" in worst or "(limit " in worst


def test_a_write_beyond_the_output_is_seen(device: str) -> None:
    def execute(spec: SegmentSpec, feeds: Outputs) -> Outputs:
        # What lies behind an output is found through the output's own memory.
        outputs = computed_in(spec, feeds, DTYPES[spec.dtype])
        for tensor in fake_outputs:
            tensor[-1] = 0
        return outputs

    fake_outputs: list[Tensor] = []
    original = torch.full

    def full(*args: Any, **kwargs: Any) -> Tensor:
        fake_outputs.append(original(*args, **kwargs))
        return fake_outputs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "full", full)
        assert verify(device, tiny_arch(), "float32", execute).failures


def test_a_verification_survives_json_and_nothing_else_is_taken_for_one(device: str) -> None:
    verification = verify(device, tiny_arch(), "float16", with_a_row_unwritten)
    timed = Verification.from_dict({**verification.to_dict(), "step_us": {"8": [10.0, 12.5]}})
    assert timed is not None
    assert timed.step_us == {8: (10.0, 12.5)}
    assert Verification.from_dict(json.loads(json.dumps(verification.to_dict(), allow_nan=False))) == verification
    assert verification.holds_for("tensorrt 0.fake", torch.device(device))
    assert not verification.holds_for("tensorrt 1.fake", torch.device(device))
    known = verification.to_dict()
    for values in ({}, {**known, "more": 1}, {**known, "checks": [1]}, {**known, "step_us": {"8": [10.0, 0.0]}}):
        assert Verification.from_dict(values) is None


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_reference_is_the_models_formulas(family: str) -> None:
    arch = tiny_arch(**FAMILIES[family])
    weights = random_weights(arch, torch.float32)
    expected = ReferenceSegments(arch, weights)
    attended, x = torch.randn(5, 64), torch.randn(5, 48)
    rows = torch.tensor([4, 0], dtype=torch.int32)
    first, mid, _, last = segments_of(arch, "float32", PROFILES)
    results = [
        (first, [expected.first(x)]),
        (mid, list(expected.mid(0, attended, x))),
        (last, [expected.last(attended, x, rows)]),
    ]
    for segment, wanted in results:
        tensors = {"attended": attended, "x": x, "sample_tokens": rows, **weight_feeds(segment, weights)}
        found = reference(segment.spec, tensors, torch.float64)
        for value, other in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(value, other)


def test_cases_are_the_edges_of_what_each_profile_is_used_for() -> None:
    spec = segments_of(tiny_arch(), "float32", PROFILES)[0].spec
    assert list(checked_sizes(spec)) == [Sizes(1, 1), Sizes(2, 2), Sizes(4, 4), Sizes(5, 1), Sizes(10, 2), Sizes(16, 4)]
    same = tuple(ProfileSpec(profile.name, Range(1, 1, 1), Range(1, 1, 1)) for profile in PROFILES)
    assert list(checked_sizes(segments_of(tiny_arch(), "float32", same)[0].spec)) == [Sizes(1, 1)]
