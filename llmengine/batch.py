"""The seam between engine and backends: one step's work and its result, as plain data.

Steps run in order. The engine may launch step N+1 before it has collected step N (up to
`BackendInfo.max_steps_in_flight`), so the ids sampled in step N can be inputs of step N+1 that the host does not know
yet: a row then brings one token id fewer than `num_tokens`, and the backend takes the missing last one from the slot,
where it left it when it sampled it. Blocks freed by the engine may be handed out again at once: step order makes
that safe.

A step may give several tokens of a request (`BackendInfo.max_samples`). The backend then has written the KV of all but
the last of them, into blocks that the row's table has for it, and no later step has a row of that request before the
engine has seen them. The engine may keep only the first few, where a stop, the length or a grammar ends what it can
use: the request's next row starts right behind those, brings their ids, and what came after them never was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from llmengine.sampling_params import SamplingParams

NULL_BLOCK = 0
"""Block id that belongs to no request; padding reads and writes go there."""


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A request takes a slot (newly admitted, or resumed after preemption): replaces all state of that slot.

    Attributes:
        slot: row of the backend's persistent per-request state, in [0, max_batch_size).
        token_ids: every token known so far, prompt first.
        num_prompt_tokens: how many of them are the prompt.
        sampling_params: as the caller gave them, bad words as token ids.
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
    """One request's part of a step: compute tokens at positions [start, start + num_tokens). Nobody changes it.

    Not frozen: that would make it five times as dear, and a step makes one for each running request.

    Attributes:
        slot: the request's slot.
        start: position of the first token; KV of [0, start) is in the slot's blocks.
        num_tokens: how many tokens, >= 1.
        token_ids: their ids; one fewer than num_tokens when the last is the slot's latest sampled token.
        new_block_ids: blocks appended to the slot's block table before this step (after `SlotInit`: the whole table).
            Token at position p lives in block_table[p // block_size], row p % block_size.
        sample: most tokens that the step may sample for the row, at most `BackendInfo.max_samples`; 0: none. The first
            follows from the last position's logits and becomes the token at start + num_tokens.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: Sequence[int]
    new_block_ids: Sequence[int]
    sample: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. `rows` hold each slot at most once; `slot_inits` come before them.

    `masks`: slot -> the tokens that it may choose first in this step, for rows with a grammar. 4 * ceil(vocab / 32)
    bytes, id t if bit t % 8 of byte t // 8 is set.
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
    """Log-probabilities at one position: that of the token there, and the likeliest (ids, values), best first."""

    logprob: float
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled.

    Attributes:
        step: the batch's step number.
        token_ids: slot -> ids of the sampled tokens in order, 1 to `BatchRow.sample` of them, for each row with
            `sample` that did not fail; an int stands for a sequence of one.
        logprobs: slot -> log-probabilities of each of them, for rows whose parameters ask for them.
        prompt_logprobs: slot -> log-probabilities of the row's prompt tokens at positions start + 1 to
            min(start + num_tokens, num_prompt_tokens - 1), for rows whose parameters ask for them.
        errors: slot -> cause, for rows that failed alone (non-finite logits); the others are sound.
        forward_s: seconds that the model's forward pass took, without sampling and input preparation.
        idle_s: seconds that the device waited for this step, after the one before that was in flight with it.
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
    """What the engine must know of a ready backend.

    Attributes:
        description: one line for people: backend, device, dtype and weight formats with what measuring chose.
        vocab_size: logits per position; token ids are in [0, vocab_size).
        max_model_len: most tokens of one request, prompt and output together.
        num_blocks: KV blocks, `NULL_BLOCK` included (so num_blocks - 1 can be handed out).
        block_size: tokens a block.
        kv_bytes_per_block: bytes of one block over all layers.
        weight_bytes: bytes of the resident weights.
        max_steps_in_flight: how many steps may be launched and not yet collected, >= 1.
        max_samples: most tokens that a step samples for one row, >= 1.
        has_prompt_logprobs: it computes `SamplingParams.prompt_logprobs`.
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


class Backend(Protocol):
    """Runs batches on a device. One thread makes it, calls it and closes it.

    An exception from `launch` or `collect` is fatal for the engine; what concerns one row goes into
    `StepResult.errors`.
    """

    @property
    def info(self) -> BackendInfo:
        """Facts that do not change while the backend lives."""

    def launch(self, batch: Batch) -> None:
        """Queue one step. May return before it is done; at most `max_steps_in_flight` are outstanding."""

    def collect(self) -> StepResult:
        """Wait for the oldest outstanding step and return its result."""

    def close(self) -> None:
        """Release device memory; idempotent."""


@runtime_checkable
class PreparingBackend(Backend, Protocol):
    """A backend that can use quiet moments to make later steps start faster."""

    def prepare(self) -> bool:
        """Do one piece of that, in a fraction of a second, while no step is in flight; False: there was none left."""


class SavableBackend(Backend, Protocol):
    """A backend that was loaded from a checkpoint and can give its weights back."""

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Yield (canonical name, tensor) as the weights are used, one copy at a time."""
