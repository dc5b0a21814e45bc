"""Traces of requests for `benchmarks.simulate`: generated, or files of JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from llmengine.batch import Batch

_NOISY = "noisy"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One line of a trace."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str | None = None
    priority: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"{self}: prompt_tokens and output_tokens must be at least 1")
        if not 0 <= self.prefix_tokens < self.prompt_tokens:
            raise ValueError(f"{self}: prefix_tokens must be in [0, prompt_tokens)")


@dataclass(frozen=True, slots=True)
class Cost:
    """Duration of a step as a function of its batch."""

    step_ms: float = 6.0
    token_us: float = 30.0
    context_us: float = 0.04

    def step_s(self, batch: Batch) -> float:
        """Seconds of one step."""
        num_tokens = num_context = 0
        for row in batch.rows:
            num_tokens += row.num_tokens
            num_context += row.start + row.num_tokens
        return self.step_ms / 1e3 + (self.token_us * num_tokens + self.context_us * num_context) / 1e6


@dataclass(frozen=True, slots=True)
class TraceProfile:
    """Properties of a generated trace; lengths have log-normal distributions around these means.

    Attributes:
        load: demand in proportion to what a full batch could serve.
        num_tenants: including the noisy one, whose demand equals that of all others together.
        urgent: share of the requests with priority 1.
    """

    num_requests: int = 100_000
    load: float = 0.95
    num_tenants: int = 4
    prompt_tokens: int = 256
    prefix_tokens: int = 96
    output_tokens: int = 64
    urgent: float = 0.1
    seed: int = 0


def make_trace(profile: TraceProfile, cost: Cost, max_batch_size: int) -> list[Arrival]:
    """A generated trace, in order of arrival."""
    rng = random.Random(profile.seed)
    context = profile.prompt_tokens + profile.output_tokens / 2
    per_output_us = 1e3 * cost.step_ms / max_batch_size + cost.token_us + cost.context_us * context
    request_s = (profile.prompt_tokens * cost.token_us + profile.output_tokens * per_output_us) / 1e6
    rate = profile.load / request_s
    others = [f"tenant {index}" for index in range(1, profile.num_tenants)]
    burst_s = profile.num_requests / rate / 10
    arrivals = []
    for _ in range(profile.num_requests):
        arrival_s = rng.random() * 10 * burst_s
        tenant = _NOISY if not others or rng.random() < 0.5 else rng.choice(others)
        if tenant == _NOISY and rng.random() < 0.8:
            arrival_s = (int(rng.random() * 10) + rng.random() / 5) * burst_s  # in a fifth of the time
        prefix_tokens = profile.prefix_tokens if rng.random() < 0.5 else 0
        arrivals.append(
            Arrival(
                arrival_s,
                prefix_tokens + _length(rng, max(1, profile.prompt_tokens - profile.prefix_tokens // 2)),
                _length(rng, profile.output_tokens),
                tenant,
                int(rng.random() < profile.urgent),
                prefix_tokens,
            )
        )
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _length(rng: random.Random, mean: float, sigma: float = 0.6) -> int:
    return max(1, min(round(mean * rng.lognormvariate(-sigma * sigma / 2, sigma)), 16 * round(mean)))


def read_trace(path: Path) -> list[Arrival]:
    """The file's requests in order of arrival. Raises `ValueError` naming a malformed line."""
    arrivals = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            arrivals.append(Arrival(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def write_trace(path: Path, trace: Iterable[Arrival]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(asdict(arrival)) + "\n" for arrival in trace), encoding="utf-8")
