"""Beam search against transformers on a tiny model, and through an LLM."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llmengine import (
    LLM,
    BeamSearchOutput,
    InvalidRequestError,
    KvCacheConfig,
    ModelConfig,
    PromptTooLongError,
    RequestKeywords,
    SamplingParams,
)
from llmengine.batch import Batch
from llmengine.testing import FakeBackend
from tests.backends.helpers import save_tiny
from tests.engine.helpers import StepGate, assert_idle, bounded, in_loop, make_llm, oracle

PROMPTS = [list(range(30, 53)), [7, 8, 9], [100, 3, 77, 5, 200, 41, 12, 18]]
EOS = [2, 9, 31, 55, 90, 120, 200, 222]
"""So many that beams do end: each step of a random model ends one in a few dozen."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LlamaForCausalLM]]:
    directory = tmp_path_factory.mktemp("tiny")
    model = save_tiny(directory, eos_token_id=EOS, initializer_range=0.12)
    config = ModelConfig(
        model_dir=directory, device="cpu", kv_cache_config=KvCacheConfig(block_size=8, max_bytes=8 << 20)
    )
    with LLM(config, enable_tokenizer=False) as llm:
        yield llm, model


@torch.no_grad()
def reference(
    model: LlamaForCausalLM, prompt: list[int], num_beams: int, **settings: Any
) -> list[tuple[list[int], float]]:
    """Return transformers' outputs, best first, and their scores."""
    ids = torch.tensor([prompt])
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    outputs = []
    for sequence, score in zip(result.sequences.tolist(), result.sequences_scores.tolist(), strict=True):
        generated = sequence[len(prompt) :]
        ends = [place for place, token_id in enumerate(generated) if token_id in EOS]
        outputs.append((generated[: ends[0] + 1] if ends else generated, score))
    return outputs


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (3, 1.0), (5, -0.7), (4, 2.5), (2, 0.0)])
def test_equals_transformers(
    tiny: tuple[LLM, LlamaForCausalLM], num_beams: int, length_penalty: float, early_stopping: Any
) -> None:
    llm, model = tiny
    settings = {"max_new_tokens": 14, "length_penalty": length_penalty, "early_stopping": early_stopping}
    found = llm.beam_search(PROMPTS, num_beams, **settings)
    for prompt, result in zip(PROMPTS, found, strict=True):
        assert result.prompt_token_ids == prompt
        if num_beams == 1:  # with one beam transformers decodes greedily
            ids = llm.generate(prompt)[0].token_ids
            assert result.token_ids == ids[: len(result.token_ids)]
            continue
        expected = reference(model, prompt, num_beams, **settings)
        assert [output.token_ids for output in result.outputs] == [ids for ids, _ in expected]
        assert [output.score for output in result.outputs] == pytest.approx([score for _, score in expected], abs=1e-3)
        for index, output in enumerate(result.outputs):
            assert output.index == index
            assert output.finish_reason == ("stop" if output.token_ids[-1] in EOS else "length")
            length = len(output.token_ids)
            assert output.score == pytest.approx(output.cumulative_logprob / length**length_penalty)


def test_some_beams_do_end(tiny: tuple[LLM, LlamaForCausalLM]) -> None:
    results = tiny[0].beam_search(PROMPTS, 4, max_new_tokens=14)
    assert {output.finish_reason for result in results for output in result.outputs} == {"stop", "length"}


def test_async_gives_the_same(tiny: tuple[LLM, LlamaForCausalLM]) -> None:
    llm, _ = tiny

    async def main() -> list[list[BeamSearchOutput]]:
        return await asyncio.gather(*(llm.beam_search_async(prompt, 3, max_new_tokens=6) for prompt in PROMPTS))

    found = [[output.token_ids for output in one.outputs] for (one,) in in_loop(main)]
    assert found == [
        [output.token_ids for output in one.outputs] for one in llm.beam_search(PROMPTS, 3, max_new_tokens=6)
    ]


