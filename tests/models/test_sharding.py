"""How a model is divided among ranks: nothing is missing, shares are about equal, and impossible sizes are refused."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.errors import ConfigError
from llmengine.models.arch import ModelArch, canonical_shapes, check_arch
from llmengine.models.sharding import Held, Shard, Units, cuts, divided, held_by, shard_arch, vocabulary_range
from tests.models.arch_helpers import SMALL_ARCH


def arch_with(heads: int = 4, kv_heads: int = 2, **changes: Any) -> ModelArch:
    return dataclasses.replace(SMALL_ARCH, num_heads=heads, num_kv_heads=kv_heads, **changes)


def attention(arch: ModelArch, size: int, units: Units = Units()) -> list[tuple[int, int]]:  # noqa: B008
    return [(len(held.heads), len(held.kv_heads)) for held in divided(arch, size, units)]


def test_one_rank_has_the_model() -> None:
    assert shard_arch(SMALL_ARCH, Shard(0, 1)) == SMALL_ARCH
    assert vocabulary_range(SMALL_ARCH, Shard(0, 1)) == range(40)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "expected"),
    [
        (8, 4, 2, [(4, 2), (4, 2)]),
        (9, 3, 2, [(6, 2), (3, 1)]),
        (9, 3, 4, [(2, 1), (1, 1), (3, 1), (3, 1)]),
        (8, 2, 4, [(2, 1)] * 4),
        (8, 2, 3, [(2, 1), (2, 1), (4, 1)]),
        (4, 1, 3, [(2, 1), (1, 1), (1, 1)]),
        (32, 8, 3, [(12, 3), (12, 3), (8, 2)]),
    ],
)
def test_heads_stay_with_their_keys(heads: int, kv_heads: int, size: int, expected: list[tuple[int, int]]) -> None:
    assert attention(arch_with(heads, kv_heads), size) == expected


models = st.builds(
    arch_with,
    st.just(12),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
    head_dim=st.sampled_from([2, 64]),
    intermediate_size=st.integers(12, 20_000),
    vocab_size=st.integers(12, 20_000),
)


@given(arch=models, size=st.integers(1, 12))
def test_ranks_have_everything_once_but_for_shared_keys(arch: ModelArch, size: int) -> None:
    ranks = divided(arch, size)
    group = arch.num_heads // arch.num_kv_heads
    for whole, parts in (
        (arch.num_heads, [held.heads for held in ranks]),
        (arch.intermediate_size, [held.intermediate for held in ranks]),
        (arch.vocab_size, [held.vocabulary for held in ranks]),
    ):
        assert [index for part in parts for index in part] == list(range(whole))
    for rank, held in enumerate(ranks):
        own = shard_arch(arch, Shard(rank, size))
        check_arch(own, "shard")
        assert vocabulary_range(arch, Shard(rank, size)) == held.vocabulary
        own_group = own.num_heads // own.num_kv_heads
        found = [held.kv_heads[index // own_group] for index in range(own.num_heads)]
        assert found == [head // group for head in held.heads]
    for shares in ([held.intermediate for held in ranks], [held.vocabulary for held in ranks]):
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1 or max(lengths) * size <= 1.05 * sum(lengths)


@given(arch=models, size=st.integers(1, 12))
def test_cuts_give_each_rank_the_tensors_of_its_model(arch: ModelArch, size: int) -> None:
    arch = dataclasses.replace(arch, mlp_bias=True, attention_out_bias=True, num_layers=1)
    shapes = canonical_shapes(arch)
    for rank, held in enumerate(divided(arch, size)):
        wanted = canonical_shapes(shard_arch(arch, Shard(rank, size)))
        found = cuts(arch, held)
        assert list(found) == list(shapes) == list(wanted)
        for name, cut in found.items():
            shape = list(shapes[name])
            if cut.axis is not None:
                shape[0 if cut.axis == "out" else 1] = sum(map(len, cut.ranges))
            assert tuple(shape) == wanted[name], name
            assert cut.is_term == name.endswith(("o.bias", "down.bias"))


def test_rows_of_fused_matrices_are_taken_from_each_part() -> None:
    found = cuts(SMALL_ARCH, Held(range(2, 4), range(1, 2), range(12, 24), range(20, 40)))
    assert found["layers.1.qkv.weight"].ranges == (range(8, 16), range(20, 24), range(28, 32))
    assert found["layers.1.qkv.bias"] == found["layers.0.qkv.weight"]
    assert found["layers.0.gate_up.weight"].ranges == (range(12, 24), range(36, 48))
    assert (found["layers.0.o.weight"].axis, found["layers.0.o.weight"].ranges) == ("in", (range(8, 16),))
    assert (found["layers.0.down.weight"].axis, found["layers.0.down.weight"].ranges) == ("in", (range(12, 24),))
    assert found["lm_head.weight"].ranges == found["embed_tokens.weight"].ranges == (range(20, 40),)


def test_shares_are_aligned_where_that_costs_little() -> None:
    arch = arch_with(intermediate_size=4864, vocab_size=151_936)
    assert [len(held.intermediate) for held in divided(arch, 4)] == [1216] * 4
    assert [len(held.intermediate) for held in divided(arch, 3)] == [1664, 1664, 1536]
    assert [len(held.vocabulary) for held in divided(arch, 3)] == [50_688, 50_688, 50_560]
    assert [len(held.intermediate) for held in divided(arch_with(intermediate_size=101), 2)] == [52, 49]


def test_units_move_cuts_and_the_first_that_works_counts() -> None:
    arch = arch_with(14, 2, head_dim=64, intermediate_size=4864)
    assert attention(arch, 2) == [(7, 1), (7, 1)]
    assert attention(arch, 2, Units(attention=(128, 64))) == [(7, 1), (7, 1)]
    assert attention(arch_with(12, 2, head_dim=128), 4, Units(attention=(256,))) == [(4, 1), (2, 1)] * 2
    assert attention(arch_with(32, 8, head_dim=64), 3, Units(qkv=128)) == [(16, 4), (8, 2), (8, 2)]
    units = Units(intermediate=(256, 32))
    assert [len(held.intermediate) for held in divided(arch, 4, units)] == [1280, 1280, 1280, 1024]
    small = arch_with(intermediate_size=256)
    assert [len(held.intermediate) for held in divided(small, 2, units)] == [128, 128]
    assert held_by(small, Shard(1, 2), units).intermediate == range(128, 256)


@pytest.mark.parametrize(
    ("arch", "size", "units", "message"),
    [
        (arch_with(), 5, Units(), "4 attention heads with 2 key-value heads cannot be divided among 5 ranks"),
        (arch_with(9, 3), 10, Units(), "9 attention heads .* sizes that work: 1, 2, 3, 4, 5, 6, 7, 8, 9$"),
        (
            arch_with(14, 2, head_dim=64),
            2,
            Units(attention=(128,)),
            "tp_size=2: 14 attention heads .* ranks between units of 128, which .* sizes that work: 1$",
        ),
        (arch_with(intermediate_size=3), 4, Units(), "the intermediate size of 3 .* sizes that work: 1, 2, 3$"),
        (arch_with(intermediate_size=512), 3, Units(intermediate=(256,)), "size of 512 .* units of 256.*: 1, 2$"),
        (arch_with(vocab_size=3), 4, Units(), "the vocabulary of 3 tokens .* sizes that work: 1, 2, 3$"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_sizes_that_work(
    arch: ModelArch, size: int, units: Units, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        held_by(arch, Shard(0, size), units)
    works = re.search(r"sizes that work: ([\d, ]+)$", str(caught.value))
    assert works is not None
    assert {int(other) for other in works[1].split(",")} == {
        other for other in range(1, 13) if other <= arch.num_heads and _works(arch, other, units)
    }


def _works(arch: ModelArch, size: int, units: Units) -> bool:
    try:
        return bool(divided(arch, size, units))
    except ConfigError:
        return False
