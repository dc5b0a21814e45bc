"""The command `serve`: an HTTP server with OpenAI's API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmengine.cli.announcement import announce
from llmengine.cli.arguments import (
    add_kv_cache_argument,
    add_parallel_arguments,
    add_quant_argument,
    chosen_config,
    positive_int,
)
from llmengine.errors import ConfigError

if TYPE_CHECKING:
    from llmengine.llm import LLM

KEY_VARIABLE = "LLMENGINE_API_KEY"

_MAX_PORT = 65535


def add_serve_command(commands: Any) -> None:
    """Add the command to the subparsers of `llmengine`."""
    serve = commands.add_parser("serve", help="serve a model over HTTP with OpenAI's API")
    serve.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face directory, .gguf file or saved engine")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine)")
    serve.add_argument("--port", type=_port, default=8000, help="0 takes a free one (default: %(default)s)")
    serve.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="a key that clients must send; may be given several times (default: the environment variable "
        f"{KEY_VARIABLE}; if there is none, no key is needed)",
    )
    serve.add_argument(
        "--tenant-key",
        action="append",
        default=[],
        metavar="TENANT=KEY",
        help="a key for the requests of one tenant; tenants share the engine fairly",
    )
    serve.add_argument("--served-model-name", metavar="NAME", help="the model's name in requests (default: MODEL's)")
    serve.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="let web pages of this origin in"
    )
    serve.add_argument(
        "--max-concurrent-requests", type=positive_int, metavar="N", help="more are answered with 429 (default: 1024)"
    )
    serve.add_argument("--max-body-bytes", type=positive_int, metavar="N", help="most bytes of a request's body")
    serve.add_argument(
        "--max-stored-bytes", type=int, metavar="N", help="memory for responses that /v1/responses stores; 0: none"
    )
    serve.add_argument(
        "--tool-format", metavar="NAME", help="form of tool calls, such as hermes (default: the chat template's)"
    )
    serve.add_argument("--request-timeout", type=float, metavar="SECONDS", help="end requests after this time")
    serve.add_argument(
        "--metric-names",
        choices=("llmengine", "vllm", "both"),
        default="llmengine",
        help="names of the metrics at /metrics (default: %(default)s)",
    )
    serve.add_argument(
        "--kv-events", metavar="ENDPOINT", help="tell routers of the prefix cache at this address, such as tcp://*:5557"
    )
    serve.add_argument("--kv-events-replay", metavar="ENDPOINT", help="answer requests for past events at this address")
    serve.add_argument("--kv-events-topic", metavar="TOPIC", default="", help="topic of the events (default: empty)")
    serve.add_argument("--no-playground", action="store_true", help="leave out the page at /")
    serve.add_argument("--log-level", choices=("critical", "error", "warning", "info", "debug"), default="info")
    add_quant_argument(serve, "quantize the weights")
    add_kv_cache_argument(serve)
    add_parallel_arguments(serve)
    serve.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    try:
        from llmengine.server.run import bound_sockets, run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`llmengine serve` needs the package {error.name}: pip install 'llmengine[server]'"
        ) from error
    from llmengine.llm import LLM
    from llmengine.server.config import ServerConfig

    limits = {
        "max_concurrent_requests": arguments.max_concurrent_requests,
        "max_body_bytes": arguments.max_body_bytes,
        "max_stored_bytes": arguments.max_stored_bytes,
        "request_timeout_s": arguments.request_timeout,
    }
    if arguments.kv_events is None and (arguments.kv_events_replay or arguments.kv_events_topic):
        raise ConfigError("--kv-events-replay and --kv-events-topic need --kv-events")
    config = ServerConfig(
        model_name=arguments.served_model_name or arguments.model.resolve().stem,
        api_keys=_keys(arguments),
        cors_origins=arguments.cors_origin,
        metric_names=arguments.metric_names,
        playground=not arguments.no_playground,
        tool_format=arguments.tool_format,
        **{name: value for name, value in limits.items() if value is not None},
    ).resolve()

    async def load() -> LLM:
        return llm

    # Both before the server starts, so that a fault is reported as those of other commands are; the port first, since
    # loading may take minutes.
    with bound_sockets(arguments.host, arguments.port) as sockets, LLM(chosen_config(arguments)) as llm:
        if arguments.kv_events is not None:
            _publish_kv_events(llm, arguments)
        announce(llm)
        run(load, config, sockets, host=arguments.host, log_level=arguments.log_level)
    return 0


def _publish_kv_events(llm: LLM, arguments: argparse.Namespace) -> None:
    """Publish what the prefix cache has until the model is closed."""
    try:
        from llmengine.observability import KvEventPublisher
    except ModuleNotFoundError as error:
        raise ConfigError(f"--kv-events needs the package {error.name}: pip install 'llmengine[kv-events]'") from error
    KvEventPublisher(
        llm, arguments.kv_events, replay_endpoint=arguments.kv_events_replay, topic=arguments.kv_events_topic
    )


def _port(text: str) -> int:
    """The value of `--port`; anything but the number of a port is a usage error."""
    if not text.isdecimal() or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"must be an integer in [0, {_MAX_PORT}], not {text!r}")
    return int(text)


def _keys(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Key -> tenant."""
    keys: dict[str, str | None] = dict.fromkeys(arguments.api_key)
    for given in arguments.tenant_key:
        tenant, separator, key = given.partition("=")
        if not tenant or not separator:
            raise ConfigError(f"--tenant-key must be TENANT=KEY, not {tenant!r} alone")
        keys[key] = tenant
    from_environment = os.environ.get(KEY_VARIABLE)
    return keys or ({from_environment: None} if from_environment else {})
