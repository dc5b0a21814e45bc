"""Steps that give several tokens of a request: the output equals that of one token at a time, in fewer steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest

from llmengine import LLM, GenerationOutput, SamplingParams, SchedulerConfig, StructuredOutput
from llmengine.batch import Batch
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.engine.helpers import assert_concatenates

PROMPT = list(b"several tokens a row")
MAX_SAMPLES = 4


def letters(token_ids: Sequence[int]) -> int:
    """Return a letter that depends on the whole context."""
    return ord("a") + sum((index + 1) * token_id for index, token_id in enumerate(token_ids)) % 26


def json_letters(token_ids: Sequence[int]) -> int:
    """Return mostly a token that may continue a JSON object of letters, and sometimes one that may not."""
    return b'{"ab": "cde", }'[sum(token_ids) % 15]


def serve(max_samples: int, **options: Any) -> LLM:
    scheduler = options.pop("scheduler", None)
    backend = partial(FakeBackend, options.pop("next_token", letters), max_samples=max_samples, **options)
    return LLM.from_backend(backend, tokenizer=ByteTokenizer(), eos_token_ids=[257], scheduler_config=scheduler)


def both(params: SamplingParams, num_prompts: int = 1, **options: Any) -> list[list[GenerationOutput]]:
    """Return the outputs of steps with one token and of steps with several."""
    prompts = [[*PROMPT, index] for index in range(num_prompts)]
    found = []
    for max_samples in (1, MAX_SAMPLES):
        with serve(max_samples, **options) as llm:
            found.append(llm.generate(prompts, params))
            assert llm.stats().num_used_blocks == 0
    return found


def as_data(output: GenerationOutput) -> tuple[Any, ...]:
    return output.token_ids, output.text, output.finish_reason, output.matched_stop


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5, 16, 33])
def test_the_length_is_kept_to_the_token(max_new_tokens: int) -> None:
    one, several = both(SamplingParams(max_new_tokens=max_new_tokens))
    assert as_data(several[0]) == as_data(one[0])
    assert several[0].num_tokens == max_new_tokens


def test_the_context_length_is_kept_to_the_token() -> None:
    one, several = both(SamplingParams(), max_model_len=39)
    assert as_data(several[0]) == as_data(one[0])
    assert several[0].num_tokens == 39 - len(PROMPT) - 1


@pytest.mark.parametrize("max_steps_in_flight", [1, 3])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_takes_fewer_steps(max_steps_in_flight: int, block_size: int) -> None:
    steps: list[Batch] = []
    options = {"block_size": block_size, "num_blocks": 200, "max_steps_in_flight": max_steps_in_flight}
    params = SamplingParams(max_new_tokens=60)
    one, _ = both(params, 3, **options)
    with serve(MAX_SAMPLES, on_step=steps.append, **options) as llm:
        several = llm.generate([[*PROMPT, index] for index in range(3)], params)
    assert list(map(as_data, several)) == list(map(as_data, one))
    assert sum(len(batch.rows) for batch in steps) < 90, "half of one token a row, whichever requests share a step"


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_stop_strings_and_ids_end_within_a_step(length: int) -> None:
    full = both(SamplingParams(max_new_tokens=40))[0][0]
    for begin in range(3, 24):
        stop = full.text[begin : begin + length]
        one, several = both(SamplingParams(max_new_tokens=40, stop=stop))
        assert as_data(several[0]) == as_data(one[0])
        assert several[0].finish_reason == "stop"
        one, several = both(SamplingParams(max_new_tokens=40, stop_token_ids=[full.token_ids[begin]]))
        assert as_data(several[0]) == as_data(one[0])


def test_each_token_has_its_logprobs() -> None:
    _, several = both(SamplingParams(max_new_tokens=17, logprobs=1))
    entries = several[0].logprobs
    assert entries is not None
    assert [entry.top_ids for entry in entries] == [(token_id,) for token_id in several[0].token_ids]


@pytest.mark.parametrize(
    "spec",
    [
        StructuredOutput(json_schema={"type": "object", "additionalProperties": {"type": "string", "maxLength": 5}}),
        StructuredOutput(regex="[a-e]{3,30}"),
        StructuredOutput(choice=["abc", "cab", "deed"]),
    ],
)
@pytest.mark.parametrize("next_token", [letters, json_letters])
def test_grammars_take_as_much_as_they_allow(spec: StructuredOutput, next_token: Callable[..., int]) -> None:
    pytest.importorskip("llguidance")
    one, several = both(SamplingParams(max_new_tokens=40, structured=spec), 3, next_token=next_token)
    assert list(map(as_data, several)) == list(map(as_data, one))
    if spec.json_schema is not None and several[0].finish_reason == "stop":
        json.loads(several[0].text)


def test_several_outputs_and_preemptions() -> None:
    options = {"num_blocks": 24, "scheduler": SchedulerConfig(max_batch_size=6)}
    one, several = both(SamplingParams(max_new_tokens=40, n=2, temperature=1.0), 4, **options)
    for left, right in zip(one, several, strict=True):
        assert list(map(as_data, left.outputs)) == list(map(as_data, right.outputs))


@pytest.mark.parametrize("slow_consumer", ["coalesce", "pause"])
async def test_streams_add_up(slow_consumer: Any) -> None:
    expected = both(SamplingParams(max_new_tokens=50))[0][0]
    scheduler = SchedulerConfig(max_unread_tokens=3)
    with serve(MAX_SAMPLES, scheduler=scheduler) as llm:
        handle = llm.generate_async(
            [*PROMPT, 0], SamplingParams(max_new_tokens=50), streaming=True, slow_consumer=slow_consumer
        )
        outputs = [output async for output in handle]
    assert_concatenates(outputs)
    assert as_data(outputs[-1]) == as_data(expected)


async def test_a_bad_row_ends_alone() -> None:
    def faulty(token_ids: Sequence[int]) -> int | None:
        return None if len(token_ids) == len(PROMPT) + 9 and token_ids[0] == PROMPT[0] else letters(token_ids)

    with serve(MAX_SAMPLES, next_token=faulty) as llm:
        bad, good = llm.generate([PROMPT, PROMPT[1:]], SamplingParams(max_new_tokens=20))
        assert bad.finish_reason == "error"
        assert bad.num_tokens == 9
        assert good.num_tokens == 20
        assert llm.stats().num_used_blocks == 0
