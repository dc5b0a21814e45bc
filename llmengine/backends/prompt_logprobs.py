"""Log-probabilities of prompt tokens, for the slots whose parameters ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmengine.backends.cpu.sampler import log_sum_exp
from llmengine.backends.cpu.step_inputs import StepInputs
from llmengine.batch import SlotInit, TokenLogprobs

MAX_LOGITS = 1 << 24
"""Logits that are held at once: 64 MiB."""


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """Prompt tokens of a slot whose log-probabilities a step gives.

    Attributes:
        tokens: the step's tokens after which they come.
        token_ids: int64 [len(tokens)], what they are.
        count: alternatives of each.
    """

    slot: int
    tokens: range
    token_ids: Tensor
    count: int


class PromptLogprobs:
    """Which slots want them, and how many alternatives; knows their prompts until they are computed."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._prompts: dict[int, tuple[Tensor, int]] = {}

    def init_slot(self, init: SlotInit) -> None:
        """Replace what is known of `init.slot`."""
        self._prompts.pop(init.slot, None)
        count = init.sampling_params.prompt_logprobs
        if count is not None:
            prompt = torch.tensor(init.token_ids[: init.num_prompt_tokens], dtype=torch.int64)
            self._prompts[init.slot] = prompt, min(count, self._vocab_size)

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def wanted(self, inputs: StepInputs) -> list[WantedLogprobs]:
        """Return what a step gives; see `take_wanted`."""
        if not self._prompts:
            return []
        starts = inputs.positions[inputs.row_starts[:-1]].tolist()
        return self.take_wanted(
            zip(inputs.row_slots.tolist(), starts, np.diff(inputs.row_starts).tolist(), strict=True)
        )

    def take_wanted(self, rows: Iterable[tuple[int, int, int]]) -> list[WantedLogprobs]:
        """Return what a step gives, and forget the prompts that it ends.

        Args:
            rows: slot, position of the first token, number of tokens, in the order of the step's tokens.
        """
        result = []
        begin = 0
        for slot, start, num_tokens in rows:
            if slot in self._prompts:
                prompt, count = self._prompts[slot]
                token_ids = prompt[start + 1 : start + 1 + num_tokens]
                if len(token_ids):
                    result.append(WantedLogprobs(slot, range(begin, begin + len(token_ids)), token_ids, count))
                if start + num_tokens >= len(prompt):
                    del self._prompts[slot]
            begin += num_tokens
        return result

    def compute(
        self, wanted: Sequence[WantedLogprobs], logits_after: Callable[[Tensor], Tensor]
    ) -> dict[int, list[TokenLogprobs]]:
        """Return what `StepResult.prompt_logprobs` holds, a bounded number of logits at a time.

        Args:
            logits_after: indices of the step's tokens, int64 [n] -> logits fp32 [n, vocab].
        """
        size = max(1, MAX_LOGITS // self._vocab_size)
        result: dict[int, list[TokenLogprobs]] = {}
        for item in wanted:
            entries = result[item.slot] = []
            for begin in range(0, len(item.tokens), size):
                tokens = item.tokens[begin : begin + size]
                logits = logits_after(torch.arange(tokens.start, tokens.stop))
                entries += _entries(logits, item.token_ids[begin : begin + size], item.count)
        return result


def _entries(logits: Tensor, token_ids: Tensor, count: int) -> list[TokenLogprobs]:
    """Return one entry for each row of `logits` [n, vocab], of the token in `token_ids` [n]."""
    log_totals = log_sum_exp(logits)[:, None]
    chosen = (logits.gather(1, token_ids[:, None]) - log_totals)[:, 0].tolist()
    values, ids = torch.topk(logits, count, dim=-1)
    tops = zip(ids.tolist(), (values - log_totals).tolist(), strict=True)
    return [
        TokenLogprobs(value, tuple(top_ids), tuple(top_values))
        for value, (top_ids, top_values) in zip(chosen, tops, strict=True)
    ]
