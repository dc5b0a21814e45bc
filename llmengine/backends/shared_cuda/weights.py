"""The weights of a model that several ranks hold: each sends its shards to rank 0, which puts them together."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmengine.backends.cuda.following import NextWeight, encode
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.checkpoints.sharded_source import ShardPlan

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""A rank's canonical weights, on the CPU, one at a time."""


class WeightSender:
    """A rank's side."""

    def __init__(self, weights: Weights, channel: RankChannel) -> None:
        self._all_weights = weights
        self._weights = weights()
        self._channel = channel

    def send(self, asked: NextWeight) -> None:
        """Reply with a weight."""
        if asked.restarts:
            self._weights = self._all_weights()
        _, tensor = next(self._weights)
        self._channel.reply(_tensor_bytes(tensor))


def joined_weights(plan: ShardPlan, weights: Weights, group: RankGroup) -> Iterator[tuple[str, Tensor]]:
    """The canonical weights, each put together from the ranks' parts; `weights` are those of rank 0."""
    for index, (name, tensor) in enumerate(weights()):
        group.broadcast(encode([NextWeight(restarts=index == 0)]))
        yield name, plan.join(name, [tensor, *map(_tensor_of, group.replies())])


def _tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor of any dtype; torch pickles numbers of 8 bits wrongly, but saves them right."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def _tensor_of(message: bytes) -> Tensor:
    """Undoes `_tensor_bytes`."""
    tensor = torch.load(io.BytesIO(message), weights_only=True)
    assert isinstance(tensor, Tensor), tensor
    return tensor
