"""build_app: a Serve application of gateways and engines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve

from llmengine.cluster.ray_hosts import HostPlan
from llmengine.cluster.ray_transport import num_gpus
from llmengine.cluster.serve.config import ServeConfig
from llmengine.cluster.serve.engine_replica import EngineReplica, load_on_hosts
from llmengine.cluster.serve.gateway import Gateway
from llmengine.config import KvCacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.llm import LLM
from llmengine.server.config import ServerConfig

_SPARE_REQUESTS = 64
"""Requests that a gateway is given beyond those that it forwards, so that it can refuse them, and answer `/metrics`."""

_STOP_S = 10.0
"""How long ending a replica may take after its requests have ended."""

_PACED = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
"""Has Serve take an answer's next messages when it has sent the latest ones. On a thread of its own, the application
would fill a queue without bound instead, and each token would be a message however far behind Serve is."""


def build_app(
    model: ModelConfig | str | Path | Callable[[], Awaitable[LLM]],
    config: ServeConfig | None = None,
    server_config: ServerConfig | None = None,
    *,
    tokenizer: Any = None,
    enable_tokenizer: bool = True,
) -> serve.Application:
    """A Serve application that answers OpenAI's API with replicas of one model, for `serve.run` and RayService.

    Args:
        model, tokenizer, enable_tokenizer: as for `LLM`, on each replica; or an async function that makes the `LLM`
            there. Pickled.
        config: None: one replica.
        server_config: of the HTTP API. `max_stored_bytes` is what each replica may store.

    With `device="auto"`, the cluster is asked whether it has GPUs. A process that is not connected to one yet does what
    `ray.init()` does.

    Raises:
        ConfigError: a setting is out of range. What is wrong with the model shows where replicas start.
    """
    config = config or ServeConfig()
    server = (server_config or ServerConfig()).resolve()
    num_gpus_each, plan = 0, None
    if callable(model):
        if config.ranks_per_host is not None:
            raise ConfigError("ranks_per_host needs a model's configuration, not a function that makes the LLM")
        load = model
    else:
        model = model if isinstance(model, ModelConfig) else ModelConfig(model)
        if model.device == "auto" and not ray.is_initialized():
            ray.init()
        num_gpus_each = num_gpus(model)
        load = partial(LLM.create, model, tokenizer, enable_tokenizer)
        parallel, strategy = model.parallel_config, config.placement_strategy
        num_ranks = parallel.tp_size * parallel.pp_size
        plan = HostPlan.of(num_ranks, config.ranks_per_host, strategy, num_gpus_each, config.actor_options)
        if plan is not None:
            load = partial(load_on_hosts, load, plan)
    engines = serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=config.max_ongoing_requests,
        **_placement(config, num_gpus_each, plan),
        request_router_config={"request_router_class": "llmengine.cluster.serve.routing.PrefixRequestRouter"},
        **_scale(config),
        **_watch(config, server),
    )
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=config.num_gateways,
        max_ongoing_requests=server.max_concurrent_requests + _SPARE_REQUESTS,
        ray_actor_options=_actor_options({"num_cpus": 0, **config.gateway_options}),
        **_watch(config, server),
    )
    # Across origins, the gateway answers.
    engine_settings = ServerConfig(**{**_fields(server), "cors_origins": ()})
    app: serve.Application = gateway.bind(engines.bind(load, engine_settings, config.step_timeout_s), server)
    return app


def app_from_args(args: Mapping[str, Any]) -> serve.Application:
    """`build_app` for Serve's configuration files, in which arguments are plain values.

    Args:
        args: "model": fields of `ModelConfig`, of whose own configurations `parallel_config`, `kv_cache_config` and
            `scheduler_config` are mappings; "serve" and "server", where given: fields of `ServeConfig` and
            `ServerConfig`.

    Raises `ConfigError` for another name, and `TypeError` for another field.
    """
    if unknown := args.keys() - {"model", "serve", "server"}:
        raise ConfigError(f"args must have the names 'model', 'serve', 'server', not {sorted(unknown)}")
    if "model" not in args:
        raise ConfigError("args['model'] is missing")
    kinds = {"parallel_config": ParallelConfig, "kv_cache_config": KvCacheConfig, "scheduler_config": SchedulerConfig}
    fields = {name: kinds[name](**value) if name in kinds else value for name, value in args["model"].items()}
    server = ServerConfig(**args.get("server", {}))
    return build_app(ModelConfig(**fields), ServeConfig(**args.get("serve", {})), server)


def _placement(config: ServeConfig, num_gpus_each: int, plan: HostPlan | None) -> dict[str, Any]:
    """Options of the engines' deployment that say where each replica runs."""
    if plan is None:
        return {"ray_actor_options": _actor_options({"num_gpus": num_gpus_each, **config.actor_options})}
    return {
        "ray_actor_options": _actor_options(plan.actor_options),
        "placement_group_bundles": plan.bundles,
        "placement_group_strategy": plan.strategy,
    }


def _actor_options(options: Mapping[str, Any]) -> dict[str, Any]:
    environment = dict(options.get("runtime_env") or {})
    environment["env_vars"] = {**_PACED, **environment.get("env_vars", {})}
    return {**options, "runtime_env": environment}


def _scale(config: ServeConfig) -> dict[str, Any]:
    if config.autoscaling is None:
        return {"num_replicas": config.num_replicas}
    return {"autoscaling_config": dict(config.autoscaling)}


def _watch(config: ServeConfig, server: ServerConfig) -> dict[str, Any]:
    return {
        "health_check_period_s": config.health_check_period_s,
        "health_check_timeout_s": config.health_check_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": server.drain_s + _STOP_S,
    }


def _fields(settings: ServerConfig) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ServerConfig.__dataclass_fields__}
