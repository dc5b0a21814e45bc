"""Runs the application with uvicorn, which handles SIGTERM and Ctrl-C: running requests are finished first."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llmengine.errors import ConfigError
from llmengine.llm import LLM
from llmengine.server.app import create_app
from llmengine.server.config import ServerConfig
from llmengine.server.protocol import LimitedProtocol

logger = logging.getLogger("uvicorn.error")  # the only one that uvicorn's settings show


def uvicorn_config(app: ASGIApp, **settings: Any) -> uvicorn.Config:
    """How uvicorn serves the application best; `settings` are uvicorn's, and replace those chosen here."""
    return uvicorn.Config(
        app, **{"http": LimitedProtocol, "ws": "none", "access_log": False, "server_header": False, **settings}
    )


@contextmanager
def bound_sockets(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at the addresses of `host`, closed at the end; so nobody else takes the port while a model is loaded.

    Connections are refused until a server listens. Port 0 takes a free one. Addresses that this machine does not have,
    such as those of IPv6, are left out if there are others. Raises `ConfigError` if the port is in use or `host` has no
    address of this machine.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        failure: OSError | UnicodeError | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, _, _, _, address in found:
                chosen = sockets[0].getsockname()[1] if sockets else port
                try:
                    sockets.append(_bound_socket(stack, family, (address[0], chosen, *address[2:])))
                except OSError as error:
                    failure = error
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
        except (OSError, UnicodeError) as error:
            sockets, failure = [], error
        if not sockets:
            reason = getattr(failure, "strerror", None) or failure
            raise ConfigError(f"cannot listen at {host}, port {port}: {reason}") from failure
        yield sockets


def _bound_socket(stack: ExitStack, family: int, address: tuple[Any, ...]) -> socket.socket:
    bound = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bound.bind(address)
    return bound


class _Server(uvicorn.Server):
    """A server that says where it listens at sockets of its caller's, too."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = self.config.host, sockets[0].getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        logger.info("running on http://%s:%d (Press CTRL+C to quit)", shown, port)


def run(
    load: Callable[[], Awaitable[LLM]],
    config: ServerConfig,
    sockets: Sequence[socket.socket],
    *,
    host: str,
    log_level: str,
) -> None:
    """Serve at `sockets`, those of `host`, until a signal ends the process. Must run in the main thread.

    A first SIGTERM or Ctrl-C lets no new requests in and waits for those in progress, for at most `drain_s` seconds.
    """
    settings = uvicorn_config(
        create_app(load, config),
        host=host,
        log_level=log_level,
        access_log=log_level == "debug",
        timeout_graceful_shutdown=max(1, round(config.drain_s)),
    )
    _Server(settings).run(sockets=list(sockets))
