"""Workloads of the benchmarks: numbers of requests, their lengths, and prompts and parameters for them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import anyio

from llmengine import SamplingParams

_FIRST_TOKEN_ID = 3
"""Random prompts leave out smaller ids, which are special tokens in most vocabularies."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are submitted together in one call, all of the same lengths."""

    name: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def num_counted_tokens(self) -> int:
        """Tokens that count towards the speed: output tokens, or prompt tokens if each request has one output token."""
        return self.num_requests * (self.prompt_tokens if self.output_tokens == 1 else self.output_tokens)

    def scaled(self, divisor: int) -> Workload:
        """The workload with all lengths divided, for a quick try."""
        prompt_tokens, output_tokens = (max(1, size // divisor) for size in (self.prompt_tokens, self.output_tokens))
        return replace(self, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def prompts(self, rng: random.Random, vocab_size: int) -> list[list[int]]:
        """Random prompts for all requests."""
        return random_prompts(rng, [self.prompt_tokens] * self.num_requests, vocab_size)


@dataclass(frozen=True, slots=True)
class StreamingLoad:
    """Concurrent consumers, each of which streams one request after the other.

    Attributes:
        num_requests: requests of all consumers together.
        busy_s: a task on the consumers' event loop computes for this long, sleeps for as long, and so on; 0: none does.
    """

    concurrency: int
    num_requests: int
    prompt_tokens: int = 128
    output_tokens: int = 128
    busy_s: float = 0.0


def random_prompts(rng: random.Random, lengths: Iterable[int], vocab_size: int) -> list[list[int]]:
    """Prompts of random token ids, one for each length."""
    return [[rng.randrange(_FIRST_TOKEN_ID, vocab_size) for _ in range(length)] for length in lengths]


def exact_length(num_tokens: int) -> SamplingParams:
    """Parameters of a greedy request that generates exactly this many tokens."""
    return SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)


async def keep_busy(busy_s: float) -> None:
    """Compute in Python for `busy_s`, sleep for as long, and so on until cancelled: a handler that blocks its loop."""
    while True:
        end = time.perf_counter() + busy_s
        while time.perf_counter() < end:
            pass
        await anyio.sleep(busy_s)
