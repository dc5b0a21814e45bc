"""An HTTP server around one `LLM`, as an ASGI application: OpenAI's endpoints, health, and what operators need.

``app = create_app(llm)`` gives the application, which any ASGI server runs and any other application mounts;
`llmengine serve` runs it with uvicorn. It needs the packages of ``pip install llmengine[server]``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.server.app import create_app
    from llmengine.server.config import ServerConfig

_HOMES = {"create_app": "llmengine.server.app", "ServerConfig": "llmengine.server.config"}

__all__ = ["ServerConfig", "create_app"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmengine.server' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
