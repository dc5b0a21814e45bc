"""Descriptions and linears that are damaged in any way are read, or refused by typed errors that name them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmengine.checkpoints.huggingface_descriptions import Module
from llmengine.checkpoints.huggingface_quantization import layout_choice
from llmengine.checkpoints.huggingface_tensors import StoredTensor
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.quantized_linears import LinearLayout, StoredLinear
from llmengine.dtypes import dtype_name
from llmengine.errors import CorruptFileError, ModelLoadError
from llmengine.quantization.formats import TensorSpec
from tests.checkpoints.quantized_files import QuantizedFiles
from tests.checkpoints.quantized_layouts import BLOCKS, LAYOUTS, auto_round, compressed, gptq, group, modelopt

NAME = "model.layers.0.mlp.down_proj"
MODULE = Module((NAME,), "Linear")
SHAPE = (32, 64)
CONFIGS: list[dict[str, Any]] = [
    *(dict(files.config) for files, _ in LAYOUTS.values()),
    BLOCKS,
    gptq(dynamic={"+:.*down": {"bits": 8}, "-:.*up": {}}),
    auto_round("auto_gptq", extra_config={NAME: {"bits": 8}}),
    modelopt("MIXED_PRECISION", quantized_layers={NAME: {"quant_algo": "FP8"}}),
    compressed("mixed-precision", {**group(), "format": "int-quantized"}, group(bits=8), ignore=["re:.*head", NAME]),
]
numbers = st.integers(-(1 << 70), 1 << 70) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.sampled_from(["", "re:(", "int", "4"])
json_values = st.recursive(
    scalars,
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.sampled_from(["bits", ""]), items, max_size=2),
    max_leaves=4,
)


def refusal(call: Callable[[], object]) -> str | None:
    """What a typed error says; None without an error."""
    try:
        call()
    except ModelLoadError as error:
        return str(error)
    return None


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where an object has values, nested ones too."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for key, item in items for place in ((*path, key), *places(item, (*path, key)))]


@given(config=st.sampled_from(CONFIGS), data=st.data())
def test_descriptions(config: dict[str, Any], data: st.DataObject) -> None:
    damaged = copy.deepcopy(config)
    for _ in range(data.draw(st.integers(1, 2))):
        found = places(damaged)
        if not found:
            break
        *path, key = data.draw(st.sampled_from(found))
        parent = damaged
        for step in path:
            parent = parent[step]
        if data.draw(st.booleans()):
            del parent[key]
        else:
            parent[key] = data.draw(json_values)
    message = refusal(lambda: layout_choice(Fields(damaged, "here: quantization_config"))(MODULE))
    assert message is None or message.startswith("here: quantization_config")


def linear(tensors: dict[str, torch.Tensor]) -> StoredLinear:
    stored = {
        suffix: StoredTensor(
            Path("model.safetensors"), f"{NAME}.{suffix}", dtype_name(tensor.dtype), tuple(tensor.shape), tensor
        )
        for suffix, tensor in tensors.items()
    }
    return StoredLinear(NAME, SHAPE, "here", stored, lambda item: item.tensor.clone())


def layout_of(files: QuantizedFiles) -> LinearLayout:
    found = layout_choice(Fields(files.config, "here"))(MODULE)
    assert found is not None
    return found


def read(layout: LinearLayout, stored: StoredLinear) -> None:
    """Read a linear as a checkpoint's reader does; what comes is what the format lists."""
    wanted = layout.format(stored).tensors(SHAPE, "float32")
    tensors = layout.read(stored)
    assert {suffix: TensorSpec.of(tensors[suffix]) for suffix in wanted} == wanted
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def reshaped(tensor: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    change = data.draw(st.sampled_from(("half", "double", "flat", "transposed", "empty")))
    if change == "half":
        return tensor[: len(tensor) // 2] if tensor.ndim else tensor
    if change == "double":
        return torch.cat([tensor, tensor]) if tensor.ndim else tensor.expand(2).contiguous()
    if change == "flat":
        return tensor.reshape(-1)
    return tensor.t().contiguous() if change == "transposed" and tensor.ndim == 2 else tensor.reshape(-1)[:0]


def damaged(tensor: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    """A tensor of another shape, dtype or content."""
    kind = data.draw(st.sampled_from(("shape", "dtype", "bytes")))
    if kind == "shape":
        return reshaped(tensor, data)
    if kind == "dtype":
        dtype = data.draw(st.sampled_from((torch.float32, torch.float16, torch.int32, torch.uint8, torch.int64)))
        return tensor.float().nan_to_num(0.0).clamp(-100, 100).to(dtype)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    noise = torch.from_numpy(rng.integers(0, 256, max(1, tensor.nbytes)).astype(np.uint8))
    return noise[: tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("name", LAYOUTS)
@given(data=st.data())
def test_linears(name: str, data: st.DataObject) -> None:
    files, _ = LAYOUTS[name]
    tensors, _ = files.pack(np.random.default_rng(1), *SHAPE)
    layout = layout_of(files)
    read(layout, linear(tensors))
    suffix = data.draw(st.sampled_from(sorted(tensors)))
    if data.draw(st.booleans()):
        tensors[suffix] = damaged(tensors[suffix], data)
    else:
        del tensors[suffix]
    stored = linear(tensors)
    if layout.stores(stored.tensors):
        message = refusal(lambda: read(layout, stored))
        assert message is None or NAME in message


SCALES = [
    (name, suffix)
    for name, (files, _) in LAYOUTS.items()
    for suffix, tensor in files.pack(np.random.default_rng(1), *SHAPE)[0].items()
    if tensor.is_floating_point() and suffix not in ("weight", "weight.quant_map")
]


@pytest.mark.parametrize(("name", "suffix"), SCALES)
def test_scales_that_are_not_finite(name: str, suffix: str) -> None:
    files, _ = LAYOUTS[name]
    tensors, _ = files.pack(np.random.default_rng(1), *SHAPE)
    tensor = tensors[suffix].clone()
    tensor.view(-1)[-1] = torch.nan
    with pytest.raises(CorruptFileError, match=rf"model.safetensors: tensor '{NAME}.{suffix}' has a scale that is not"):
        read(layout_of(files), linear({**tensors, suffix: tensor}))


@pytest.mark.parametrize(("name", "suffix"), [item for item in SCALES if "input" in item[1] or "activation" in item[1]])
def test_scales_of_activations_that_are_not_positive(name: str, suffix: str) -> None:
    files, _ = LAYOUTS[name]
    tensors, _ = files.pack(np.random.default_rng(1), *SHAPE)
    for value in (0.0, -1.0):
        tensors[suffix] = torch.full_like(tensors[suffix], value)
        with pytest.raises(CorruptFileError, match=rf"'{NAME}.{suffix}' has a scale that is not positive"):
            read(layout_of(files), linear(tensors))
