"""The weights of a model that several ranks hold: each sends its shards to rank 0, which puts them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from llmengine.backends.cuda.following import NextWeight, encode
from llmengine.backends.rank_places import RankPlaces
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.backends.shared_weights import tensor_bytes, tensor_of
from llmengine.models.stages import Stage

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""A rank's canonical weights, on the CPU, one at a time."""


class WeightSender:
    """A rank's side, in the stage with the number `stage`."""

    def __init__(self, stage: int, weights: Weights, channel: RankChannel) -> None:
        self._stage = stage
        self._all_weights = weights
        self._weights = weights()
        self._channel = channel

    def send(self, asked: NextWeight) -> None:
        """Reply with a weight and its name, if one is asked for and left."""
        if asked.stage != self._stage:
            self._channel.reply(b"")
            return
        if asked.restarts:
            self._weights = self._all_weights()
        named = next(self._weights, None)
        self._channel.reply(b"" if named is None else named[0].encode() + b"\0" + tensor_bytes(named[1]))


def joined_weights(places: RankPlaces, weights: Weights, group: RankGroup) -> Iterator[tuple[str, Tensor]]:
    """The canonical weights, each put together from the ranks' parts; `weights` are those of rank 0."""
    for stage in places.stages:
        for name, parts in _parts_of(stage, weights() if stage.is_last else iter(()), group):
            if stage.is_first or not name.startswith("embed_tokens."):  # tied ones are in the last stage too
                yield stage.whole_name(name), places.plans[stage.index].join(name, parts)


def _parts_of(stage: Stage, own: Iterator[tuple[str, Tensor]], group: RankGroup) -> Iterator[tuple[str, list[Tensor]]]:
    """Each weight of a stage, by its name there, and the parts of it in the order of ranks; `own` are rank 0's."""
    restarts = True
    while True:
        group.broadcast(encode([NextWeight(stage.index, restarts)]))
        replies = [reply.split(b"\0", 1) for reply in group.replies() if reply]
        found = [*islice(own, 1), *((name.decode(), tensor_of(data)) for name, data in replies)]
        if not found:
            return
        (name,) = {name for name, _ in found}
        yield name, [tensor for _, tensor in found]
        restarts = False
