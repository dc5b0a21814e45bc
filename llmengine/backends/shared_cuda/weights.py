"""The weights of a model that several ranks hold: each sends its shards to rank 0, which puts them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from llmengine.backends.cuda.following import NextWeight, encode
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.backends.shared_weights import tensor_bytes, tensor_of
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
        self._channel.reply(tensor_bytes(tensor))


def joined_weights(plan: ShardPlan, weights: Weights, group: RankGroup) -> Iterator[tuple[str, Tensor]]:
    """The canonical weights, each put together from the ranks' parts; `weights` are those of rank 0."""
    for index, (name, tensor) in enumerate(weights()):
        group.broadcast(encode([NextWeight(restarts=index == 0)]))
        yield name, plan.join(name, [tensor, *map(tensor_of, group.replies())])
