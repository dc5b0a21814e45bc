"""Random schedules of the same requests, each compared to the last bit with the request run alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from llmengine import LLM, SamplingParams

Result = tuple[list[int], list[Any]]

OpenLLM = Callable[[random.Random | None], LLM]
"""Returns an LLM with limits drawn from the generator; None: one request at a time, in one chunk, nothing reused."""


def params_of(index: int) -> SamplingParams:
    """Sample half of the prompts, each with its own seed; score every third; edit the logits of half."""
    changes: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": index} if index % 2 else {}
    if index % 4 > 1:
        changes |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "logit_bias": {30: 2.0, 31: -5.0}}
        changes |= {"bad_words": [(40,), (5, 12)], "min_new_tokens": 6, "stop_token_ids": (50, 51, 52)}
    scored = 2 if index % 3 == 0 else None
    return SamplingParams(max_new_tokens=8 + 2 * index, ignore_eos=True, logprobs=3, prompt_logprobs=scored, **changes)


def run(
    llm: LLM, prompts: Sequence[Sequence[int]], picks: list[int], second_wave: int
) -> tuple[list[Result], int, int]:
    """Return the results of the prompts `picks`, and how many tokens were cached and requests preempted.

    Those from `second_wave` on are sent when the first has ended.
    """
    handles = []
    for place, index in enumerate(picks):
        if place == second_wave and handles:
            handles[0].result(60.0)
        handles.append(llm.generate_async(list(prompts[index]), params_of(index)))
    outputs = [handle.result(60.0) for handle in handles]
    results = [(output.token_ids, [*(output.logprobs or []), *(output.prompt_logprobs or [])]) for output in outputs]
    preemptions = sum(output.timeline.num_preemptions for output in outputs)
    return results, sum(output.num_cached_tokens for output in outputs), preemptions


def check_schedules(
    open_llm: OpenLLM, prompts: Sequence[Sequence[int]], num_engines: int, num_waves: int
) -> tuple[bool, int, int]:
    """Compare random schedules with each request alone, exactly.

    Returns whether all were equal, and how many tokens were cached and requests preempted.
    """
    with open_llm(None) as llm:
        alone = [run(llm, prompts, [index], 0)[0][0] for index in range(len(prompts))]
    cached, preemptions, equal = 0, 0, True
    for seed in range(num_engines):
        rng = random.Random(seed)
        with open_llm(rng) as llm:
            for _ in range(num_waves):
                picks = rng.choices(range(len(prompts)), k=rng.randrange(2, 9))
                results, hits, losses = run(llm, prompts, picks, rng.randrange(len(picks)))
                cached, preemptions = cached + hits, preemptions + losses
                equal = equal and results == [alone[index] for index in picks]
    return equal, cached, preemptions
