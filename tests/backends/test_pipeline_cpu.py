"""Pipelines of stages on a CPU, with real processes: what one process computes, several compute one after the other."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import LLM, ConfigError, EngineDeadError, ParallelConfig, QuantConfig
from llmengine.checkpoints.opening import open_model
from llmengine.config import ModelConfig
from tests.backends.helpers import save_tiny
from tests.backends.test_shared_cpu import CALIBRATION, GREEDY, children, tiny_config, tokens


def load(directory: Path, pp_size: int, tp_size: int = 1, **options: Any) -> LLM:
    config: ModelConfig = tiny_config(directory, 1, **options)
    config.parallel_config = ParallelConfig(tp_size=tp_size, pp_size=pp_size)
    return LLM(config, enable_tokenizer=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, attention_bias=True, mlp_bias=True, num_hidden_layers=4, tie_word_embeddings=True)
    return directory


@pytest.fixture(scope="module")
def alone(directory: Path) -> Iterator[LLM]:
    with load(directory, 1) as llm:
        yield llm


@pytest.fixture(scope="module", params=[(3, 1), (2, 2)], ids=["3 stages", "2 stages of 2"])
def together(directory: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with load(directory, *request.param) as llm:
        yield llm


def test_the_same_tokens_as_one_process(alone: LLM, together: LLM) -> None:
    assert tokens(together) == tokens(alone)
    sampled = GREEDY.replace(temperature=1.0, top_p=0.9, seed=3)
    assert tokens(together, sampled) == tokens(alone, sampled)
    assert " stages of " in together.info.description
    assert together.info.vocab_size == alone.info.vocab_size
    assert together.info.kv_bytes_per_block == alone.info.kv_bytes_per_block
    assert together.info.weight_bytes > alone.info.weight_bytes, "a tied embedding is on both ends"


def test_log_probabilities_of_prompts_too(alone: LLM, together: LLM) -> None:
    prompts = [list(range(20, 90)), [5, 6, 7]]
    params = GREEDY.replace(max_new_tokens=2, logprobs=3, prompt_logprobs=2)
    for mine, expected in zip(together.generate(prompts, params), alone.generate(prompts, params), strict=True):
        assert mine.prompt_logprobs is not None
        assert expected.prompt_logprobs is not None
        for one, other in zip(mine.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert other is not None
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert one.top_ids == other.top_ids


def test_requests_come_and_go(alone: LLM, together: LLM) -> None:
    async def main(llm: LLM) -> list[list[int]]:
        abandoned = llm.generate_async([9, 9, 9], GREEDY.replace(max_new_tokens=100), streaming=True)
        others = [
            llm.generate_async([7 + number, 8, number], GREEDY.replace(max_new_tokens=5 + 3 * number))
            for number in range(6)
        ]
        async for output in abandoned:
            if output.num_tokens > 3:
                break
        abandoned.abort()
        return [list((await other).token_ids) for other in others]

    assert asyncio.run(main(together)) == asyncio.run(main(alone))


def test_what_is_saved_is_the_whole_model(directory: Path, together: LLM, tmp_path: Path) -> None:
    together.save(tmp_path / "engine")
    given = dict(open_model(directory).weights(torch.float32))
    for name, tensor in open_model(tmp_path / "engine").weights(torch.float32):
        assert torch.equal(tensor, given.pop(name)), name
    assert not given


def test_scores(alone: LLM, together: LLM) -> None:
    text = [number * 7 % 300 for number in range(400)]
    reports = [llm.evaluate(text=text, window_tokens=64, measure_speed=False) for llm in (together, alone)]
    mine, expected = (report.model.perplexity for report in reports)
    assert mine == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True},
        {"quant_config": QuantConfig(weights="int8", kv_cache="int8")},
        {"quant_config": QuantConfig.preset("int4-awq", group_size=16, **CALIBRATION)},
    ],
    ids=["deterministic", "int8", "awq"],
)
def test_options(directory: Path, options: dict[str, Any]) -> None:
    params = GREEDY.replace(max_new_tokens=6, prompt_logprobs=0)
    with load(directory, 1, **options) as alone, load(directory, 2, **options) as together:
        assert tokens(together, params) == tokens(alone, params)


def test_a_rank_that_dies_ends_the_engine(directory: Path) -> None:
    before = set(children())
    llm = load(directory, 3)
    victim = min(set(children()) - before, key=lambda one: one.pid)

    async def main() -> None:
        async for output in llm.generate_async([5, 6], GREEDY.replace(max_new_tokens=200), streaming=True):
            if output.num_tokens >= 3 and victim.is_running():  # a consumer that is late gets several at once
                os.kill(victim.pid, signal.SIGKILL)

    with pytest.raises(EngineDeadError, match=r"rank \d of 3 .*SIGKILL"):
        asyncio.run(main())
    llm.close()
    assert set(children()) == before


def test_too_many_stages_are_refused_before_a_process_starts(directory: Path) -> None:
    before = children()
    with pytest.raises(ConfigError, match=r"pp_size=5: the model has 4 layers.*at most 4"):
        load(directory, 5)
    with pytest.raises(ConfigError, match=r"tp_size=5: .*4 attention heads.*sizes that work: 1, 2"):
        load(directory, 2, 5)
    assert children() == before
