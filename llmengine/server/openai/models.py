"""`/v1/models`: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from llmengine.server.service import Service, service_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """All models: one."""
    return {"object": "list", "data": [_model(service_of(request.app.state))]}


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
    """The model of this name."""
    service = service_of(request.app.state)
    service.check_model(model)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.config.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "llmengine",
        "max_model_len": service.llm.info.max_model_len,
    }
