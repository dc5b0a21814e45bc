"""Tensor parallelism as data: which heads, columns and rows of a model each rank has.

Every rank runs the one decoder over a smaller model. Attention is divided by heads and the MLP by its intermediate
columns, so that a rank's results of `o` and `down` are terms of sums over all ranks (Megatron-LM, arXiv 1909.08053).
The embedding and the output matrix are divided by rows of the vocabulary. Norms are the same everywhere, but for those
of q and k over all heads (`qk_norm="projection"`): ranks add up the squares of their heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, lcm
from typing import Literal, TypeVar

from llmengine.errors import ConfigError
from llmengine.models.arch import ModelArch, fused_parts

T = TypeVar("T")

_ALIGNMENTS = (128, 64, 32, 16, 8, 4, 2)
"""Columns or rows that kernels like to have multiples of, the best first."""

_LARGEST_SURPLUS = 1.05
"""What the largest share may be, in proportion to an equal one, for the sake of alignment."""

_MOST_LISTED = 16
"""The largest number of ranks that messages suggest."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` parts of a model, that of rank `rank`."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)


@dataclass(frozen=True, slots=True)
class Units:
    """Rows and columns that weight formats keep together: cuts lie at multiples of them, or at the end.

    Of several alternatives the first with which there is something for every rank counts.

    Attributes:
        attention: alternatives for the columns of `o`.
        qkv: rows of each of q, k and v.
        intermediate: alternatives for the columns of `down` and the rows of each of gate and up.
    """

    attention: tuple[int, ...] = (1,)
    qkv: int = 1
    intermediate: tuple[int, ...] = (1,)


NO_UNITS = Units()


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank has of a model; ranks that share a KV head all have it."""

    heads: range
    kv_heads: range
    intermediate: range
    vocabulary: range


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank has of a canonical tensor.

    Attributes:
        axis: "out" for rows, "in" for columns; None: all of the tensor.
        ranges: of rows or columns of the whole; in the shard one comes behind the other. `NOTHING` has none.
        is_term: whether the tensor is added to a sum over the ranks, so that rank 0 has it and the others have zeros.
    """

    axis: Literal["out", "in"] | None = None
    ranges: tuple[range, ...] = ()
    is_term: bool = False


NOTHING = Cut("out")
"""A tensor, or all tensors of a matrix, of which a rank has nothing: readers leave it out."""


def held_by(arch: ModelArch, shard: Shard, units: Units = NO_UNITS) -> Held:
    """What a rank has of the model `arch`; raises as `divided` does."""
    return divided(arch, shard.size, units)[shard.rank]


def shard_arch(arch: ModelArch, shard: Shard, units: Units = NO_UNITS) -> ModelArch:
    """The model that a rank runs: its heads, intermediate columns and vocabulary rows of `arch`.

    Its layers, hidden size and options are those of `arch`. Raises as `divided` does.
    """
    return arch_of(arch, held_by(arch, shard, units))


def arch_of(arch: ModelArch, held: Held) -> ModelArch:
    """The model that a rank runs which has `held` of the model `arch`."""
    return dataclasses.replace(
        arch,
        num_heads=len(held.heads),
        num_kv_heads=len(held.kv_heads),
        intermediate_size=len(held.intermediate),
        vocab_size=len(held.vocabulary),
    )


def vocabulary_range(arch: ModelArch, shard: Shard) -> range:
    """The token ids whose rows of the embedding and of the output matrix a rank has; `arch` is the whole model's.

    Raises as `divided` does.
    """
    return held_by(arch, shard).vocabulary


def divided(
    arch: ModelArch, size: int, units: Units = NO_UNITS, check: Callable[[list[Held]], None] = lambda ranks: None
) -> list[Held]:
    """What each of `size` ranks has of the model `arch`.

    Ranks get whole heads of keys and values with the heads of queries that use them; where there are fewer heads of
    keys and values than ranks, several ranks have the same one and divide its heads of queries. Shares are as equal as
    `units` allow, the larger ones first, and aligned for kernels where that costs little. The vocabulary is divided in
    the same way whatever the units.

    Raises `ConfigError` naming the sizes that work if there is not something for every rank, or if `check` does.
    """

    def attempt(other: int) -> list[Held]:
        ranks = _divided(arch, other, units)
        check(ranks)
        return ranks

    def works(other: int) -> bool:
        try:
            return bool(attempt(other))
        except ConfigError:
            return False

    try:
        return attempt(size)
    except ConfigError as error:
        sizes = [str(other) for other in range(1, min(arch.num_heads, _MOST_LISTED) + 1) if works(other)]
        raise ConfigError(f"parallel_config.tp_size={size}: {error}; sizes that work: {', '.join(sizes)}") from error


