"""EngineReplica: what a replica of Serve's engine deployment runs, one `LLM` and our ASGI application around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import prometheus_client
import ray
from prometheus_client import CollectorRegistry
from ray import serve
from starlette.types import Message

from llmengine.cluster.ray_hosts import HostPlan, RayHosts
from llmengine.cluster.serve.forwarded import ForwardedRequest
from llmengine.cluster.step_watch import StepWatch
from llmengine.errors import EngineDeadError
from llmengine.llm import LLM
from llmengine.server import ServerConfig, create_app


class EngineReplica:
    """Answers the requests that gateways forward.

    Args:
        load: makes the model; it is awaited on the replica, and must not block its event loop.
        config: of the ASGI application.
        step_timeout_s: see `ServeConfig`.
    """

    async def __init__(  # type: ignore[misc]
        self, load: Callable[[], Awaitable[LLM]], config: ServerConfig, step_timeout_s: float | None = None
    ) -> None:
        # Serve awaits a constructor that is a coroutine.
        self._llm = await load()
        self._step_watch = StepWatch(step_timeout_s)
        self._registry = CollectorRegistry()
        self._app = create_app(self._llm, config, registry=self._registry)
        self._app.state.responses.keeper = self.name()

    async def answer(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        """Yield the ASGI messages of the answer: at once what there is, in the order in which they were sent.

        When this generator is cancelled or closed, the engine aborts the request.
        """
        exchange = _Exchange(request.body)
        task = asyncio.create_task(self._app(dict(request.scope), exchange.receive, exchange.send))
        task.add_done_callback(exchange.end)
        try:
            while messages := await exchange.take():
                yield messages
            await task
        finally:
            task.cancel()

    def name(self) -> str:
        """The replica's name in Serve."""
        name: str = serve.get_replica_context().replica_id.unique_id
        return name

    async def metrics(self) -> tuple[str, str]:
        """The replica's name, and its metrics in the text format of Prometheus."""
        text = await asyncio.to_thread(prometheus_client.generate_latest, self._registry)
        return self.name(), text.decode()

    def check_health(self) -> None:
        """Raise `EngineDeadError` if the engine accepts no requests, or hangs. Serve then replaces the replica."""
        health = self._llm.health()
        if not health.ok:
            raise EngineDeadError(f"the engine is {health.state}: {health.failure}")
        self._step_watch.check(self._llm.stats(), time.monotonic())

    def __del__(self) -> None:
        # Serve calls this when a replica is shut down, after its requests have ended or `drain_s` is over.
        if hasattr(self, "_llm"):
            self._llm.close()


async def load_on_hosts(load: Callable[..., Awaitable[LLM]], plan: HostPlan) -> LLM:
    """Load a model over the hosts of this replica's placement group, which Serve has made by the plan."""
    group = ray.util.get_current_placement_group()
    assert group is not None
    return await load(rank_hosts=RayHosts(plan, group))


class _Exchange:
    """The two ends of one ASGI call: what the application receives, and what it sends. One event loop."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._sent: list[Message] = []
        self._has_ended = False
        self._news = asyncio.Event()
        self._taken = asyncio.Event()

    async def receive(self) -> Message:
        """The body; after it nothing, as a client's leaving cancels the call."""
        if self._body is None:
            await asyncio.Event().wait()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Have a message taken. Waits until it was, so that a stream's next event has all that came meanwhile."""
        self._sent.append(message)
        self._news.set()
        if message.get("more_body"):
            self._taken.clear()
            await self._taken.wait()

    def end(self, task: asyncio.Task[None]) -> None:
        """There will be no further messages."""
        self._has_ended = True
        self._news.set()

    async def take(self) -> list[Message]:
        """All messages since the last call, waiting for one; none if the application has ended."""
        while not self._sent and not self._has_ended:
            self._news.clear()
            await self._news.wait()
        taken, self._sent = self._sent, []
        self._taken.set()
        return taken
