"""Which prompt tokens of a step want log-probabilities, for every backend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.batch import BatchRow, SlotInit

MAX_LOGITS = 1 << 24
"""Logits that are held at once: 64 MiB."""


@dataclass(frozen=True, slots=True)
class WantedLogprobs:
    """Prompt tokens of one slot whose log-probabilities a step computes.

    Attributes:
        tokens: the step's tokens whose logits they follow from.
        token_ids: int64 [len(tokens)], the prompt tokens themselves.
        count: alternatives for each.
    """

    slot: int
    tokens: range
    token_ids: Tensor
    count: int


class PromptLogprobs:
    """Slots that want log-probabilities of their prompts, until these are computed."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._prompts: dict[int, tuple[Tensor, int]] = {}

    def init_slot(self, init: SlotInit) -> None:
        """Replace what `init.slot` wants."""
        self._prompts.pop(init.slot, None)
        count = init.sampling_params.prompt_logprobs
        if count is not None:
            prompt = torch.tensor(init.token_ids[: init.num_prompt_tokens], dtype=torch.int64)
            self._prompts[init.slot] = prompt, min(count, self._vocab_size)

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def take_wanted(self, rows: Iterable[BatchRow]) -> list[WantedLogprobs]:
        """Log-probabilities that a step computes; prompts that end in it are forgotten.

        Args:
            rows: in the order of the step's tokens.
        """
        result = []
        begin = 0
        for row in rows:
            if row.slot in self._prompts:
                prompt, count = self._prompts[row.slot]
                token_ids = prompt[row.start + 1 : row.start + 1 + row.num_tokens]
                if len(token_ids):
                    result.append(WantedLogprobs(row.slot, range(begin, begin + len(token_ids)), token_ids, count))
                if row.start + row.num_tokens >= len(prompt):
                    del self._prompts[row.slot]
            begin += row.num_tokens
        return result
