"""How kernels tell those of other GPUs how far they are: the instructions that they compile to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT


def test_kernels_tell_and_wait_without_atomic_operations(tmp_path: Path) -> None:
    """GPUs that are joined by PCIe have none on each other's memory. Stores release and loads acquire instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_peer_kernels"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [(name, words) for name, *words in map(str.split, done.stdout.splitlines())]
    names = {name for name, _ in lines}
    sums = {"_sum_over_peers", "_choose_over_peers"}
    assert names == {"_await_hidden", "_take_ids", "_tell_next", "_send_ids", "_copy_hidden", *sums}
    for name, words in lines:
        assert not any(word.startswith(("atom", "red")) for word in words), (name, words)
        assert ("ld.acquire.sys.global.u32" in words) == (name in {"_await_hidden", "_take_ids", *sums}), (name, words)
        assert ("st.release.sys.global.u32" in words) == (name in {"_tell_next", "_send_ids", *sums}), (name, words)
        if name in ("_copy_hidden", "_sum_over_peers"):
            assert any("v4" in word for word in words if word.startswith("ld"))
            assert any("v4" in word for word in words if word.startswith("st"))
