"""Weight formats: what they list is what they make, pieces are the whole, and the reference is near the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmengine.dtypes import dtype_name, item_bytes, model_dtype_name, torch_dtype
from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.formats import DENSE, FORMATS, INT8, Axis, TensorSpec, WeightFormat, format_from_json
from llmengine.quantization.matrix import Matrix
from tests.quantization.grouped_format import Int4Groups

GROUPED = Int4Groups(8)
ALL = [DENSE, INT8, GROUPED]
by_format = pytest.mark.parametrize("format", ALL, ids=lambda item: item.name)
by_axis = pytest.mark.parametrize("axis", ["out", "in"])


def matrix(format: WeightFormat, rows: int, columns: int) -> Matrix:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))
    return Matrix.dense(weight).quantized(format)


def assert_same(found: dict[str, Tensor], expected: Matrix) -> None:
    assert list(found) == list(expected.tensors)
    for suffix, tensor in found.items():
        assert torch.equal(tensor, expected.tensors[suffix]), suffix
        assert tensor.is_contiguous()


sizes = st.integers(1, 6)


@by_format
@given(rows=st.integers(1, 40), groups=sizes)
def test_the_tensors_are_those_that_the_format_lists(format: WeightFormat, rows: int, groups: int) -> None:
    shape = (rows, 8 * groups)
    made = matrix(format, *shape)
    assert {suffix: TensorSpec.of(tensor) for suffix, tensor in made.tensors.items()} == format.tensors(
        shape, "float32"
    )
    assert format.size_bytes(shape, "float32") == made.size_bytes
    assert next(iter(made.tensors)) == "weight"


@by_format
@by_axis
@given(rows=sizes, groups=sizes, num_ranks=st.sampled_from([1, 2, 3]))
def test_shards_of_all_ranks_are_the_whole(
    format: WeightFormat, axis: Axis, rows: int, groups: int, num_ranks: int
) -> None:
    shape = (num_ranks * rows, num_ranks * 8 * groups)
    whole = matrix(format, *shape)
    shards = [format.shard(whole.tensors, shape, axis, rank, num_ranks) for rank in range(num_ranks)]
    shard_shape = (rows, shape[1]) if axis == "out" else (shape[0], 8 * groups)
    for shard in shards:
        specs = {suffix: TensorSpec.of(tensor) for suffix, tensor in shard.items()}
        assert specs == format.tensors(shard_shape, "float32")
    assert_same(format.join(shards, shape, axis), whole)
    dequantized = torch.cat([format.dequantize(shard) for shard in shards], 0 if axis == "out" else 1)
    assert torch.equal(dequantized, whole.dequantized())


@by_format
@given(parts=st.lists(sizes, min_size=1, max_size=3), num_ranks=st.sampled_from([1, 2, 4]))
def test_a_rank_gets_its_share_of_each_fused_part(format: WeightFormat, parts: list[int], num_ranks: int) -> None:
    parts = [size * num_ranks for size in parts]
    whole = matrix(format, sum(parts), 16)
    for rank in range(num_ranks):
        found = format.shard(whole.tensors, whole.shape, "out", rank, num_ranks, parts)
        shares = [part.chunk(num_ranks)[rank] for part in whole.dequantized().split(parts)]
        assert torch.equal(format.dequantize(found), torch.cat(shares))


@by_format
@given(num_ranks=st.integers(2, 9))
def test_what_does_not_divide_is_refused_by_name(format: WeightFormat, num_ranks: int) -> None:
    whole = matrix(format, num_ranks + 1, 16)
    with pytest.raises(ConfigError, match=rf"tp_size={num_ranks} does not divide the {num_ranks + 1} rows"):
        format.shard(whole.tensors, whole.shape, "out", 0, num_ranks)


def test_groups_are_not_cut_through() -> None:
    whole = matrix(GROUPED, 4, 24)
    with pytest.raises(ConfigError, match=r"4 x 24 .*'test-int4' has an entry for every 8 columns.* at 0 and 12"):
        GROUPED.shard(whole.tensors, whole.shape, "in", 0, 2)
    assert matrix(INT8, 4, 24).format.shard(matrix(INT8, 4, 24).tensors, (4, 24), "in", 0, 2)["weight"].shape == (4, 12)


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


@pytest.mark.parametrize("format", [DENSE, INT8])
def test_json_round_trip(format: WeightFormat) -> None:
    assert format_from_json(format.to_json(), "here") == format
    assert FORMATS[format.name] is type(format)


def test_the_names_that_manifests_have() -> None:
    assert (DENSE.to_json(), INT8.to_json()) == ({"weights": "none"}, {"weights": "int8"})
    assert GROUPED.to_json() == {"weights": "test-int4", "group_size": 8}
    assert format_from_json({}, "here") == DENSE


def test_unknown_formats_and_settings_are_refused() -> None:
    for name in ("int3", 8, None, ["int8"]):
        with pytest.raises(UnsupportedModelError, match=r"here: weights in format .* not supported.*none, int8"):
            format_from_json({"weights": name}, "here")
    with pytest.raises(CorruptFileError, match=r"here: format 'int8' has the settings \[\].*\['group_size'\]"):
        format_from_json({"weights": "int8", "group_size": 4}, "here")


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
