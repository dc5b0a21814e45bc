"""Several outputs of one prompt: shared blocks, seeds, streams by index, abort, best_of, decoded logprobs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmengine import LLM, GenerationOutput, InvalidRequestError, KvCacheConfig, ModelConfig, QueueFullError
from llmengine.config import SchedulerConfig
from llmengine.engine.request import RequestStatus
from llmengine.engine.seeds import child_seed
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import save_tiny
from tests.engine.helpers import (
    WAIT_S,
    StepGate,
    Steps,
    assert_concatenates,
    assert_idle,
    bounded,
    in_loop,
    make_llm,
    oracle,
    tokens,
)

PROMPT = list(range(5, 24))
"""19 tokens: four full blocks of four, and three tokens."""


def several(n: int, num_tokens: int = 6, **changes: Any) -> SamplingParams:
    """Return parameters for n sampled outputs; the fake backend does not draw."""
    return tokens(num_tokens, n=n, temperature=1.0, **changes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An LLM with a random Llama on the CPU; steps of at most 24 tokens."""
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory)
    with load(directory) as llm:
        yield llm


def load(directory: Path, **scheduler: Any) -> LLM:
    return LLM(
        ModelConfig(
            model_dir=directory,
            device="cpu",
            kv_cache_config=KvCacheConfig(block_size=8, max_bytes=4 << 20),
            scheduler_config=SchedulerConfig(
                **{"max_batch_size": 8, "max_tokens_per_step": 24, "max_tokens_per_mixed_step": 24, **scheduler}
            ),
        ),
        enable_tokenizer=False,
    )


@pytest.mark.parametrize("caching", [True, False])
def test_the_prompt_is_computed_once(caching: bool) -> None:
    steps = Steps(caching=caching, max_steps_in_flight=2)
    relatives = steps.submit(PROMPT, 6, num_outputs=4).relatives
    other = steps.submit([9, 9], 3)
    steps.drain()
    steps.check_tokens()
    # The prompt, then its last three tokens for three relatives, the other prompt, and the decodes.
    assert steps.counters.num_computed_tokens == 19 + 3 * 3 + 2 + 4 * 5 + 2
    assert [one.stream.log.num_cached_tokens for one in relatives] == [0, 16, 16, 16]
    assert steps.counters.num_prompt_tokens == len(PROMPT) + len(other.prompt_token_ids)


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_of_the_prompt_are_shared_while_the_family_runs(caching: bool) -> None:
    steps = Steps(caching=caching)
    leader = steps.submit(PROMPT, 6, num_outputs=3)
    assert steps.step().num_tokens == 19
    assert steps.kv_cache.num_used_blocks == 5
    steps.step()
    assert steps.kv_cache.num_used_blocks == 5 + 2
    assert len({tuple(one.blocks.block_ids[:4]) for one in leader.relatives}) == 1
    steps.drain()


@pytest.mark.parametrize("caching", [True, False])
def test_a_pool_for_little_more_than_one_output_serves_all(caching: bool) -> None:
    steps = Steps(num_blocks=9, max_model_len=32, caching=caching, max_batch_size=4)
    first = steps.submit(PROMPT, 12, num_outputs=5).relatives
    second = steps.submit(PROMPT[::-1], 12, num_outputs=3).relatives
    steps.drain(400)
    steps.check_tokens()
    assert all(one.stream.log.finish_reason == "length" for one in (*first, *second))


def test_relatives_go_on_when_the_first_output_ends_before_its_prompt_is_computed() -> None:
    steps = Steps(max_batch_size=8, max_tokens_per_step=8, max_tokens_per_mixed_step=8)
    leader = steps.submit(PROMPT, 6, num_outputs=3)
    relatives = leader.relatives
    steps.step()
    assert [one.status for one in relatives[1:]] == [RequestStatus.HELD] * 2
    steps.scheduler.finish(leader, "abort")
    steps.drain()
    assert [len(one.stream.log.token_ids) for one in relatives] == [0, 6, 6]


def test_generate_groups_the_outputs_of_a_prompt() -> None:
    with make_llm() as llm:
        first, second = bounded(lambda: llm.generate([PROMPT, [1, 2]], [several(3, logprobs=1), tokens(2)]))
        assert [output.index for output in first.outputs] == [0, 1, 2]
        assert {output.request_id for output in first.outputs} == {first.request_id}
        assert first.request_id != second.request_id
        assert [output.token_ids for output in first.outputs] == [oracle(PROMPT, 6)] * 3
        assert first.token_ids == first.outputs[0].token_ids
        assert first.outputs[2].prompt_token_ids == PROMPT
        assert second.outputs == [second]
        assert_idle(llm)


def test_streams_by_index() -> None:
    async def main() -> list[GenerationOutput]:
        handle = llm.generate_async("abc", several(4, 9), streaming=True)
        seen = [output async for output in handle]
        final = await handle
        assert [output.text for output in final.outputs] == [final.text] * 4
        return seen

    with make_llm() as llm:
        seen = in_loop(main)
        for index in range(4):
            assert_concatenates([output for output in seen if output.index == index])
        assert_idle(llm)


