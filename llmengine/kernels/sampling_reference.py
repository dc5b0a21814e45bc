"""The results and distributions of `kernels.sampling`, in torch."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_greedy_reference(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Int64 ids and bool failures [num_rows], as `sample_greedy` writes them."""
    largest = logits.float().nan_to_num(nan=torch.inf, neginf=-torch.inf).amax(dim=-1, keepdim=True)
    failed = largest[:, 0].isinf()
    ids = (logits.float() == largest).to(torch.int32).argmax(dim=-1)
    return ids.masked_fill(failed, 0), failed


def distribution_reference(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities that `sample` draws from, float64 [vocab], for logits [vocab] that are finite or -inf."""
    values, ids = logits.double().sort(descending=True, stable=True)
    if temperature == 0.0:
        top_k = 1
    else:
        values = (values - values[0]) / temperature
    weights = (values - values[0]).exp()
    if top_k > 0:
        weights[top_k:] = 0.0
    weights /= weights.sum()
    if top_p < 1.0:
        weights[weights.cumsum(0) - weights >= top_p] = 0.0
    weights[weights < min_p * weights[0]] = 0.0
    return torch.zeros_like(weights).scatter_(0, ids, weights / weights.sum())
