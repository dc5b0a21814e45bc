"""Log-probabilities of prompt tokens, computed on the CPU from the logits of a step's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmengine.backends.cpu.sampler import log_sum_exp
from llmengine.backends.prompt_logprobs import MAX_LOGITS, WantedLogprobs
from llmengine.batch import TokenLogprobs


def compute_prompt_logprobs(
    wanted: Sequence[WantedLogprobs], logits_after: Callable[[Tensor], Tensor], vocab_size: int
) -> dict[int, list[TokenLogprobs]]:
    """Compute `StepResult.prompt_logprobs`, a bounded number of logits at a time.

    Args:
        logits_after: indices of the step's tokens, int64 [n] -> logits fp32 [n, vocab].
    """
    size = max(1, MAX_LOGITS // vocab_size)
    result: dict[int, list[TokenLogprobs]] = {}
    for item in wanted:
        entries = result[item.slot] = []
        for begin in range(0, len(item.tokens), size):
            tokens = item.tokens[begin : begin + size]
            logits = logits_after(torch.arange(tokens.start, tokens.stop))
            entries += _entries(logits, item.token_ids[begin : begin + size], item.count)
    return result


def _entries(logits: Tensor, token_ids: Tensor, count: int) -> list[TokenLogprobs]:
    """One entry for each row of `logits` [n, vocab]: that of the token in `token_ids` [n]."""
    log_totals = log_sum_exp(logits)[:, None]
    chosen = (logits.gather(1, token_ids[:, None]) - log_totals)[:, 0].tolist()
    values, ids = torch.topk(logits, count, dim=-1)
    tops = zip(ids.tolist(), (values - log_totals).tolist(), strict=True)
    return [
        TokenLogprobs(value, tuple(top_ids), tuple(top_values))
        for value, (top_ids, top_values) in zip(chosen, tops, strict=True)
    ]
