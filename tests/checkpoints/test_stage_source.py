"""Stages of checkpoints: each has its layers' tensors, and reads no others."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch

from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.checkpoints.sharded_source import ShardPlan, shard_source
from llmengine.checkpoints.source import ModelSource
from llmengine.checkpoints.stage_source import plan_stages, stage_source
from llmengine.errors import CorruptFileError
from llmengine.models.arch import canonical_shapes
from llmengine.models.sharding import Shard
from llmengine.quant_config import QuantConfig
from tests.models.family_helpers import make_family, write_family_gguf

KINDS = ["tied", "untied", "int8", "int4", "gguf", "engine"]


def of_kind(directory: Path, kind: str) -> ModelSource:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = make_family("gemma3" if kind == "tied" else "mistral", **sizes)
    if kind == "gguf":
        write_family_gguf(directory / "model.gguf", model, lambda name, _: "Q8_0" if "ffn" in name else "F16")
        return open_model(directory / "model.gguf")
    model.save_pretrained(directory / "model")
    source = open_model(directory / "model")
    if kind in ("int8", "int4"):
        quant = QuantConfig(weights="int8") if kind == "int8" else QuantConfig.preset("int4-rtn", group_size=16)
        return quantized_source(source, quant.resolve())
    if kind == "engine":
        weights = source.weights(torch.float32)
        save_model(directory / "engine", source, weights, dtype="float32", formats=source.formats, tokenizer=None)
        return open_model(directory / "engine")
    return source


@pytest.mark.parametrize("kind", KINDS)
def test_stages_together_have_what_the_model_has(tmp_path: Path, kind: str) -> None:
    source = of_kind(tmp_path, kind)
    assert source.arch.tie_word_embeddings == (kind == "tied")
    whole = dict(source.weights(torch.float32))
    for tp_size in (1, 2):
        found: set[str] = set()
        for stage in plan_stages(source, 3):
            own = stage_source(source, stage)
            plan = ShardPlan(own.arch, own.formats, tp_size)
            streams = [shard_source(own, Shard(rank, tp_size)).weights(torch.float32) for rank in range(tp_size)]
            for items in zip(*streams, strict=True):
                name = stage.whole_name(items[0][0])
                assert torch.equal(plan.join(items[0][0], [tensor for _, tensor in items]), whole[name]), name
                found.add(name)
        assert found == whole.keys()


@pytest.mark.parametrize("kind", ["tied", "int8"])
def test_a_stage_reads_its_own_layers_only(tmp_path: Path, kind: str) -> None:
    source = of_kind(tmp_path, kind)
    first, last = plan_stages(source, 2)
    shapes = canonical_shapes(source.arch)
    missing = 4 * sum(prod(shape) for name, shape in shapes.items() if name.startswith("layers.2"))
    file = tmp_path / "model" / "model.safetensors"
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size - missing)  # which is at the end of the file
    assert list(stage_source(source, first).weights(torch.float32))
    with pytest.raises(CorruptFileError, match="truncated"):
        list(stage_source(source, last).weights(torch.float32))


def test_one_stage_has_the_source(tmp_path: Path) -> None:
    source = of_kind(tmp_path, "untied")
    (stage,) = plan_stages(source, 1)
    assert stage_source(source, stage) is source
