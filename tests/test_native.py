"""The native decoder against torch's operators on the same weights and KV blocks, and what happens without it."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_helpers import NO_NATIVE, BackendDriver, load_tiny, reference_greedy, save_tiny

from llmengine.backends.torch.cpu import CpuBackend
from llmengine.backends.torch.native import (
    MAX_NATIVE_TOKENS,
    NATIVE_DIRECTORY,
    NativeInt8Linear,
    NativeUnavailableError,
    load_native_library,
)
from llmengine.batch import TokenLogprobs
from llmengine.sampling_params import SamplingParams

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
ALL_LOGPROBS = SamplingParams(logprobs=20)

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "three_queries_a_head": {"num_attention_heads": 6, "head_dim": 64, "hidden_size": 60},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "sizes_that_fill_no_vector": {"hidden_size": 44, "intermediate_size": 83, "head_dim": 22},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
}


def own_name() -> str:
    """The file name of the variant that this processor takes; skips the test where it is not built."""
    try:
        return f"_native_{load_native_library(NATIVE_DIRECTORY).variant}{SUFFIX}"
    except NativeUnavailableError as error:
        pytest.skip(f"no native decoder: {error}")


@pytest.fixture(params=["own", "generic"])
def native_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the library; "generic" has the variant for any processor in the place of its own."""
    name = own_name()
    if request.param == "own":
        return NATIVE_DIRECTORY
    directory = tmp_path / "generic"
    directory.mkdir()
    shutil.copy(NATIVE_DIRECTORY / f"_native_generic{SUFFIX}", directory / name)
    return directory


