"""Matrices whose parts have formats of their own: names, shards, rows and manifests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.formats import DENSE, TensorSpec
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.int8 import INT8
from llmengine.quantization.known_formats import format_from_json
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.stacked import Stacked, StackedPart

FORMAT = Stacked.of_rows([(12, GGUF_BLOCKS["Q4_1"]), (4, INT8), (4, DENSE)])
ROWS = [12, 4, 4]


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


def test_ranks_get_a_share_of_every_part(matrix: Matrix) -> None:
    shards = [FORMAT.shard(matrix.tensors, matrix.shape, "out", rank, 2, ROWS) for rank in range(2)]
    for rank, shard in enumerate(shards):
        assert {suffix: TensorSpec.of(tensor) for suffix, tensor in shard.items()} == FORMAT.tensors(
            (10, 128), "float32"
        )
        shares = [part.chunk(2)[rank] for part in matrix.dequantized().split(ROWS)]
        assert torch.equal(FORMAT.dequantize(shard), torch.cat(shares))
    joined = FORMAT.join(shards, matrix.shape, "out")
    assert all(torch.equal(joined[suffix], tensor) for suffix, tensor in matrix.tensors.items())


def test_columns_are_cut_in_every_part(matrix: Matrix) -> None:
    shards = [FORMAT.shard(matrix.tensors, matrix.shape, "in", rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([FORMAT.dequantize(shard) for shard in shards], 1), matrix.dequantized())
    joined = FORMAT.join(shards, matrix.shape, "in")
    assert all(torch.equal(joined[suffix], tensor) for suffix, tensor in matrix.tensors.items())
    with pytest.raises(ConfigError, match="has an entry for every 32 columns"):
        FORMAT.cut(matrix.tensors, matrix.shape, "in", 0, 48)


def test_what_does_not_divide_is_refused(matrix: Matrix) -> None:
    with pytest.raises(ConfigError, match=r"20 x 128 .*different formats.*cannot be cut at rows 0 and 5"):
        FORMAT.cut(matrix.tensors, matrix.shape, "out", 0, 5)
    assert FORMAT.cut(matrix.tensors, matrix.shape, "out", 0, 20) == matrix.tensors
    with pytest.raises(UnsupportedModelError, match=r"21 x 128 .* in 5 equal shares"):
        FORMAT.tensors((21, 128), "float32")
    with pytest.raises(ConfigError, match=r"tp_size=3 does not divide the 4 rows"):
        FORMAT.shard(matrix.tensors, matrix.shape, "out", 0, 3, ROWS)


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
