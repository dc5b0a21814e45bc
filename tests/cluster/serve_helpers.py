"""Replicas of the Serve application, without Serve."""

from __future__ import annotations

from typing import Any

from llmengine import LLM
from llmengine.server import ServerConfig


async def make_replica(llm: LLM, config: ServerConfig, name: str = "alone", **settings: Any) -> Any:
    """A replica as Serve makes it, with the name that Serve would give it; `settings` are its others."""
    from llmengine.cluster.serve.engine_replica import EngineReplica

    class Replica(EngineReplica):
        def name(self) -> str:
            return name

    async def load() -> LLM:
        return llm

    replica: Any = Replica.__new__(Replica)
    await replica.__init__(load, config, **settings)
    return replica
