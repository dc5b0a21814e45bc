"""Segments as networks: every family, type and weight mode computes what the model's formulas say."""

from __future__ import annotations

import hashlib
import json
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.network import define_segment
from llmengine.backends.tensorrt.spec import SegmentSpec, WeightMode, make_profiles, segments_by_plan, spec_from_dict
from llmengine.dtypes import MODEL_DTYPES
from llmengine.errors import CorruptFileError
from llmengine.models.arch import RopeConfig, canonical_shapes
from tests.backends.tensorrt.interpreter import Interpreter
from tests.backends.tensorrt.segment_helpers import (
    DTYPES,
    FAMILIES,
    PROFILES,
    ReferenceSegments,
    interpreted,
    library_or_skip,
    placed,
    random_weights,
    tiny_arch,
    weight_feeds,
)

NUM_TOKENS = 7
SAMPLE_TOKENS = torch.tensor([6, 0, 3], dtype=torch.int32)

TOLERANCE = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error in units of the largest value: a few roundings of results of a chain of ten."""


def activations(spec: SegmentSpec, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(T=NUM_TOKENS, S=len(SAMPLE_TOKENS))
        is_index = tensor.dtype == "int32"
        feeds[tensor.name] = (
            SAMPLE_TOKENS if is_index else torch.randn(shape, generator=generator).to(DTYPES[spec.dtype])
        )
    return feeds


def expected_outputs(reference: ReferenceSegments, kind: str, layer: int, feeds: dict[str, Tensor]) -> list[Tensor]:
    if kind == "first":
        return [reference.first(feeds["x"])]
    if kind == "mid":
        return list(reference.mid(layer, feeds["attended"], feeds["x"]))
    return [reference.last(feeds["attended"], feeds["x"], feeds["sample_tokens"])]


@pytest.mark.parametrize("mode", ["inputs", "constants"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_segment_computes_the_models_formulas(family: str, dtype: str, mode: str) -> None:
    library = library_or_skip()
    arch = tiny_arch(**FAMILIES[family])
    weights = random_weights(arch, DTYPES[dtype])
    reference = ReferenceSegments(arch, weights)
    for kind in ("first", "mid", "last"):
        segment = placed(arch, dtype, mode, kind)
        feeds = activations(segment.spec)
        outputs = interpreted(library, segment, weights).run({**feeds, **weight_feeds(segment, weights)})
        expected = expected_outputs(reference, kind, segment.layer, feeds)
        assert list(outputs) == [output.name for output in segment.spec.outputs]
        for output, wanted in zip(outputs.values(), expected, strict=True):
            error = (output.double() - wanted).abs().max() / wanted.abs().max()
            assert error < TOLERANCE[dtype], f"{kind}: {error:.1e}"


def test_a_norm_is_computed_in_fp32() -> None:
    # In fp16, 300 ** 2 overflows.
    library = library_or_skip()
    arch = tiny_arch()
    weights = random_weights(arch, torch.float16)
    segment = placed(arch, "float16", "inputs", "first")
    x = torch.full((NUM_TOKENS, arch.hidden_size), 300.0, dtype=torch.float16)
    qkv = interpreted(library, segment, weights).run({"x": x, **weight_feeds(segment, weights)})["qkv"]
    wanted = ReferenceSegments(arch, weights).first(x)
    assert (qkv.double() - wanted).abs().max() < 4e-3 * wanted.abs().max()


def test_products_accumulate_in_fp32() -> None:
    # TensorRT takes casts around a product for that; without them the interpreter multiplies in fp16.
    library = library_or_skip()
    segment = placed(tiny_arch(), "float16", "inputs", "mid")
    network = define_segment(library, library.create_builder(), segment.spec).network
    products = [network.get_layer(i) for i in range(network.num_layers)]
    products = [layer for layer in products if layer.type == library.trt.LayerType.MATRIX_MULTIPLY]
    assert len(products) == 4
    for layer in products:
        assert [layer.get_input(i).dtype for i in range(2)] == [library.trt.float32] * 2


def test_a_networks_inputs_and_outputs_are_the_specs() -> None:
    library = library_or_skip()
    for segment in segments_of(tiny_arch(attention_bias=True), "float16", PROFILES, "inputs"):
        spec = segment.spec
        network = define_segment(library, library.create_builder(), spec).network
        found = [network.get_input(i) for i in range(network.num_inputs)]
        assert [tensor.name for tensor in found] == [item.name for item in (*spec.inputs, *spec.weight_inputs)]
        shapes = [item.resolve(T=-1, S=-1) for item in spec.inputs] + [item.plan_shape for item in spec.weight_inputs]
        assert [tuple(tensor.shape) for tensor in found] == shapes
        assert [network.get_output(i).name for i in range(network.num_outputs)] == [item.name for item in spec.outputs]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_weight_but_those_of_our_kernels_is_in_a_segment(family: str) -> None:
    arch = tiny_arch(**FAMILIES[family], qk_norm="head")
    ours = {name for name in canonical_shapes(arch) if "q_norm" in name or "k_norm" in name}
    if not arch.tie_word_embeddings:
        ours.add("embed_tokens.weight")
    used = [name for segment in segments_of(arch, "float16", PROFILES) for name in segment.weight_names().values()]
    assert len(used) == len(set(used))
    assert set(used) == canonical_shapes(arch).keys() - ours


def test_weights_as_inputs_make_one_plan_of_all_layers() -> None:
    arch = tiny_arch(num_layers=5)
    shared = segments_of(arch, "bfloat16", PROFILES, "inputs")
    assert [(segment.plan_name, segment.layer) for segment in shared] == [
        ("first", 0),
        ("mid", 0),
        ("mid", 1),
        ("mid", 2),
        ("mid", 3),
        ("last", 4),
    ]
    assert list(segments_by_plan(shared)) == ["first", "mid", "last"]
    assert len({segment.spec.fingerprint() for segment in shared}) == 3
    own = segments_of(arch, "bfloat16", PROFILES, "constants")
    assert list(segments_by_plan(own)) == ["first", "mid.0", "mid.1", "mid.2", "mid.3", "last"]
    assert [segment.plan_name for segment in segments_of(tiny_arch(num_layers=1), "float16", PROFILES)] == [
        "first",
        "last",
    ]


def test_fingerprints_of_saved_engines_stay() -> None:
    """A saved engine or a cache whose plans have other fingerprints would be rebuilt: raise `NETWORK_VERSION` then."""
    digest = hashlib.sha256()
    for changes in FAMILIES.values():
        for dtype in MODEL_DTYPES:
            for mode in get_args(WeightMode):
                for segment in segments_of(tiny_arch(**changes), dtype, PROFILES, mode):
                    digest.update((segment.plan_name + segment.spec.fingerprint()).encode())
    assert digest.hexdigest() == "0a8ee81cdaaa52308b5a4d2f7a70ca9849d65fb6410dbf741cd5ae94b73a42c1"


def test_a_fingerprint_changes_with_what_the_plan_depends_on_and_nothing_else() -> None:
    def fingerprints(
        dtype: Any = "float16", profiles: Any = PROFILES, mode: Any = "inputs", **changes: Any
    ) -> list[str]:
        segments = segments_of(tiny_arch(**changes), dtype, profiles, mode)
        specs = {segment.spec.kind: segment.spec for segment in segments}
        return [spec.fingerprint() for spec in specs.values()]

    plain = fingerprints()
    rope = RopeConfig(theta=5e5, original_max_position_embeddings=64)
    assert fingerprints(num_layers=7, rope=rope, max_position_embeddings=128, embedding_scale=3.0) == plain

    def changed(other: list[str]) -> list[bool]:
        return [a != b for a, b in zip(plain, other, strict=True)]

    assert changed(fingerprints(vocab_size=80)) == [False, False, True]
    assert changed(fingerprints(logit_soft_cap=30.0)) == [False, False, True]
    assert changed(fingerprints(hidden_act="gelu_tanh")) == [False, True, True]
    assert changed(fingerprints(attention_bias=True)) == [True, True, False]
    assert changed(fingerprints(attention_out_bias=True)) == [False, True, True]
    for other in (
        fingerprints(dtype="bfloat16"),
        fingerprints(profiles=make_profiles(8, 16)),
        fingerprints(mode="constants"),
        fingerprints(rms_norm_eps=1e-6),
        fingerprints(hidden_size=64),
    ):
        assert changed(other) == [True, True, True]


def test_a_spec_survives_json_and_nothing_else_is_taken_for_one() -> None:
    spec = placed(tiny_arch(attention_bias=True), "float16", "constants", "mid").spec
    values = json.loads(json.dumps(spec.to_dict()))
    assert spec_from_dict(values) == spec
    assert spec_from_dict(values).fingerprint() == spec.fingerprint()
    without = {key: value for key, value in values.items() if key != "numerics"}
    more = {**values, "surprise": 1}
    other = {**values, "weights": [{**values["weights"][0], "shape": "48"}]}
    for wrong in (without, more, other):
        with pytest.raises(CorruptFileError, match="segment"):
            spec_from_dict(wrong)


def test_the_interpreter_is_as_strict_as_tensorrt() -> None:
    library = library_or_skip()
    arch = tiny_arch()
    weights = random_weights(arch, torch.float16)
    segment = placed(arch, "float16", "inputs", "mid")
    run = interpreted(library, segment, weights).run
    feeds = {**activations(segment.spec), **weight_feeds(segment, weights)}
    for name, wrong in (
        ("x", feeds["x"].float()),
        ("x", feeds["x"][:, :-1]),
        ("x", feeds["x"][:-1]),
        ("o.weight", feeds["o.weight"].T),
    ):
        with pytest.raises(AssertionError, match=name):
            run({**feeds, name: wrong})
    with pytest.raises(AssertionError, match="inputs"):
        run({name: tensor for name, tensor in feeds.items() if name != "x"})


def test_the_interpreter_refuses_a_layer_it_does_not_know() -> None:
    library = library_or_skip()
    builder = library.create_builder()
    segment = define_segment(library, builder, placed(tiny_arch(), "float32", "inputs", "first").spec)
    segment.network.add_softmax(segment.network.get_input(0))
    with pytest.raises(NotImplementedError, match="SOFTMAX"):
        Interpreter(library, segment)
