"""Segments with quantized matrices: their networks compute what dequantized weights and rounded activations give."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends.tensorrt import random_tensors as random_tensors_module
from llmengine.backends.tensorrt.builder_process import serialize_segment
from llmengine.backends.tensorrt.expected_outputs import expected_outputs
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.network import define_segment
from llmengine.backends.tensorrt.plan_matrix import PlanMatrix, plan_parts, plan_tensors
from llmengine.backends.tensorrt.random_tensors import random_matrix, random_tensors
from llmengine.backends.tensorrt.runtime import Sizes
from llmengine.backends.tensorrt.spec import BuildTarget, SegmentSpec, segments_by_plan, spec_from_dict
from llmengine.backends.tensorrt.verify import SegmentCheck, check_errors, scaled_errors
from llmengine.errors import ConfigError, CorruptFileError
from llmengine.quantization.formats import DENSE, TensorSpec
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.mxfp4 import Mxfp4
from tests.backends.tensorrt.interpreter import Interpreter
from tests.backends.tensorrt.quantized_helpers import (
    FORMATS,
    QuantizedWeights,
    model_formats,
    quantized_arch,
    quantized_segment,
)
from tests.backends.tensorrt.segment_helpers import (
    DTYPES,
    PROFILES,
    as_in_plan,
    interpreted,
    library_or_skip,
    raw,
    weight_feeds,
)
from tests.backends.tensorrt.test_network import activations
from tests.backends.tensorrt.test_network import expected_outputs as reference_outputs

TOLERANCE = {"float32": 1e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error in units of the largest value; see `test_network`."""

ROUNDED_TOLERANCE = {"float32": 3e-2, "float16": 6e-2, "bfloat16": 8e-2}
"""The same where activations are rounded: one that is near the middle of two numbers may become the other one."""


def errors_by_row(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.double() - wanted).abs().amax(1).sort().values / wanted.abs().max()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(("dtype", "mode"), [("float32", "inputs"), ("float16", "constants"), ("bfloat16", "inputs")])
def test_segments_compute_the_models_formulas_with_quantized_weights(name: str, dtype: Any, mode: str) -> None:
    library, arch = library_or_skip(), quantized_arch()
    weights = QuantizedWeights(arch, dtype, model_formats(FORMATS[name]))
    plan_weights = weights.of_plans()
    for kind in ("first", "mid", "last") if dtype == "float32" else ("mid",):
        segment = quantized_segment(arch, dtype, mode, kind, weights.formats)
        rounds = any(part.activations != "none" for part in plan_parts(FORMATS[name], (256, 256), dtype).values())
        feeds = activations(segment.spec)
        outputs = interpreted(library, segment, plan_weights).run({**feeds, **weight_feeds(segment, plan_weights)})
        expected = reference_outputs(weights.reference(), kind, segment.layer, feeds)
        for output, wanted in zip(outputs.values(), expected, strict=True):
            errors = errors_by_row(output, wanted)
            assert errors[-1] < (ROUNDED_TOLERANCE if rounds else TOLERANCE)[dtype], kind
            assert errors[0] < TOLERANCE[dtype] or dtype != "float32", kind


def test_an_output_matrix_that_is_rounded_from_the_embedding_is_a_weight_of_its_own() -> None:
    library, arch = library_or_skip(), quantized_arch(tie_word_embeddings=True)
    weights = QuantizedWeights(arch, "float32", ModelFormats(INT8))
    segment = quantized_segment(arch, "float32", "inputs", "last", weights.formats)
    assert segment.weight_names()["lm_head.weight_scale"] == "lm_head.weight_scale"
    plan_weights, feeds = weights.of_plans(), activations(segment.spec)
    outputs = interpreted(library, segment, plan_weights).run({**feeds, **weight_feeds(segment, plan_weights)})
    [wanted] = reference_outputs(weights.reference(), "last", segment.layer, feeds)
    assert errors_by_row(outputs["logits"], wanted)[-1] < TOLERANCE["float32"]
    dense = quantized_segment(arch, "float32", "inputs", "last", ModelFormats(INT8, {"lm_head": DENSE}))
    assert dense.weight_names()["lm_head.weight"] == "embed_tokens.weight"


@pytest.mark.parametrize("name", ["int8", "int4-128, zeros", "w8a8", "fp8-block"])
def test_segments_with_quantized_matrices_build(name: str) -> None:
    library, arch = library_or_skip(), quantized_arch()
    for segment in segments_of(arch, "float16", PROFILES, "inputs", model_formats(FORMATS[name]))[1:2]:
        serialize_segment(library, segment.spec, BuildTarget((89,)), {})


