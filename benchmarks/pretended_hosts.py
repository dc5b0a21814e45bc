"""Other hosts, pretended: agents in processes of this one, which share nothing with it but 127.0.0.1."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmengine.errors import EngineDeadError
from llmengine.rank_hosts import Invitation

_ROOT = Path(__file__).resolve().parents[1]
_AGENT = """
import base64, json, sys
from llmengine.backends.ranks.agent import serve
from llmengine.rank_hosts import Invitation
values = json.loads(sys.stdin.readline())
serve(Invitation(**{**values, "secret": base64.b64decode(values["secret"])}), sys.argv[1])
"""


class PretendedHosts:
    """Implements `RankHosts`.

    Attributes:
        agents: their processes, in the order of hosts.

    Args:
        addresses: of rank 0's host, and of all others.
        prefix: of the command that starts an agent.
    """

    def __init__(
        self,
        hosts: Sequence[int],
        addresses: tuple[str, str] = ("127.0.0.1", "127.0.0.1"),
        prefix: Sequence[str] = (),
    ) -> None:
        self.hosts = tuple(hosts)
        self.address, self._agents_address = addresses
        self._prefix = prefix
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, invitations: Sequence[Invitation]) -> None:
        env = {**os.environ, "PYTHONPATH": str(_ROOT)}
        for one in invitations:
            command = [*self._prefix, sys.executable, "-c", _AGENT, self._agents_address]
            agent = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=env)
            self.agents.append(agent)
            assert agent.stdin is not None
            secret = base64.b64encode(one.secret).decode()
            with agent.stdin as stdin:
                stdin.write(json.dumps({"host": one.host, "port": one.port, "number": one.number, "secret": secret}))

    def check(self) -> None:
        for number, agent in enumerate(self.agents, 1):
            if agent.poll() is not None:
                raise EngineDeadError(f"the agent of host {number} has ended")

    def stop(self) -> None:
        for agent in self.agents:
            try:
                agent.wait(10.0)  # by itself
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait()
