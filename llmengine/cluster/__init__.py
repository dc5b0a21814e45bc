"""The API of `LLM` over many engines, each a replica of one model. Needs `llmengine[ray]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.cluster.cluster import Cluster
    from llmengine.cluster.config import ClusterConfig

__all__ = ["Cluster", "ClusterConfig"]

_MODULES = {"Cluster": "cluster", "ClusterConfig": "config"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
