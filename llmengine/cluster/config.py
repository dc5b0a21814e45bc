"""ClusterConfig: how many replicas there are, and what becomes of requests when one dies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmengine.checks import require_bool, require_choice, require_int, require_number
from llmengine.errors import ConfigError

STRATEGIES = ("PACK", "SPREAD", "STRICT_SPREAD")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The settings of a `Cluster`. Raises `ConfigError` for a value out of range.

    Attributes:
        num_replicas: engines, each with the whole model.
        rerun_requests: what becomes of the requests of a replica that dies. False: they fail with a
            `ReplicaDeadError`. True: another replica runs them again from the prompt, with the same seed, and the
            tokens that the caller has seen already must come again, or the request fails after all.
        max_reruns: how often a request is run again.
        replace_replicas: start another replica in place of one that has died.
        replica_timeout_s: a replica that is silent for so long is taken for dead. It says something every second.
        step_timeout_s: a replica that has requests running but has ended no step for so long is taken for dead, such as
            one whose device hangs. None: a step may take as long as it does. Set it well above the longest step.
        start_timeout_s: how long Ray may take to find room for a replica and start its process, such as until a node
            has been added. A replica that has not begun to load its model by then counts as one that cannot be started,
            with a `PlacementError`. Loading may take as long as it does.
        address: of the Ray cluster, as `ray.init` takes it. None: the one that this process is connected to, else what
            `ray.init()` finds: that of the variable RAY_ADDRESS, one that runs on this machine, or a new one.
        actor_options: options of the replicas' Ray actors, such as ``{"num_cpus": 4}`` or a `runtime_env`, in addition
            to the GPUs that the model's `parallel_config` asks for.
        ranks_per_host: None: all ranks of a replica are on one host. Else each replica has a placement group with a
            bundle for each so many of its ranks, which are on one host: the model's `tp_size` for stages on hosts of
            their own, 1 for ranks that may all be elsewhere. The `num_cpus`, `resources` and `runtime_env` of
            `actor_options` are then those of each bundle.
        placement_strategy: of these placement groups: "PACK" puts bundles on few hosts, "SPREAD" on many,
            "STRICT_SPREAD" each on another one.
    """

    num_replicas: int = 1
    rerun_requests: bool = False
    max_reruns: int = 3
    replace_replicas: bool = True
    replica_timeout_s: float = 30.0
    step_timeout_s: float | None = None
    start_timeout_s: float = 600.0
    address: str | None = None
    actor_options: Mapping[str, Any] = field(default_factory=dict)
    ranks_per_host: int | None = None
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"

    def __post_init__(self) -> None:
        require_int("num_replicas", self.num_replicas, 1, error=ConfigError)
        require_int("max_reruns", self.max_reruns, 0, error=ConfigError)
        require_bool("rerun_requests", self.rerun_requests, error=ConfigError)
        require_bool("replace_replicas", self.replace_replicas, error=ConfigError)
        require_number("replica_timeout_s", self.replica_timeout_s, 2.0, error=ConfigError)
        if self.step_timeout_s is not None:
            require_number("step_timeout_s", self.step_timeout_s, 0.0, low_open=True, error=ConfigError)
        require_number("start_timeout_s", self.start_timeout_s, 0.0, low_open=True, error=ConfigError)
        require_choice("placement_strategy", self.placement_strategy, STRATEGIES, error=ConfigError)
        if self.ranks_per_host is not None:
            require_int("ranks_per_host", self.ranks_per_host, 1, error=ConfigError)
