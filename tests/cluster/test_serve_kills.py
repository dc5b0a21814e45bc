"""Processes behind Ray Serve are killed under load, by `benchmarks.serve_kills`: streams end well, nothing is left."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.serve_kills import KINDS, kill_all

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python"),
]


def test_streams_end_well_whatever_is_killed() -> None:
    kills, faults = kill_all(KINDS, seed=3, num_clients=4, bound_s=120.0, back_s=300.0)
    assert not faults
    assert [kill.kind for kill in kills] == list(KINDS)
    assert all(kill.endings["whole"] for kill in kills)
