"""Sources whose stream quantizes: in the formats asked for, in order, the same each time, and lazily."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.source import ModelSource
from llmengine.errors import ConfigError
from llmengine.quant_config import QuantConfig
from llmengine.quantization.formats import DENSE, TensorSpec
from llmengine.quantization.int8 import INT8
from tests.backends.helpers import save_tiny


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    save_tiny(tmp_path, attention_bias=True)
    return open_model(tmp_path)


def test_weights_come_in_the_formats_asked_for_and_the_same_each_time(source: ModelSource) -> None:
    config = QuantConfig.preset("int4-rtn", group_size=32, skip_layers=["*.down"]).resolve()
    quantized = quantized_source(source, config)
    assert quantized.formats.of("layers.1.down") == DENSE
    assert quantized.formats.of("lm_head") == INT8
    first, second = (dict(quantized.weights(torch.float32)) for _ in range(2))
    specs = {name: TensorSpec.of(tensor) for name, tensor in first.items()}
    assert specs == quantized.formats.layout(source.arch, "float32")
    assert list(first) == list(specs)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())
    dense = dict(source.weights(torch.float32))
    kept = [name for name in dense if name.endswith(("norm.weight", ".bias", "down.weight")) or "embed" in name]
    assert all(torch.equal(first[name], dense[name]) for name in kept)


def test_a_source_is_left_alone_where_there_is_nothing_to_do(source: ModelSource) -> None:
    assert quantized_source(source, QuantConfig().resolve()) is source
    int8 = QuantConfig(weights="int8").resolve()
    quantized = quantized_source(source, int8)
    assert quantized_source(quantized, int8) is quantized
    with pytest.raises(ConfigError, match=r"'fp8.*', but the model's are stored as 'int8'"):
        quantized_source(quantized, QuantConfig.preset("fp8").resolve())


def test_matrices_are_quantized_as_they_are_read(source: ModelSource) -> None:
    read: list[str] = []

    def stream(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.stream(dtype):
            read.append(name)
            yield name, tensor

    counted = dataclasses.replace(source, stream=stream)
    for name, _ in quantized_source(counted, QuantConfig(weights="int8").resolve()).weights(torch.float32):
        assert read[-1].rpartition(".")[0] == name.rpartition(".")[0]
