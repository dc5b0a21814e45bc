"""ServeConfig: how many replicas Ray Serve keeps, and how it watches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmengine.checks import require_choice, require_int, require_number, requirement
from llmengine.cluster.config import STRATEGIES
from llmengine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The settings of `build_app`. Raises `ConfigError` for a value out of range.

    Attributes:
        num_replicas: engines, each with the whole model.
        autoscaling: fields of Serve's `AutoscalingConfig`, such as ``{"min_replicas": 1, "max_replicas": 8,
            "target_ongoing_requests": 32}``, in place of `num_replicas`. Serve counts the requests that a replica has
            and those that wait for one.
        num_gateways: processes that read requests, choose a replica for each, and pass its answer on. Each remembers
            for itself which replica has seen which prompt.
        max_ongoing_requests: most requests that a replica is given at the same time; more wait in the gateway.
        health_check_period_s: seconds between two checks of a replica's engine. One that is dead is replaced.
        health_check_timeout_s: a replica that does not answer a check for so long has failed it. Serve replaces it
            after three such failures in a row.
        step_timeout_s: a replica that has requests running but has ended no step for so long fails its checks, such as
            one whose device hangs. None: a step may take as long as it does. Set it well above the longest step.
        actor_options: Serve's `ray_actor_options` of replicas, such as ``{"num_cpus": 4}``, in addition to the GPUs
            that the model's `parallel_config` asks for.
        gateway_options: `ray_actor_options` of gateways.
        ranks_per_host, placement_strategy: as in `ClusterConfig`; `actor_options` are then those of each bundle.
    """

    num_replicas: int = 1
    autoscaling: Mapping[str, Any] | None = None
    num_gateways: int = 1
    max_ongoing_requests: int = 256
    health_check_period_s: float = 2.0
    health_check_timeout_s: float = 10.0
    step_timeout_s: float | None = None
    actor_options: Mapping[str, Any] = field(default_factory=dict)
    gateway_options: Mapping[str, Any] = field(default_factory=dict)
    ranks_per_host: int | None = None
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"

    def __post_init__(self) -> None:
        for name in ("num_replicas", "num_gateways", "max_ongoing_requests"):
            require_int(name, getattr(self, name), 1, error=ConfigError)
        for name in ("health_check_period_s", "health_check_timeout_s"):
            require_number(name, getattr(self, name), 0.0, low_open=True, error=ConfigError)
        if self.step_timeout_s is not None:
            require_number("step_timeout_s", self.step_timeout_s, 0.0, low_open=True, error=ConfigError)
        if self.ranks_per_host is not None:
            require_int("ranks_per_host", self.ranks_per_host, 1, error=ConfigError)
        require_choice("placement_strategy", self.placement_strategy, STRATEGIES, error=ConfigError)
        for name in ("actor_options", "gateway_options"):
            _require_mapping(name, getattr(self, name))
        if self.autoscaling is not None:
            _require_mapping("autoscaling", self.autoscaling)
            if self.num_replicas != 1:
                raise ConfigError("num_replicas cannot be set together with autoscaling; set its min_replicas")


def _require_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise requirement(ConfigError, name, "a mapping", value)
