"""KV caches of 8 bits on the CUDA backend: the numbers of the CPU's, in every kind of step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

from llmengine.backends import load_backend
from llmengine.backends.kv_layout import joint_kv_layout
from llmengine.batch import Backend, TokenLogprobs
from llmengine.checkpoints.opening import open_model
from llmengine.config import ModelConfig, QuantConfig
from llmengine.errors import ConfigError
from llmengine.sampling_params import SamplingParams
from tests.backends.cuda.helpers import load_cuda
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, save_tiny

NumberFormat = Literal["int8", "fp8"]
FORMATS: tuple[NumberFormat, ...] = ("int8", "fp8")
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
PROMPT = [3 + index * 7 % 290 for index in range(21)]
OTHER = [5, 6, 7]


def run(backend: Backend, chunks: Sequence[int]) -> tuple[list[int], list[TokenLogprobs]]:
    """Run `PROMPT` in chunks beside another request, then decode both; return the tokens and their logprobs."""
    driver = BackendDriver(backend)
    request = driver.add(1, PROMPT, SamplingParams(logprobs=5, prompt_logprobs=1))
    other = driver.add(2, OTHER)
    results = [driver.step((request, count)) for count in chunks]
    results.append(driver.step((request, 1), (other, 3)))
    results.append(driver.step((request, 1), (other, 1)))
    return request.token_ids, [entry for result in results for entry in result.logprobs.get(1, ())]


def assert_close(found: Sequence[TokenLogprobs], expected: Sequence[TokenLogprobs], tolerance: float) -> None:
    assert len(found) == len(expected) == 3
    for mine, reference in zip(found, expected, strict=True):
        assert mine.top_ids == reference.top_ids
        torch.testing.assert_close(
            torch.tensor(mine.top_logprobs), torch.tensor(reference.top_logprobs), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize(("heads", "kv_cache"), [(2, "fp8"), (4, "int8")])
def test_tokens_are_those_of_the_cpu(tmp_path: Path, device: str, heads: int, kv_cache: NumberFormat) -> None:
    save_tiny(tmp_path, num_attention_heads=heads)
    quant = QuantConfig(kv_cache=kv_cache)
    on_cpu = load_tiny(tmp_path, quant=quant, native_directory=NO_NATIVE, dtype="float32")
    backend = load_cuda(tmp_path, device, quant_config=quant)
    expected, found = run(on_cpu, [21]), run(backend, [8, 13])
    assert found[0] == expected[0]
    assert_close(found[1], expected[1], 2e-4)
    backend.close()


@pytest.mark.parametrize("kv_cache", FORMATS)
def test_what_the_cache_holds_is_told_and_takes_half_of_the_memory(
    tmp_path: Path, device: str, kv_cache: NumberFormat
) -> None:
    save_tiny(tmp_path, num_hidden_layers=1)
    source = open_model(tmp_path)
    backend = load_cuda(tmp_path, device, quant_config=QuantConfig(kv_cache=kv_cache))
    info, dtype = backend.info, DTYPES[kv_cache]
    backend.close()
    assert info.kv_dtype == str(dtype).removeprefix("torch.")
    assert info.description.endswith(f"KV cache in {info.kv_dtype}")
    assert info.kv_bytes_per_block == joint_kv_layout(source.arch, 16, dtype).bytes_per_block == 2 * 2 * 16 * (16 + 4)
    assert info.num_blocks == min((1 << 20) // info.kv_bytes_per_block, 4 * 16 + 1)


@pytest.mark.parametrize("kv_cache", FORMATS)
def test_deterministic_engines_give_the_same_bits_however_a_prompt_is_cut(
    tmp_path: Path, device: str, kv_cache: NumberFormat
) -> None:
    if device == "cpu":
        pytest.skip("seconds in the interpreter; a test of attention alone shows it there")
    save_tiny(tmp_path)
    runs = []
    for chunks in ([21], [8, 12, 1]):
        backend = load_cuda(tmp_path, device, quant_config=QuantConfig(kv_cache=kv_cache), deterministic=True)
        runs.append(run(backend, chunks))
        backend.close()
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("kv_cache", "capability", "message"),
    [
        ("fp8", (8, 6), r"kv_cache='fp8' needs compute capability 8\.9; a GPU has 8\.6: use 'int8'"),
        ("fp8", (7, 5), r"kv_cache='fp8' needs compute capability 8\.9; a GPU has 7\.5: use 'none'"),
        ("int8", (7, 5), r"kv_cache='int8' needs compute capability 8\.0; a GPU has 7\.5: use 'none'"),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "tensorrt", "auto"])
def test_gpus_that_cannot_convert_its_numbers_refuse_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: Literal["torch", "tensorrt", "auto"],
    kv_cache: NumberFormat,
    capability: tuple[int, int],
    message: str,
) -> None:
    save_tiny(tmp_path)
    monkeypatch.setattr("llmengine.backends.choose_device", lambda name: "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    config = ModelConfig(tmp_path, backend=backend, quant_config=QuantConfig(kv_cache=kv_cache))
    with pytest.raises(ConfigError, match=message):
        load_backend(config.resolve(), open_model(tmp_path))
