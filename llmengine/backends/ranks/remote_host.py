"""Rank 0's side of other hosts: their agents, the connections to their ranks, and how those ranks are."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmengine.backends.ranks.connections import Address, ControlConnection, Gate, connect
from llmengine.backends.ranks.host import RankStart
from llmengine.backends.ranks.layout import Link, LinkEnds, RankLayout
from llmengine.backends.ranks.progress import Seen
from llmengine.errors import EngineDeadError
from llmengine.rank_hosts import Invitation, RankHosts

__all__ = ["Asked", "Dump", "HostPlan", "Look", "Looks", "RemoteHosts", "hello_of", "make_links"]

_LOOK_S = 0.1
_DUMP_S = 2.0
# An agent says something twice a second. One that is silent for so long hangs; hosts that are gone are noticed before.
_SILENT_S = 60.0


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What an agent is told first: who is where, the gates of all hosts, and what ranks are started with."""

    layout: RankLayout
    gates: Mapping[int, Address]
    start: RankStart


@dataclass(frozen=True, slots=True)
class Asked:
    """What an agent is asked of a rank: "kill", "interrupt", or "dump", which it answers with a `Dump`."""

    what: str
    rank: int


@dataclass(frozen=True, slots=True)
class Dump:
    """Where the threads of a rank are."""

    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class Look:
    """How a rank is: how it has ended, its process, and what `HostedRank` and `Progress` say of it."""

    ending: str | None
    pid: int
    is_stopped: bool
    sleeps: bool
    seen: Seen


@dataclass(frozen=True, slots=True)
class Looks:
    """What an agent says of its ranks, twice a second, once all are launched."""

    ranks: Mapping[int, Look]


def hello_of(link: Link) -> bytes:
    """By which a connection between ranks is recognized."""
    return json.dumps(link).encode()


def make_links(
    plan: HostPlan, host: int, secret: bytes, gate: Gate, timeout_s: float, check: Callable[[], None]
) -> dict[tuple[Link, int], socket.socket]:
    """Connect a host's ranks as they need it. Of two hosts, the one with the greater number connects.

    Raises `OSError`, and what `check` raises, which is called again and again.
    """
    until = time.monotonic() + timeout_s
    made: dict[tuple[Link, int], socket.socket] = {}
    awaited = []
    try:
        for link in plan.layout.links(host):
            own = plan.layout.ends_on(link, host)
            if len(own) == 2:
                made[link, link.first], made[link, link.second] = socket.socketpair()
                continue
            other = plan.layout.hosts[link.first + link.second - own[0]]
            if other < host:
                check()
                made[link, own[0]] = connect(plan.gates[other], secret, hello_of(link), timeout_s)
            else:
                awaited.append((link, own[0]))
        for link, rank in awaited:
            while (connection := gate.take(hello_of(link), _LOOK_S)) is None:
                check()
                if time.monotonic() > until:
                    raise TimeoutError(f"ranks {link.first} and {link.second} were not connected in {timeout_s:g} s")
            made[link, rank] = connection
    except BaseException:
        for connection in made.values():
            connection.close()
        raise
    return made


class RemoteRank:
    """Implements `HostedRank` for a process of another host."""

    def __init__(self, host: RemoteHost, rank: int) -> None:
        self._host = host
        self._rank = rank

    @property
    def name(self) -> str:
        look = self._host.looks.get(self._rank)
        return f"on {self._host.address}" if look is None else f"process {look.pid} on {self._host.address}"

    def ending(self, timeout_s: float = 0.0) -> str | None:
        return self._host.ending(self._rank, timeout_s)

    def kill(self) -> None:
        self._host.control.send(Asked("kill", self._rank))

    def interrupt(self) -> None:
        self._host.control.send(Asked("interrupt", self._rank))

    def dumped(self) -> str:
        return self._host.dump(self._rank)

    def is_stopped(self) -> bool:
        look = self._host.looks.get(self._rank)
        return look is not None and look.is_stopped

    def sleeps(self) -> bool:
        look = self._host.looks.get(self._rank)
        return look is not None and look.sleeps


