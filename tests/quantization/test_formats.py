"""Weight formats: what they list is what they make, pieces are the whole, and the reference is near the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import accumulate
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from llmengine.dtypes import dtype_name, item_bytes, model_dtype_name, torch_dtype
from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import DENSE, Axis, TensorSpec, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.known_formats import FORMATS, format_from_json
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4

GROUPED = Int4Groups(16)
EVERY = [
    DENSE,
    INT8,
    *(Int4Groups(size, zero_points) for size in (16, 128, -1) for zero_points in (True, False)),
    Int4Groups(16, input_scale=True),
    Int4Groups(32, scale_dtype="bfloat16"),
    *(Int8Groups(size, zero_points) for size in (16, -1) for zero_points in (True, False)),
    Int8Groups(32, scale_dtype="float32"),
    *(Fp8(scales, activations) for scales, activations in (("tensor", "none"), ("channel", "token"))),
    Fp8("block", "block"),
    Int8W8A8(),
    Int8W8A8("tensor", input_scale=True),
    Mxfp4(),
    *(Nvfp4(scales) for scales in ("tensor", "channel")),
    *(Bnb4Bit(quant_type, size) for quant_type, size in (("nf4", 16), ("fp4", 32), ("nf4", 64))),
]
BLOCKS = [item for item in EVERY if item in (Int4Groups(128), Int4Groups(128, False), Fp8("block", "block"), Bnb4Bit())]
"""Formats with entries for more rows or columns than the small matrices of these tests have."""
SMALL = [item for item in EVERY if item not in BLOCKS]


def by(formats: list[WeightFormat]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("format", formats, ids=lambda item: "-".join(map(str, item.to_json().values())))


few = hypothesis_settings(max_examples=8)
"""Examples for each of the many formats, which share most of their code."""

by_axis = pytest.mark.parametrize("axis", ["out", "in"])


def random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))


def matrix(format: WeightFormat, rows: int, columns: int) -> Matrix:
    return Matrix.dense(random(rows, columns)).quantized(format)


def assert_same(found: dict[str, Tensor], expected: Matrix) -> None:
    assert list(found) == list(expected.tensors)
    for suffix, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), expected.tensors[suffix].view(torch.uint8)), suffix
        assert tensor.is_contiguous()


sizes = st.integers(1, 6)


@by(EVERY)
@few
@given(rows=st.integers(1, 300), groups=st.integers(1, 40))
def test_the_tensors_are_those_that_the_format_lists(format: WeightFormat, rows: int, groups: int) -> None:
    shape = (rows, 8 * groups)
    made = matrix(format, *shape)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in made.tensors.items()} == format.tensors(
        shape, "float32"
    )
    assert format.size_bytes(shape, "float32") == made.size_bytes
    assert next(iter(made.tensors)) == "weight"


def shard(whole: Matrix, axis: Axis, *ranges: range) -> Matrix:
    """What a rank holds of a matrix."""
    held = sum(map(len, ranges))
    shape = (held, whole.shape[1]) if axis == "out" else (whole.shape[0], held)
    tensors = {
        suffix: whole.format.shard(suffix, tensor, whole.shape, axis, ranges)
        for suffix, tensor in whole.tensors.items()
    }
    found = Matrix(whole.format.sharded(whole.shape, axis, ranges), shape, tensors)
    specs = {suffix: TensorSpec.of(tensor) for suffix, tensor in tensors.items()}
    assert specs == found.format.tensors(shape, dtype_name(whole.weight.dtype) if whole.format == DENSE else "float32")
    return found


def unsharded(whole: Matrix, axis: Axis, shards: list[tuple[Matrix, list[range]]]) -> dict[str, Tensor]:
    """The tensors of `whole` from those of its shards and their ranges."""
    found = {suffix: torch.empty_like(tensor) for suffix, tensor in whole.tensors.items()}
    for piece, ranges in shards:
        for suffix, tensor in piece.tensors.items():
            whole.format.unshard(suffix, tensor, found[suffix], whole.shape, axis, ranges)
    return found


@by(SMALL)
@by_axis
@few
@given(
    rows=st.lists(sizes, min_size=1, max_size=3),
    groups=st.lists(sizes, min_size=1, max_size=3),
)
def test_shards_of_all_ranks_are_the_whole(
    format: WeightFormat, axis: Axis, rows: list[int], groups: list[int]
) -> None:
    whole = matrix(format, sum(rows), 32 * sum(groups))
    sizes = rows if axis == "out" else [32 * count for count in groups]
    ranges = [range(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
    shards = [shard(whole, axis, part) for part in ranges]
    assert {piece.format for piece in shards} == {format}
    dequantized = torch.cat([piece.dequantized() for piece in shards], 0 if axis == "out" else 1)
    assert torch.equal(dequantized, whole.dequantized())
    assert_same(unsharded(whole, axis, [(piece, [part]) for piece, part in zip(shards, ranges, strict=True)]), whole)
    assert_same(format.join([piece.tensors for piece in shards], whole.shape, axis), whole)


@by(SMALL)
@few
@given(parts=st.lists(sizes, min_size=1, max_size=3), num_ranks=st.sampled_from([1, 2, 4]))
def test_a_rank_gets_its_share_of_each_fused_part(format: WeightFormat, parts: list[int], num_ranks: int) -> None:
    whole = matrix(format, num_ranks * sum(parts), 16)
    firsts = [num_ranks * (end - size) for size, end in zip(parts, accumulate(parts), strict=True)]
    shards = []
    for rank in range(num_ranks):
        own = [range(first + rank * size, first + (rank + 1) * size) for first, size in zip(firsts, parts, strict=True)]
        shards.append((shard(whole, "out", *own), own))
        rows = [index for part in own for index in part]
        assert torch.equal(shards[-1][0].dequantized(), whole.dequantized()[rows])
    assert_same(unsharded(whole, "out", shards), whole)


def test_shards_are_in_memory_of_their_own() -> None:
    whole = matrix(INT8, 4, 16)
    for axis in ("out", "in"):
        for tensor in shard(whole, axis, range(2)).tensors.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes or axis == "in"


@pytest.mark.parametrize("format", [Int4Groups(64), Int4Groups(128, False, input_scale=True), Int8Groups(64)], ids=str)
def test_groups_that_are_cut_through_become_smaller_ones_of_the_same_values(format: WeightFormat) -> None:
    whole = matrix(format, 5, 400)
    ranges = [range(96), range(96, 288), range(288, 400)]
    shards = [shard(whole, "in", part) for part in ranges]
    assert [piece.format for piece in shards] == [dataclasses.replace(format, group_size=32)] * 3  # type: ignore[type-var]
    assert torch.equal(torch.cat([piece.dequantized() for piece in shards], 1), whole.dequantized())
    assert_same(unsharded(whole, "in", [(piece, [part]) for piece, part in zip(shards, ranges, strict=True)]), whole)
    assert format.finest() == dataclasses.replace(format, group_size=16)  # type: ignore[type-var]


def test_blocks_of_bitsandbytes_are_divided_likewise() -> None:
    whole = matrix(Bnb4Bit("fp4", 128), 5, 400)
    ranges = [range(96), range(96, 400)]
    shards = [shard(whole, "in", part) for part in ranges]
    assert [piece.format for piece in shards] == [Bnb4Bit("fp4", 32)] * 2
    assert torch.equal(torch.cat([piece.dequantized() for piece in shards], 1), whole.dequantized())
    assert_same(unsharded(whole, "in", [(piece, [part]) for piece, part in zip(shards, ranges, strict=True)]), whole)
    assert whole.format.finest() == Bnb4Bit("fp4", 16)
    assert Bnb4Bit("nf4", 8).finest() == Bnb4Bit("nf4", 8)


def test_groups_are_not_cut_through() -> None:
    whole = matrix(GROUPED, 4, 48)
    with pytest.raises(ConfigError, match=r"4 x 48 .*'int4' has an entry for every 16 columns.* at 0 and 24"):
        GROUPED.sharded(whole.shape, "in", [range(24)])
    assert shard(matrix(INT8, 4, 24), "in", range(12)).weight.shape == (4, 12)


@pytest.mark.parametrize(
    ("format", "steps"),
    [
        (DENSE, (1, 1)),
        (INT8, (1, 1)),
        (Fp8("block", "block"), (128, 128)),
        (Int4Groups(64), (1, 64)),
        (Int4Groups(-1), (1, 2)),
        (Nvfp4(), (1, 16)),
    ],
    ids=str,
)
def test_steps(format: WeightFormat, steps: tuple[int, int]) -> None:
    assert (format.step("out"), format.step("in")) == steps


@given(rows=st.integers(1, 12), columns=st.integers(1, 40), scale=st.sampled_from([1e-20, 0.02, 1.0, 1e4]))
def test_int8_rounds_each_row_to_its_own_grid(rows: int, columns: int, scale: float) -> None:
    weight = scale * torch.randn(rows, columns)
    tensors = INT8.quantize(weight)
    assert int(tensors["weight"].abs().amax(dim=1).min()) == 127
    error = (INT8.dequantize(tensors) - weight).abs()
    assert bool((error <= 0.501 * tensors["weight_scale"][:, None]).all())


def test_int8_keeps_zeros_and_takes_half_precision() -> None:
    tensors = INT8.quantize(torch.zeros(2, 3))
    assert not INT8.dequantize(tensors).any()
    half = torch.randn(3, 8).bfloat16()
    assert torch.equal(INT8.quantize(half)["weight"], INT8.quantize(half.float())["weight"])


@by(
    [
        *EVERY,
        Int4Groups(32, input_order=True),
        Int8Groups(32, input_order=True),
        Fp8("tensor", "tensor"),
        Int8W8A8("tensor", "tensor"),
    ]
)
def test_json_round_trip(format: WeightFormat) -> None:
    assert format_from_json(format.to_json(), "here") == format
    assert FORMATS[format.name] is type(format)


def test_the_names_that_manifests_have() -> None:
    assert (DENSE.to_json(), INT8.to_json()) == ({"weights": "none"}, {"weights": "int8"})
    assert GROUPED.to_json() == {
        "weights": "int4",
        "group_size": 16,
        "zero_points": True,
        "input_order": False,
        "input_scale": False,
        "scale_dtype": "float16",
    }
    assert Fp8("block", "block").to_json() == {"weights": "fp8", "scales": "block", "activations": "block"}
    assert Int8W8A8().to_json() == {
        "weights": "w8a8",
        "scales": "channel",
        "activations": "token",
        "input_scale": False,
    }
    assert Mxfp4().to_json() == {"weights": "mxfp4"}
    assert Nvfp4().to_json() == {"weights": "nvfp4", "scales": "tensor"}
    assert Bnb4Bit("fp4", 32).to_json() == {"weights": "bnb-4bit", "quant_type": "fp4", "block_size": 32}
    assert format_from_json({"weights": "int4", "group_size": 32}, "here") == Int4Groups(32)
    assert format_from_json({}, "here") == DENSE


def test_formats_as_people_read_them() -> None:
    assert (str(DENSE), str(INT8), str(Mxfp4())) == ("none", "int8", "mxfp4")
    assert str(Int4Groups(32)) == "int4(group_size=32, zero_points)"
    assert str(Int4Groups(-1, False, input_scale=True)) == "int4(group_size=-1, input_scale)"
    assert str(Int4Groups(64, False, scale_dtype="bfloat16")) == "int4(group_size=64, scale_dtype=bfloat16)"
    assert str(Int8Groups()) == "int8-groups(group_size=128, zero_points)"
    assert str(Fp8()) == "fp8(scales=channel, activations=token)"


def test_unknown_formats_and_settings_are_refused() -> None:
    for name in ("int3", 8, None, ["int8"]):
        with pytest.raises(UnsupportedModelError, match=r"here: weights in format .* not supported.*none, int8"):
            format_from_json({"weights": name}, "here")
    with pytest.raises(CorruptFileError, match=r"here: format 'int8' has the settings \[\].*\['group_size'\]"):
        format_from_json({"weights": "int8", "group_size": 4}, "here")
    for settings in ({"block_size": 0}, {"block_size": True}, {"block_size": 64.0}, {"quant_type": "nf3"}):
        with pytest.raises(CorruptFileError, match=r"here: \w+ of format 'bnb-4bit' must be .*, not "):
            format_from_json({"weights": "bnb-4bit", **settings}, "here")
    for settings in ({"group_size": 24}, {"group_size": "128"}, {"group_size": True}, {"zero_points": 1}):
        with pytest.raises(CorruptFileError, match=r"here: \w+ of format 'int4' must be one of .*, not "):
            format_from_json({"weights": "int4", **settings}, "here")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int4Groups(24), "group_size of format 'int4' must be one of 16, 32, 64, 128, -1, not 24"),
        (lambda: Fp8("row"), "scales of format 'fp8' must be one of 'tensor', 'channel', 'block', not 'row'"),  # type: ignore[arg-type]
        (lambda: Int8W8A8(activations="none"), "activations of format 'w8a8' must be one of"),  # type: ignore[arg-type]
        (lambda: Fp8("tensor", "tensor").quantize(torch.ones(2, 2)), "'fp8' with one scale for all .* calibrated"),
        (lambda: Int8W8A8(activations="tensor").quantize(torch.ones(2, 2)), "'w8a8' with one scale .* calibrated"),
    ],
)
def test_what_a_format_does_not_have_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("format", [Int4Groups(), Mxfp4(), Nvfp4(), Bnb4Bit()])
def test_an_odd_number_of_columns_is_refused(format: WeightFormat) -> None:
    with pytest.raises(UnsupportedModelError, match=r"3 x 7 .* number of columns must be even"):
        format.tensors((3, 7), "float32")


def test_sizes_are_what_the_bits_promise() -> None:
    shape = (1000, 4096)
    bits = {
        Int4Groups(128): 4 + 24 / 128,
        Int4Groups(32, False): 4 + 16 / 32,
        Int8Groups(32): 8 + 24 / 32,
        Fp8("block", "block"): 8 + 32 / 128**2,
        Int8W8A8(): 8 + 32 / 4096,
        Mxfp4(): 4.25,
        Nvfp4(): 4.5,
        Bnb4Bit("nf4", 64): 4.5,
    }
    for format, promised in bits.items():
        assert format.size_bytes(shape, "bfloat16") == pytest.approx(prod(shape) * promised / 8, rel=0.001)


@by(EVERY)
@few
@given(rows=st.integers(1, 300), columns=st.sampled_from([2, 30, 128, 130, 288]), limit=st.integers(1, 40_000))
def test_rows_are_dequantized_part_by_part(format: WeightFormat, rows: int, columns: int, limit: int) -> None:
    whole = matrix(format, rows, columns)
    parts = list(format.dequantized_rows(whole.tensors, whole.shape, limit))
    assert torch.equal(torch.cat([part for _, part in parts]), whole.dequantized())
    assert [begin for begin, _ in parts] == [0, *accumulate(len(part) for _, part in parts)][:-1]
    step = 128 if format == Fp8("block", "block") else 1
    assert all(part.numel() <= max(limit, columns * step) for _, part in parts)


RELATIVE_ERRORS = {
    Int4Groups(16): 0.10,
    Int4Groups(128): 0.13,
    Int4Groups(16, False): 0.13,
    Int4Groups(128, False): 0.14,
    Int4Groups(-1): 0.17,
    Fp8("tensor", "none"): 0.04,
    Fp8("channel", "token"): 0.04,
    Fp8("block", "block"): 0.04,
    Int4Groups(16, scale_dtype="bfloat16"): 0.10,
    Int8Groups(16): 0.01,
    Int8Groups(-1, False): 0.02,
    Int8W8A8(): 0.02,
    Int8W8A8("tensor"): 0.02,
    Mxfp4(): 0.16,
    Nvfp4(): 0.12,
    Bnb4Bit("nf4", 64): 0.11,
    Bnb4Bit("fp4", 32): 0.16,
    INT8: 0.02,
}


@by(list(RELATIVE_ERRORS))
@few
@given(rows=st.integers(1, 200), columns=st.integers(64, 300), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_weights_are_near_what_they_were(format: WeightFormat, rows: int, columns: int, scale: float) -> None:
    weight = scale * random(rows, 2 * columns)
    error = format.dequantize(format.quantize(weight)) - weight
    assert float(error.norm() / weight.norm()) < RELATIVE_ERRORS[format]
    assert format.dequantize(format.quantize(weight.bfloat16())).dtype == torch.float32


@by(EVERY)
@pytest.mark.parametrize("value", [0.0, 1e-25, -3.0, 1e4])
def test_weights_that_are_all_alike(format: WeightFormat, value: float) -> None:
    weight = torch.full((3, 34), value)
    error = format.dequantize(format.quantize(weight)) - weight
    assert bool((error.abs() <= max(1e-7, 0.27 * abs(value))).all())
    assert value != 0.0 or not error.any()


@given(weights=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=64).filter(lambda item: not len(item) % 2))
def test_int4_is_the_nearest_of_its_grid(weights: list[float]) -> None:
    weight = torch.tensor([weights])
    tensors = Int4Groups(-1).quantize(weight)
    scale, zero = tensors["weight_scale"].float(), tensors["zero_point"].float()
    grid = (torch.arange(16.0) - zero) * scale
    nearest = (weight.view(-1, 1) - grid).abs().amin(dim=1)
    error = (Int4Groups(-1).dequantize(tensors) - weight).abs().view(-1)
    torch.testing.assert_close(error, nearest, atol=1e-5, rtol=1e-4)


def test_the_nibbles_of_int4_and_the_order_of_its_columns() -> None:
    format = Int4Groups(16, input_order=True, input_scale=True)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    values = torch.arange(32) % 16
    tensors = {
        "weight": (values[0::2] + 16 * values[1::2]).to(torch.uint8)[None],
        "weight_scale": torch.tensor([[0.5, -2.0]]).half(),
        "zero_point": torch.tensor([[3, 16]]).to(torch.uint8),
        "input_order": order.int(),
        "input_scale": 1.0 + torch.arange(32),
    }
    stored = torch.cat(((values[:16] - 3) * 0.5, (values[16:] - 16) * -2.0))
    expected = torch.zeros(32)
    expected[order] = stored
    found = format.dequantize(tensors)
    assert torch.equal(found, (expected * tensors["input_scale"])[None])
    x = random(5, 32).double()
    torch.testing.assert_close((x * tensors["input_scale"])[:, order] @ stored.double(), (x @ found.T.double())[:, 0])
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in tensors.items()} == format.tensors((1, 32), "float32")
    whole = matrix(format, 6, 32)
    assert torch.equal(shard(whole, "out", range(3, 6)).dequantized(), whole.dequantized()[3:])
    assert format.sharded((6, 32), "in", [range(32)]) == format
    with pytest.raises(ConfigError, match=r"6 x 32 weights .* act-order; it cannot be cut along them$"):
        format.sharded((6, 32), "in", [range(16)])


def test_the_bytes_of_int8_groups_and_the_order_of_its_columns() -> None:
    format = Int8Groups(16, input_order=True)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    values = torch.arange(32, dtype=torch.uint8) * 8
    tensors = {
        "weight": values[None],
        "weight_scale": torch.tensor([[0.5, -2.0]]).half(),
        "zero_point": torch.tensor([[3, 255]]).to(torch.uint8),
        "input_order": order.int(),
    }
    expected = torch.zeros(32)
    expected[order] = torch.cat(((values[:16].float() - 3) * 0.5, (values[16:].float() - 255) * -2.0))
    assert torch.equal(format.dequantize(tensors), expected[None])
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in tensors.items()} == format.tensors((1, 32), "float32")
    symmetric = Int8Groups(16, False)
    found = symmetric.dequantize({"weight": values[None], "weight_scale": torch.ones(1, 2)})
    assert torch.equal(found, (values.float() - 128)[None])
    with pytest.raises(ConfigError, match=r"6 x 32 weights .* act-order; it cannot be cut along them$"):
        format.sharded((6, 32), "in", [range(16)])


def test_the_values_of_mxfp4() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    tensors = {"weight": codes[0::2] | codes[1::2] << 4, "weight_scale": torch.tensor([129], dtype=torch.uint8)}
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    found = Mxfp4().dequantize({suffix: tensor[None] for suffix, tensor in tensors.items()})
    assert found.tolist() == [[4 * value for value in (*magnitudes, *(-item for item in magnitudes))]]
    again = Mxfp4().quantize(found)
    assert torch.equal(Mxfp4().dequantize(again), found)
    assert int(again["weight_scale"]) == 129


@given(st.integers(1, 5), st.sampled_from([2, 128, 200]), st.sampled_from([1e-4, 1.0, 500.0]))
def test_activations_are_rounded_token_by_token(num_tokens: int, columns: int, scale: float) -> None:
    x = scale * random(num_tokens, columns)
    for format in (Fp8("channel", "token"), Fp8("block", "block"), Int8W8A8(), Int8W8A8(input_scale=True)):
        tensors = matrix(format, 3, columns).tensors
        found = format.rounded_activations(x, tensors)
        assert torch.equal(found, torch.cat([format.rounded_activations(row, tensors) for row in x.split(1)]))
        assert float((found - x).norm()) <= 0.05 * float(x.norm())
    for format in (DENSE, INT8, GROUPED, Mxfp4(), Fp8("tensor", "none")):
        assert torch.equal(format.rounded_activations(x, matrix(format, 3, columns).tensors), x)


def test_activations_beyond_a_calibrated_scale_saturate() -> None:
    x = torch.tensor([[0.4, -1.0, 400.0, -1e6]])
    int8 = {"activation_scale": torch.tensor([1.0])}
    assert Int8W8A8(activations="tensor").rounded_activations(x, int8).tolist() == [[0.0, -1.0, 127.0, -127.0]]
    fp8 = {"activation_scale": torch.tensor([0.5])}
    assert Fp8("tensor", "tensor").rounded_activations(x, fp8).tolist() == [[0.40625, -1.0, 224.0, -224.0]]


def test_w8a8_multiplies_integers() -> None:
    format = Int8W8A8(input_scale=True)
    weight, x = random(7, 30), random(4, 30)
    tensors = format.quantize(weight) | {"input_scale": torch.rand(30) + 0.5}
    values, scale = format.quantized_activations(x, tensors)
    sums = values.long() @ tensors["weight"].long().T
    expected = sums * scale * tensors["weight_scale"]
    rounded = format.rounded_activations(x, tensors) @ format.dequantize(tensors).T
    torch.testing.assert_close(rounded, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_matrix_in_its_format_stays() -> None:
    made = matrix(INT8, 4, 8)
    assert made.quantized(INT8) is made
    assert [name for name, _ in made.named_tensors("lm_head")] == ["lm_head.weight", "lm_head.weight_scale"]


def test_dtype_names() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.uint8, torch.int32):
        assert torch_dtype(dtype_name(dtype)) == dtype
        assert item_bytes(dtype_name(dtype)) == dtype.itemsize
    assert model_dtype_name(torch.float16) == "float16"
    with pytest.raises(AssertionError, match="int8"):
        model_dtype_name(torch.int8)
