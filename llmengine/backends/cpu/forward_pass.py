"""A step's forward pass on a CPU by torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmengine.backends.cpu.attention import PagedAttention
from llmengine.backends.cpu.step_inputs import BlockTables, StepInputs
from llmengine.backends.cpu.weights import CpuModel
from llmengine.models.decoder import forward, forward_to_last


class ForwardPass:
    """What a step computes with the weights and the KV blocks, up to the logits."""

    def __init__(self, model: CpuModel, attention: PagedAttention, tables: BlockTables) -> None:
        self._model = model
        self._attention = attention
        self._tables = tables

    def run(self, inputs: StepInputs) -> Tensor | None:
        """Write the KV of all tokens and return logits float32 [num_samples, vocab], None if no token samples."""
        every = len(inputs.sample_tokens) == len(inputs.token_ids)
        sample_tokens = None if every else torch.from_numpy(inputs.sample_tokens)
        return forward(self._model.segments, self._embedded(inputs), self._attention.attend, sample_tokens)

    def begin(self, inputs: StepInputs) -> Callable[[Tensor], Tensor]:
        """Write the KV of all tokens; the result gives the logits float32 [n, vocab] of tokens int64 [n], until the
        next step."""
        attended, x = forward_to_last(self._model.segments, self._embedded(inputs), self._attention.attend)
        return partial(self._model.segments.last, attended, x)

    def _embedded(self, inputs: StepInputs) -> Tensor:
        self._attention.plan(inputs, self._tables.array)
        return self._model.embed(torch.from_numpy(inputs.token_ids))
