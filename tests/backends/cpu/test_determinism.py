"""`ModelConfig(deterministic=True)` on CPUs: results do not depend on the schedule, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import (
    LLM,
    ConfigError,
    KvCacheConfig,
    ModelConfig,
    QuantConfig,
    SchedulerConfig,
)
from llmengine.backends import load_backend
from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cpu.loading import cpu_kv_layout, load_cpu_backend
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY
from llmengine.backends.cpu.sampler import log_sum_exp
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.quant_config import KvQuantization
from tests.backends.determinism_helpers import check_schedules
from tests.backends.helpers import NO_NATIVE, save_tiny
from tests.models.family_helpers import make_family, write_family_gguf

BLOCK_SIZE = 8
PREFIX = [5 + index * 7 % 90 for index in range(40)]
PROMPTS = [
    [7],
    [9, 8, 7, 6],
    PREFIX,
    [*PREFIX[:24], 3, 4, 5],
    [*PREFIX, *PREFIX, 11, 12],
    [*PREFIX, 90, 91, 92, *PREFIX],
    [60 + index % 30 for index in range(33)],
    [*PREFIX[:16], 41],
]


def open_llm(
    directory: Path,
    rng: random.Random | None,
    *,
    native: Path = NATIVE_DIRECTORY,
    block_size: int = BLOCK_SIZE,
    pool_sizes: Sequence[int] = (15, 17, 60),
    **settings: Any,
) -> LLM:
    """Return an LLM with limits drawn from `rng`; None runs one request at a time, in one chunk, and reuses nothing."""
    batch_size = rng.choice((2, 3, 8)) if rng else 1
    mixed = max(batch_size, rng.choice((1, 9, 17, 40)) if rng else 256)
    step = max(mixed, rng.choice((1, 19, 64, 200)) if rng else 256)
    num_blocks = rng.choice(pool_sizes) if rng else pool_sizes[-1]
    given = settings.get("quant_config", QuantConfig())
    source = source_in_use(ModelConfig(directory, device="cpu", quant_config=given), open_model(directory))
    config = ModelConfig(
        model_dir=directory,
        scheduler_config=SchedulerConfig(
            max_batch_size=batch_size, max_tokens_per_mixed_step=mixed, max_tokens_per_step=step
        ),
        kv_cache_config=KvCacheConfig(block_size=block_size, enable_prefix_caching=rng is not None),
        **{"deterministic": True, **settings},
    )
    config.kv_cache_config.max_bytes = num_blocks * cpu_kv_layout(config, source.arch).bytes_per_block
    return LLM.from_backend(
        lambda: load_cpu_backend(config.resolve(), quantized_source(source, config.resolve().quant_config), native),
        scheduler_config=config.scheduler_config,
        kv_cache_config=config.kv_cache_config,
    )


def check(
    directory: Path,
    num_engines: int,
    num_waves: int,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    **settings: Any,
) -> bool:
    """Return whether all schedules gave the same results; asserts that some had preemptions and prefix hits."""
    equal, cached, preemptions = check_schedules(
        partial(open_llm, directory, **settings), prompts, num_engines, num_waves
    )
    assert cached > 0
    assert preemptions > 0
    return equal


@pytest.mark.parametrize(
    "settings",
    [{}, {"quant_config": QuantConfig(weights="int8")}, {"dtype": "bfloat16"}],
    ids=["float32", "int8", "bfloat16"],
)
def test_200_schedules_in_the_native_decoder(tmp_path: Path, settings: dict[str, Any]) -> None:
    save_tiny(tmp_path)
    assert check(tmp_path, 20 if not settings else 3, 10, **settings)


def test_schedules_without_the_native_decoder(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert check(tmp_path, 3, 5, native=NO_NATIVE)


def test_schedules_of_blocks_of_gguf(tmp_path: Path) -> None:
    model = make_family("mistral", intermediate_size=64, sliding_window=None, num_hidden_layers=1)
    write_family_gguf(tmp_path / "model.gguf", model, "Q4_1")
    assert check(tmp_path / "model.gguf", 3, 3)


@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_schedules_with_keys_and_values_of_8_bits(tmp_path: Path, kv_cache: KvQuantization) -> None:
    save_tiny(tmp_path)
    assert check(tmp_path, 3, 2, quant_config=QuantConfig(kv_cache=kv_cache))


def test_schedules_with_int8_keys_and_values_in_the_native_decoder(tmp_path: Path) -> None:
    save_tiny(tmp_path, head_dim=32)
    # Answers that outgrow a prompt's block of 32 tokens.
    prompts = [*PROMPTS[:4], *([token] * 29 for token in (3, 4, 5, 6))]
    settings: dict[str, Any] = {"block_size": 32, "pool_sizes": (4, 5, 20)}
    assert check(tmp_path, 4, 6, prompts, quant_config=QuantConfig(kv_cache="int8"), **settings)


def test_schedules_of_another_family(tmp_path: Path) -> None:
    make_family("gemma3").save_pretrained(tmp_path)
    assert check(tmp_path, 3, 4)


def test_without_it_schedules_differ(tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    save_tiny(tmp_path)
    assert not check(tmp_path, 5, 4, deterministic=False)


def test_what_it_excludes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ConfigError, match="deterministic must be True or False, not 'yes'"):
        ModelConfig(tmp_path, deterministic="yes").resolve()  # type: ignore[arg-type]
    monkeypatch.setattr("llmengine.backends.choose_device", lambda name: "cuda:0")
    with pytest.raises(ConfigError, match="deterministic=True excludes backend='tensorrt'"):
        load_backend(ModelConfig(tmp_path, backend="tensorrt", deterministic=True).resolve(), open_model(tmp_path))


@pytest.mark.parametrize("vocab_size", [311, 49152, 262145])
def test_log_sums_of_a_row_do_not_depend_on_the_others(vocab_size: int) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed in range(5):
            logits = 5 * torch.randn((9, vocab_size), generator=torch.Generator().manual_seed(seed))
            sums = log_sum_exp(logits)
            torch.testing.assert_close(sums, torch.logsumexp(logits.double(), dim=-1).float(), rtol=1e-6, atol=0)
            for rows in (slice(0, 1), slice(4, 5), slice(3, 5)):
                assert torch.equal(log_sum_exp(logits[rows].clone()), sums[rows])
    finally:
        torch.set_num_threads(threads)
