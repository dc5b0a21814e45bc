"""Errors that end a load test before it has measured anything."""

from __future__ import annotations

from llmengine.errors import EngineError


class EndpointError(EngineError):
    """The endpoint cannot be reached, or does not speak the OpenAI API; the message names its address and answer."""

    status = 502
