"""The native decoder's attention over int8 keys and values against torch's on the same blocks."""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import KvCacheConfig, ModelConfig, QuantConfig, SamplingParams
from llmengine.backends.cpu.backend import CpuBackend
from llmengine.backends.cpu.loading import load_cpu_backend
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY, NativeUnavailableError, load_native_library
from llmengine.checkpoints.opening import open_model
from llmengine.quant_config import KvQuantization
from tests.backends.helpers import NO_NATIVE, BackendDriver, save_tiny

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
VARIANTS = ["generic", "avx2", "avx512", "avx512vnni"]
"""Those before this processor's own run on it as well."""

SHAPES: dict[str, dict[str, Any]] = {
    "two_heads_a_key": {"head_dim": 32},
    "three_heads_a_key": {"head_dim": 64, "num_attention_heads": 6},
    "seven_heads_a_key": {"head_dim": 128, "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 56},
    "largest_heads": {"head_dim": 256, "num_attention_heads": 2},
}
TEXT = [3 + index * 7 % 300 for index in range(250)]
POISON = 7
"""A token whose embedding is NaN."""


@pytest.fixture(params=VARIANTS)
def native_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with one variant of the library, under the name of this processor's own."""
    try:
        own = load_native_library(NATIVE_DIRECTORY).variant
    except NativeUnavailableError as error:
        pytest.skip(f"no native decoder: {error}")
    source = NATIVE_DIRECTORY / f"_native_{request.param}{SUFFIX}"
    if VARIANTS.index(request.param) > VARIANTS.index(own) or not source.exists():
        pytest.skip(f"this processor's own variant is {own}")
    directory = tmp_path / "native"
    directory.mkdir()
    shutil.copy(source, directory / f"_native_{own}{SUFFIX}")
    return directory


def load(
    directory: Path,
    native_directory: Path,
    *,
    kv_cache: KvQuantization = "int8",
    block_size: int = 32,
    max_bytes: int = 16 << 20,
    num_threads: int = 1,
) -> CpuBackend:
    config = ModelConfig(
        directory,
        num_threads=num_threads,
        quant_config=QuantConfig(kv_cache=kv_cache),
        kv_cache_config=KvCacheConfig(block_size=block_size, max_bytes=max_bytes),
    )
    before = torch.get_num_threads()
    try:
        backend = load_cpu_backend(config.resolve(), open_model(directory), native_directory)
    finally:
        torch.set_num_threads(before)
    if native_directory != NO_NATIVE and kv_cache != "fp8":
        assert "in the native decoder" in backend.info.description
    return backend


def scored(backend: CpuBackend, chunks: Sequence[int]) -> torch.Tensor:
    """Log-probabilities after every token of `TEXT`, which is computed in chunks."""
    driver = BackendDriver(backend)
    request = driver.add(1, TEXT)
    logits = [rows.clone() for count in chunks for rows in backend.score(driver.batch((request, count)))]
    return torch.log_softmax(torch.cat(logits), dim=-1)


def divergence(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float((reference.exp() * (reference - found)).sum(dim=-1).mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_stays_near_torchs_attention(tmp_path: Path, native_directory: Path, shape: str) -> None:
    save_tiny(tmp_path, **SHAPES[shape])
    exact = scored(load(tmp_path, NO_NATIVE, kv_cache="none"), [250])
    expected = scored(load(tmp_path, NO_NATIVE), [250])
    # Chunks of more tokens than `MAX_FEW_TOKENS` and of fewer, and decodes.
    found = scored(load(tmp_path, native_directory), [150, 1, 1, 20, 78])
    other = scored(load(tmp_path, native_directory, block_size=64, num_threads=3), [100, 150])
    # Queries and weights are rounded too, which about doubles what rounding keys and values costs.
    assert divergence(expected, found) < 0.0015
    assert divergence(exact, found) < 0.002
    # Where sums of products differ in their last bit, a number between two bytes becomes another one.
    assert divergence(found, other) < 0.0005


def test_neither_threads_nor_neighbours_change_a_bit(tmp_path: Path, native_directory: Path) -> None:
    save_tiny(tmp_path, **SHAPES["three_heads_a_key"])
    params = SamplingParams(logprobs=5)

    def run(num_threads: int, others: Sequence[int]) -> list[Any]:
        driver = BackendDriver(load(tmp_path, native_directory, num_threads=num_threads))
        request = driver.add(4, TEXT[:90], params)
        beside = [driver.add(slot, TEXT[slot : slot + length], params) for slot, length in enumerate(others)]
        # As many tokens as choose the same loops of the products.
        steps = [[(request, 80), *((row, len(row.token_ids) - 6) for row in beside)]]
        steps += [[(request, 10), *((row, 6) for row in beside)]]
        return [driver.step(*parts).logprobs.get(4) for parts in steps]

    alone = run(1, [])
    assert alone[1]
    assert run(3, []) == alone
    assert run(3, [12, 20, 9]) == alone


@pytest.mark.parametrize("library", ["native", "torch"])
def test_what_is_not_finite_stays_in_its_request(tmp_path: Path, native_directory: Path, library: str) -> None:
    """Neither rows beside it nor the next request in its blocks see it."""
    model = save_tiny(tmp_path, head_dim=32)
    with torch.no_grad():
        model.model.embed_tokens.weight[POISON] = torch.nan
    model.save_pretrained(tmp_path)
    directory = native_directory if library == "native" else NO_NATIVE
    block_bytes = load(tmp_path, directory).info.kv_bytes_per_block
    driver = BackendDriver(load(tmp_path, directory, max_bytes=7 * block_bytes))
    params = SamplingParams(logprobs=5)
    clean = [token_id for token_id in TEXT if token_id != POISON]

    first = driver.add(0, clean[:70], params)
    expected = [driver.step((first, count)).logprobs.get(0) for count in (40, 30, 1)]
    driver.release(first)

    poisoned, beside = driver.add(1, [POISON, *clean[:63]], params), driver.add(2, clean[:70], params)
    errors = driver.step((beside, 40), (poisoned, 64)).errors
    assert set(errors) == {1}
    results = [driver.step((beside, 30)).logprobs.get(2), driver.step((beside, 1)).logprobs.get(2)]
    assert_near(results, expected[1:])
    for request in (poisoned, beside):
        driver.release(request)

    again = driver.add(3, clean[:70], params)
    assert_near([driver.step((again, count)).logprobs.get(3) for count in (40, 30, 1)][1:], expected[1:])


def assert_near(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Compare log-probabilities; the sums of torch's products depend on how many tokens a step has."""
    for (one,), (other,) in zip(found, expected, strict=True):
        assert one.top_ids[0] == other.top_ids[0]
        assert list(one.top_logprobs) == pytest.approx(list(other.top_logprobs), abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "block_size", "kv_cache", "reason"),
    [
        ({"head_dim": 32}, 8, "int8", "blocks of a multiple of 32 tokens, not 8, and heads .*, not 32"),
        ({"head_dim": 48}, 32, "int8", "heads of a multiple of 32 and at most 256 dimensions, not 48"),
        ({"head_dim": 32}, 32, "fp8", "it has no fp8 KV cache"),
    ],
)
def test_torch_runs_what_it_does_not(
    tmp_path: Path, changes: dict[str, Any], block_size: int, kv_cache: KvQuantization, reason: str
) -> None:
    save_tiny(tmp_path, **changes)
    config = ModelConfig(
        tmp_path,
        quant_config=QuantConfig(kv_cache=kv_cache),
        kv_cache_config=KvCacheConfig(block_size=block_size, max_bytes=1 << 20),
    )
    backend = load_cpu_backend(config.resolve(), open_model(tmp_path))
    assert re.search(f"no native decoder: .*{reason}", backend.info.description)