@pytest.mark.parametrize(
    ("name", "mode", "copies"),
    [
        ("int8", "inputs", False),
        ("w8a8", "inputs", False),
        ("fp8", "inputs", False),
        ("fp8, weights", "inputs", False),
        ("int4-64", "constants", False),
        ("int4-64", "inputs", True),
    ],
)
def test_an_execution_needs_no_room_for_weights(
    name: str, mode: Any, copies: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A plan that copies or dequantizes whole matrices has scratch memory for them; the library's log says how much."""
    library = library_or_skip()
    caplog.set_level(logging.DEBUG, logger="llmengine.tensorrt")
    arch = quantized_arch(intermediate_size=1536)

    def scratch_bytes(formats: ModelFormats) -> int:
        caplog.clear()
        segment = quantized_segment(arch, "float16", mode, "mid", formats)
        plan_weights, names = QuantizedWeights(arch, "float16", formats).of_plans(), segment.weight_names()
        constants = {item.name: raw(plan_weights[names[item.name]]) for item in segment.spec.constant_weights}
        serialize_segment(library, segment.spec, BuildTarget((89,)), constants)
        found = [int(number) for number in re.findall(r"Max Scratch Memory: (\d+) bytes", caplog.text)]
        if not found:
            pytest.skip(f"{library} does not say")
        return max(found)

    more = scratch_bytes(model_formats(FORMATS[name])) - scratch_bytes(ModelFormats())
    assert (more > 128 * 1536) == copies, f"{more} bytes more than for a dense plan"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("mode", ["inputs", "constants"])
def test_every_format_builds_for_every_gpu_that_it_is_said_to(name: str, mode: Any) -> None:
    """SmolLM2's shapes, whose columns are not divisible by 128, in both dtypes of 16 bits."""
    library = library_or_skip()
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64}
    arch = quantized_arch(**sizes)
    for dtype in ("float16", "bfloat16"):
        weights = QuantizedWeights(arch, dtype, model_formats(FORMATS[name])).of_plans()  # type: ignore[arg-type]
        segments = segments_of(arch, dtype, PROFILES, mode, model_formats(FORMATS[name]))  # type: ignore[arg-type]
        for kind in ("first", "mid", "last"):
            segment = next(segment for segment in segments if segment.spec.kind == kind)
            least = max(least_capabilities(segment.spec))
            constants = {
                item.name: weights[segment.weight_names()[item.name]].contiguous().view(-1).view(torch.uint8).numpy()
                for item in segment.spec.constant_weights
            }
            for capability in (80, 89, 120):
                if capability >= least:
                    assert serialize_segment(library, segment.spec, BuildTarget((capability,)), constants).nbytes


def least_capabilities(spec: SegmentSpec) -> list[int]:
    return [part.least_capability for name, _ in spec.quantization for part in spec.matrix_parts(name).values()]


def test_a_plan_dequantizes_to_the_stored_values() -> None:
    """For float32 to the last bits, whatever the shape: groups that do not divide it, and blocks that exceed it."""
    for weight_format in FORMATS.values():
        for shape in ((128, 128), (64, 576), (160, 32)):
            stored = random_matrix(weight_format, shape, "float32", torch.device("cpu"))
            tensors, rows = plan_tensors(weight_format, shape, "float32", stored), []
            for end, part in plan_parts(weight_format, shape, "float32").items():
                own = {suffix: tensors[suffix + end] for suffix in part.tensors()}
                rows.append(dequantized(part, own))
            wanted = weight_format.dequantize(stored)
            torch.testing.assert_close(torch.cat(rows).float(), wanted, rtol=1e-6, atol=1e-8)


def dequantized(part: PlanMatrix, tensors: dict[str, Tensor]) -> Tensor:
    """A part of a matrix with everything that its product applies to activations."""
    weight = part.dequantized_rows(tensors, 0, part.shape[0])
    if part.has_zeros:
        weight = weight + part.per_weight(tensors["zero_term"])
    if part.has_input_order:
        reordered = torch.empty_like(weight)
        reordered[:, tensors["input_order"].long()] = weight
        weight = reordered
    return weight * tensors["input_scale"] if part.has_input_scale else weight


def test_layers_in_other_formats_have_plans_of_their_own() -> None:
    arch = quantized_arch(num_layers=6)
    formats = ModelFormats(INT8, {"layers.0.down": DENSE, "layers.3.qkv": DENSE, "layers.5.o": DENSE})
    segments = segments_of(arch, "float16", PROFILES, "inputs", formats)
    assert [segment.plan_name for segment in segments] == ["first", "mid", "mid.1", "mid.2", "mid.1", "mid.1", "last"]
    assert len(segments_by_plan(segments)) == 5
    assert len({segment.spec.fingerprint() for segment in segments}) == 5


