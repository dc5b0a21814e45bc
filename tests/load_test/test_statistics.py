"""Percentiles agree with numpy's, and weights with repeated values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmengine.load_test.statistics import median, percentile, summary, weighted_summary

numbers = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(numbers, min_size=1), st.integers(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


@given(st.lists(numbers, min_size=1))
def test_a_summary_is_made_of_percentiles(values: list[float]) -> None:
    found = summary(values, scale=10)
    assert found["p99"] == pytest.approx(10 * percentile(values, 99), abs=1e-5)
    assert found["max"] == pytest.approx(10 * max(values))
    assert found["mean"] == pytest.approx(10 * np.mean(values), abs=1e-5)


@given(st.lists(st.tuples(numbers, st.integers(1, 9)), min_size=1))
def test_a_weight_counts_as_so_many_values(pairs: list[tuple[float, int]]) -> None:
    expanded = [value for value, weight in pairs for _ in range(weight)]
    found = weighted_summary(pairs)
    for percent in (50, 90, 95, 99):
        assert found[f"p{percent}"] == np.percentile(expanded, percent, method="inverted_cdf")
    assert found["mean"] == pytest.approx(np.mean(expanded), abs=1e-6)


def test_nothing_has_no_percentiles() -> None:
    assert math.isnan(median([]))
    assert all(math.isnan(value) for value in [*summary([]).values(), *weighted_summary([]).values()])


def test_a_percentile_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="percent must be in"):
        percentile([1.0], 101)
