"""The native decoder against torch's operators on the same weights and KV blocks, and a backend without it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine.backends.cpu.backend import CpuBackend
from llmengine.backends.cpu.native import MAX_FEW_TOKENS, NativeLinear
from llmengine.backends.cpu.native_library import (
    NATIVE_DIRECTORY,
    NativeLibrary,
    NativeUnavailableError,
    load_native_library,
)
from llmengine.batch import TokenLogprobs
from llmengine.errors import OutOfMemoryError
from llmengine.quantization.int8 import INT8
from llmengine.quantization.matrix import Matrix
from llmengine.sampling_params import SamplingParams
from tests import ROOT
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, reference_greedy, save_tiny

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
    """File name of the variant that this processor uses; skips the test where it is not built."""
    try:
        return f"_native_{load_native_library(NATIVE_DIRECTORY).variant}{SUFFIX}"
    except NativeUnavailableError as error:
        pytest.skip(f"no native decoder: {error}")


@pytest.fixture(params=["own", "generic"])
def native_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with the library; "generic" has the variant for any processor in place of this processor's own."""
    name = own_name()
    if request.param == "own":
        return NATIVE_DIRECTORY
    directory = tmp_path / "generic"
    directory.mkdir()
    shutil.copy(NATIVE_DIRECTORY / f"_native_generic{SUFFIX}", directory / name)
    return directory


@pytest.fixture(params=["avx512", "avx2"])
def lesser_library(request: pytest.FixtureRequest, tmp_path: Path) -> NativeLibrary:
    """A variant for fewer vector units than this processor has."""
    name, variants = own_name(), ["avx512vnni", "avx512", "avx2"]
    own = name.removeprefix("_native_").removesuffix(SUFFIX)
    if own not in variants[: variants.index(request.param)]:
        pytest.skip(f"this processor runs {own}")
    shutil.copy(NATIVE_DIRECTORY / f"_native_{request.param}{SUFFIX}", tmp_path / name)
    return load_native_library(tmp_path)