class RemoteHost:
    """Another host: reads what its agent says, in a thread of its own.

    Attributes:
        looks: what was last said of each rank.
        lost: why nothing more is heard of the agent; None while it is there.
    """

    def __init__(self, number: int, address: str, control: ControlConnection) -> None:
        self.number = number
        self.address = address
        self.control = control
        self.looks: Mapping[int, Look] = {}
        self.lost: str | None = None
        self._dumps: dict[int, str] = {}
        self._fresh: set[int] = set()
        self._works: set[int] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"llmengine-host-{number}", daemon=True)
        self._thread.start()

    def ending(self, rank: int, timeout_s: float) -> str | None:
        """How a rank has ended, or that its host is lost; None while it runs."""

        def told() -> str | None:
            look = self.looks.get(rank)
            if look is not None and look.ending is not None:
                return look.ending
            return None if self.lost is None else f"was lost with its host: {self.lost}"

        with self._changed:
            self._changed.wait_for(lambda: told() is not None, timeout_s)
            return told()

    def dump(self, rank: int) -> str:
        """Ask where the threads of a rank are."""
        with self._changed:
            self._dumps.pop(rank, None)
            self.control.send(Asked("dump", rank))
            self._changed.wait_for(lambda: rank in self._dumps or self.lost is not None, _DUMP_S)
            return self._dumps.get(rank, "")

    def take_seen(self, rank: int) -> Seen | None:
        """How far a rank is; None if nothing was said since the last call."""
        with self._changed:
            if rank not in self._fresh:
                return None
            self._fresh.discard(rank)
            return self.looks[rank].seen

    def works(self) -> bool:
        """Whether any rank was not resting when it was last looked at, or has gone on since the time before."""
        return bool(self._works)

    def close(self) -> None:
        """End the connection, and with it the agent."""
        self.control.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        why = f"its agent has said nothing for {_SILENT_S:g} s"
        try:
            while (message := self.control.receive(_SILENT_S)) is not None:
                self._take(message)
        except EOFError as error:
            why = f"its agent is gone ({error})"
        except Exception as error:
            why = f"its agent cannot be understood: {error!r}"
        with self._changed:
            self.lost = self.lost or why
            self._works.clear()
            self._changed.notify_all()

    def _take(self, message: object) -> None:
        with self._changed:
            if isinstance(message, Looks):
                before, self.looks = self.looks, message.ranks
                self._fresh = set(message.ranks)
                self._works = {
                    rank
                    for rank, look in message.ranks.items()
                    if look.seen.is_working or (rank in before and look.seen.count != before[rank].seen.count)
                }
            elif isinstance(message, Dump):
                self._dumps[message.rank] = message.text
            elif isinstance(message, str):
                self.lost = message
            self._changed.notify_all()


class RemoteHosts:
    """All hosts but rank 0's, from their agents' start to their end.

    Attributes:
        links: connections of the ranks of this host.

    Args:
        where: starts the agents.
        check: called again and again while agents are awaited; what it raises ends that.
    """

    def __init__(self, layout: RankLayout, where: RankHosts, timeout_s: float, check: Callable[[], None]) -> None:
        self._layout = layout
        self._where = where
        self._timeout_s = timeout_s
        self._check_wanted = check
        self._secret = os.urandom(32)
        self._gate = Gate(where.address, self._secret)
        self._controls: dict[int, ControlConnection] = {}
        self._hosts: dict[int, RemoteHost] = {}
        self.links: LinkEnds = {}

    def start(self, start: RankStart) -> None:
        """Start the agents, connect all hosts, and have the ranks launched there.

        Raises `EngineDeadError`; then, as always, `close` ends what has begun.
        """
        try:
            self._start(start)
        except (EOFError, OSError) as error:
            raise EngineDeadError(f"ranks on other hosts could not be started: {error}") from error
        finally:
            self._gate.close()

    def rank(self, rank: int) -> RemoteRank:
        """The process of a rank on another host."""
        return RemoteRank(self._hosts[self._layout.hosts[rank]], rank)

    def take_seen(self, rank: int) -> Seen | None:
        """See `RemoteHost.take_seen`."""
        return self._hosts[self._layout.hosts[rank]].take_seen(rank)

    def work(self) -> bool:
        """See `RemoteHost.works`."""
        return any(host.works() for host in self._hosts.values())

    def close(self) -> None:
        """End the agents, and with them what is left of their ranks, and the connections of this host's ranks."""
        self._gate.close()
        for host in self._hosts.values():
            host.close()
        for control in self._controls.values():
            control.close()
        for connection in self.links.values():
            connection.close()
        self._where.stop()

    def _start(self, start: RankStart) -> None:
        address, port = self._gate.address
        numbers = range(1, self._layout.num_hosts)
        self._where.start([Invitation(address, port, number, self._secret) for number in numbers])
        until = time.monotonic() + self._timeout_s
        gates = {0: self._gate.address}
        for number in numbers:
            while (connection := self._gate.take(b"agent %d" % number, _LOOK_S)) is None:
                self._check()
                if time.monotonic() > until:
                    raise EngineDeadError(f"the agent of host {number} did not connect within {self._timeout_s:g} s")
            control = self._controls[number] = ControlConnection(connection)
            gate = control.receive(self._timeout_s)
            if gate is None:
                raise EngineDeadError(f"the agent of host {number} said nothing for {self._timeout_s:g} s")
            gates[number] = gate
            self._hosts[number] = RemoteHost(number, gate[0], control)
        plan = HostPlan(self._layout, gates, start)
        for host in self._hosts.values():
            host.control.send(plan)
        self.links = make_links(plan, 0, self._secret, self._gate, self._timeout_s, self._check)
        while not all(host.looks for host in self._hosts.values()):
            self._check()
            time.sleep(_LOOK_S)
            if time.monotonic() > until:
                raise EngineDeadError(f"ranks on other hosts were not launched within {self._timeout_s:g} s")

    def _check(self) -> None:
        self._check_wanted()
        self._where.check()
        for host in self._hosts.values():
            if host.lost is not None:
                raise EngineDeadError(f"host {host.number} ({host.address}): {host.lost}")