def test_fingerprints_depend_on_formats() -> None:
    fingerprints = set()
    for weight_format in (DENSE, *FORMATS.values()):
        for segment in segments_of(quantized_arch(), "float16", PROFILES, "inputs", ModelFormats(weight_format)):
            fingerprints.add(segment.spec.fingerprint())
    assert len(fingerprints) == 3 * (1 + len(FORMATS))


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_spec_with_formats_survives_json_and_nothing_else_is_taken_for_one(name: str) -> None:
    spec = quantized_segment(quantized_arch(), "float16", "inputs", "mid", model_formats(FORMATS[name])).spec
    values = json.loads(json.dumps(spec.to_dict()))
    assert spec_from_dict(values) == spec
    assert spec_from_dict(values).fingerprint() == spec.fingerprint()
    for wrong in ({"o": {"weights": "int9"}}, {"o": {"weights": "int8", "more": 1}}, "int8", {"o": 1}):
        with pytest.raises(CorruptFileError):
            spec_from_dict({**values, "quantization": wrong})


@pytest.mark.parametrize(
    ("weight_format", "shape", "message"),
    [
        (Mxfp4(), (64, 64), r"no product with weights in format 'mxfp4'; use quant_config.weights='int8'"),
        (Int4Groups(128), (64, 72), r"64 x 72, whose columns are not divisible by 16; use quant_config.weights='int8'"),
    ],
)
def test_formats_without_a_product_are_refused(weight_format: Any, shape: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_parts(weight_format, shape, "float16")


Change = Callable[[Tensor], Tensor]


def checks_of(library: Library, spec: SegmentSpec, num_tokens: int, **changes: Change) -> list[SegmentCheck]:
    """Checks of a segment's network, run by the interpreter on weights that have been changed."""
    sizes = Sizes(num_tokens, min(num_tokens, 4))
    tensors = random_tensors(spec, sizes, torch.device("cpu"))
    expected = list(expected_outputs(spec, tensors, DTYPES[spec.dtype]))
    interpreter = Interpreter(library, define_segment(library, library.create_builder(), spec))
    feeds = {item.name: tensors[item.name] for item in spec.inputs}
    for weight in spec.weights:
        change = changes.get(weight.name.replace(".", "_"), lambda tensor: tensor)
        feeds[weight.name] = as_in_plan(weight, change(tensors[weight.name]))
    outputs = interpreter.run(feeds)
    errors = scaled_errors(expected, outputs)
    return [check_errors(spec.kind, name, sizes, error) for name, error in errors.items()]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_verification_accepts_sound_plans(name: str, dtype: Any) -> None:
    """The errors of sound plans stay as far from the limits as those of dense ones."""
    torch.manual_seed(0)
    library = library_or_skip()
    spec = quantized_segment(quantized_arch(), dtype, "inputs", "mid", model_formats(FORMATS[name])).spec
    for num_tokens in (1, 16):
        for check in checks_of(library, spec, num_tokens):
            assert check.finite
            assert check.ratio < 0.7, check
            assert check.rms_error > 0.05, check


def with_one_scale(factor: float) -> Change:
    def change(scale: Tensor) -> Tensor:
        changed = scale.clone()
        changed.view(-1)[0] *= factor
        return changed

    return change


def swapped_nibbles(weight: Tensor) -> Tensor:
    return weight << 4 | weight >> 4


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("int8", {"down_weight_scale": with_one_scale(1.1)}),
        ("int8", {"o_weight": lambda weight: weight.roll(1, 1)}),
        ("int8-groups", {"o_weight_scale": lambda scale: scale.roll(1, 1)}),
        ("int4-32", {"next_qkv_weight": swapped_nibbles}),
        ("int4-128, zeros", {"next_qkv_zero_term": torch.zeros_like}),
        ("int4-128, act-order, AWQ", {"down_input_scale": lambda scale: scale.roll(1)}),
        ("int4-128, act-order, AWQ", {"down_input_order": lambda order: order.roll(1)}),
        ("w8a8", {"down_weight_scale": with_one_scale(1.3)}),
        ("w8a8, one scale", {"next_qkv_activation_scale": lambda scale: scale * 2}),
        ("fp8", {"o_weight": lambda weight: weight.float().mul(1.2).to(weight.dtype)}),
        ("fp8-block", {"o_weight_scale": with_one_scale(1.5)}),
        ("stacked", {"down_weight_1": swapped_nibbles}),
    ],
)
def test_verification_refuses_wrong_plans(name: str, changes: dict[str, Change]) -> None:
    torch.manual_seed(0)
    library = library_or_skip()
    spec = quantized_segment(quantized_arch(), "float16", "inputs", "mid", model_formats(FORMATS[name])).spec
    assert max(check.ratio for check in checks_of(library, spec, 16, **changes)) > 1


@pytest.mark.parametrize("name", list(FORMATS))
def test_random_matrices_are_stored_as_their_format_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_tensors_module, "_MATRIX_ROWS", 128)
    shape = (320, 64)
    found = random_matrix(FORMATS[name], shape, "float16", torch.device("cpu"))
    specs = {suffix: TensorSpec.of(tensor) for suffix, tensor in found.items()}
    assert specs == FORMATS[name].tensors(shape, "float16")
    values = FORMATS[name].dequantize(found)
    assert 0.05 < values.std() < 0.3
