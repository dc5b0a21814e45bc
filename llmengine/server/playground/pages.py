"""Serves the page's files, and the state that its live view asks for."""

from __future__ import annotations

import time
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmengine.engine.stats import RequestStats
from llmengine.server.middleware import TENANT
from llmengine.server.service import service_of

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_FILES = ("style.css", "app.js", "api.js", "answer.js", "chat.js", "lanes.js", "live.js", "settings.js")
_HEADERS = {
    # Nothing from elsewhere, nothing inline, and no page that shows this one inside its own.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_MOST_REQUESTS = 64

PUBLIC_PATHS = frozenset({"/", *(f"/playground/{name}" for name in _FILES)})
"""Paths that need no key: the page itself, which holds nothing of the server's."""

router = APIRouter(include_in_schema=False)


def _read(name: str) -> Response:
    content = resources.files(__package__).joinpath("static", name).read_bytes()
    kind = f"{_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
    return Response(content, headers={**_HEADERS, "content-type": kind})


@router.get("/")
def page() -> Response:
    """The page."""
    return _read("index.html")


@router.get("/playground/state")
async def state(request: Request) -> Response:
    """What the engine does at this moment; requests of other tenants have no ids."""
    service = service_of(request.app.state)
    llm = service.llm
    stats, health = llm.stats(), llm.health()
    tenant = request.scope.get(TENANT)
    found = {
        "time": time.monotonic(),
        "model": service.config.model_name,
        "engine": health.state,
        "description": health.description,
        "max_model_len": llm.info.max_model_len,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "num_paused": stats.num_paused,
        "num_generated_tokens": stats.counters.num_generated_tokens,
        "last_step_s": stats.last_step_s,
        "cache_hit_rate": stats.cache_hit_rate,
        "blocks": {
            "used": stats.num_used_blocks,
            "cached": stats.num_cached_blocks,
            "free": stats.num_free_blocks,
        },
        "requests": [_row(one, tenant) for one in llm.requests()[:_MOST_REQUESTS]],
    }
    return JSONResponse(found, headers={"cache-control": "no-store"})


@router.get("/playground/{name}")
def file(name: str) -> Response:
    """A file that the page loads."""
    if name not in _FILES:
        return Response(status_code=404)
    return _read(name)


def _row(request: RequestStats, tenant: str | None) -> dict[str, Any]:
    """One request of the live view. It says nothing of what was asked."""
    return {
        "id": request.request_id if request.tenant == tenant else None,
        "state": request.state,
        "num_prompt_tokens": request.num_prompt_tokens,
        "num_cached_tokens": request.num_cached_tokens,
        "num_tokens": request.num_tokens,
    }
