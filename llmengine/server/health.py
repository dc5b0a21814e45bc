"""`/health`: whether the engine accepts requests. It needs no key, and says nothing that a stranger may not know."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmengine.server.service import service_of

HEALTH_PATH = "/health"

router = APIRouter(tags=["operation"])


@router.get(HEALTH_PATH)
@router.head(HEALTH_PATH, include_in_schema=False)  # some load balancers ask so
async def health(request: Request) -> Response:
    """200 with the engine's state if it accepts requests, else 503."""
    found = service_of(request.app.state).llm.health()
    return JSONResponse({"state": found.state}, status_code=200 if found.ok else 503)
