"""Models take the memory and the files that their formats promise, within 3 %."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmengine import LLM, ModelConfig, QuantConfig
from llmengine.backends.cpu.native_packing import packing_of
from llmengine.checkpoints.engine_dir import WEIGHTS_NAME
from llmengine.checkpoints.opening import open_model
from llmengine.quantization.gguf_blocks import BLOCK_SIZES, GGUF_BLOCKS
from llmengine.quantization.model_formats import matrix_shapes
from tests import ROOT
from tests.backends.helpers import save_tiny
from tests.memory import output_in_steady_heap
from tests.models.family_helpers import make_family, write_family_gguf
from tests.test_smollm2 import model_path

TOLERANCE = 0.03
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1, "vocab_size": 2048}


def promised_bits() -> dict[str, float]:
    """Bits a weight of each format, as docs/quantization.md promises them."""
    page = (ROOT / "docs" / "quantization.md").read_text()
    row = re.search(r"\| INT4, groups of ([\d /]+) \| ([\d. /]+); ([\d. /]+) less if symmetric \|", page)
    assert row is not None
    sizes, bits, less = ([float(value) for value in values.split("/")] for values in row.groups())
    promised = {}
    for size, value, difference in zip(sizes, bits, less, strict=True):
        promised[f"int4 {size:.0f}"], promised[f"int4 {size:.0f} symmetric"] = value, value - difference
    for names, value in re.findall(r"^\| ([A-Z0-9, ]+) \| ([\d.]+) \|$", page, re.MULTILINE):
        promised |= {name.lower(): float(value) for name in names.split(", ")}
    return promised


BITS = promised_bits()
CONFIGS = {
    "int8": QuantConfig.preset("int8"),
    "w8a8": QuantConfig.preset("w8a8", method="rtn"),
    "fp8": QuantConfig.preset("fp8"),
    "mxfp4": QuantConfig.preset("mxfp4"),
    **{
        f"int4 {size}{' symmetric' * symmetric}": QuantConfig.preset("int4-rtn", group_size=size, symmetric=symmetric)
        for size in (128, 64, 32, 16)
        for symmetric in (False, True)
    },
}
MORE_BITS_IN_MEMORY = {"Q2_K": 0.5, "Q3_K": 0.125, "Q4_K": 0.25, "Q5_K": 0.25}
"""Scales of 4 or 6 bits are bytes in the native library's panels."""
NATIVE_BLOCKS = [name for name, item in GGUF_BLOCKS.items() if packing_of(item) is not None]


def test_the_page_promises_something_for_each_format() -> None:
    assert BITS.keys() == CONFIGS.keys()


def sizes(config: ModelConfig, engine: Path) -> tuple[int, int]:
    """Bytes of a model's weights in memory and in a saved engine."""
    with LLM(config, enable_tokenizer=False) as llm:
        llm.save(engine)
        return llm.info.weight_bytes, (engine / WEIGHTS_NAME).stat().st_size


@pytest.mark.parametrize("name", CONFIGS)
def test_quantized_models(tmp_path: Path, name: str) -> None:
    """The layers' matrices have the format, the output matrix 8 bits, and the embedding stays in float32."""
    save_tiny(tmp_path / "model", num_attention_heads=8, head_dim=64, **SIZES)
    config = ModelConfig(tmp_path / "model", device="cpu", num_threads=1, quant_config=CONFIGS[name])
    shapes = matrix_shapes(open_model(tmp_path / "model").arch)
    numbers = {matrix: rows * columns for matrix, (rows, columns) in shapes.items()}
    others = numbers.pop("embed_tokens") * 4 + numbers.pop("lm_head")
    for size_bytes in sizes(config, tmp_path / "engine"):
        assert (size_bytes - others) * 8 / sum(numbers.values()) == pytest.approx(BITS[name], rel=TOLERANCE)


@pytest.mark.parametrize("name", NATIVE_BLOCKS)
def test_gguf(tmp_path: Path, name: str) -> None:
    model = make_family("mistral", sliding_window=None, num_attention_heads=8, head_dim=64, **SIZES)
    path = tmp_path / "model.gguf"
    write_family_gguf(path, model, name)
    block_size, block_bytes = BLOCK_SIZES[name]
    in_memory, in_file = sizes(ModelConfig(path, device="cpu", num_threads=1), tmp_path / "engine")
    num_weights = sum(rows * columns for rows, columns in matrix_shapes(open_model(path).arch).values())
    bits = 8 * block_bytes / block_size
    assert in_file * 8 / num_weights == pytest.approx(bits, rel=TOLERANCE)
    assert in_memory * 8 / num_weights == pytest.approx(bits + MORE_BITS_IN_MEMORY.get(name, 0.0), rel=TOLERANCE)


GROWTH = """
import sys
import psutil, torch
from llmengine import LLM, KvCacheConfig, ModelConfig
import llmengine.llm_parts, llmengine.backends.cpu.loading, llmengine.checkpoints.opening

config = ModelConfig(sys.argv[1], device="cpu", num_threads=1, kv_cache_config=KvCacheConfig(max_bytes=8 << 20))
if sys.argv[2] == "int8":
    config.quant_config.weights = "int8"
elif sys.argv[2] == "float32":
    config.dtype = "float32"
process = psutil.Process()
before = process.memory_info().rss
with LLM(config, enable_tokenizer=False) as llm:
    print(process.memory_info().rss - before, llm.info.weight_bytes)
"""


def growth(name: str) -> tuple[int, int]:
    """What loading SmolLM2 adds to a process, and the weights' part of it by the backend's own account."""
    added, weights = map(int, output_in_steady_heap(GROWTH, str(model_path()), name).split())
    return added, weights


@pytest.mark.slow
def test_processes_grow_by_the_weights() -> None:
    """Of what a model's size does not change, such as the KV cache, all have the same."""
    grown = {name: growth(name) for name in ("blocks", "int8", "float32")}
    added, weights = grown.pop("blocks")
    assert weights < 1.03 * model_path().stat().st_size
    assert added - weights < 48 << 20
    for name, (more_added, more_weights) in grown.items():
        assert more_added - added == pytest.approx(more_weights - weights, abs=TOLERANCE * more_weights), name
