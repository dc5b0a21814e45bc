"""Percentiles, of plain and of weighted values, and what is reported of a distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

PERCENTS = (50, 90, 95, 99)
"""Percentiles that reports give."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile, interpolated between the two nearest values (numpy's default); nan without values."""
    _check_percent(percent)
    return _place_in(sorted(values), percent)


def median(values: Sequence[float]) -> float:
    """The 50th percentile; nan without values."""
    return percentile(values, 50)


def median_of_runs(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median of each figure over runs that all have the same figures."""
    return {name: median([run[name] for run in runs]) for name in runs[0]}


def summary(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """Mean, `PERCENTS` and maximum of the values times `scale`; all nan without values."""
    ordered = sorted(value * scale for value in values)
    mean = math.fsum(ordered) / len(ordered) if ordered else math.nan
    places = {f"p{percent}": _place_in(ordered, percent) for percent in PERCENTS}
    return {"mean": mean, **places, "max": ordered[-1] if ordered else math.nan}


def weighted_summary(pairs: Iterable[tuple[float, float]], scale: float = 1.0) -> dict[str, float]:
    """`summary` of (value, weight) pairs: a percentile is the least value that its share of the weight does not exceed.

    So the pair (0.01, 4.0) counts as four values of 0.01. Weights are positive.
    """
    ordered = sorted((value * scale, weight) for value, weight in pairs)
    total = math.fsum(weight for _, weight in ordered)
    mean = math.fsum(value * weight for value, weight in ordered) / total if ordered else math.nan
    places = {f"p{percent}": math.nan for percent in PERCENTS}
    remaining = list(PERCENTS)
    reached = 0.0
    for value, weight in ordered:
        reached += weight
        # Weights that do not add up exactly must not push a percentile to the next value.
        while remaining and reached >= total * remaining[0] / 100 * (1 - 1e-9):
            places[f"p{remaining.pop(0)}"] = value
    return {"mean": mean, **places, "max": ordered[-1][0] if ordered else math.nan}


def _check_percent(percent: float) -> None:
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in [0, 100], not {percent}")


def _place_in(ordered: Sequence[float], percent: float) -> float:
    if not ordered:
        return math.nan
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
