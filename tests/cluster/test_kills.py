"""Parts of a cluster are killed under load, by `benchmarks.cluster_kills`: streams end well, and nothing is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from benchmarks.cluster_kills.killing import KINDS
from benchmarks.cluster_kills.runs import Where, kill_all, order_of
from tests import ROOT

FAST = ("replica", "rank", "node", "removal", "cluster")


@pytest.mark.parametrize("rerun", [False, True])
def test_streams_end_well_whatever_is_killed(rerun: bool) -> None:
    kills, faults = kill_all(FAST * 3, seed=3, num_replicas=3, rerun_requests=rerun, replica_timeout_s=30.0)
    assert not faults
    assert len(kills) == 3 * len(FAST)
    errors = sum(kill.endings["ReplicaDeadError"] for kill in kills if kill.kind != "removal")
    assert (errors == 0) == rerun


def test_replicas_that_are_processes() -> None:
    kinds = ("replica", "rank", "node", "cluster")
    kills, faults = kill_all(kinds, where="processes", num_replicas=2, num_clients=4, replica_timeout_s=30.0)
    assert not faults
    assert sum(kill.endings["whole"] for kill in kills)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["threads", "processes"])
@pytest.mark.parametrize("rerun", [False, True])
def test_hundreds_of_kills(where: Where, rerun: bool) -> None:
    kills, faults = kill_all(order_of(150, seed=7), where=where, seed=7, num_replicas=3, rerun_requests=rerun)
    assert not faults
    assert {kill.kind for kill in kills} == set(KINDS)


ON_RAY = """
from benchmarks.cluster_kills.killing import KINDS
from benchmarks.cluster_kills.runs import kill_all, order_of

kills, faults = kill_all(order_of(16, seed=7), where="ray", seed=7, num_clients=6, bound_s=120.0)
assert not faults, faults
assert {kill.kind for kill in kills} == set(KINDS)
"""
"""In a process of its own, since Ray leaves sockets open in one that starts it."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python")
def test_replicas_that_are_actors_of_ray() -> None:
    ended = subprocess.run([sys.executable, "-c", ON_RAY], capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-4000:]
