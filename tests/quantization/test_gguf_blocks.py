"""GGUF's blocks as weight formats: the bytes of the file, cut between blocks, worth what the gguf package says."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.formats import Axis, TensorSpec
from llmengine.quantization.gguf_blocks import BLOCK_SIZES, DENSE_TYPES, GGUF_BLOCKS
from llmengine.quantization.gguf_dequantize import dequantize
from llmengine.quantization.known_formats import FORMATS, format_from_json
from llmengine.quantization.matrix import Matrix
from tests.quantization.random_blocks import HALVES, random_blocks

by_type = pytest.mark.parametrize("type_name", HALVES)


def random_matrix(type_name: str, rows: int, num_blocks: int) -> Matrix:
    shape = (rows, num_blocks * BLOCK_SIZES[type_name][0])
    return Matrix(GGUF_BLOCKS[type_name], shape, {"weight": torch.from_numpy(random_blocks(type_name, *shape))})


@pytest.mark.parametrize("type_name", BLOCK_SIZES)
def test_dequantize_agrees_with_gguf(type_name: str) -> None:
    block_size, block_bytes = BLOCK_SIZES[type_name]
    kind = gguf.GGMLQuantizationType[type_name]
    assert gguf.GGML_QUANT_SIZES[kind] == (block_size, block_bytes)
    raw = np.random.default_rng(0).integers(0, 0x3C, (4, 2 * block_bytes), dtype=np.uint8)
    out = np.empty((4, 2 * block_size), dtype=np.float32)
    dequantize(raw, type_name, out)
    expected = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(out, expected)
    if type_name not in DENSE_TYPES:
        blocks = torch.from_numpy(raw).view(4, 2, block_bytes)
        assert torch.equal(GGUF_BLOCKS[type_name].dequantize({"weight": blocks}), torch.from_numpy(expected))


@by_type
def test_every_byte_counts(type_name: str) -> None:
    matrix = random_matrix(type_name, 3, 2)
    expected = gguf.quants.dequantize(matrix.weight.flatten(1).numpy(), gguf.GGMLQuantizationType[type_name])
    assert torch.equal(matrix.dequantized(), torch.from_numpy(expected))
    assert matrix.dequantized().abs().max() > 0


@by_type
def test_the_tensors_are_the_blocks(type_name: str) -> None:
    matrix = random_matrix(type_name, 5, 3)
    specs = matrix.format.tensors(matrix.shape, "bfloat16")
    assert {"weight": TensorSpec.of(matrix.weight)} == specs
    block_size, block_bytes = BLOCK_SIZES[type_name]
    assert matrix.size_bytes == matrix.format.size_bytes(matrix.shape, "bfloat16") == 5 * 3 * block_bytes
    with pytest.raises(UnsupportedModelError, match=rf"5 x 40 weights .*'gguf-.*multiple of {block_size}"):
        matrix.format.tensors((5, 40), "float32")


@by_type
@pytest.mark.parametrize("axis", ["out", "in"])
@given(rows=st.integers(1, 4), num_blocks=st.integers(1, 3), num_ranks=st.sampled_from([1, 2, 3]))
def test_shards_of_all_ranks_are_the_whole(
    type_name: str, axis: Axis, rows: int, num_blocks: int, num_ranks: int
) -> None:
    whole = random_matrix(type_name, num_ranks * rows, num_ranks * num_blocks)
    step = rows if axis == "out" else num_blocks * whole.format.step("in")
    ranges = [range(rank * step, (rank + 1) * step) for rank in range(num_ranks)]
    shards = [whole.format.shard("weight", whole.weight, whole.shape, axis, [part]) for part in ranges]
    assert all(whole.format.sharded(whole.shape, axis, [part]) == whole.format for part in ranges)
    joined = torch.empty_like(whole.weight)
    for shard, part in zip(shards, ranges, strict=True):
        whole.format.unshard("weight", shard, joined, whole.shape, axis, [part])
    assert torch.equal(joined, whole.weight)
    dequantized = torch.cat([whole.format.dequantize({"weight": item}) for item in shards], 0 if axis == "out" else 1)
    assert torch.equal(dequantized, whole.dequantized())


@by_type
def test_blocks_are_not_cut_through(type_name: str) -> None:
    whole = random_matrix(type_name, 4, 3)
    columns = whole.shape[1]
    message = rf"'gguf-{type_name.lower()}' has an entry for every {columns // 3} columns.* at 0 and {columns // 2}"
    with pytest.raises(ConfigError, match=message):
        whole.format.sharded(whole.shape, "in", [range(columns // 2)])


@by_type
def test_rows_are_dequantized_alone(type_name: str) -> None:
    matrix = random_matrix(type_name, 7, 2)
    assert torch.equal(matrix.rows(torch.tensor([6, 0, 0, 3])), matrix.dequantized()[[6, 0, 0, 3]])
    parts = dict(matrix.format.dequantized_rows(matrix.tensors, matrix.shape, 2 * matrix.shape[1]))
    assert list(parts) == [0, 2, 4, 6]
    assert torch.equal(torch.cat(list(parts.values())), matrix.dequantized())


@pytest.mark.parametrize(("type_name", "levels"), [("Q4_0", 8), ("Q4_1", 15), ("Q8_0", 127), ("Q5_0", 16)])
def test_quantizing_is_ggmls(type_name: str, levels: int) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    weight[2, 32:64] = 0.0
    matrix = Matrix.dense(weight).quantized(GGUF_BLOCKS[type_name])
    expected = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[type_name])
    assert torch.equal(matrix.weight.flatten(1), torch.from_numpy(expected))
    blocks = weight.view(6, 3, 32)
    spread = blocks.amax(2) - blocks.amin(2) if type_name.endswith("_1") else blocks.abs().amax(2)
    error = (matrix.dequantized() - weight).abs().view(6, 3, 32).amax(2)
    assert bool((error <= 1.01 * spread / levels).all())


def test_types_that_need_a_search_are_not_quantized_to() -> None:
    with pytest.raises(ConfigError, match=r"'gguf-q4_k' here; make the file with llama\.cpp's llama-quantize"):
        GGUF_BLOCKS["Q4_K"].quantize(torch.zeros(2, 256))


@pytest.mark.parametrize("type_name", GGUF_BLOCKS)
def test_names_in_manifests(type_name: str) -> None:
    blocks = GGUF_BLOCKS[type_name]
    assert blocks.to_json() == {"weights": f"gguf-{type_name.lower()}"}
    assert format_from_json(blocks.to_json(), "here") == blocks
    assert FORMATS[blocks.name] is type(blocks)
    assert [other for other in GGUF_BLOCKS.values() if other == blocks] == [blocks]
    with pytest.raises(CorruptFileError, match=r"has the settings \[\]"):
        format_from_json({**blocks.to_json(), "group_size": 32}, "here")
