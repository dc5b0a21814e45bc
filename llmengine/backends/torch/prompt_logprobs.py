"""Log-probabilities of prompt tokens, for the slots whose parameters ask for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmengine.backends.inputs import StepInputs
from llmengine.batch import SlotInit, TokenLogprobs

_MAX_LOGITS = 1 << 24
"""Logits that are held at once: 64 MiB."""


class PromptLogprobs:
    """Which slots want them, and how many alternatives; knows their prompts."""

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

    def wanted(self, inputs: StepInputs) -> dict[int, range]:
        """Return slot -> the step's tokens after which comes a prompt token whose log-probabilities are wanted."""
        if not self._prompts:
            return {}
        result = {}
        for row, slot in enumerate(inputs.row_slots.tolist()):
            if slot not in self._prompts:
                continue
            begin, end = inputs.row_starts[row : row + 2].tolist()
            num_after = len(self._prompts[slot][0]) - 1 - int(inputs.positions[begin])
            if num_after > 0:
                result[slot] = range(begin, min(end, begin + num_after))
        return result

    def compute(
        self, wanted: dict[int, range], inputs: StepInputs, logits_after: Callable[[Tensor], Tensor]
    ) -> dict[int, list[TokenLogprobs]]:
        """Return what `StepResult.prompt_logprobs` holds, a bounded number of logits at a time.

        Args:
            logits_after: indices of the step's tokens, int64 [n] -> logits fp32 [n, vocab].
        """
        size = max(1, _MAX_LOGITS // self._vocab_size)
        result: dict[int, list[TokenLogprobs]] = {}
        for slot, tokens in wanted.items():
            prompt, count = self._prompts[slot]
            entries = result[slot] = []
            for begin in range(tokens.start, tokens.stop, size):
                part = range(begin, min(begin + size, tokens.stop))
                following = int(inputs.positions[begin]) + 1
                token_ids = prompt[following : following + len(part)]
                entries += _entries(logits_after(torch.arange(part.start, part.stop)), token_ids, count)
        return result


def _entries(logits: Tensor, token_ids: Tensor, count: int) -> list[TokenLogprobs]:
    """Return one entry for each row of `logits` [n, vocab], of the token in `token_ids` [n]."""
    log_totals = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = (logits.gather(1, token_ids[:, None]) - log_totals)[:, 0].tolist()
    values, ids = torch.topk(logits, count, dim=-1)
    tops = zip(ids.tolist(), (values - log_totals).tolist(), strict=True)
    return [
        TokenLogprobs(value, tuple(top_ids), tuple(top_values))
        for value, (top_ids, top_values) in zip(chosen, tops, strict=True)
    ]
