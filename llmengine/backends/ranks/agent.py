"""The agent of a host on which ranks lie but not rank 0: it starts their processes, says how they are, and ends them.

What ranks say to each other does not pass through it. Its ranks end with it, and it ends with rank 0's process: the
kernel closes the connection of a process that is killed, and breaks that to a host that is gone after 7 s.
"""

from __future__ import annotations

import time
import traceback

from llmengine.backends.ranks.connections import ControlConnection, Gate, connect
from llmengine.backends.ranks.host import HostRanks
from llmengine.backends.ranks.launcher import LocalLauncher
from llmengine.backends.ranks.progress import Progress
from llmengine.backends.ranks.remote_host import Asked, Dump, HostPlan, Look, Looks, make_links
from llmengine.rank_hosts import Invitation

__all__ = ["serve"]

_TICK_S = 0.25
_LOOK_S = 0.5
_CONNECT_S = 60.0
_KILL_S = 5.0


def serve(invitation: Invitation, address: str) -> None:
    """Be the agent of a host until rank 0's process closes its group or is gone. Blocks; on any thread.

    Args:
        address: of this host, at which the others reach it.

    Raises `OSError` if rank 0's process cannot be reached.
    """
    at = (invitation.host, invitation.port)
    gate = Gate(address, invitation.secret)
    try:
        control = ControlConnection(connect(at, invitation.secret, b"agent %d" % invitation.number, _CONNECT_S))
        try:
            control.send(gate.address)
            _Agent(invitation, control, gate).run()
        except EOFError:
            return  # rank 0's process has closed
        except Exception as error:
            text = "".join(traceback.format_exception(error)).rstrip()
            control.send(f"its agent raised {error!r}\n\nTraceback of the agent:\n{text}")
        finally:
            control.close()
    finally:
        gate.close()


class _Agent:
    def __init__(self, invitation: Invitation, control: ControlConnection, gate: Gate) -> None:
        self._invitation = invitation
        self._control = control
        self._gate = gate
        self._looked_at = 0.0

    def run(self) -> None:
        """Launch the ranks and look after them; whatever ends this, no rank is left."""
        plan: HostPlan = self._control.receive()
        host = self._invitation.number
        links = make_links(plan, host, self._invitation.secret, self._gate, _CONNECT_S, self._check)
        self._gate.close()
        ranks = HostRanks(plan.layout, host, plan.start, LocalLauncher())
        try:
            try:
                ranks.launch(links)
                progress = Progress(ranks.progress, 0, plan.layout.size)
            finally:
                ranks.release()
                for connection in links.values():
                    connection.close()
            self._look_after(ranks, progress)
        finally:
            ranks.end(_KILL_S)
            ranks.close()

    def _check(self) -> None:
        """Raise `EOFError` if rank 0's process is gone meanwhile."""
        if self._control.receive(0.0) is not None:
            raise AssertionError("rank 0 asks before the ranks are launched")

    def _look_after(self, ranks: HostRanks, progress: Progress) -> None:
        ended: set[int] = set()
        while True:
            now_ended = {number for number, rank in ranks.ranks.items() if rank.ending() is not None}
            if now_ended != ended or time.monotonic() - self._looked_at >= _LOOK_S:
                self._tell(ranks, progress)
            ended = now_ended
            message = self._control.receive(_TICK_S)
            if isinstance(message, Asked):
                self._do(ranks, message)

    def _tell(self, ranks: HostRanks, progress: Progress) -> None:
        self._looked_at = time.monotonic()
        seen = progress.look()
        looks = {
            number: Look(rank.ending(), rank.process.pid, rank.is_stopped(), rank.sleeps(), seen[number])
            for number, rank in ranks.ranks.items()
        }
        self._control.send(Looks(looks))

    def _do(self, ranks: HostRanks, asked: Asked) -> None:
        rank = ranks.ranks[asked.rank]
        if asked.what == "kill":
            rank.kill()
        elif asked.what == "interrupt":
            rank.interrupt()
        else:
            self._control.send(Dump(asked.rank, rank.dumped()))