def test_without_streaming_an_iteration_gives_one_output() -> None:
    async def main() -> None:
        outputs = [output async for output in llm.generate_async(PROMPT, several(3))]
        assert [len(output.outputs) for output in outputs] == [3]

    with make_llm() as llm:
        in_loop(main)


@pytest.mark.parametrize("how", ["abort", "collect", "cancel"])
def test_abort_ends_the_whole_family(how: str) -> None:
    gate = StepGate()

    async def main() -> None:
        handle = llm.generate_async(PROMPT, several(5, 200), streaming=True)
        gate.wait()
        for _ in range(3):
            gate.step()
        assert not (await anext(handle)).finished
        if how == "abort":
            handle.abort()
            gate.open()
            assert {output.finish_reason for output in (await handle).outputs} == {"abort"}
        elif how == "collect":
            del handle
            gc.collect()
            gate.open()
        else:
            await handle.aclose()
            gate.open()

    with make_llm(on_step=gate, num_blocks=129) as llm:
        in_loop(main)
        assert_idle(llm)
        assert llm.stats().counters.num_generated_tokens < 100


def test_a_family_waits_for_admission_as_one_request() -> None:
    gate = StepGate()
    config = SchedulerConfig(max_queued_requests=1, max_batch_size=1)
    with make_llm(on_step=gate, scheduler=config) as llm:
        running = llm.generate_async([1], tokens(1))
        gate.wait()
        queued = llm.generate_async(PROMPT, several(3))
        with pytest.raises(QueueFullError):
            llm.generate_async(PROMPT, several(2))
        outside = llm.generate_async("hello", several(2), wait_for_admission=True)
        aborted = llm.generate_async("hello", several(2), wait_for_admission=True)
        aborted.abort()
        gate.open()
        assert running.result(WAIT_S).finished
        assert [len(queued.result(WAIT_S).outputs), len(outside.result(WAIT_S).outputs)] == [3, 2]
        assert {output.finish_reason for output in aborted.result(WAIT_S).outputs} == {"abort"}
        assert_idle(llm)


def test_closing_fails_or_ends_every_output() -> None:
    gate = StepGate()
    llm = make_llm(on_step=gate)
    handle = llm.generate_async(PROMPT, several(3, 100))
    gate.wait()
    gate.open()
    llm.close()
    assert len({output.finish_reason for output in handle.result(WAIT_S).outputs}) == 1


def test_outputs_depend_on_seed_and_index_alone(tiny: LLM) -> None:
    params = several(4, 12, seed=7)
    alone = ids_of(tiny.generate(PROMPT, params))
    assert len(set(alone)) == 4
    # Output i is what its derived seed gives by itself.
    singles = [tokens(12, temperature=1.0, seed=child_seed(7, index)) for index in range(4)]
    assert [tuple(tiny.generate(PROMPT, one)[0].token_ids) for one in singles] == alone
    crowd = [several(3, 9, seed=seed) for seed in range(5)]
    prompts = [PROMPT, *([seed + 3] * (9 * seed + 1) for seed in range(5))]
    assert ids_of(tiny.generate(prompts, [params, *crowd])) == alone


def test_best_of_returns_the_likeliest(tiny: LLM) -> None:
    everything = tiny.generate(PROMPT, several(6, 8, seed=3, logprobs=2))[0].outputs
    best = tiny.generate(PROMPT, several(2, 8, seed=3, best_of=6))[0]
    ranked = sorted(everything, key=lambda output: -(output.cumulative_logprob or 0.0))
    assert [output.token_ids for output in best.outputs] == [output.token_ids for output in ranked[:2]]
    assert best.cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob, abs=1e-4)
    assert best.token_ids == ranked[0].token_ids


def test_logprobs_come_with_decoded_tokens() -> None:
    with make_llm() as llm:
        output = bounded(lambda: llm.generate("hey", tokens(4, logprobs=1)))[0]
        decoded = output.decoded_logprobs
        assert decoded is not None
        for token_id, entry in zip(output.token_ids, decoded, strict=True):
            assert llm.tokenizer is not None
            assert entry[token_id].decoded_token == llm.tokenizer.decode([token_id])
            assert (entry[token_id].rank, entry[token_id].logprob) == (1, 0.0)
        assert bounded(lambda: llm.generate("hey", tokens(1)))[0].decoded_logprobs is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, r"n must be an integer in \[1, 128\], not 0"),
        ({"n": 3, "best_of": 2}, r"best_of must be an integer in \[3, 128\], not 2"),
        ({"n": 2}, "all 2 outputs of the prompt .* same with temperature=0.0"),
        ({"n": 2, "temperature": 1.0, "top_k": 1}, "same with"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**changes)


def test_best_of_cannot_be_streamed() -> None:
    with make_llm() as llm, pytest.raises(InvalidRequestError, match=r"best_of=3 above n=2 cannot be streamed"):
        llm.generate_async([1], several(2, best_of=3), streaming=True)


def ids_of(outputs: Sequence[GenerationOutput]) -> list[tuple[int, ...]]:
    """Return the token ids of the first prompt's outputs."""
    return [tuple(output.token_ids) for output in outputs[0].outputs]
