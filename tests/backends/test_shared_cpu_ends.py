"""Engines shared by processes, from their start in unusual places to their end, however it comes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from llmengine import LLM, CorruptFileError, ModelConfig, ParallelConfig, SamplingParams
from llmengine.config import KvCacheConfig
from tests import ROOT
from tests.backends.helpers import save_tiny
from tests.backends.ranks.helpers import is_gone

# Ranks must be gone after 2 s; a busy machine may need longer for anything.
GONE_S = 20.0
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0, ignore_eos=True)

# Without a guard, as all of its kind: it must not run again in a rank.
SCRIPT = """
import gc, logging, os, signal, sys, threading, time
import psutil
from llmengine import LLM, ModelConfig, ParallelConfig, SamplingParams
from llmengine.config import KvCacheConfig

print("this script runs", flush=True)

def interrupt_when_ranks_start():
    while not psutil.Process().children():
        time.sleep(0.005)
    print(*(one.pid for one in psutil.Process().children()), flush=True)
    os.kill(os.getpid(), signal.SIGINT)

def interrupt_when_loaded(*arguments):
    pids = [one.pid for one in psutil.Process().children()]
    if pids and threading.current_thread() is threading.main_thread():
        print(*pids, flush=True)
        signal.raise_signal(signal.SIGINT)

meanwhile = sys.argv[2]
if meanwhile == "loading":
    threading.Thread(target=interrupt_when_ranks_start, daemon=True).start()
elif meanwhile == "describing":  # the first thing after the backend is there
    handler = logging.Handler()
    handler.emit = interrupt_when_loaded
    logging.getLogger("llmengine.llm_parts").setLevel(logging.INFO)
    logging.getLogger("llmengine.llm_parts").addHandler(handler)
elif meanwhile == "tidying":  # the last thing before there is an LLM
    gc.collect = interrupt_when_loaded
config = ModelConfig(sys.argv[1], device="cpu", parallel_config=ParallelConfig(tp_size=3))
config.kv_cache_config = KvCacheConfig(max_bytes=16 << 20)
try:
    with LLM(config, enable_tokenizer=False) as llm:
        if meanwhile == "generating":
            print(*(one.pid for one in psutil.Process().children()), flush=True)
        while True:
            llm.generate([[5, 6, 7]], SamplingParams(max_new_tokens=100, ignore_eos=True))
except KeyboardInterrupt:
    print("interrupted", len(psutil.Process().children()), flush=True)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory)
    return directory


def shared(directory: Path, tp_size: int = 2) -> ModelConfig:
    return ModelConfig(
        directory,
        device="cpu",
        dtype="float32",
        parallel_config=ParallelConfig(tp_size=tp_size),
        kv_cache_config=KvCacheConfig(max_bytes=16 << 20),
    )


def ranks() -> set[int]:
    """Processes of ranks that this one started."""
    found = psutil.Process().children(recursive=True)
    return {one.pid for one in found if any("ranks/process.py" in word for word in one.cmdline())}


@contextmanager
def script(tmp_path: Path, directory: Path, meanwhile: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A program that generates for ever, and its ranks.

    It interrupts itself while it is "loading", when they start, or when they are ready: "describing" or "tidying".
    """
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), str(directory), meanwhile]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "this script runs\n"
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


@pytest.mark.parametrize("meanwhile", ["loading", "describing", "tidying", "generating"])
def test_ctrl_c_leaves_no_ranks(tmp_path: Path, directory: Path, meanwhile: str) -> None:
    with script(tmp_path, directory, meanwhile) as (process, pids):
        assert pids
        if meanwhile == "generating":
            process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.read() == "interrupted 0\n"
        assert process.wait(60) == 0
    assert all(map(is_gone, pids))


def test_ranks_die_with_a_program_that_is_killed(tmp_path: Path, directory: Path) -> None:
    with script(tmp_path, directory, "generating") as (process, pids):
        assert len(pids) == 2
        process.kill()
        assert all(is_gone(pid, GONE_S) for pid in pids)


def test_engines_that_start_at_once_in_a_running_loop(directory: Path) -> None:
    """As in a notebook, whose loop runs already; loading is on threads."""
    before = ranks()

    async def say(size: int) -> list[int]:
        async with await LLM.create(shared(directory, size), enable_tokenizer=False) as llm:
            return list((await llm.generate_async([5, 6, 7], GREEDY)).token_ids)

    async def main() -> list[list[int]]:
        return list(await asyncio.gather(say(2), say(3), say(1)))

    first, *others = asyncio.run(main())
    assert others == [first, first]
    assert ranks() == before


def test_damaged_weights_leave_no_ranks(directory: Path, tmp_path: Path) -> None:
    """Every rank reads the file, so any of them may be the first to find out."""
    with LLM(shared(directory), enable_tokenizer=False) as llm:
        llm.save(tmp_path / "engine")
    before = ranks()
    weights = tmp_path / "engine" / "weights.rank0.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"weights\.rank0"):
        LLM(shared(tmp_path / "engine"), enable_tokenizer=False)
    assert ranks() == before
