"""Stages of a pipeline: cut by bytes, and named both ways."""

from __future__ import annotations

import dataclasses
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.errors import ConfigError
from llmengine.models.arch import LayerArch, canonical_shapes
from llmengine.models.stages import cut_into_stages
from tests.models.arch_helpers import SMALL_ARCH


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(0, 200),
    st.integers(0, 200),
    st.integers(1, 8),
)
def test_the_largest_stage_is_as_small_as_can_be(layers: list[int], first: int, last: int, size: int) -> None:
    size = min(size, len(layers))

    def largest(starts: tuple[int, ...]) -> int:
        ends = [0, *starts, len(layers)]
        sums = [sum(layers[start:stop]) for start, stop in pairwise(ends)]
        sums[0] += first
        sums[-1] += last
        return max(sums)

    stages = cut_into_stages(layers, first, last, size)
    assert [index for stage in stages for index in stage.layers] == list(range(len(layers)))
    assert [stage.index for stage in stages] == list(range(size))
    assert all(len(stage.layers) for stage in stages)
    own = largest(tuple(stage.layers.start for stage in stages[1:]))
    assert own == min(map(largest, combinations(range(1, len(layers)), size - 1)))


def test_equal_layers_are_divided_equally() -> None:
    assert [len(stage.layers) for stage in cut_into_stages([5] * 32, 0, 0, 4)] == [8] * 4
    assert [len(stage.layers) for stage in cut_into_stages([5] * 32, 10, 10, 4)] == [7, 9, 9, 7]


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pp_size=5: the model has 4 layers.* use at most 4"):
        cut_into_stages([1] * 4, 1, 1, 5)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_have_each_tensor_once_but_for_a_tied_embedding(tied: bool) -> None:
    layers = tuple(LayerArch(sliding_window=8 + index) for index in range(5))
    arch = dataclasses.replace(SMALL_ARCH, num_layers=5, layers=layers, tie_word_embeddings=tied)
    stages = cut_into_stages([1] * 5, 0, 0, 3)
    arches = [stage.arch_of(arch) for stage in stages]
    assert [layer for part in arches for layer in part.layers] == list(layers)
    names = [
        stage.whole_name(name) for stage, part in zip(stages, arches, strict=True) for name in canonical_shapes(part)
    ]
    again = ["embed_tokens.weight"] if tied else []
    assert sorted(names) == sorted([*canonical_shapes(arch), *again])
    assert [stage.own_name("layers.2.qkv.weight") for stage in stages].count(None) == 2
    for stage in stages:
        for whole, own in stage.own_names(arch).items():
            assert stage.own_name(whole) == own
