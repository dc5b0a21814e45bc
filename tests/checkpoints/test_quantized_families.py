"""Every format in every family: logits are those of the dequantized weights, alone and in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmengine import LLM, GenerationOutput, ModelConfig, SamplingParams, TokenLogprobs
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4
from tests.backends.helpers import leave_products_to_torch
from tests.checkpoints import quantized_files as files
from tests.checkpoints.quantized_files import Packer, QuantizedFiles, write_dense, write_quantized
from tests.checkpoints.quantized_layouts import LAYOUTS, NVFP4, compressed, group, make
from tests.checkpoints.test_quantized_huggingface import FAMILIES, assert_stands_for

LAYERS: list[tuple[str, dict[str, Any], Packer, WeightFormat]] = [
    (
        "pack-quantized",
        group(strategy="group", group_size=32, symmetric=False),
        files.compressed(symmetric=False),
        Int4Groups(32, scale_dtype="bfloat16"),
    ),
    ("pack-quantized", group(bits=8, strategy="channel"), files.compressed(8, -1), INT8),
    (
        "int-quantized",
        group(bits=8, strategy="channel", symmetric=False),
        files.int8(symmetric=False),
        Int8Groups(-1, scale_dtype="bfloat16"),
    ),
    ("float-quantized", group("float", 8, strategy="channel"), files.fp8(), Fp8("channel", "none")),
    ("nvfp4-pack-quantized", NVFP4, files.nvfp4(), Nvfp4()),
    (
        "mxfp4-pack-quantized",
        group("float", 4, strategy="group", group_size=32),
        files.mxfp4("weight_packed", "weight_scale"),
        Mxfp4(),
    ),
]
"""The format of each layer of a model, as compressed-tensors describes it."""

PROMPTS = [[5, 9, 3], [7, 2], list(range(3, 23))]
PARAMS = SamplingParams(max_new_tokens=2, ignore_eos=True, prompt_logprobs=3, logprobs=3)


def load(place: Path, **changes: Any) -> LLM:
    config = ModelConfig(
        place, device="cpu", num_threads=1, deterministic=True, kv_cache_config=KvCacheConfig(block_size=8), **changes
    )
    return LLM(config, enable_tokenizer=False)


def facts(output: GenerationOutput) -> tuple[Any, ...]:
    return output.token_ids, output.logprobs, output.prompt_logprobs


def scored(output: GenerationOutput) -> list[TokenLogprobs]:
    """Of the prompt but its first token, and of the tokens generated."""
    assert output.prompt_logprobs is not None
    assert output.logprobs is not None
    return [*(entry for entry in output.prompt_logprobs if entry is not None), *output.logprobs]


@pytest.mark.parametrize("family", FAMILIES)
def test_formats_compute_what_their_dequantized_weights_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    leave_products_to_torch(monkeypatch)
    heads = 4 if family.startswith("phi3") else 2
    model = make(family, num_hidden_layers=len(LAYERS), num_key_value_heads=heads, intermediate_size=64)
    groups = [
        {**scheme, "format": name, "targets": [rf"re:.*layers\.{index}\..*"]}
        for index, (name, scheme, _, _) in enumerate(LAYERS)
    ]
    own = {rf"layers\.{index}\.": pack for index, (_, _, pack, _) in enumerate(LAYERS)}
    stored = QuantizedFiles(compressed("mixed-precision", *groups), files.compressed(), own)
    place, dense = tmp_path / "files", tmp_path / "dense"
    write_dense(dense, model, write_quantized(place, model, stored))
    formats = open_model(place).formats
    assert [formats.of(f"layers.{index}.down") for index in range(len(LAYERS))] == [layer[3] for layer in LAYERS]
    with load(place) as llm:
        found = llm.generate(PROMPTS, PARAMS)
        assert facts(llm.generate([PROMPTS[2]], PARAMS)[0]) == facts(found[2])
        again = llm.generate([PROMPTS[2]], SamplingParams(max_new_tokens=2, ignore_eos=True))[0]
        assert (again.num_cached_tokens, again.token_ids) == (16, found[2].token_ids)
    with load(dense) as llm:
        for output, expected in zip(found, llm.generate(PROMPTS, PARAMS), strict=True):
            assert output.token_ids == expected.token_ids
            for one, two in zip(scored(output), scored(expected), strict=True):
                assert one.logprob == pytest.approx(two.logprob, abs=1e-4)
                assert one.top_logprobs == pytest.approx(two.top_logprobs, abs=1e-4)


@pytest.mark.parametrize("layout", ["awq", "w8a8-static", "fp8", "nvfp4-modelopt", "bnb-double", "bnb-8"])
@pytest.mark.parametrize("family", ["qwen2", "phi3", "phi3_short", "gemma3"])
def test_layouts_are_read_exactly_where_families_differ_in_their_linears(
    tmp_path: Path, family: str, layout: str
) -> None:
    """Biases and a tied output matrix; q, k and v in one linear; heads in another order; one head of keys."""
    model = make(family, num_hidden_layers=2, num_key_value_heads=4 if family.startswith("phi3") else 1)
    write_dense(tmp_path / "dense", model, write_quantized(tmp_path / "files", model, LAYOUTS[layout][0]))
    assert_stands_for(tmp_path / "files", tmp_path / "dense")
