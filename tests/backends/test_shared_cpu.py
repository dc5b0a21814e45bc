"""Tensor parallelism on a CPU, with real processes: what one process computes, several compute together."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmengine import LLM, ConfigError, EngineDeadError, ModelConfig, ParallelConfig, QuantConfig, SamplingParams
from llmengine.checkpoints.engine_dir import WEIGHTS_NAME
from llmengine.checkpoints.opening import open_model
from llmengine.cli.demo import find_demo_model
from llmengine.config import KvCacheConfig, SchedulerConfig
from tests.backends.helpers import save_tiny
from tests.models.family_helpers import make_family

PROMPTS = [[5, 6, 7], list(range(20, 90)), [300]]
CALIBRATION: dict[str, Any] = {"calibration_prompts": PROMPTS, "num_calibration_samples": 3}
GREEDY = SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True)


def tiny_config(directory: Path, tp_size: int, max_unread_tokens: int = 256, **options: object) -> ModelConfig:
    return ModelConfig(
        directory,
        device="cpu",
        dtype="float32",
        parallel_config=ParallelConfig(tp_size=tp_size),
        kv_cache_config=KvCacheConfig(block_size=8, max_bytes=16 << 20),
        scheduler_config=SchedulerConfig(
            max_batch_size=8,
            max_tokens_per_step=128,
            max_tokens_per_mixed_step=64,
            max_unread_tokens=max_unread_tokens,
        ),
        **options,  # type: ignore[arg-type]
    )


def load(directory: Path, tp_size: int, **options: Any) -> LLM:
    return LLM(tiny_config(directory, tp_size, **options), enable_tokenizer=False)


def children() -> list[psutil.Process]:
    """Processes of ranks that this one started."""
    found = psutil.Process().children(recursive=True)
    return [one for one in found if any("ranks/process.py" in word for word in one.cmdline())]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, attention_bias=True, mlp_bias=True)
    return directory


@pytest.fixture(scope="module")
def alone(directory: Path) -> Iterator[LLM]:
    with load(directory, 1) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(directory: Path) -> Iterator[LLM]:
    with load(directory, 2) as llm:
        yield llm


def tokens(llm: LLM, params: SamplingParams = GREEDY) -> list[list[int]]:
    return [list(output.token_ids) for output in llm.generate(PROMPTS, params)]


def test_the_same_tokens_as_one_process(alone: LLM, together: LLM) -> None:
    assert tokens(together) == tokens(alone)
    sampled = GREEDY.replace(temperature=1.0, top_p=0.9, seed=3)
    assert tokens(together, sampled) == tokens(alone, sampled)
    assert "2 processes share each matrix" in together.info.description
    assert together.info.vocab_size == alone.info.vocab_size
    assert together.info.kv_bytes_per_block == alone.info.kv_bytes_per_block
    assert len(children()) == 1


def test_log_probabilities_of_prompts_too(alone: LLM, together: LLM) -> None:
    params = GREEDY.replace(max_new_tokens=2, logprobs=3, prompt_logprobs=2)
    for mine, expected in zip(together.generate(PROMPTS, params), alone.generate(PROMPTS, params), strict=True):
        assert mine.prompt_logprobs is not None
        assert expected.prompt_logprobs is not None
        for one, other in zip(mine.prompt_logprobs, expected.prompt_logprobs, strict=True):
            if other is not None:
                assert one is not None
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert one.top_ids == other.top_ids


def test_requests_come_and_go(alone: LLM, together: LLM) -> None:
    async def main(llm: LLM) -> list[int]:
        abandoned = llm.generate_async([9, 9, 9], GREEDY.replace(max_new_tokens=100), streaming=True)
        others = [llm.generate_async(prompt, GREEDY) for prompt in PROMPTS]
        async for output in abandoned:
            if output.num_tokens > 3:
                break
        abandoned.abort()
        return [token for other in others for token in (await other).token_ids]

    assert asyncio.run(main(together)) == asyncio.run(main(alone))


def test_what_is_saved_is_the_whole_model(directory: Path, together: LLM, alone: LLM, tmp_path: Path) -> None:
    together.save(tmp_path / "engine")
    given = dict(open_model(directory).weights(torch.float32))
    for name, tensor in open_model(tmp_path / "engine").weights(torch.float32):
        assert torch.equal(tensor, given.pop(name)), name
    assert not given
    with load(tmp_path / "engine", 3) as again:  # 4 heads, of which 2 ranks share one of keys and values
        assert tokens(again) == tokens(alone)


@pytest.mark.parametrize(
    "options", [{"deterministic": True}, {"quant_config": QuantConfig(weights="int8")}], ids=["deterministic", "int8"]
)
def test_options(directory: Path, options: dict[str, object]) -> None:
    with load(directory, 1, **options) as alone, load(directory, 2, **options) as together:
        assert tokens(together, GREEDY.replace(max_new_tokens=4)) == tokens(alone, GREEDY.replace(max_new_tokens=4))


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(weights="fp8"),
        QuantConfig.preset("int4-rtn", group_size=32),
        QuantConfig.preset("int4-awq", group_size=16, **CALIBRATION),
        QuantConfig.preset("int4-gptq", group_size=16, **CALIBRATION),
        QuantConfig.preset("w8a8", **CALIBRATION),
    ],
    ids=["fp8", "int4", "awq", "gptq", "smoothquant"],
)
def test_quantized_weights_are_saved_as_one_process_does(directory: Path, tmp_path: Path, quant: QuantConfig) -> None:
    for size in (1, 2):
        with load(directory, size, quant_config=quant) as llm:
            llm.save(tmp_path / str(size))
    saved = [(tmp_path / str(size) / WEIGHTS_NAME).read_bytes() for size in (1, 2)]
    assert saved[0] == saved[1]


def test_norms_of_q_and_k_over_all_heads(tmp_path: Path) -> None:
    """OLMo 2; of three ranks two have the same head of keys."""
    make_family("olmo2").save_pretrained(tmp_path)
    prompts = [[token % 101 for token in prompt] for prompt in PROMPTS]
    said = []
    for size in (1, 3):
        with load(tmp_path, size) as llm:
            said.append([output.token_ids for output in llm.generate(prompts, GREEDY)])
    assert said[0] == said[1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_ends_the_engine(directory: Path, number: signal.Signals) -> None:
    before = set(children())
    llm = load(directory, 3, max_unread_tokens=16)
    (first, _) = sorted(set(children()) - before, key=lambda one: one.pid)

    async def main() -> None:
        # However late this task is, the request does not end before.
        params = GREEDY.replace(max_new_tokens=200)
        async for output in llm.generate_async([5, 6], params, streaming=True, slow_consumer="pause"):
            if output.num_tokens >= 3 and first.is_running():  # a consumer that is late gets several at once
                os.kill(first.pid, number)

    with pytest.raises(EngineDeadError, match=rf"rank \d of 3 .*{number.name}"):
        asyncio.run(main())
    assert number.name in str(llm.health().failure)
    llm.close()
    assert set(children()) == before


def test_a_rank_that_dies_ends_an_idle_engine_too(directory: Path) -> None:
    before = set(children())
    with load(directory, 2) as llm:
        (rank,) = set(children()) - before
        rank.kill()
        deadline = time.monotonic() + 30
        while llm.health().state != "dead" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "rank 1 of 2" in str(llm.health().failure)
        with pytest.raises(EngineDeadError, match="rank 1 of 2"):
            llm.generate([[5, 6]], GREEDY)
    assert set(children()) == before


def test_what_cannot_be_divided_names_what_can(directory: Path) -> None:
    before = children()
    with pytest.raises(ConfigError, match=r"tp_size=5: .*4 attention heads.*sizes that work: 1, 2"):
        load(directory, 5)
    assert children() == before


def smollm2_says(parallel: ParallelConfig) -> list[str]:
    """What SmolLM2 says in this many processes."""
    config = ModelConfig(find_demo_model(), device="cpu", dtype="float32", parallel_config=parallel)
    with LLM(config) as llm:
        prompts = ["The capital of France is", "To tell a story, one must", "def add(a, b):"]
        params = SamplingParams(max_new_tokens=32, temperature=0.0)
        return [output.text for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def smollm2_alone() -> list[str]:
    return smollm2_says(ParallelConfig())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("tp_size", "pp_size"),
    [(2, 1), (1, 2), *(pytest.param(*sizes, marks=SLOW) for sizes in ((3, 1), (4, 1), (1, 3), (2, 2)))],
)
def test_smollm2_says_the_same(smollm2_alone: list[str], tp_size: int, pp_size: int) -> None:
    """9 heads, 3 of keys and values: cut unevenly, evenly, and with heads of keys and values on several ranks."""
    assert smollm2_says(ParallelConfig(tp_size=tp_size, pp_size=pp_size)) == smollm2_alone
