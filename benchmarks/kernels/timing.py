"""What the kernel benchmarks share."""

from __future__ import annotations

from llmengine.kernels.timing import time_graph

__all__ = ["time_graph"]