def prompt(length: int) -> list[int]:
    return torch.randint(3, 311, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def run_mixed_steps(backend: CpuBackend) -> tuple[list[TokenLogprobs], list[list[int]]]:
    """Drive requests of several lengths through chunks, mixed steps and decodes; return all that comes out."""
    driver = BackendDriver(backend, seed=5)
    long, short, middle = (
        driver.add(slot, prompt(length), ALL_LOGPROBS) for slot, length in ((3, 70), (0, 1), (6, 21))
    )
    steps = [
        [(long, 30)],
        [(short, 1), (long, 33)],
        [(long, 7), (middle, 21), (short, 1)],
        *[[(middle, 1), (short, 1), (long, 1)]] * 8,
        *[[(short, 1)]] * 4,
        [(long, 1), (short, 1)],
    ]
    logprobs = [driver.step(*parts).logprobs for parts in steps]
    entries = [step[slot] for step in logprobs for slot in sorted(step)]
    return entries, [request.output_ids for request in (long, short, middle)]


def assert_close(found: Sequence[TokenLogprobs], expected: Sequence[TokenLogprobs], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.top_ids[0] == other.top_ids[0]
        logprobs, others = torch.tensor(one.top_logprobs), torch.tensor(other.top_logprobs)
        torch.testing.assert_close(logprobs, others, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_threads", "block_size"), [(1, 64), (3, 2)])
def test_equals_torch(tmp_path: Path, native_directory: Path, shape: str, num_threads: int, block_size: int) -> None:
    save_tiny(tmp_path, **SHAPES[shape])
    before = torch.get_num_threads()
    try:
        native = load_tiny(tmp_path, native_directory=native_directory, num_threads=num_threads, block_size=block_size)
        assert f"steps of up to {MAX_NATIVE_TOKENS} tokens in the native decoder" in native.info.description
        entries, tokens = run_mixed_steps(native)
    finally:
        torch.set_num_threads(before)
    expected_entries, expected_tokens = run_mixed_steps(load_tiny(tmp_path, native_directory=NO_NATIVE))
    assert tokens == expected_tokens
    assert_close(entries, expected_entries)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, native_directory: Path, dtype: str) -> None:
    model = save_tiny(tmp_path / "model")
    entries, tokens = run_mixed_steps(load_tiny(tmp_path / "model", native_directory=native_directory, dtype=dtype))
    # In float32, from weights that have been through the other type.
    model.to(getattr(torch, dtype)).float().save_pretrained(tmp_path / "rounded")
    expected_entries, expected_tokens = run_mixed_steps(load_tiny(tmp_path / "rounded", native_directory=NO_NATIVE))
    assert tokens == expected_tokens
    assert_close(entries, expected_entries)


def test_larger_steps_go_through_torch_on_the_same_blocks(tmp_path: Path) -> None:
    own_name()
    length = MAX_NATIVE_TOKENS + 40
    model = save_tiny(tmp_path, max_position_embeddings=2 * length)
    driver = BackendDriver(load_tiny(tmp_path))
    first, second = driver.add(0, prompt(length)), driver.add(1, prompt(30))
    driver.step((first, length - 20))
    driver.step((first, 20), (second, 10))
    driver.step((second, 20), (first, 1))
    outputs = driver.generate([first, second], 12)
    assert outputs == [reference_greedy(model, prompt(length), 12), reference_greedy(model, prompt(30), 12)]


def test_without_the_library_torch_runs_everything_and_the_description_says_so(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    description = load_tiny(tmp_path, native_directory=NO_NATIVE).info.description
    assert "no native decoder: it was not built when this package was installed" in description


def test_a_library_that_cannot_be_loaded_is_left_out(tmp_path: Path) -> None:
    model = save_tiny(tmp_path)
    (tmp_path / own_name()).write_bytes(b"not a shared object")
    backend = load_tiny(tmp_path, native_directory=tmp_path)
    assert "no native decoder: _native_" in backend.info.description
    driver = BackendDriver(backend)
    assert driver.generate([driver.add(0, prompt(9))], 5) == [reference_greedy(model, prompt(9), 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_int8_equals_torch(tmp_path: Path, native_directory: Path, shape: str, num_threads: int) -> None:
    # A seed that leads no greedy choice into a near-tie.
    save_tiny(tmp_path, seed=1, **SHAPES[shape])
    before = torch.get_num_threads()
    try:
        native = load_tiny(tmp_path, quant="int8", native_directory=native_directory, num_threads=num_threads)
        entries, tokens = run_mixed_steps(native)
    finally:
        torch.set_num_threads(before)
    assert "int8 weights, steps of up to" in native.info.description
    expected_entries, expected_tokens = run_mixed_steps(load_tiny(tmp_path, quant="int8", native_directory=NO_NATIVE))
    assert tokens == expected_tokens
    # Activations of 16 bits, in place of float32.
    assert_close(entries, expected_entries, tolerance=2e-3)


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (37, 83), (5, 1)])
@pytest.mark.parametrize("num_tokens", [1, 5, 13, 200])
def test_int8_product(native_directory: Path, rows: int, columns: int, num_tokens: int) -> None:
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale, bias = torch.rand(rows) + 0.5, torch.randn(rows)
    linear = NativeInt8Linear(load_native_library(native_directory), weight, scale, bias)
    # Tokens of very different magnitudes, one of zeros.
    x = torch.randn(num_tokens, columns) * torch.logspace(-9, 9, num_tokens)[:, None]
    x[num_tokens // 2] = 0.0
    expected = (x.double() @ (weight * scale[:, None]).double().T + bias).float()
    step = x.abs().amax(1) / 32767
    bound = step[:, None] * weight.float().abs().sum(1) * scale + 1e-5 * expected.abs()
    found = linear(x)
    assert bool(((found - expected).abs() <= bound + 1e-6).all())
    residual = torch.randn(num_tokens, rows)
    torch.testing.assert_close(linear(x, residual.clone()), found + residual)
    for token in range(0, num_tokens, 7):
        assert torch.equal(linear(x[token : token + 1])[0], found[token])
    x[0, 0] = torch.nan
    spoiled = linear(x)
    assert bool(spoiled[0].isnan().all())
    assert torch.equal(spoiled[1:], found[1:])
    tensors = dict(linear.canonical())
    assert torch.equal(tensors["weight"], weight)
    assert torch.equal(tensors["weight_scale"], scale)
    assert torch.equal(tensors["bias"], bias)


def test_int8_sums_of_the_largest_products_fit_into_32_bits(native_directory: Path) -> None:
    columns = 9000
    weight = torch.full((16, columns), -128, dtype=torch.int8)
    linear = NativeInt8Linear(load_native_library(native_directory), weight, torch.ones(16), None)
    torch.testing.assert_close(linear(torch.ones(2, columns)), torch.full((2, 16), -128.0 * columns))


@pytest.mark.skipif(not sysconfig.get_platform().startswith("linux"), reason="built and tested on Linux only")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here, so no library is expected")
def test_where_there_is_a_compiler_the_library_is_built() -> None:
    load_native_library(NATIVE_DIRECTORY)
