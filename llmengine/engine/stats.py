"""Counts and states of an engine and its requests: `EngineStats`, `EngineHealth` and `RequestStats`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmengine.outputs import RequestTimeline

RequestState = Literal["queued", "running", "paused", "finished"]

EngineState = Literal["loading", "ready", "draining", "closed", "dead"]


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine started, written by the engine thread.

    Attributes:
        num_steps: steps scheduled.
        num_rows: requests in them, summed; num_rows / num_steps is the mean batch size.
        num_computed_tokens: tokens the model computed, recomputation included.
        num_prompt_tokens: prompt tokens of requests that were admitted.
        num_generated_tokens: tokens sampled.
        num_preemptions: times that a request lost its blocks.
        num_finished_requests: requests that ended, for whatever reason.
        step_s: wall-clock seconds spent in steps.
        forward_s: seconds of these in the model's forward pass.
    """

    num_steps: int = 0
    num_rows: int = 0
    num_computed_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_finished_requests: int = 0
    step_s: float = 0.0
    forward_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's work. Used, cached and free blocks together are all that can be handed out.

    Attributes:
        num_running: requests in the running batch.
        num_waiting: requests in the scheduler's queue, new and preempted.
        num_paused: requests that wait for their consumers to read (`slow_consumer="pause"`).
        num_queued: requests that count towards `max_queued_requests`, including those being tokenized.
        num_used_blocks: KV blocks that requests refer to.
        num_cached_blocks: KV blocks that no request refers to and whose content can be reused.
        num_free_blocks: KV blocks without content.
        block_size: tokens a block.
        num_queried_tokens: prompt tokens looked up in the prefix cache.
        num_hit_tokens: prompt tokens found there.
        num_refused: requests that were refused with `QueueFullError`.
        last_step_s: wall-clock seconds of the latest step.
        counters: totals since the start.
    """

    num_running: int
    num_waiting: int
    num_paused: int
    num_queued: int
    num_used_blocks: int
    num_cached_blocks: int
    num_free_blocks: int
    block_size: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_refused: int
    last_step_s: float
    counters: EngineCounters

    @property
    def cache_hit_rate(self) -> float:
        """Fraction of the prompt tokens that the prefix cache held, in [0, 1]."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0

    @property
    def mean_batch_size(self) -> float:
        """Mean number of requests in a step."""
        return self.counters.num_rows / self.counters.num_steps if self.counters.num_steps else 0.0

    @property
    def overhead(self) -> float:
        """Fraction of the step time outside the model's forward pass, in [0, 1]."""
        return 1.0 - self.counters.forward_s / self.counters.step_s if self.counters.step_s else 0.0


@dataclass(frozen=True, slots=True)
class RequestStats:
    """How far one request is, with all its outputs together.

    Attributes:
        request_id: the caller's id, else the engine's number.
        metadata: the caller's object.
        tenant, priority: see `RequestOptions`.
        state: "queued" until its first step (it may be waiting for room, or be tokenized), then "running" until it has
            "finished"; "paused" while it waits for its consumer to read (`slow_consumer="pause"`).
        num_outputs: outputs that are generated.
        num_prompt_tokens: tokens of the prompt; 0 until it is tokenized.
        num_cached_tokens: prompt tokens found in the prefix cache.
        num_tokens: tokens generated so far.
        timeline: moments of the request.
    """

    request_id: int | str
    metadata: Any
    tenant: str | None
    priority: int
    state: RequestState
    num_outputs: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    timeline: RequestTimeline


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether the engine accepts requests, and with which backend.

    Attributes:
        state: a "ready" engine accepts requests, a "draining" one only finishes those that it has, and a "closed" or
            "dead" one has none.
        description: backend, device, dtype and weight format in one line.
        failure: the exception that killed a dead engine.
        idle_s: seconds since the latest step ended. A large value while `num_running` > 0 means that a step hangs.
    """

    state: EngineState
    description: str
    failure: str | None
    idle_s: float

    @property
    def ok(self) -> bool:
        """True when new requests are accepted."""
        return self.state == "ready"
