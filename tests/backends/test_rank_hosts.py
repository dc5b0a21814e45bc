"""Engines whose ranks lie on several hosts, which are pretended: processes that share nothing but 127.0.0.1."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from benchmarks.pretended_hosts import PretendedHosts
from llmengine import LLM, ConfigError, EngineDeadError, ParallelConfig
from llmengine.backends.ranks.connections import connect
from llmengine.rank_hosts import Invitation
from tests import ROOT
from tests.backends.helpers import save_tiny
from tests.backends.ranks.helpers import is_gone
from tests.backends.test_shared_cpu import GREEDY, tiny_config, tokens

# Ranks must be gone after 2 s; a busy machine may need longer for anything.
GONE_S = 20.0

SCRIPT = """
import sys
from pathlib import Path
from benchmarks.pretended_hosts import PretendedHosts
from tests.backends.test_rank_hosts import load, ranks_of
from tests.backends.test_shared_cpu import GREEDY
hosts = PretendedHosts((0, 1))
llm = load(Path(sys.argv[1]), hosts, tp_size=2)
print(*ranks_of(hosts), *(agent.pid for agent in hosts.agents), flush=True)
while True:
    llm.generate([[5, 6, 7]], GREEDY.replace(max_new_tokens=100))
"""


def load(directory: Path, hosts: PretendedHosts | None, tp_size: int = 1, pp_size: int = 1) -> LLM:
    config = tiny_config(directory, 1)
    config.parallel_config = ParallelConfig(tp_size=tp_size, pp_size=pp_size)
    return LLM(config, enable_tokenizer=False, rank_hosts=hosts)


def ranks_of(hosts: PretendedHosts) -> list[int]:
    """Processes of ranks that the agents have started."""
    found = [one for agent in hosts.agents for one in psutil.Process(agent.pid).children()]
    return [one.pid for one in found if any("ranks/process.py" in word for word in one.cmdline())]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, attention_bias=True, num_hidden_layers=4, tie_word_embeddings=True)
    return directory


@pytest.fixture(scope="module")
def alone(directory: Path) -> Iterator[LLM]:
    with load(directory, None) as llm:
        yield llm


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "where"),
    [(2, 1, (0, 1)), (2, 2, (0, 0, 1, 1)), (3, 1, (0, 1, 0)), (1, 3, (0, 1, 1))],
    ids=["tensors", "stages of tensors", "tensors, two on a host", "stages, two on a host"],
)
def test_the_same_tokens_as_one_process(
    directory: Path, alone: LLM, tp_size: int, pp_size: int, where: tuple[int, ...]
) -> None:
    hosts = PretendedHosts(where)
    with load(directory, hosts, tp_size, pp_size) as llm:
        assert tokens(llm) == tokens(alone)
        with_logprobs = GREEDY.replace(max_new_tokens=4, prompt_logprobs=0)
        assert tokens(llm, with_logprobs) == tokens(alone, with_logprobs)
        ranks = ranks_of(hosts)
        assert len(ranks) == sum(map(bool, where))
        own = psutil.Process().children(recursive=True)
        here = [one for one in own if "ranks/process.py" in " ".join(one.cmdline()) and one.pid not in ranks]
        assert len(here) == where.count(0) - 1, "no process is started for ranks that others start"
    assert all(map(is_gone, ranks))
    assert all(agent.returncode == 0 for agent in hosts.agents)


def kill_rank(hosts: PretendedHosts) -> None:
    os.kill(ranks_of(hosts)[-1], signal.SIGKILL)


def kill_agent(hosts: PretendedHosts) -> None:
    hosts.agents[-1].kill()


def stop_rank(hosts: PretendedHosts) -> None:
    os.kill(ranks_of(hosts)[-1], signal.SIGSTOP)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (kill_rank, r"rank 3 of 4 \(process \d+ on 127.0.0.1\) was killed by SIGKILL"),
        (stop_rank, r"rank 3 of 4 \(process \d+ on 127.0.0.1\) was stopped"),
        (kill_agent, r"rank [23] of 4 \(process \d+ on 127.0.0.1\) was lost with its host: its agent is gone"),
    ],
)
def test_what_happens_to_a_rank_elsewhere_ends_the_requests(
    directory: Path, how: Callable[[PretendedHosts], None], says: str
) -> None:
    hosts = PretendedHosts((0, 0, 1, 1))
    llm = load(directory, hosts, 2, 2)
    ranks = ranks_of(hosts)
    assert len(ranks) == 2

    async def main() -> None:
        # However late this task is, the request does not end before.
        params = GREEDY.replace(max_new_tokens=400)
        handle = llm.generate_async([5, 6, 7], params, streaming=True, slow_consumer="pause")
        await anext(handle)
        how(hosts)
        with pytest.raises(EngineDeadError, match=says):
            async for _ in handle:
                pass

    asyncio.run(main())
    assert llm.health().state == "dead"
    llm.close()
    assert all(is_gone(pid, GONE_S) for pid in ranks)
    assert all(agent.poll() is not None for agent in hosts.agents)


def test_ranks_elsewhere_do_not_outlive_rank_0(directory: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=tmp_path) as process:
        assert process.stdout is not None
        started = [int(word) for word in process.stdout.readline().split()]
        assert len(started) == 2
        process.kill()
        assert all(is_gone(pid, GONE_S) for pid in started)


class NoHosts(PretendedHosts):
    """Agents that end at once."""

    def start(self, invitations: object) -> None:
        self.agents.append(subprocess.Popen([sys.executable, "-c", ""], text=True))


class Deserters(PretendedHosts):
    """An agent that comes and goes."""

    def start(self, invitations: Sequence[Invitation]) -> None:
        (one,) = invitations
        connect((one.host, one.port), one.secret, b"agent 1", 30.0).close()


def test_an_agent_that_goes_at_once(directory: Path) -> None:
    with pytest.raises(EngineDeadError, match="ranks on other hosts could not be started: the connection was closed"):
        load(directory, Deserters((0, 1)), 2)


def test_agents_that_do_not_come(directory: Path) -> None:
    with pytest.raises(EngineDeadError, match="the agent of host 1 has ended"):
        load(directory, NoHosts((0, 1)), 2)


@pytest.mark.parametrize("where", [(0,), (0, 1), (1, 0, 0), (0, 0, 2)])
def test_hosts_that_do_not_fit_the_ranks(directory: Path, where: tuple[int, ...]) -> None:
    hosts = PretendedHosts(where)
    with pytest.raises(ConfigError, match="rank_hosts"):
        load(directory, hosts, tp_size=3)
    assert not hosts.agents


def test_a_single_rank_is_here(directory: Path) -> None:
    with pytest.raises(ConfigError, match="rank_hosts needs"):
        load(directory, PretendedHosts((0,)))