def test_text_comes_without_the_eos() -> None:
    with make_llm(next_token=lambda ids: 257 if len(ids) > 6 else ord("x"), eos_token_ids=[257]) as llm:
        (result,) = bounded(lambda: llm.beam_search("abc", 1))
        assert (result.prompt, result.text, result.outputs[0].finish_reason) == ("abc", "xxxx", "stop")
        assert result.token_ids == [ord("x")] * 4 + [257]


@pytest.mark.parametrize("caching", [True, False])
def test_a_long_search_finds_its_prefixes(caching: bool) -> None:
    with make_llm(caching=caching, max_model_len=64) as llm:
        prompt = list(range(40))
        (result,) = bounded(lambda: llm.beam_search(prompt, 1, max_new_tokens=100))
        assert result.token_ids == oracle(prompt, 24)
        computed = llm.stats().counters.num_computed_tokens
        assert (computed < 40 + 24 * 4) == caching
        assert_idle(llm)


def test_cancelling_ends_its_requests() -> None:
    gate = StepGate()

    async def main() -> None:
        task = asyncio.ensure_future(llm.beam_search_async([[1, 2, 3], [4, 5]], 1))
        await asyncio.to_thread(gate.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with make_llm(on_step=gate) as llm:
        in_loop(main)
        gate.open()
        assert_idle(llm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams must be an integer of at least 1, not 0"),
        ({"num_beams": 20}, r"num_beams must be in \[1, 19\] with 1 EOS ids, not 20"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, not 0"),
        ({"length_penalty": float("nan")}, r"length_penalty must be a number in \[-10, 10\], not nan"),
        ({"early_stopping": "always"}, "early_stopping must be True, False or 'never', not 'always'"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with make_llm(eos_token_ids=[257]) as llm:
        with pytest.raises(InvalidRequestError, match=message):
            llm.beam_search([1], **changes)
        with pytest.raises(PromptTooLongError):
            llm.beam_search([1] * 256)


def test_a_sampling_config_with_beams_says_where_to_go() -> None:
    assert SamplingParams.from_sampling_config({"num_beams": 1, "length_penalty": 2.0, "top_k": 3}).top_k == 3
    with pytest.raises(InvalidRequestError, match=r"num_beams=4 is not a sampling parameter; call LLM\.beam_search"):
        SamplingParams.from_sampling_config({"num_beams": 4})


def test_a_failing_beam_raises() -> None:
    with make_llm(next_token=lambda ids: None if len(ids) > 4 else 1) as llm:
        with pytest.raises(Exception, match="logits are not finite"):
            bounded(lambda: llm.beam_search([1, 2], 1))
        assert_idle(llm)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_deadline_is_of_the_whole_search(asynchronous: bool) -> None:
    ended = threading.Event()

    def wait_for_the_deadline(batch: Batch) -> None:
        if batch.step == 3:
            assert not ended.wait(0.3)  # longer than the deadline

    with LLM.from_backend(lambda: FakeBackend(on_step=wait_for_the_deadline)) as llm:
        options: RequestKeywords = {"deadline_s": 0.25, "first_token_deadline_s": 100.0}
        if asynchronous:
            (output,) = asyncio.run(llm.beam_search_async([[1]], 2, max_new_tokens=400, **options))
        else:
            (output,) = llm.beam_search([[1]], 2, max_new_tokens=400, **options)
        assert {beam.finish_reason for beam in output.outputs} == {"timeout"}
        assert all(len(beam.token_ids) < 400 for beam in output.outputs)
        (output,) = llm.beam_search([[1]], 2, max_new_tokens=4, first_token_deadline_s=1e-6)
        assert [(beam.finish_reason, beam.token_ids) for beam in output.outputs] == [("timeout", [])]
        (output,) = llm.beam_search([[1]], 2, max_new_tokens=4, deadline_s=1000)
        assert {beam.finish_reason for beam in output.outputs} == {"length"}
