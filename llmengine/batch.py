"""The seam between engine and backends: one step's work and its result, as plain data.

Steps run in order. The engine may launch step N+1 before it has collected step N (up to
`BackendInfo.max_steps_in_flight`), so an id sampled in step N can be an input of step N+1 that the host does not know
yet. Such a row brings one token id fewer than `num_tokens`, and the backend takes the missing final id from the slot,
where it stored it when it sampled it. Blocks that the engine frees may be handed out again at once: the order of steps
makes that safe.

A step may sample several tokens of a request (`BackendInfo.max_samples`). The backend has then written the KV of all
but the final one of them, into blocks that the row's table has for it, and no later step has a row of that request
before the engine has seen the tokens. The engine may keep only the first few of them, up to a stop, a length limit or
the first token that a grammar does not allow. The request's next row then starts right after those and brings their
ids, and the tokens after them are void.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from llmengine.sampling_params import SamplingParams

NULL_BLOCK = 0
"""Id of the block that belongs to no request; padding reads and writes go there."""


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A request takes a slot, newly admitted or resumed after a preemption; this replaces all state of that slot.

    Attributes:
        slot: row of the backend's persistent state of requests, in [0, max_batch_size).
        token_ids: all tokens known so far, prompt first.
        num_prompt_tokens: number of prompt tokens among them.
        sampling_params: the caller's, with bad words as token ids.
        seed: resolved seed. The random number for the token at position p is a function of (seed, p) alone.
        stop_token_ids: EOS ids (unless ignored) and the caller's stop ids; masked out of the logits while fewer than
            `sampling_params.min_new_tokens` tokens were generated.
    """

    slot: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    sampling_params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(slots=True)
class BatchRow:
    """One request's part of a step: the tokens at positions [start, start + num_tokens). It is never changed.

    It is not frozen, since that would make it five times slower to create, and a step has one for each running request.

    Attributes:
        slot: the request's slot.
        start: position of the first token; the KV of [0, start) is in the slot's blocks.
        num_tokens: number of tokens, >= 1.
        token_ids: their ids; one fewer than `num_tokens` if the final one is the slot's latest sampled token.
        new_block_ids: blocks appended to the slot's block table before this step; after a `SlotInit`, the whole table.
            The token at position p is in block_table[p // block_size], row p % block_size.
        sample: most tokens that the step may sample for the row, at most `BackendInfo.max_samples`; 0 for none. The
            first follows from the logits of the final position and becomes the token at start + num_tokens.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: Sequence[int]
    new_block_ids: Sequence[int]
    sample: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step.

    Attributes:
        step: number of the step.
        rows: at most one for each slot.
        slot_inits: slots that requests take before the rows are computed.
        masks: slot -> tokens allowed as the first that the step samples for it, for rows with a grammar. A mask has
            4 * ceil(vocab_size / 32) bytes and allows id t if bit t % 8 of byte t // 8 is set.
    """

    step: int
    rows: Sequence[BatchRow]
    slot_inits: Sequence[SlotInit] = ()
    masks: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes in this step."""
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: of the token there, and of the likeliest tokens, best first."""

    logprob: float
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens that a step sampled, and how long it took.

    Attributes:
        step: number of the batch's step.
        token_ids: slot -> ids of the sampled tokens in order, 1 to `BatchRow.sample` of them, for each row with
            `sample` that did not fail. An int stands for a sequence of one.
        logprobs: slot -> log-probabilities of each of them, for rows whose parameters ask for them.
        prompt_logprobs: slot -> log-probabilities of the row's prompt tokens at positions start + 1 to
            min(start + num_tokens, num_prompt_tokens - 1), for rows whose parameters ask for them.
        errors: slot -> cause, for rows that failed alone, with non-finite logits for instance; the others are sound.
        forward_s: seconds of the model's forward pass, without sampling and preparing inputs.
        idle_s: seconds that the device waited for this step after the previous one, if that was in flight with it.
    """

    step: int
    token_ids: Mapping[int, int | Sequence[int]]
    logprobs: Mapping[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, Sequence[TokenLogprobs]] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    forward_s: float = 0.0
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """Facts about a ready backend that the engine needs.

    Attributes:
        description: one line for people: backend, device, dtype, and weight formats with the results of measurements.
        vocab_size: logits per position; token ids are in [0, vocab_size).
        max_model_len: most tokens of one request, prompt and output together.
        num_blocks: KV blocks, including `NULL_BLOCK`, so that num_blocks - 1 can be handed out.
        block_size: tokens a block.
        kv_bytes_per_block: bytes of one block over all layers, scales included.
        weight_bytes: bytes of the resident weights.
        max_steps_in_flight: most steps that may be launched and not yet collected, >= 1.
        max_samples: most tokens that a step samples for one row, >= 1.
        has_prompt_logprobs: the backend computes `SamplingParams.prompt_logprobs`.
        kv_dtype: dtype of the keys and values in the blocks, as torch spells it.
        wants_early_launches: a step cannot be launched late without holding a device up: `collect` computes a part of
            the one before, or stages of a pipeline are done with that while the last is not.
    """

    description: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    kv_bytes_per_block: int
    weight_bytes: int
    max_steps_in_flight: int = 1
    max_samples: int = 1
    has_prompt_logprobs: bool = False
    kv_dtype: str = "float32"
    wants_early_launches: bool = False


class Backend(Protocol):
    """Runs batches on a device. One thread makes it, calls it and closes it.

    An exception from `launch` or `collect` is fatal for the engine. The failure of a single row goes into
    `StepResult.errors`.
    """

    @property
    def info(self) -> BackendInfo:
        """Facts that do not change while the backend lives."""

    def launch(self, batch: Batch) -> None:
        """Queue one step, which may be unfinished on return; at most `max_steps_in_flight` are outstanding."""

    def collect(self) -> StepResult:
        """The result of the oldest outstanding step; waits for it."""

    def close(self) -> None:
        """Release device memory. Idempotent."""


@runtime_checkable
class PreparingBackend(Backend, Protocol):
    """A backend that can use quiet moments to make later steps start faster."""

    def prepare(self) -> bool:
        """Do one piece of that work, in a fraction of a second, while no step is in flight; False if none was left."""


@runtime_checkable
class WatchedBackend(Backend, Protocol):
    """A backend that can fail while no step is in flight, since it has processes of its own."""

    def watch(self, on_failure: Callable[[], None]) -> None:
        """Call `on_failure` once, on any thread, when the backend has failed; at once if it has already."""

    def check(self) -> None:
        """Raise what the backend failed of, if it has."""


@runtime_checkable
class ScoringBackend(Backend, Protocol):
    """A backend that gives the logits of every token of a step, by which a model is evaluated."""

    def score(self, batch: Batch) -> Iterator[Any]:
        """Run a step that samples nothing, and yield the logits of all its tokens, in order.

        The step is like one that serves a prompt: the same products, the same KV cache. Steps that were launched before
        may still be in flight.

        Args:
            batch: has a single row, with all of its ids.

        Yields fp32 tensors [n, vocab_size] on the backend's device, each valid until the next is asked for. Their
        memory is bounded by the number of tokens in the step, which is the caller's to choose.
        """


class SavableBackend(Backend, Protocol):
    """A backend that was loaded from a checkpoint and can return its weights."""

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Yield (canonical name, tensor) of each weight in the form in which it is used, one copy at a time."""
