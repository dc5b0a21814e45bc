"""The seam to whatever places the ranks of a model on several hosts, such as Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llmengine.errors import ConfigError

__all__ = ["Invitation", "RankHosts", "hosts_of_ranks"]


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the agent of a host needs in order to join rank 0's process.

    Attributes:
        host: address of that process.
        port: on which it listens.
        number: of the agent's host, from 1.
        secret: by which both recognize each other. It must travel where nobody else can read it.
    """

    host: str
    port: int
    number: int
    secret: bytes = field(repr=False)


class RankHosts(Protocol):
    """The hosts of a model's ranks. For one `LLM`.

    Attributes:
        address: of this host, where rank 0 is, as the other hosts reach it.
        hosts: the number of each rank's host, from 0, which is this one. Ranks are numbered as in docs/parallelism.md.
    """

    @property
    def address(self) -> str: ...

    @property
    def hosts(self) -> Sequence[int]: ...

    def start(self, invitations: Sequence[Invitation]) -> None:
        """Have `llmengine.backends.ranks.agent.serve` called with each invitation on its host. Does not wait for it."""

    def check(self) -> None:
        """Raise an `EngineDeadError` if an agent could not be started or has ended."""

    def stop(self) -> None:
        """End the agents that are left, with the ranks that they have started. Idempotent; never raises."""


def hosts_of_ranks(rank_hosts: RankHosts | None, size: int) -> tuple[int, ...]:
    """The number of each rank's host; None: all are on this one. Raises `ConfigError` for hosts of other ranks."""
    if rank_hosts is None:
        return (0,) * size
    found = tuple(rank_hosts.hosts)
    if len(found) != size or found[0] or set(found) != set(range(max(found) + 1)):
        raise ConfigError(
            f"rank_hosts.hosts={list(found)} must have a number for each of {size} ranks: 0 for rank 0, and no gaps"
        )
    return found
