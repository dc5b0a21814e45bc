"""Matrices whose parts have formats of their own: names, shards, rows and manifests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.formats import DENSE, Axis, TensorSpec
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8
from llmengine.quantization.known_formats import format_from_json
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.stacked import Stacked, StackedPart

FORMAT = Stacked.of_rows([(12, GGUF_BLOCKS["Q4_1"]), (4, INT8), (4, DENSE)])


@pytest.fixture
def matrix() -> Matrix:
    return Matrix.dense(torch.randn(20, 128, generator=torch.Generator().manual_seed(0))).quantized(FORMAT)


def test_every_part_has_the_tensors_of_its_format(matrix: Matrix) -> None:
    found = {suffix: TensorSpec.of(tensor) for suffix, tensor in matrix.tensors.items()}
    assert found == FORMAT.tensors((20, 128), "float32")
    assert {suffix: (spec.dtype, spec.shape) for suffix, spec in found.items()} == {
        "weight": ("uint8", (12, 4, 20)),
        "weight_1": ("int8", (4, 128)),
        "weight_scale_1": ("float32", (4,)),
        "weight_2": ("float32", (4, 128)),
    }
    assert FORMAT.tensors((20, 128), "bfloat16")["weight_2"].dtype == "bfloat16"
    assert matrix.size_bytes == 12 * 80 + 4 * 132 + 4 * 512


def test_the_parts_are_the_whole(matrix: Matrix) -> None:
    parts = FORMAT.matrices(matrix.tensors, matrix.shape)
    assert [(part.format, part.shape) for part in parts] == [
        (GGUF_BLOCKS["Q4_1"], (12, 128)),
        (INT8, (4, 128)),
        (DENSE, (4, 128)),
    ]
    whole = matrix.dequantized()
    assert torch.equal(torch.cat([part.dequantized() for part in parts]), whole)
    rows = dict(FORMAT.dequantized_rows(matrix.tensors, matrix.shape, 3 * 128))
    assert list(rows) == [0, 3, 6, 9, 12, 15, 16, 19]
    assert torch.equal(torch.cat(list(rows.values())), whole)


def shard(matrix: Matrix, axis: Axis, *ranges: range) -> dict[str, torch.Tensor]:
    return {
        suffix: FORMAT.shard(suffix, tensor, matrix.shape, axis, ranges) for suffix, tensor in matrix.tensors.items()
    }


def unsharded(
    matrix: Matrix, axis: Axis, shards: list[tuple[dict[str, torch.Tensor], list[range]]]
) -> dict[str, torch.Tensor]:
    found = {suffix: torch.empty_like(tensor) for suffix, tensor in matrix.tensors.items()}
    for tensors, ranges in shards:
        for suffix, tensor in tensors.items():
            FORMAT.unshard(suffix, tensor, found[suffix], matrix.shape, axis, ranges)
    return found


def test_ranks_get_some_of_every_part(matrix: Matrix) -> None:
    held = [[range(6), range(12, 14), range(16, 18)], [range(6, 12), range(14, 16), range(18, 20)]]
    uneven = [[range(8), range(12, 13), range(16, 17)], [range(8, 12), range(13, 16), range(17, 20)]]
    for ranks in (held, uneven):
        shards = []
        for own in ranks:
            tensors = shard(matrix, "out", *own)
            format = FORMAT.sharded(matrix.shape, "out", own)
            size = sum(map(len, own))
            assert {suffix: TensorSpec.of(item) for suffix, item in tensors.items()} == format.tensors(
                (size, 128), "float32"
            )
            rows = [index for part in own for index in part]
            assert torch.equal(format.dequantize(tensors), matrix.dequantized()[rows])
            shards.append((tensors, own))
        found = unsharded(matrix, "out", shards)
        assert all(torch.equal(found[suffix], tensor) for suffix, tensor in matrix.tensors.items())
    assert FORMAT.sharded(matrix.shape, "out", held[1]) == FORMAT
    assert [part["share"] for part in FORMAT.sharded(matrix.shape, "out", uneven[0]).to_json()["parts"]] == [8, 1, 1]


def test_columns_are_cut_in_every_part(matrix: Matrix) -> None:
    ranges = [range(96), range(96, 128)]
    shards = [shard(matrix, "in", part) for part in ranges]
    assert FORMAT.sharded(matrix.shape, "in", ranges[:1]) == FORMAT
    assert torch.equal(torch.cat([FORMAT.dequantize(item) for item in shards], 1), matrix.dequantized())
    for found in (
        FORMAT.join(shards, matrix.shape, "in"),
        unsharded(matrix, "in", [(item, [part]) for item, part in zip(shards, ranges, strict=True)]),
    ):
        assert all(torch.equal(found[suffix], tensor) for suffix, tensor in matrix.tensors.items())
    with pytest.raises(ConfigError, match="has an entry for every 32 columns"):
        FORMAT.cut(matrix.tensors, matrix.shape, "in", 0, 48)


def test_parts_have_steps_of_their_own_and_are_divided_alone() -> None:
    grouped = Stacked.of_rows([(4, Int4Groups(64)), (2, GGUF_BLOCKS["Q8_0"])])
    assert (grouped.step("in"), grouped.step("out")) == (64, 1)
    assert grouped.finest() == Stacked.of_rows([(4, Int4Groups(16)), (2, GGUF_BLOCKS["Q8_0"])])
    halves = Stacked.of_rows([(4, Int4Groups(32)), (2, GGUF_BLOCKS["Q8_0"])])
    assert grouped.sharded((6, 192), "in", [range(96)]) == halves


def test_what_does_not_divide_is_refused(matrix: Matrix) -> None:
    with pytest.raises(ConfigError, match=r"20 x 128 .*different formats.*cannot be cut at rows 0 and 5"):
        FORMAT.cut(matrix.tensors, matrix.shape, "out", 0, 5)
    assert FORMAT.cut(matrix.tensors, matrix.shape, "out", 0, 20) == matrix.tensors
    with pytest.raises(UnsupportedModelError, match=r"21 x 128 .* in 5 equal shares"):
        FORMAT.tensors((21, 128), "float32")
    for ranges in ([range(6), range(12, 14)], [range(6), range(10, 14), range(16, 20)]):
        with pytest.raises(ConfigError, match=r"20 x 128 .*different formats.*cannot be cut at rows 0 to 6 and rows"):
            FORMAT.sharded(matrix.shape, "out", ranges)


def test_manifests() -> None:
    values = {
        "weights": "stacked",
        "parts": [
            {"share": 3, "weights": "gguf-q4_1"},
            {"share": 1, "weights": "int8"},
            {"share": 1, "weights": "none"},
        ],
    }
    assert FORMAT.to_json() == values
    assert str(FORMAT) == "stacked(gguf-q4_1, int8, none)"
    assert format_from_json(values, "here") == FORMAT


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, r"here: parts: expected a list of objects, found \{\}"),
        ([], r"here: parts: expected a list of objects, found \[\]"),
        ([3], r"here: parts: expected a list of objects, found \[3\]"),
        ([{"weights": "int8"}], r"here: parts: 0: share: expected a positive integer, found None"),
        ([{"share": 0, "weights": "int8"}], r"here: parts: 0: share: expected a positive integer, found 0"),
        ([{"share": 1, "weights": "int8", "x": 1}], r"here: parts: 0: format 'int8' has the settings"),
        ([{"share": 1, **FORMAT.to_json()}], r"here: the parts .* must not have parts themselves"),
    ],
)
def test_damaged_manifests_are_refused(parts: Any, message: str) -> None:
    with pytest.raises(CorruptFileError, match=message):
        format_from_json({"weights": "stacked", "parts": parts}, "here")


def test_parts_in_unknown_formats_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="here: parts: 1: weights in format 'int3'"):
        format_from_json({"weights": "stacked", "parts": [{"share": 1}, {"share": 1, "weights": "int3"}]}, "here")
    with pytest.raises(ConfigError, match="must not have parts"):
        Stacked((StackedPart(1, FORMAT),))
