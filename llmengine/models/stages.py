"""Pipeline parallelism as data: which layers of a model each stage has.

A stage is a model of the same kind with fewer layers. The first one begins with token ids, the others with the hidden
states that the stage before gives; the last one ends with logits. Where the embedding is the output matrix as well,
both ends have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from llmengine.errors import ConfigError
from llmengine.models.arch import ModelArch, canonical_shapes

_LAYER = "layers."


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers [layers.start, layers.stop) of a model with `num_layers`; `index` counts from the embedding."""

    index: int
    layers: range
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return not self.layers.start

    @property
    def is_last(self) -> bool:
        """Whether it has the last norm and the output matrix."""
        return self.layers.stop == self.num_layers

    def arch_of(self, arch: ModelArch) -> ModelArch:
        """The model that the stage runs, where `arch` is the whole model's."""
        return dataclasses.replace(
            arch,
            num_layers=len(self.layers),
            layers=arch.layers[self.layers.start : self.layers.stop],
            has_embedding=self.is_first,
            has_head=self.is_last,
        )

    def whole_name(self, name: str) -> str:
        """The name in the whole model of the stage's tensor or matrix `name`."""
        return _moved(name, self.layers.start)

    def own_name(self, name: str) -> str | None:
        """Inverse of `whole_name` for the layers' names; None for those of other layers. Others stay as they are."""
        if name.startswith(_LAYER) and int(name.split(".")[1]) not in self.layers:
            return None
        return _moved(name, -self.layers.start)

    def own_names(self, arch: ModelArch) -> dict[str, str]:
        """Canonical tensor of the whole model `arch` -> its name in the stage, for those that the stage has."""
        return {self.whole_name(name): name for name in canonical_shapes(self.arch_of(arch))}


def cut_into_stages(layer_bytes: Sequence[int], first_bytes: int, last_bytes: int, size: int) -> list[Stage]:
    """`size` stages of consecutive layers, the largest of which is as small as can be.

    Args:
        layer_bytes: of each layer's weights.
        first_bytes: what the first stage has beside its layers: the embedding.
        last_bytes: likewise the last one: the output matrix, which is read for every token as a layer's weights are.

    Raises `ConfigError` if there are more stages than layers.
    """
    num_layers = len(layer_bytes)
    if size > num_layers:
        raise ConfigError(
            f"parallel_config.pp_size={size}: the model has {num_layers} layers, and each stage needs one of its own; "
            f"use at most {num_layers}"
        )
    sums = [0]
    for value in layer_bytes:
        sums.append(sums[-1] + value)

    def stage_bytes(index: int, start: int, stop: int) -> int:
        ends = (first_bytes if not index else 0) + (last_bytes if index == size - 1 else 0)
        return sums[stop] - sums[start] + ends

    # best[stop]: the cost of the stages so far, which end at `stop`, and where each of them begins.
    best: dict[int, tuple[tuple[int, int], list[int]]] = {0: ((0, 0), [])}
    for index in range(size):
        left = size - 1 - index
        stops = range(index + 1, num_layers - left + 1) if left else range(num_layers, num_layers + 1)
        following = {}
        for stop in stops:
            following[stop] = min(
                ((max(cost[0], own), cost[1] + own**2), [*starts, start])
                for start, (cost, starts) in best.items()
                if start < stop
                for own in [stage_bytes(index, start, stop)]
            )
        best = following
    starts = best[num_layers][1]
    ranges = [range(*ends) for ends in zip(starts, [*starts[1:], num_layers], strict=True)]
    return [Stage(index, layers, num_layers) for index, layers in enumerate(ranges)]


def _moved(name: str, by: int) -> str:
    if not name.startswith(_LAYER):
        return name
    prefix, number, *rest = name.split(".")
    return ".".join((prefix, str(int(number) + by), *rest))
