"""Models that eight processes share: on a CPU, and as ranks on GPUs through Triton's interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmengine import LLM, EngineDeadError, ParallelConfig
from tests import ROOT
from tests.backends.cuda.helpers import check_steps_in_flight, load_shared
from tests.backends.helpers import BackendDriver, reference_greedy, save_tiny
from tests.backends.ranks.helpers import is_gone
from tests.backends.test_shared_cpu import GREEDY, children, tiny_config, tokens
from tests.device_fixture import device

__all__ = ["device"]

pytestmark = pytest.mark.slow

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]
HEADS = {"num_attention_heads": 16, "head_dim": 8, "hidden_size": 64}
# Ranks must be gone after 2 s; a busy machine may need longer for anything.
GONE_S = 20.0

SCRIPT = """
import sys
from pathlib import Path
from tests.backends.test_eight_ranks import load
from tests.backends.test_shared_cpu import GREEDY, children
llm = load(Path(sys.argv[1]), 8, 1)
print(*(one.pid for one in children()), flush=True)
while True:
    llm.generate([[5, 6, 7]], GREEDY.replace(max_new_tokens=100))
"""


def load(directory: Path, tp_size: int, pp_size: int) -> LLM:
    config = tiny_config(directory, 1)
    config.parallel_config = ParallelConfig(tp_size=tp_size, pp_size=pp_size)
    return LLM(config, enable_tokenizer=False)


@pytest.fixture(scope="module", params=[8, 2], ids=["a head of keys for each", "shared heads of keys"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, **HEADS, num_key_value_heads=request.param, num_hidden_layers=8, attention_bias=True)
    return directory


@pytest.fixture(scope="module")
def expected(directory: Path) -> Iterator[list[list[int]]]:
    with load(directory, 1, 1) as llm:
        yield tokens(llm)


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
def test_the_same_tokens_as_one_process(directory: Path, expected: list[list[int]], tp_size: int, pp_size: int) -> None:
    before = set(children())
    with load(directory, tp_size, pp_size) as llm:
        assert len(set(children()) - before) == 7
        assert tokens(llm) == expected
    assert set(children()) == before


@pytest.mark.parametrize(("tp_size", "pp_size", "victim"), [(8, 1, 7), (2, 4, 1), (1, 8, 4)])
def test_a_rank_that_is_killed_is_named(directory: Path, tp_size: int, pp_size: int, victim: int) -> None:
    before = set(children())
    with load(directory, tp_size, pp_size) as llm:
        ranks = sorted(set(children()) - before, key=lambda one: one.pid)
        timer = threading.Timer(0.5, ranks[victim - 1].kill)
        timer.start()
        with pytest.raises(EngineDeadError, match=rf"rank {victim} of 8 .*SIGKILL"):
            llm.generate([[5, 6]] * 1000, GREEDY.replace(max_new_tokens=100))
        assert f"rank {victim} of 8" in str(llm.health().failure)
    assert set(children()) == before


def test_ranks_die_with_a_program_that_is_killed(directory: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(directory)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 7
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
    assert all(is_gone(pid, GONE_S) for pid in pids)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(8, 1), (4, 2)])
def test_ranks_of_the_cuda_backend(tmp_path: Path, device: str, tp_size: int, pp_size: int) -> None:
    sizes = {**HEADS, "num_key_value_heads": 8, "num_hidden_layers": pp_size, "vocab_size": 101}
    reference = save_tiny(tmp_path, **sizes, intermediate_size=64)
    with load_shared(tmp_path, device, tp_size, pp_size) as backend:
        check_steps_in_flight(reference, backend, {0: [5, 90, 17], 2: [3, 60]})
        driver = BackendDriver(backend)
        assert driver.generate([driver.add(1, [5, 9])], 2) == [reference_greedy(reference, [5, 9], 2)]
