"""The ranks of a replica on several nodes of a Ray cluster: a bundle of a placement group for each host.

The replica's actor, with rank 0, is in the first bundle. In each other one it starts an actor that is the agent of that
host. Ranks themselves are processes of ours, which Ray knows nothing of: they end with their agent, and with rank 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmengine.errors import ConfigError, EngineDeadError
from llmengine.rank_hosts import Invitation

_OF_BUNDLES = ("num_cpus", "num_gpus", "resources", "runtime_env")
"""Options that a replica's actor and its agents have in common."""


@dataclass(frozen=True)
class HostPlan:
    """How the ranks of a replica are divided among hosts.

    Attributes:
        num_ranks: of the replica.
        ranks_per_host: those of each bundle, a divisor of `num_ranks`.
        strategy: see `ClusterConfig.placement_strategy`.
        options: of the replica's actor. Each bundle has the resources that they name, and one CPU if they name none.
    """

    num_ranks: int
    ranks_per_host: int
    strategy: str
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls, num_ranks: int, ranks_per_host: int | None, strategy: str, gpus: float, options: Mapping[str, Any]
    ) -> HostPlan | None:
        """The plan that settings ask for, None if all ranks are on one host; raises `ConfigError`.

        Args:
            gpus: of all ranks.
            options: of the replica's actor, without GPUs.
        """
        if ranks_per_host is None or ranks_per_host >= num_ranks:
            return None
        if num_ranks % ranks_per_host:
            raise ConfigError(f"ranks_per_host={ranks_per_host} must divide the {num_ranks} ranks of a replica")
        return cls(num_ranks, ranks_per_host, strategy, {**options, "num_gpus": gpus and ranks_per_host})

    @property
    def actor_options(self) -> dict[str, Any]:
        """Options of an actor on any of the hosts."""
        given = {name: self.options[name] for name in _OF_BUNDLES if self.options.get(name) is not None}
        return {"num_cpus": 1, **given}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The resources of each host's part of the replica."""
        options = self.actor_options
        counted = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
        return [{name: amount for name, amount in counted.items() if amount}] * (self.num_ranks // self.ranks_per_host)

    def place(self) -> RayHosts:
        """Hosts in a new placement group."""
        from ray.util.placement_group import placement_group

        return RayHosts(self, placement_group(self.bundles, self.strategy))


class RayHosts:
    """Implements `RankHosts` for one replica, whose actor uses it.

    Args:
        group: a placement group of the plan's bundles.
    """

    def __init__(self, plan: HostPlan, group: Any) -> None:
        self.hosts = tuple(rank // plan.ranks_per_host for rank in range(plan.num_ranks))
        self.bundle = plan.bundles[0]
        self._options = plan.actor_options
        self._group = group
        self._agents: list[Any] = []
        self._running: list[Any] = []

    @property
    def address(self) -> str:
        import ray

        return str(ray.util.get_node_ip_address())

    def options_on(self, host: int) -> dict[str, Any]:
        """Options of an actor on a host of the replica."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        placed = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=host)
        return {**self._options, "scheduling_strategy": placed}

    def start(self, invitations: Sequence[Invitation]) -> None:
        """See `RankHosts`."""
        import ray

        agent_class: Any = ray.remote(_RankAgent)
        for one in invitations:
            agent = agent_class.options(**self.options_on(one.number)).remote()
            self._agents.append(agent)
            self._running.append(agent.serve.remote(one))

    def check(self) -> None:
        """See `RankHosts`."""
        import ray

        ended, _ = ray.wait(self._running, num_returns=len(self._running), timeout=0) if self._running else ([], [])
        for reference in ended:
            host = self._running.index(reference) + 1
            try:
                ray.get(reference)
            except Exception as error:
                reason = str(error).strip().splitlines()[-1]
                raise EngineDeadError(f"the agent of host {host} has ended: {reason}") from error
            raise EngineDeadError(f"the agent of host {host} has ended")

    def stop(self) -> None:
        """See `RankHosts`."""
        import ray

        for agent in self._agents:
            with contextlib.suppress(Exception):  # Ray may have been shut down
                ray.kill(agent)
        self._agents.clear()
        self._running.clear()

    def remove(self) -> None:
        """Give the replica's resources back, and end whatever still runs there."""
        from ray.util.placement_group import remove_placement_group

        with contextlib.suppress(Exception):
            remove_placement_group(self._group)


class _RankAgent:
    """The actor of a host: an agent, see `llmengine.backends.ranks.agent`."""

    def serve(self, invitation: Invitation) -> None:
        import ray

        from llmengine.backends.ranks.agent import serve

        serve(invitation, str(ray.util.get_node_ip_address()))