def cuts(arch: ModelArch, held: Held) -> dict[str, Cut]:
    """Canonical tensor of `arch` -> what a rank that has `held` has of it, in stream order.

    ::

        embed_tokens.weight, lm_head.weight   rows of the vocabulary
        qkv.weight, qkv.bias                  rows of the heads, in each of q, k and v
        o.weight                              columns of the heads of queries
        gate_up.weight, gate_up.bias          rows of the intermediate columns, in each of gate and up
        down.weight                           columns
        o.bias, down.bias                     rank 0 has them, the others zeros
        q_norm.weight, k_norm.weight          columns of the heads, where the norms are over all of them
        other norms                           all of them
    """
    queries, keys = (_scaled(heads, arch.head_dim) for heads in (held.heads, held.kv_heads))
    rows = dict.fromkeys(("embed_tokens", "lm_head"), held.vocabulary)
    rows |= {"q": queries, "k": keys, "v": keys, "gate": held.intermediate, "up": held.intermediate}
    if arch.qk_norm == "projection":
        rows |= {"q_norm": queries, "k_norm": keys}
    columns = {"o.weight": queries, "down.weight": held.intermediate}
    result = {}
    for name, parts in fused_parts(arch).items():
        end = ".".join(name.split(".")[-2:])
        ranges, first = [], 0
        for part, shape in parts:
            own = rows.get(part.split(".")[-2])
            if own is not None:
                ranges.append(range(first + own.start, first + own.stop))
            first += shape[0]
        if end in columns:
            result[name] = Cut("in", (columns[end],))
        elif ranges:
            result[name] = Cut("out", tuple(ranges))
        else:
            result[name] = Cut(is_term=end in ("o.bias", "down.bias"))
    return result


def _divided(arch: ModelArch, size: int, units: Units) -> list[Held]:
    if size == 1:
        whole = (arch.num_heads, arch.num_kv_heads, arch.intermediate_size, arch.vocab_size)
        return [Held(*map(range, whole))]
    heads = _first(units.attention, lambda unit: _heads(arch, size, unit, units.qkv))
    intermediate = _first(units.intermediate, lambda unit: _aligned_spread(arch.intermediate_size, size, unit))
    vocabulary = _aligned_spread(arch.vocab_size, size, 1)
    if heads is None:
        heads_text = f"{arch.num_heads} attention heads with {arch.num_kv_heads} key-value heads"
        raise _refusal(heads_text, size, max(units.attention[-1], units.qkv))
    if intermediate is None:
        raise _refusal(f"the intermediate size of {arch.intermediate_size}", size, units.intermediate[-1])
    if vocabulary is None:
        raise _refusal(f"the vocabulary of {arch.vocab_size} tokens", size, 1)
    rest = zip(intermediate, vocabulary, strict=True)
    return [Held(*own, inner, tokens) for own, (inner, tokens) in zip(heads, rest, strict=True)]


def _refusal(what: str, size: int, unit: int) -> ConfigError:
    reason = f" between units of {unit}, which the format of the weights keeps together" if unit > 1 else ""
    return ConfigError(f"{what} cannot be divided among {size} ranks{reason}")


def _heads(arch: ModelArch, size: int, column_unit: int, row_unit: int) -> list[tuple[range, range]] | None:
    """For each rank its heads of queries and its heads of keys and values."""
    group = arch.num_heads // arch.num_kv_heads
    if size <= arch.num_kv_heads:
        unit = lcm(_together(column_unit, group * arch.head_dim), _together(row_unit, arch.head_dim))
        shares = _spread(arch.num_kv_heads, size, unit)
        return None if shares is None else [(_scaled(heads, group), heads) for heads in shares]
    unit = lcm(_together(column_unit, arch.head_dim), _together(row_unit, arch.head_dim))
    if group % unit or arch.head_dim % row_unit:
        return None
    ranks_of_heads = _spread(size, arch.num_kv_heads, 1)
    assert ranks_of_heads is not None
    result = []
    for head, ranks in enumerate(ranks_of_heads):
        shares = _spread(group, len(ranks), unit)
        if shares is None:
            return None
        first = head * group
        result += [(range(first + own.start, first + own.stop), range(head, head + 1)) for own in shares]
    return result


def _together(unit: int, columns: int) -> int:
    """How many heads of so many columns end at a multiple of `unit`."""
    return unit // gcd(unit, columns)


def _aligned_spread(total: int, size: int, unit: int) -> list[range] | None:
    """`_spread` in the best multiples of `unit` with which shares are still about equal."""
    for alignment in _ALIGNMENTS:
        ranges = _spread(total, size, lcm(unit, alignment))
        if ranges is not None and len(ranges[0]) * size <= _LARGEST_SURPLUS * total:
            return ranges
    return _spread(total, size, unit)


def _spread(total: int, size: int, unit: int) -> list[range] | None:
    """Consecutive ranges of about the same length, that begin at multiples of `unit`; None if some would be empty."""
    share, larger = divmod(-(-total // unit), size)
    if not share:
        return None
    starts = [unit * (rank * share + min(rank, larger)) for rank in range(size)]
    return [range(begin, end) for begin, end in pairwise((*starts, total))]


def _scaled(part: range, step: int) -> range:
    return range(part.start * step, part.stop * step)


def _first(alternatives: tuple[int, ...], attempt: Callable[[int], list[T] | None]) -> list[T] | None:
    """The first result that is not None."""
    results = (attempt(unit) for unit in alternatives)
    return next((result for result in results if result is not None), None)
