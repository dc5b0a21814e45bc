"""The HTTP server over many engines, as an application for Ray Serve. Needs `llmengine[ray]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.cluster.serve.application import app_from_args, build_app
    from llmengine.cluster.serve.config import ServeConfig

__all__ = ["ServeConfig", "app_from_args", "build_app"]

_MODULES = {"ServeConfig": "config", "app_from_args": "application", "build_app": "application"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
