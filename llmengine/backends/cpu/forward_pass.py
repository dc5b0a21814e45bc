"""A step's forward pass on a CPU by torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llmengine.backends.cpu.attention import PagedAttention
from llmengine.backends.cpu.step_inputs import BlockTables, StepInputs
from llmengine.backends.cpu.weights import CpuModel
from llmengine.models.decoder import forward, forward_to_last


class StepPass(Protocol):
    """The computation of one step after the other."""

    def run(self, inputs: StepInputs) -> Tensor | None:
        """Write the KV of all tokens and return logits float32 [num_samples, vocab], None if no token samples."""

    def begin(self, inputs: StepInputs) -> Callable[[Tensor], Tensor]:
        """Write the KV of all tokens; the result gives the logits float32 [n, vocab] of tokens int64 [n], until the
        next step."""


class ForwardPass:
    """What a step computes with the weights and the KV blocks, up to the logits.

    Args:
        begin_with: what goes into the first layer, [num_tokens, hidden], which may be overwritten; None: the embeddings
            of the step's tokens.
    """

    def __init__(
        self,
        model: CpuModel,
        attention: PagedAttention,
        tables: BlockTables,
        begin_with: Callable[[StepInputs], Tensor] | None = None,
    ) -> None:
        self._model = model
        self._begin_with = begin_with or self._embedded
        self._attention = attention
        self._tables = tables

    def run(self, inputs: StepInputs) -> Tensor | None:
        """See `StepPass.run`."""
        every = len(inputs.sample_tokens) == len(inputs.token_ids)
        sample_tokens = None if every else torch.from_numpy(inputs.sample_tokens)
        return forward(self._model.segments, self._begun(inputs), self._attention.attend, sample_tokens)

    def begin(self, inputs: StepInputs) -> Callable[[Tensor], Tensor]:
        """See `StepPass.begin`."""
        attended, x = forward_to_last(self._model.segments, self._begun(inputs), self._attention.attend)
        return partial(self._model.segments.last, attended, x)

    def _begun(self, inputs: StepInputs) -> Tensor:
        self._attention.plan(inputs, self._tables.array)
        return self._begin_with(inputs)

    def _embedded(self, inputs: StepInputs) -> Tensor:
        assert self._model.embed is not None
        return self._model.embed(torch.from_numpy(inputs.token_ids))