def prompt(length: int) -> list[int]:
    return torch.randint(3, 311, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def run_mixed_steps(backend: CpuBackend) -> tuple[list[TokenLogprobs], list[list[int]]]:
    """Drive requests of several lengths through chunks, mixed steps and decodes; return all results."""
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
    entries = [entry for step in logprobs for slot in sorted(step) for entry in step[slot]]
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
        assert "in the native decoder" in native.info.description
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


def run_large_steps(driver: BackendDriver) -> tuple[list[TokenLogprobs], list[list[int]]]:
    """Drive chunks of more than `MAX_FEW_TOKENS` tokens, alone and beside decodes; return all results."""
    length = 2 * MAX_FEW_TOKENS
    long, other, short = (
        driver.add(slot, prompt(size), ALL_LOGPROBS) for slot, size in ((2, length + 44), (5, length - 9), (1, 3))
    )
    steps = [
        [(short, 3), (long, length)],
        [(short, 1), (long, 43), (other, length - 50)],
        [(short, 1), (long, 1), (other, 41)],
        *[[(short, 1), (long, 1), (other, 1)]] * 4,
    ]
    logprobs = [driver.step(*parts).logprobs for parts in steps]
    entries = [entry for step in logprobs for slot in sorted(step) for entry in step[slot]]
    return entries, [request.output_ids for request in (long, other, short)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_threads", "block_size", "quant"), [(1, 32, "none"), (3, 4, "none"), (2, 16, "int8")])
def test_large_steps_equal_torch(
    tmp_path: Path, native_directory: Path, shape: str, num_threads: int, block_size: int, quant: str
) -> None:
    # A seed that leads no greedy choice into a near-tie.
    save_tiny(tmp_path, seed=1, max_position_embeddings=320, **SHAPES[shape])
    before = torch.get_num_threads()
    try:
        native = load_tiny(
            tmp_path,
            native_directory=native_directory,
            num_threads=num_threads,
            block_size=block_size,
            quant=quant,
        )
        entries, tokens = run_large_steps(BackendDriver(native))
    finally:
        torch.set_num_threads(before)
    expected_entries, expected_tokens = run_large_steps(
        BackendDriver(load_tiny(tmp_path, quant=quant, native_directory=NO_NATIVE))
    )
    assert tokens == expected_tokens
    assert_close(entries, expected_entries, tolerance=1e-4 if quant == "none" else 2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_steps_with_half_precision_weights(tmp_path: Path, native_directory: Path, dtype: str) -> None:
    model = save_tiny(tmp_path / "model", seed=1, max_position_embeddings=320)
    entries, tokens = run_large_steps(
        BackendDriver(load_tiny(tmp_path / "model", native_directory=native_directory, dtype=dtype))
    )
    model.to(getattr(torch, dtype)).float().save_pretrained(tmp_path / "rounded")
    expected_entries, expected_tokens = run_large_steps(
        BackendDriver(load_tiny(tmp_path / "rounded", native_directory=NO_NATIVE))
    )
    # On processors with tiles for bfloat16, torch multiplies in that type.
    if not (dtype == "bfloat16" and torch.cpu._is_amx_tile_supported()):
        assert tokens == expected_tokens
        assert_close(entries, expected_entries)


def test_nan_that_others_left_in_blocks_does_not_reach_a_large_step(tmp_path: Path) -> None:
    own_name()
    model = save_tiny(tmp_path, max_position_embeddings=320)
    poison = 2  # no prompt has it
    with torch.no_grad():
        model.model.embed_tokens.weight[poison] = torch.nan
    model.save_pretrained(tmp_path)
    expected = run_large_steps(BackendDriver(load_tiny(tmp_path)))
    driver = BackendDriver(load_tiny(tmp_path))
    poisoned = [driver.add(slot, [poison] * 300) for slot in (2, 5, 1)]
    for request in poisoned:
        driver.step((request, 300))
        driver.release(request)
    assert run_large_steps(driver) == expected


@pytest.mark.parametrize("vocab_size", [311, 320])
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_sampler(tmp_path: Path, native_directory: Path, vocab_size: int) -> None:
    model, half = save_tiny(tmp_path, vocab_size=vocab_size), vocab_size // 2
    model.lm_head.weight[half : 2 * half] = model.lm_head.weight[:half]  # every choice is a tie
    model.save_pretrained(tmp_path)
    found = []
    for params in (SamplingParams(), SamplingParams(logprobs=0)):
        driver = BackendDriver(load_tiny(tmp_path, native_directory=native_directory))
        requests = [driver.add(slot, prompt(slot + 2), params) for slot in range(5)]
        found.append(driver.generate(requests[:1], 6) + driver.generate(requests[1:], 6))
    assert found[0] == found[1]
    assert all(token < half or token == 2 * half for tokens in found[0] for token in tokens)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@torch.no_grad()
def test_a_row_without_a_likeliest_token_fails_alone(tmp_path: Path, native_directory: Path, number: float) -> None:
    model, poison = save_tiny(tmp_path), 2
    model.model.embed_tokens.weight[poison] = number
    model.save_pretrained(tmp_path)
    driver = BackendDriver(load_tiny(tmp_path, native_directory=native_directory))
    result = driver.step(*((driver.add(slot, ids), 2) for slot, ids in enumerate([[5, 6], [5, poison], [7, 8]])))
    assert list(result.errors) == [1]
    assert sorted(result.token_ids) == [0, 2]


def test_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    own_name()
    save_tiny(tmp_path, hidden_size=192, intermediate_size=640)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            for quant in ("none", "int8"):
                backend = load_tiny(tmp_path, num_threads=num_threads, quant=quant)
                results.append((quant, run_mixed_steps(backend)))
                backend.close()
    finally:
        torch.set_num_threads(before)
    for quant, result in results:
        assert result == next(other for name, other in results if name == quant)


def count_threads() -> int:
    """Threads of all backends in this process."""
    names = Path("/proc/self/task").glob("*/comm")
    return sum(name.read_text() == "llmengine-cpu\n" for name in names)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_end_with_the_backend(tmp_path: Path) -> None:
    own_name()
    save_tiny(tmp_path)
    gc.collect()  # backends of other tests, which nobody closed
    before, num_torch_threads = count_threads(), torch.get_num_threads()
    try:
        backends = [load_tiny(tmp_path, num_threads=4) for _ in range(3)]
        for backend in backends:
            run_mixed_steps(backend)
        assert count_threads() == before + 9
        for backend in backends:
            backend.close()
            backend.close()
    finally:
        torch.set_num_threads(num_torch_threads)
    assert count_threads() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_end_with_a_load_that_fails_although_its_error_is_kept(tmp_path: Path) -> None:
    own_name()
    save_tiny(tmp_path)
    gc.collect()
    before, num_torch_threads = count_threads(), torch.get_num_threads()
    try:
        with pytest.raises(OutOfMemoryError) as caught:
            load_tiny(tmp_path, num_threads=4, block_size=1 << 16)
    finally:
        torch.set_num_threads(num_torch_threads)
    assert count_threads() == before
    del caught


def test_threads_of_torch_are_as_before_a_step(tmp_path: Path) -> None:
    own_name()
    save_tiny(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_mixed_steps(load_tiny(tmp_path))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


_EXIT_CODE = """
import gc, os, sys
from pathlib import Path
import torch
from tests.backends.helpers import BackendDriver, load_tiny

torch.set_num_threads(3)
driver = BackendDriver(load_tiny(Path(sys.argv[1])))
tokens = driver.generate([driver.add(0, [5, 6, 7])], 5)
child = os.fork()
if child == 0:
    assert driver.generate([driver.add(1, [5, 6, 7])], 5) == tokens
    driver.backend.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert driver.generate([driver.add(2, [5, 6, 7])], 5) == tokens
del driver
gc.collect()
driver = BackendDriver(load_tiny(Path(sys.argv[1])))
assert driver.generate([driver.add(0, [5, 6, 7])], 5) == tokens
print("done", flush=True)
raise RuntimeError("while the threads wait")
"""


def test_waiting_threads_hold_up_neither_fork_nor_collection_nor_exit(tmp_path: Path) -> None:
    own_name()
    save_tiny(tmp_path)
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _EXIT_CODE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (process.returncode, process.stdout) == (1, "done\n"), process.stderr
    assert process.stderr.endswith("RuntimeError: while the threads wait\n")


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
    assert "int8 weights, steps in the native decoder" in native.info.description
    expected_entries, expected_tokens = run_mixed_steps(load_tiny(tmp_path, quant="int8", native_directory=NO_NATIVE))
    assert tokens == expected_tokens
    # Activations of 16 bits, in place of float32.
    assert_close(entries, expected_entries, tolerance=2e-3)


def int8_matrix(weight: torch.Tensor, scale: torch.Tensor) -> Matrix:
    rows, columns = weight.shape
    return Matrix(INT8, (rows, columns), {"weight": weight, "weight_scale": scale})


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (37, 83), (5, 1)])
@pytest.mark.parametrize("num_tokens", [1, 5, 13, 200])
def test_int8_product(native_directory: Path, rows: int, columns: int, num_tokens: int) -> None:
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale, bias = torch.rand(rows) + 0.5, torch.randn(rows)
    linear = NativeLinear(load_native_library(native_directory), int8_matrix(weight, scale), bias)
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
    assert linear.matrix.format == INT8
    assert torch.equal(linear.matrix.weight, weight)
    assert torch.equal(linear.matrix.tensors["weight_scale"], scale)
    assert linear.bias is not None
    assert torch.equal(linear.bias, bias)


def test_borrowed_threads_give_the_same_int8_product(native_directory: Path) -> None:
    weight, x = torch.randint(-128, 128, (333, 96), dtype=torch.int8), torch.randn(50, 96)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        libraries = [load_native_library(native_directory, borrowed_threads=borrowed) for borrowed in (False, True)]
        matrix = int8_matrix(weight, torch.full((333,), 0.1))
        own, borrowed = (NativeLinear(library, matrix, None) for library in libraries)
        expected = own(x)
        for _ in range(20):
            assert torch.equal(borrowed(x), expected)
    finally:
        torch.set_num_threads(before)


def test_int8_sums_of_the_largest_products_fit_into_32_bits(native_directory: Path) -> None:
    columns = 9000
    weight = torch.full((16, columns), -128, dtype=torch.int8)
    linear = NativeLinear(load_native_library(native_directory), int8_matrix(weight, torch.ones(16)), None)
    torch.testing.assert_close(linear(torch.ones(2, columns)), torch.full((2, 16), -128.0 * columns))


@pytest.mark.skipif(not sysconfig.get_platform().startswith("linux"), reason="built and tested on Linux only")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here, so no library is expected")
def test_where_there_is_a_compiler_the_library_is_built() -> None:
    load_native_library(NATIVE_DIRECTORY)
