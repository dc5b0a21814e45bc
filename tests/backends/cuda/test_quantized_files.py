"""Every way in which checkpoints are quantized, and every format, on the CUDA backend against the CPU's reference."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig
from llmengine.kernels.linear_ops import quantized_matrix
from llmengine.kernels.packed_gguf import why_not_packed
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.int4 import GROUP_SIZES, Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.known_formats import FORMATS
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4
from llmengine.quantization.stacked import Stacked
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny
from tests.checkpoints import quantized_files as files
from tests.checkpoints.quantized_files import QuantizedFiles, write_quantized
from tests.checkpoints.quantized_layouts import LAYOUTS, bnb4, compressed, make
from tests.checkpoints.test_quantized_families import FAMILIES, LAYERS

PROMPT = random.Random(0).choices(range(3, 101), k=9)
DTYPES: tuple[Any, ...] = ("float16", "bfloat16", "float32")

IN_INTERPRETER = ("mistral", "gemma3", "phi3_short")
"""Each is seconds there; on a GPU all are run."""

EXAMPLES: list[WeightFormat] = [
    INT8,
    *(Int8Groups(size, zeros, scale_dtype=dtype) for size in (32, -1) for zeros in (False, True) for dtype in DTYPES),
    *(Int4Groups(size, zeros) for size in GROUP_SIZES for zeros in (False, True)),
    *(Int4Groups(size, scale_dtype=dtype) for size in GROUP_SIZES[1:] for dtype in DTYPES),
    *(Fp8(weights, "none") for weights in ("tensor", "channel", "block")),
    *(Fp8(weights, "token") for weights in ("tensor", "channel", "block")),
    Fp8("block", "block"),
    *(Int8W8A8(weights, scales) for weights in ("tensor", "channel") for scales in ("tensor", "token")),
    Mxfp4(),
    Nvfp4(),
    Nvfp4("channel"),
    *(Bnb4Bit(table, 1 << bits) for table in ("nf4", "fp4") for bits in range(5, 13)),
    Stacked.of_rows([(64, Int4Groups(32)), (32, DENSE), (32, Nvfp4("channel"))]),
    *(blocks for blocks in GGUF_BLOCKS.values() if why_not_packed(blocks) is None),
]
"""Formats with products on CUDA, in the settings that decide about them."""

DEQUANTIZED: list[WeightFormat] = [
    Int4Groups(16, scale_dtype="float32"),
    Bnb4Bit("nf4", 16),
    Bnb4Bit("fp4", 48),
    *(blocks for blocks in GGUF_BLOCKS.values() if why_not_packed(blocks) is not None),
]
"""Formats without; docs/quantization.md lists them."""


def load(directory: Path, device: str) -> CudaBackend:
    config = ModelConfig(
        directory,
        device="cuda",
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32),
        dtype="float32",
    ).resolve()
    return load_cuda_backend(config, source_in_use(config, open_model(directory)), torch.device(device, 0))


def assert_equal_to_the_cpu(backend: CudaBackend, directory: Path, atol: float = 2e-4) -> None:
    """Two tokens of both backends have the same likeliest tokens, as probable."""
    found = []
    for item in (backend, load_tiny(directory, dtype="float32", native_directory=NO_NATIVE)):
        driver = BackendDriver(item)
        request = driver.add(1, PROMPT, SamplingParams(logprobs=20))
        found.append([driver.step((request, count)).logprobs[request.slot][0] for count in (len(PROMPT), 1)])
        item.close()
    for ours, theirs in zip(*found, strict=True):
        expected = dict(zip(theirs.top_ids, theirs.top_logprobs, strict=True))
        pairs = zip(ours.top_ids, ours.top_logprobs, strict=True)
        shared = {token: value for token, value in pairs if token in expected}
        assert len(shared) >= 17
        assert shared == pytest.approx({token: expected[token] for token in shared}, abs=atol)


def test_every_format_has_products_or_is_dequantized_and_listed() -> None:
    listed = {type(item).name for item in (*EXAMPLES, *DEQUANTIZED, DENSE)}
    assert listed == set(FORMATS)
    for item in EXAMPLES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for shape in ((128, 4096), (256, 512)):
                assert quantized_matrix(item, shape, dtype, "meta") is not None, (item, shape)
    for item in DEQUANTIZED:
        assert quantized_matrix(item, (128, 768), torch.float16, "meta") is None, item


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_files_runs_as_it_is_stored(tmp_path: Path, device: str, layout: str) -> None:
    stored, weight_format = LAYOUTS[layout]
    write_quantized(tmp_path, make("qwen2", num_hidden_layers=1), stored)
    backend, source = load(tmp_path, device), open_model(tmp_path)
    assert source.formats.of("layers.0.qkv") == weight_format
    for (name, tensor), (wanted_name, wanted) in zip(backend.weights(), source.weights(torch.float32), strict=True):
        assert name == wanted_name
        assert tensor.shape == wanted.shape
        assert torch.equal(tensor.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8)), name
    # A value on the edge between two numbers of 8 bits may fall to either side.
    rounds = isinstance(weight_format, Int8W8A8) or getattr(weight_format, "activations", "none") != "none"
    assert_equal_to_the_cpu(backend, tmp_path, 0.05 if rounds else 2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_multiplies_by_every_format(tmp_path: Path, device: str, family: str) -> None:
    if device == "cpu" and family not in IN_INTERPRETER:
        pytest.skip("on a GPU only")
    heads = 4 if family.startswith("phi3") else 2
    model = make(family, num_hidden_layers=len(LAYERS), num_key_value_heads=heads, intermediate_size=64)
    groups = [
        {**scheme, "format": name, "targets": [rf"re:.*layers\.{index}\..*"]}
        for index, (name, scheme, _, _) in enumerate(LAYERS)
    ]
    own = {rf"layers\.{index}\.": pack for index, (_, _, pack, _) in enumerate(LAYERS)}
    write_quantized(tmp_path, model, QuantizedFiles(compressed("mixed-precision", *groups), files.compressed(), own))
    assert_equal_to_the_cpu(load(tmp_path, device), tmp_path, 5e-4)


def test_blocks_that_no_kernel_multiplies_are_dequantized_and_named(tmp_path: Path, device: str) -> None:
    write_quantized(tmp_path, make("qwen2", num_hidden_layers=1), QuantizedFiles(bnb4(), files.bnb4(block=16)))
    backend = load(tmp_path, device)
    assert "bnb-4bit(quant_type=nf4, block_size=16) dequantized: no kernel" in backend.info.description
    assert_equal_to_the_cpu(backend, tmp_path)
