"""BackgroundResponses: responses that nobody waits for. The engine runs them; they are read when somebody asks."""

from __future__ import annotations

import asyncio
from typing import Any

from llmengine.errors import LLMEngineError
from llmengine.server.errors import HttpError
from llmengine.server.openai.responses_answer import ResponseInProgress
from llmengine.server.openai.responses_store import ResponseStore

_Key = tuple[str | None, str]


class BackgroundResponses:
    """Responses in progress by tenant and id. Those that have ended move to the store when one is asked for.

    Their number is limited by the engine's queue: a request that finds it full is not taken.
    """

    def __init__(self, store: ResponseStore) -> None:
        self._store = store
        self._running: dict[_Key, _Background] = {}

    async def add(self, tenant: str | None, response: ResponseInProgress) -> None:
        """Take over a response. Those that have ended move to the store, so that only unfinished ones add up."""
        for key in [key for key, other in self._running.items() if other.response.answer.handle.done]:
            await self._settle(key)
        self._running[tenant, response.events.response["id"]] = _Background(response)

    async def find(self, tenant: str | None, response_id: str) -> dict[str, Any] | None:
        """A response in progress, as it is now; None if there is none of this id, or it has ended."""
        running = self._running.get((tenant, response_id))
        if running is None:
            return None
        handle = running.response.answer.handle
        if handle.done:
            await self._settle((tenant, response_id))
            return None
        status = "queued" if handle.stats().state == "queued" else "in_progress"
        return {**running.response.events.response, "status": status}

    async def cancel(self, tenant: str | None, response_id: str) -> bool:
        """End a response that is in progress; it is in the store afterwards. False if there is none of this id."""
        running = self._running.get((tenant, response_id))
        if running is None:
            return False
        running.cancelled = True
        running.response.answer.handle.abort()
        await self._settle((tenant, response_id))
        return True

    def drop(self, tenant: str | None, response_id: str) -> bool:
        """End a response that is in progress and forget it. False if there is none of this id."""
        running = self._running.pop((tenant, response_id), None)
        if running is None:
            return False
        running.response.answer.handle.abort()
        return True

    async def _settle(self, key: _Key) -> None:
        """Read a response that has ended, or was asked to end, and move it to the store."""
        running = self._running[key]
        async with running.settling:
            if self._running.get(key) is not running:
                return
            response = running.response
            try:
                await response.finish()
            except (LLMEngineError, HttpError) as error:
                response.fail(error)
                if running.cancelled:
                    response.events.response.update(status="cancelled", error=None)
            if self._running.pop(key, None) is not None:
                self._store.put(*key, response.stored())


class _Background:
    def __init__(self, response: ResponseInProgress) -> None:
        self.response = response
        self.cancelled = False
        self.settling = asyncio.Lock()
