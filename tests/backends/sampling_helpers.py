"""Shared by the samplers' tests: requests in slots, and the results of transformers' logits processors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from llmengine.backends.cpu.sampler import Sampler
from llmengine.batch import BackendInfo, Batch, SlotInit, StepResult
from llmengine.sampling_params import SamplingParams

_MAX_BATCH_SIZE = 64
"""Slots of an engine on a CPU."""

NO_STOP = 10**6
"""Token id of no vocabulary; transformers wants an EOS id."""


class SlotHistory:
    """The tokens of one slot's request, as the engine knows them."""

    def __init__(self, slot: int, prompt: Sequence[int], params: SamplingParams, stops: Sequence[int] = ()) -> None:
        self.slot = slot
        self.params = params
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.stops = frozenset(stops)

    def init(self) -> SlotInit:
        """Return the `SlotInit` that gives the slot to the request, with all tokens so far."""
        return SlotInit(
            self.slot, tuple(self.token_ids), self.num_prompt_tokens, self.params, 1000 + self.slot, self.stops
        )

    def expect_greedy(self, model: Callable[[Sequence[int]], Tensor], num_tokens: int) -> list[int]:
        """Return the next `num_tokens` greedy tokens for a model that gives the logits [vocab] after a context."""
        for _ in range(num_tokens):
            self.token_ids.append(int(self.expected_logits(model(self.token_ids)).argmax()))
        return self.token_ids[-num_tokens:]

    def expected_logits(self, logits: Tensor) -> Tensor:
        """Return logits [vocab] as transformers edits them; OpenAI's penalties are plain sums."""
        params, num_output = self.params, len(self.token_ids) - self.num_prompt_tokens
        processors: list[LogitsProcessor] = []
        if params.logit_bias:
            processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
        if params.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        words = [list(word) for word in params.bad_words]
        if num_output < params.min_new_tokens:
            words += [[stop] for stop in self.stops]
        if words:
            processors.append(NoBadWordsLogitsProcessor(words, NO_STOP))
        ids = torch.tensor([self.token_ids])
        values = LogitsProcessorList(processors)(ids, logits.float().cpu()[None].clone())[0]
        counts = torch.bincount(torch.tensor(self.token_ids[self.num_prompt_tokens :]).long(), minlength=len(logits))
        return values - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def logits_after(token_ids: Sequence[int], vocab: int) -> Tensor:
    """Return fp32 logits [vocab] that depend on every token of the context and its order."""
    state = 17
    for token_id in token_ids:
        state = (state * 1_000_003 + token_id + 1) % 2_147_483_647
    return torch.randn(vocab, generator=torch.Generator().manual_seed(state)) * 2.0


class SamplingBackend:
    """A backend without a model, but with the CPU's sampler: its logits are `logits_after` of a row's context."""

    def __init__(self, vocab: int, *, num_blocks: int, max_steps_in_flight: int = 1) -> None:
        self.info = BackendInfo("fake", vocab, 256, num_blocks, 4, 32, 0, max_steps_in_flight)
        self._contexts: dict[int, list[int]] = {}
        self._sampler = Sampler(_MAX_BATCH_SIZE, vocab)
        self._results: deque[StepResult] = deque()

    def launch(self, batch: Batch) -> None:
        """Compute the step."""
        for init in batch.slot_inits:
            self._contexts[init.slot] = list(init.token_ids)
            self._sampler.init_slot(init)
        rows = [row for row in batch.rows if row.sample]
        ends = [row.start + row.num_tokens for row in rows]
        token_ids: dict[int, tuple[int]] = {}
        if rows:
            contexts = [self._contexts[row.slot][:end] for row, end in zip(rows, ends, strict=True)]
            logits = torch.stack([logits_after(context, self.info.vocab_size) for context in contexts])
            slots = [row.slot for row in rows]
            sampled = self._sampler.sample(logits, np.array(slots), np.array(ends)).token_ids
            token_ids = {slot: (token_id,) for slot, token_id in zip(slots, sampled, strict=True)}
            for slot, token_id in zip(slots, sampled, strict=True):
                self._contexts[slot].append(token_id)
        self._results.append(StepResult(batch.step, token_ids))

    def collect(self) -> StepResult:
        """Return the oldest step's result."""
        return self._results.popleft()

    def close(self) -> None:
        """Nothing to release."""


EDITS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(repetition_penalty=0.6, frequency_penalty=0.4, presence_penalty=-0.3),
    SamplingParams(frequency_penalty=1.5),
    SamplingParams(presence_penalty=2.0, logit_bias={0: 4.0, 3: -100.0, 11: 2.5}),
    SamplingParams(logit_bias={5: 100.0}, repetition_penalty=3.0, bad_words=[(5,), (7, 8), (5, 5, 5)]),
    SamplingParams(bad_words=[(1,), (2, 3), (4, 2, 9), (9, 4, 2, 9), *((token, 6) for token in range(20))]),
    SamplingParams(min_new_tokens=4, logit_bias={2: 50.0}, bad_words=[(3, 4)], presence_penalty=0.5),
]
"""Greedy parameters of every kind that changes single logits, to be tried with stop tokens 2 and 3."""
