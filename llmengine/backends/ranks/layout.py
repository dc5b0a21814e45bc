"""Which rank lies where, which stage it is of, and which ranks need a connection between hosts."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

__all__ = ["Link", "LinkEnds", "RankLayout", "receiver_of", "sender_to"]


class Link(NamedTuple):
    """A connection between two ranks that share no memory, mostly since they are on different hosts.

    Attributes:
        kind: "messages" from rank 0, and reports to it; "sums" within a stage; "pipe" from a stage to the next.
        first: the sender, or the lower rank.
        second: the other rank.
    """

    kind: Literal["messages", "sums", "pipe"]
    first: int
    second: int


LinkEnds = Mapping[tuple[Link, int], socket.socket]
"""The sockets of connections, each by its rank."""


@dataclass(frozen=True, slots=True)
class RankLayout:
    """The ranks of a group.

    Attributes:
        stage_size: ranks of each stage, which are consecutive.
        hosts: the number of each rank's host; rank 0 is on host 0.
    """

    stage_size: int
    hosts: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.hosts)

    @property
    def num_hosts(self) -> int:
        """How many hosts there are."""
        return max(self.hosts) + 1

    def on(self, host: int) -> list[int]:
        """The ranks of a host."""
        return [rank for rank, its_host in enumerate(self.hosts) if its_host == host]

    def stage(self, rank: int) -> range:
        """The ranks of a rank's stage."""
        first = rank // self.stage_size * self.stage_size
        return range(first, first + self.stage_size)

    def is_on_one_host(self, ranks: Iterable[int]) -> bool:
        """Whether ranks can share memory."""
        return len({self.hosts[rank] for rank in ranks}) == 1

    def ends_on(self, link: Link, host: int) -> list[int]:
        """The ranks of a host that a connection joins, one or two."""
        return [rank for rank in (link.first, link.second) if self.hosts[rank] == host]

    def receiver(self, rank: int) -> int | None:
        """The rank to which a rank sends; None in the last stage."""
        return receiver_of(rank, self.stage_size, self.size)

    def sender(self, rank: int) -> int | None:
        """The rank from which a rank receives; None in the first stage."""
        return sender_to(rank, self.stage_size, self.size)

    def links(self, host: int) -> list[Link]:
        """The connections of a host's ranks."""
        return [link for link in self._links() if self.ends_on(link, host)]

    def _links(self) -> Iterator[Link]:
        for rank in range(self.size):
            if self.hosts[rank]:
                yield Link("messages", 0, rank)
            receiver = self.receiver(rank)
            if receiver is not None and not self.is_on_one_host((rank, receiver)):
                yield Link("pipe", rank, receiver)
        for first in range(0, self.size, self.stage_size):
            stage = self.stage(first)
            if not self.is_on_one_host(stage):  # then all of its ranks use connections, also beside each other
                yield from (Link("sums", one, other) for one, other in combinations(stage, 2))


def receiver_of(rank: int, stage_size: int, size: int) -> int | None:
    """The rank to which a rank sends; None in the last stage."""
    return None if rank < stage_size else (rank + stage_size) % size


def sender_to(rank: int, stage_size: int, size: int) -> int | None:
    """The rank from which a rank receives; None in the first stage."""
    sender = (rank - stage_size) % size
    return sender if receiver_of(sender, stage_size, size) == rank else None
